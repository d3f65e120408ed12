# SPDX-License-Identifier: Apache-2.0
"""A pool's room, on real filesystems: what is offered is there, what is promised is kept, what is full says so."""

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from csi_driver.errors import ResourceExhausted
from csi_driver.model import MIB, CapacityRange
from tests.rig import THIN, Rig, volume, wait_until
from tests.scene import Scene, fill, in_pod


def offered(rig: Rig) -> int:
    return rig.controller.capacity((), {}, None).available_bytes


def comes_back(rig: Rig, before: int, slack_bytes: int) -> bool:
    """Whether as much is offered as before; XFS gives back the blocks of what was removed a moment later."""

    def is_back() -> bool:
        rig.settle()
        return abs(before - offered(rig)) < slack_bytes

    return wait_until(is_back)


def test_offer_heeds_what_is_reserved(scene: Scene) -> None:
    whole = offered(scene.open())
    rig = scene.open("reserved = 104857600\n")

    # The pool's own files came in between.
    assert abs(whole - 100 * MIB - offered(rig)) < 2 * MIB


def test_offer_falls_by_what_is_made_and_comes_back(scene: Scene) -> None:
    rig = scene.open()
    before, size = offered(rig), scene.kind.size_bytes
    enforces = rig.backend.features.enforces_capacity

    ids = [rig.controller.create_volume(volume(f"v{number}", size)).id for number in range(4)]
    between = offered(rig)
    for volume_id in ids:
        rig.controller.delete_volume(volume_id)
    rig.settle()

    assert abs(before - between - (4 * size if enforces else 0)) < MIB
    assert comes_back(rig, before, MIB)


def test_largest_offered_can_be_made_and_then_nothing(scene: Scene) -> None:
    rig = scene.open('reserved = "5%"\n')
    capacity = rig.controller.capacity((), {}, None)
    enforces = rig.backend.features.enforces_capacity
    assert 0 < capacity.minimum_volume_bytes <= capacity.maximum_volume_bytes <= capacity.available_bytes

    with pytest.raises(ResourceExhausted):
        rig.controller.create_volume(volume("more", capacity.available_bytes + 64 * MIB))
    rig.controller.create_volume(volume("all", capacity.maximum_volume_bytes))

    after = rig.controller.capacity((), {}, None)
    if enforces:
        assert after.available_bytes < MIB
        with pytest.raises(ResourceExhausted):
            rig.controller.create_volume(volume("one more", 32 * MIB))


def test_growth_into_a_full_pool_is_refused_and_changes_nothing(scene: Scene) -> None:
    rig = scene.open('reserved = "5%"\n')
    size = scene.kind.size_bytes
    volume_id = rig.controller.create_volume(volume("a", size)).id
    if not rig.backend.features.enforces_capacity:
        return  # Nothing is promised there, so growing promises nothing either.
    rig.controller.create_volume(volume("rest", rig.controller.capacity((), {}, None).maximum_volume_bytes))
    free = rig.backend.store().free_bytes

    with pytest.raises(ResourceExhausted):
        rig.controller.expand_volume(volume_id, CapacityRange(10 * size), None)

    assert rig.controller.get_volume(volume_id).size_bytes == size
    assert rig.pool.catalog.read(rig.pool.catalog.get(volume_id)).size_bytes == size
    assert abs(rig.backend.store().free_bytes - free) < MIB


def test_others_who_fill_the_disk_are_seen_at_once(real_scene: Scene) -> None:
    rig = real_scene.open()
    rig.controller.create_volume(volume("a", real_scene.kind.size_bytes))
    before = offered(rig)
    assert real_scene.filesystem is not None

    stranger = real_scene.filesystem / "stranger"
    stranger.write_bytes(os.urandom(100 * MIB))
    with open(stranger, "rb") as file:
        os.fsync(file.fileno())
    os.sync()

    assert before - offered(rig) >= 99 * MIB


def test_hundred_at_once_for_room_of_forty(scene: Scene) -> None:
    rig = scene.open('reserved = "2%"\n')
    before = offered(rig)
    # Half a volume to spare, lest a filesystem's own bookkeeping decides.
    size = int(before / 40.5) // 4096 * 4096
    fits = 40 if rig.backend.features.enforces_capacity else 100
    made: list[str] = []
    refused: list[str] = []
    other: list[Exception] = []
    work = iter(range(100))
    guard = threading.Lock()

    def create() -> None:
        while True:
            with guard:
                number = next(work, None)
            if number is None:
                return
            try:
                made.append(rig.controller.create_volume(volume(f"v{number}", size)).id)
            except ResourceExhausted as error:
                refused.append(str(error))
            except Exception as error:  # noqa: BLE001  # whatever it is, the test is to fail by it
                other.append(error)

    threads = [threading.Thread(target=create) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert other == []
    assert (len(made), len(refused)) == (fits, 100 - fits)
    root = rig.pool.catalog.root
    assert sorted(os.listdir(root / "volumes")) == sorted(made)
    assert os.listdir(root / "staging") == os.listdir(root / "trash") == []
    for volume_id in made:
        rig.controller.delete_volume(volume_id)
    rig.settle()
    assert comes_back(rig, before, 2 * MIB)


def test_every_promise_is_kept_when_all_write_their_fill(real_scene: Scene) -> None:
    rig = real_scene.open('reserved = "5%"\n')
    if not rig.backend.features.enforces_capacity:
        return
    size = 100 * MIB
    ids: list[str] = []
    with pytest.raises(ResourceExhausted):
        while len(ids) < 100:
            ids.append(rig.controller.create_volume(volume(f"v{len(ids)}", size)).id)

    written: list[int] = []
    with ExitStack() as pods:
        for volume_id in ids:
            path = pods.enter_context(in_pod(real_scene, rig, volume_id, f"pod-{len(written)}"))
            done, error = fill(path / "x", 2 * size)
            assert error is not None
            written.append(done)

    # Each gets its size, less what its own filesystem or metadata takes.
    assert len(ids) >= 7
    assert min(written) > 0.85 * size
    assert max(written) <= size


def test_full_volume_says_so_and_harms_no_neighbour(real_scene: Scene) -> None:
    rig = real_scene.open()
    if not rig.backend.features.enforces_capacity:
        return
    size = 32 * MIB
    full, neighbour = (rig.controller.create_volume(volume(name, size)).id for name in ("full", "neighbour"))

    with in_pod(real_scene, rig, full, "f") as path, in_pod(real_scene, rig, neighbour, "n") as beside:
        done, error = fill(path / "x", 4 * size)
        assert error is not None
        assert error.errno in (28, 122)  # ENOSPC, EDQUOT
        assert 0.6 * size < done <= size
        assert fill(beside / "y", size // 4) == (size // 4, None)
        # What is full can be emptied and written again.
        (path / "x").unlink()
        os.sync()
        assert fill(path / "z", size // 4) == (size // 4, None)


def test_full_volume_can_be_grown(real_scene: Scene) -> None:
    rig = real_scene.open()
    if not rig.backend.features.enforces_capacity:
        return
    size = 32 * MIB
    volume_id = rig.controller.create_volume(volume("a", size)).id

    with in_pod(real_scene, rig, volume_id) as path:
        fill(path / "x", 4 * size)
        rig.controller.expand_volume(volume_id, CapacityRange(4 * size), None)
        if not rig.backend.features.stages:
            assert fill(path / "y", size) == (size, None)

    # Staging gives a filesystem the size of its device.
    with in_pod(real_scene, rig, volume_id) as path:
        assert fill(path / "z", size) == (size, None)


def test_full_volume_can_be_deleted(real_scene: Scene) -> None:
    rig = real_scene.open()
    volume_id = rig.controller.create_volume(volume("a", 32 * MIB)).id
    with in_pod(real_scene, rig, volume_id) as path:
        fill(path / "x", 40 * MIB)
        make_nested(path)

    rig.controller.delete_volume(volume_id)
    rig.settle()

    assert os.listdir(rig.pool.catalog.root / "trash") == []


def make_nested(path: Path) -> None:
    for number in range(20):
        try:
            (path / f"d{number}").mkdir()
        except OSError:
            return


def test_thin_volumes_take_what_they_write(real_scene: Scene) -> None:
    if real_scene.kind.backend != "image":
        return
    rig = real_scene.use(THIN)
    before = rig.controller.capacity((), {"provisioning": "thin"}, None)
    thick = rig.controller.capacity((), {"provisioning": "thick"}, None)

    # Twice as much is offered as there is.
    assert abs(before.available_bytes - 2 * thick.available_bytes) < MIB
    volume_id = rig.controller.create_volume(volume("a", 256 * MIB)).id
    taken = rig.backend.written_bytes(rig.pool.catalog.get(volume_id))
    after = rig.controller.capacity((), {"provisioning": "thin"}, None)

    assert taken < 32 * MIB
    assert abs(before.available_bytes - after.available_bytes - 256 * MIB) < 2 * MIB
    # And makes no more of it when it is started again.
    again = real_scene.open().controller.capacity((), {"provisioning": "thin"}, None)
    assert abs(again.available_bytes - after.available_bytes) < 2 * MIB
