# SPDX-License-Identifier: Apache-2.0
"""A volume's life through Pool and Controller, over every backend: replays, failures, restarts, leftovers."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from csi_driver.errors import (
    AlreadyExists,
    ConfigurationError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from csi_driver.identity import SCHEMA
from csi_driver.model import MIB, AccessType, CapacityRange, VolumeId, VolumeSpec, name_hash
from tests.rig import Rig, volume
from tests.scene import Scene, in_pod


def entries(rig: Rig, area: str) -> list[str]:
    return sorted(os.listdir(rig.pool.catalog.root / area))


def nothing_is_left(rig: Rig) -> bool:
    rig.settle()
    areas = [entry for area in ("staging", "trash", "volumes") for entry in entries(rig, area)]
    return areas == [] and rig.pool.space.count() == 0


def create(scene: Scene, rig: Rig, name: str = "a", size_bytes: int = 0, mode: str = "0755") -> str:
    return rig.controller.create_volume(volume(name, size_bytes or scene.kind.size_bytes, mode=mode)).id


def test_whole_life(scene: Scene) -> None:
    rig = scene.open()
    size = scene.kind.size_bytes

    volume_id = create(scene, rig)
    assert create(scene, rig) == volume_id
    assert [one.id for one in rig.controller.list_volumes(0, "")[0]] == [volume_id]
    rig.controller.expand_volume(volume_id, CapacityRange(2 * size), None)
    rig.controller.expand_volume(volume_id, CapacityRange(2 * size), None)
    assert rig.pool.catalog.read(rig.pool.catalog.get(volume_id)).size_bytes == 2 * size
    rig.controller.delete_volume(volume_id)
    rig.controller.delete_volume(volume_id)

    assert nothing_is_left(rig)


def test_actual_size_is_answered(scene: Scene) -> None:
    rig = scene.open()
    enforces = rig.backend.features.enforces_capacity

    made = rig.controller.create_volume(volume("a", scene.kind.size_bytes - 1))

    assert made.size_bytes == (scene.kind.size_bytes if enforces else 0)
    assert rig.controller.get_volume(made.id).size_bytes == made.size_bytes


def test_other_size_is_another_volume(scene: Scene) -> None:
    rig = scene.open()
    create(scene, rig)

    if rig.backend.features.enforces_capacity:
        with pytest.raises(AlreadyExists):
            create(scene, rig, size_bytes=2 * scene.kind.size_bytes)
    with pytest.raises(AlreadyExists):
        create(scene, rig, mode="0700")


def test_restart_finds_what_there_was(scene: Scene) -> None:
    rig = scene.open()
    ids = sorted(create(scene, rig, f"v{number}") for number in range(3))
    rig.controller.expand_volume(ids[0], CapacityRange(2 * scene.kind.size_bytes), None)
    sizes = [one.size_bytes for one in rig.controller.list_volumes(0, "")[0]]
    promised = rig.pool.space.promised()

    rig = scene.open()

    listed = rig.controller.list_volumes(0, "")[0]
    assert [one.id for one in listed] == ids
    assert [one.size_bytes for one in listed] == sizes
    assert rig.pool.space.promised() == promised
    assert rig.pool.damaged == {}


def test_half_made_volume_is_discarded_at_the_start(scene: Scene) -> None:
    rig = scene.open()
    parameters = rig.backend.parse({}, AccessType.MOUNT, "")
    for name in ("empty", "made"):
        home = rig.pool.catalog.begin(rig.pool.id_of(name))
    rig.backend.make(home, VolumeSpec(scene.kind.size_bytes, AccessType.MOUNT, parameters))

    rig = scene.open()
    if scene.kind.served:
        # Another driver may be at it. Whoever makes the volume again discards it.
        for name in ("empty", "made"):
            rig.controller.delete_volume(create(scene, rig, name))
    assert nothing_is_left(rig)


def test_half_made_volume_is_discarded_by_the_next_try(scene: Scene) -> None:
    rig = scene.open()
    parameters = rig.backend.parse({}, AccessType.MOUNT, "")
    home = rig.pool.catalog.begin(rig.pool.id_of("a"))
    rig.backend.make(home, VolumeSpec(scene.kind.size_bytes, AccessType.MOUNT, parameters))

    volume_id = create(scene, rig)

    assert entries(rig, "staging") == []
    assert entries(rig, "volumes") == [volume_id]


def test_trash_is_emptied_after_a_restart(scene: Scene) -> None:
    rig = scene.open()
    rig.controller.delete_volume(create(scene, rig))
    assert len(entries(rig, "trash")) == 1

    assert nothing_is_left(scene.open())


def test_trash_half_removed_is_removed_all_the_same(scene: Scene) -> None:
    rig = scene.open()
    rig.controller.delete_volume(create(scene, rig))
    [(home, _)] = rig.pool.catalog.trashed()
    rig.backend.clear(home)  # and the process died

    assert nothing_is_left(scene.open())


def test_retention_keeps_the_payload(scene: Scene) -> None:
    rig = scene.open('reserved = "0%"\nretention = "1h"\n')
    volume_id = create(scene, rig)
    size = rig.controller.get_volume(volume_id).size_bytes
    rig.controller.delete_volume(volume_id)

    rig = scene.open('reserved = "0%"\nretention = "1h"\n')
    assert rig.pool.empty_trash() is not None

    [(home, _)] = rig.pool.catalog.trashed()
    assert rig.backend.size_bytes(home) == size


def test_a_class_may_keep_the_payload_longer_than_the_pool(scene: Scene) -> None:
    rig = scene.open()
    volume_id = create(scene, rig)
    rig.controller.modify_volume(volume_id, {"retention": "1h"})
    size = rig.controller.get_volume(volume_id).size_bytes
    rig.controller.delete_volume(volume_id)

    rig = scene.open()
    assert rig.pool.empty_trash() is not None
    [(home, _)] = rig.pool.catalog.trashed()
    assert rig.backend.size_bytes(home) == size

    rig.pool.empty_trash(now=time.time() + 3700)
    assert entries(rig, "trash") == []


def test_limits_are_kept_or_refused_with_a_reason(scene: Scene) -> None:
    rig = scene.open()
    volume_id = create(scene, rig)
    problem = rig.backend.limits_problem()

    if problem:
        with pytest.raises(InvalidArgument, match="no limits in pool 'p'"):
            rig.controller.modify_volume(volume_id, {"writeIops": "100"})
        assert rig.controller.get_volume(volume_id).record.mutable == {}
    else:
        rig.controller.modify_volume(volume_id, {"writeIops": "100"})
        assert rig.controller.get_volume(volume_id).record.mutable == {"writeIops": "100"}


def test_volume_in_use_is_not_deleted(real_scene: Scene) -> None:
    real_scene.leave_out_clients("what uses a volume is on other machines")
    rig = real_scene.open()
    volume_id = create(real_scene, rig)

    with in_pod(real_scene, rig, volume_id) as path:
        (path / "x").write_text("kept")
        with pytest.raises(FailedPrecondition, match="in use"):
            rig.controller.delete_volume(volume_id)
        assert (path / "x").read_text() == "kept"
        assert rig.controller.get_volume(volume_id).in_use

    assert not rig.controller.get_volume(volume_id).in_use
    rig.controller.delete_volume(volume_id)
    assert nothing_is_left(rig)


def test_data_outlives_everything_but_deletion(real_scene: Scene) -> None:
    rig = real_scene.open()
    volume_id = create(real_scene, rig)
    content = os.urandom(2 * MIB)
    with in_pod(real_scene, rig, volume_id) as path:
        (path / "x").write_bytes(content)

    rig = real_scene.open()
    rig.controller.expand_volume(volume_id, CapacityRange(2 * real_scene.kind.size_bytes), None)

    with in_pod(real_scene, rig, volume_id, "other") as path:
        assert (path / "x").read_bytes() == content


def test_deleted_volume_takes_along_whatever_a_pod_made(real_scene: Scene) -> None:
    rig = real_scene.open()
    volume_id = create(real_scene, rig)
    with in_pod(real_scene, rig, volume_id) as path:
        deep = path
        for _ in range(60):
            deep = deep / ("d" * 100)
            os.mkdir(deep) if len(os.fspath(deep)) < 4000 else None
        (path / "-rf *\n").touch()
        os.symlink("/etc", path / "link")
        os.mkfifo(path / "fifo")
        (path / "locked").mkdir(mode=0)

    rig.controller.delete_volume(volume_id)

    assert nothing_is_left(rig)
    assert Path("/etc/passwd").exists()


def test_other_disks_and_other_names_are_not_here(scene: Scene) -> None:
    rig = scene.open()
    volume_id = create(scene, rig)
    _, tag, digest = volume_id.split("-")

    for foreign in (str(VolumeId("p", "00000000", name_hash("a"))), f"q-{tag}-{digest}"):
        with pytest.raises(FailedPrecondition):
            rig.controller.delete_volume(foreign)
        with pytest.raises(NotFound):
            rig.controller.get_volume(foreign)
    rig.controller.delete_volume("never-was")
    assert entries(rig, "volumes") == [volume_id]


def test_damaged_record_is_told_and_can_be_deleted(scene: Scene) -> None:
    rig = scene.open()
    bad, good = create(scene, rig, "bad"), create(scene, rig, "good")
    (rig.pool.catalog.get(bad).path / "volume.json").write_text('{"schema": 1}')

    rig = scene.open()
    assert list(rig.pool.damaged) == [bad]
    assert [one.id for one in rig.controller.list_volumes(0, "")[0]] == [good]
    assert [entry.reason for entry in rig.controller.volume_health(bad)] == ["RecordDamaged"]
    rig.controller.delete_volume(bad)
    rig.controller.delete_volume(good)

    # What its class said cannot be read: where classes can say that data is kept, it is.
    kept = [path.name for path in (rig.pool.catalog.root / "kept").glob("*")]
    assert [name.startswith(bad) for name in kept] == ([True] if scene.kind.served else [])
    assert nothing_is_left(rig)


def test_newer_record_stops_the_start_and_nothing_is_touched(scene: Scene) -> None:
    rig = scene.open()
    home = rig.pool.catalog.get(create(scene, rig))
    record = home.path / "volume.json"
    content = json.dumps(json.loads(record.read_text()) | {"schema": SCHEMA + 1})
    record.write_text(content)

    with pytest.raises(ConfigurationError, match="newer version"):
        scene.open()

    assert record.read_text() == content


def test_pool_of_another_backend_is_refused(scene: Scene) -> None:
    scene.open()
    scene.current.close()
    marker = scene.root / "pool.json"
    other = json.loads(marker.read_text()) | {"backend": "tape"}
    marker.write_text(json.dumps(other))

    with pytest.raises(ConfigurationError, match="'tape'"):
        scene.open()


def test_second_driver_is_refused(scene: Scene) -> None:
    scene.leave_out_served("several drivers may have such a pool")
    scene.open()
    second = Scene(scene.kind, scene.place, scene.root, scene.filesystem)

    with pytest.raises(ConfigurationError, match="another process"):
        second.open()


def test_read_only_filesystem_is_no_room_here_and_told(real_scene: Scene) -> None:
    if real_scene.kind.filesystem != "nfs":
        real_scene.leave_out_served("its filesystem is that of other tests too")
    rig = real_scene.open()
    volume_id = create(real_scene, rig)
    assert real_scene.mounted is not None

    subprocess.run(["mount", "-o", "remount,ro", real_scene.mounted], check=True)
    try:
        with pytest.raises(ResourceExhausted, match=r"[Rr]ead-only"):
            create(real_scene, rig, "b")
        assert [entry.reason for entry in rig.health.of_storage()] == ["PoolPReadOnly"]
        assert rig.controller.get_volume(volume_id).id == volume_id
    finally:
        subprocess.run(["mount", "-o", "remount,rw", real_scene.mounted], check=True)
    create(real_scene, rig, "b")


def test_ids_do_not_depend_on_the_process(scene: Scene) -> None:
    first = create(scene, scene.open())
    rig = scene.open()

    assert create(scene, rig) == first
    assert first == f"p-{rig.pool.catalog.tag}-{name_hash('a')}"
