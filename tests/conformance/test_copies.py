# SPDX-License-Identifier: Apache-2.0
"""Snapshots, restores and clones over every backend and every filesystem that changes how they are made."""

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.errors import FailedPrecondition, InvalidArgument, OutOfRange, ResourceExhausted
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    MIB,
    AccessMode,
    AccessType,
    CapacityRange,
    Source,
    SourceKind,
    TopologyRequirement,
    VolumeSpec,
)
from tests.conftest import require_tool
from tests.rig import (
    IN_LAB,
    KINDS,
    MANAGED,
    SHARING,
    THIN,
    Kind,
    Rig,
    capability,
    published,
    staged,
    volume,
    wait_until,
)
from tests.scene import Scene, fill, in_pod, set_up

ALL = (*KINDS, *IN_LAB, *SHARING, MANAGED, replace(THIN, name="image-thin-xfs", filesystem="xfs"))
ANYWHERE = TopologyRequirement()


@pytest.fixture(params=ALL, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def scene(kind: Kind, place: Path) -> Iterator[Scene]:
    with set_up(kind, place) as scene:
        yield scene


def create(rig: Rig, name: str, size: int, source: Source | None = None) -> str:
    return rig.controller.create_volume(replace(volume(name, size), source=source)).id


def snapshot(rig: Rig, name: str, volume_id: str) -> str:
    taken = rig.snapshots.create(name, volume_id, {}, ANYWHERE)
    assert taken.ready
    return taken.record.id


def settled_room(rig: Rig) -> int:
    rig.settle()
    return rig.pool.space.available()


def of(snapshot_id: str) -> Source:
    return Source(SourceKind.SNAPSHOT, snapshot_id)


def clone_of(volume_id: str) -> Source:
    return Source(SourceKind.VOLUME, volume_id)


def checksum(tree: Path) -> dict[str, str]:
    return {
        path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }


def test_a_volume_as_it_was_while_a_pod_writes(scene: Scene) -> None:
    rig, size = scene.open(), scene.kind.size_bytes
    if scene.kind.name == "memory":
        pytest.skip("no pod can use it")
    origin = create(rig, "origin", size)
    with in_pod(scene, rig, origin) as pod:
        (pod / "file").write_bytes(os.urandom(3 * MIB))
        (pod / "empty").touch()
        before = checksum(pod)
        taken = snapshot(rig, "s", origin)
        (pod / "file").write_bytes(os.urandom(2 * MIB))
        (pod / "later").touch()
        restored = create(rig, "restored", size, of(taken))
        cloned = create(rig, "cloned", size, clone_of(origin))
        after = checksum(pod)

        # Beside its origin.
        with in_pod(scene, rig, restored, "other") as other:
            assert checksum(other) == before
            (other / "own").write_text("x")
        with in_pod(scene, rig, cloned, "third") as third:
            assert checksum(third) == after
        assert checksum(pod) == after


def test_a_copy_of_an_unused_volume(scene: Scene) -> None:
    rig, size = scene.open(), scene.kind.size_bytes
    origin = create(rig, "origin", size)
    if scene.kind.name != "memory":
        with in_pod(scene, rig, origin) as pod:
            (pod / "file").write_bytes(os.urandom(MIB))

    taken = snapshot(rig, "s", origin)
    rig.controller.delete_volume(origin)
    rig.settle()
    restored = create(rig, "restored", size, of(taken))
    rig.snapshots.delete(taken)
    rig.settle()

    if scene.kind.name != "memory":
        with in_pod(scene, rig, restored) as pod:
            assert (pod / "file").stat().st_size == MIB


def test_a_copy_may_be_larger_and_fills_its_size(scene: Scene) -> None:
    rig, size = scene.open(), scene.kind.size_bytes
    if not scene.kind.needs_root:
        pytest.skip("needs a filesystem")
    origin = create(rig, "origin", size)
    taken = snapshot(rig, "s", origin)

    grown = create(rig, "grown", 2 * size, of(taken))
    if rig.backend.features.enforces_capacity:
        with pytest.raises(OutOfRange):
            create(rig, "smaller", size // 2, of(taken))
        assert rig.controller.get_volume(grown).size_bytes == 2 * size
        with in_pod(scene, rig, grown) as pod:
            done, refusal = fill(pod / "fill", 2 * size)
        assert refusal is not None
        assert size < done <= 2 * size


@pytest.mark.parametrize("name", ["image", "image-xfs"])
def test_copies_of_xfs_are_mounted_beside_their_origin_and_grow(name: str, place: Path) -> None:
    """They have its uuid, and xfs refuses a second filesystem of the same."""
    require_tool("mkfs.xfs")
    chosen, size = next(kind for kind in ALL if kind.name == name), 320 * MIB
    with set_up(chosen, place, 3 << 30) as scene, ExitStack() as pods:
        rig = scene.open()
        origin = rig.controller.create_volume(volume("origin", size, fsType="xfs")).id
        pod = pods.enter_context(in_pod(scene, rig, origin))
        (pod / "file").write_bytes(os.urandom(3 * MIB))
        before, room = checksum(pod), shutil.disk_usage(pod).total
        taken = snapshot(rig, "s", origin)
        (pod / "later").touch()
        same = create(rig, "same", size, of(taken))
        larger = create(rig, "larger", 2 * size, of(taken))

        # All three at the same time.
        first = pods.enter_context(in_pod(scene, rig, same, "first"))
        second = pods.enter_context(in_pod(scene, rig, larger, "second"))

        assert checksum(first) == checksum(second) == before
        assert shutil.disk_usage(first).total == room
        assert shutil.disk_usage(second).total >= room + size
        (first / "own").write_text("x")
        assert not (pod / "own").exists()
        assert not (second / "own").exists()


def test_sizes_hold_after_copies(scene: Scene) -> None:
    """Neither a copy's origin nor a copy loses what it was promised, even where it writes all of it anew."""
    rig, size = scene.open(), scene.kind.size_bytes
    if not scene.kind.needs_root or not rig.backend.features.enforces_capacity:
        pytest.skip("no size is enforced")
    origin = create(rig, "origin", size)
    part = size // 4
    with in_pod(scene, rig, origin) as pod:
        data = os.urandom(part)
        (pod / "file").write_bytes(data)
        os.sync()
        taken = snapshot(rig, "s", origin)
        for _ in range(3):
            with open(pod / "file", "r+b") as file:
                file.write(os.urandom(part))
                os.fsync(file.fileno())
        expanded = rig.controller.expand_volume(origin, CapacityRange(size + 4 * MIB), None)[0]
        assert expanded == size + 4 * MIB
    rig = scene.open()

    assert rig.controller.get_volume(origin).size_bytes == size + 4 * MIB
    restored = create(rig, "restored", size, of(taken))
    with in_pod(scene, rig, restored) as pod:
        assert (pod / "file").read_bytes() == data


def test_room_is_counted_so_that_all_can_write_what_they_were_promised(scene: Scene) -> None:
    rig, size = scene.open(), scene.kind.size_bytes
    if not scene.kind.needs_root or not rig.backend.features.enforces_capacity or "thin" in scene.kind.name:
        pytest.skip("nothing is promised")
    empty = rig.pool.space.available()
    origin = create(rig, "origin", size)
    with in_pod(scene, rig, origin) as pod:
        (pod / "file").write_bytes(os.urandom(4 * MIB))
    os.sync()
    rig.settle()
    alone = rig.pool.space.available()
    taken = [snapshot(rig, f"s{number}", origin) for number in range(3)]
    copied = rig.pool.space.available()
    rig.settle()
    counted = rig.pool.space.available()
    again = scene.open().pool.space.available()
    rig = scene.open()

    slack = 2 * MIB  # the filesystem's own
    if rig.backend.features.shares_copies:
        # What three snapshots share is shared by all: the volume may write it anew once.
        assert alone - copied <= size + slack
    assert alone - counted >= 4 * MIB - slack
    assert abs(counted - again) <= slack
    assert copied <= counted + slack
    for one in taken:
        rig.snapshots.delete(one)
    rig.controller.delete_volume(origin)
    rig.settle()
    os.sync()
    # Btrfs gives room back when its cleaner comes to it.
    slack *= 4 if scene.kind.filesystem == "btrfs" else 1
    wait_until(lambda: settled_room(rig) >= empty - slack)
    assert rig.pool.space.available() >= empty - slack


def test_no_room_leaves_nothing(scene: Scene) -> None:
    rig, size = scene.open(), scene.kind.size_bytes
    if not rig.backend.features.enforces_capacity or "thin" in scene.kind.name:
        pytest.skip("nothing is promised")
    origin = create(rig, "origin", size)
    taken = snapshot(rig, "s", origin)
    rig.settle()
    create(rig, "filler", rig.pool.space.available() // MIB * MIB - 4 * MIB)
    room = rig.pool.space.available()

    with pytest.raises(ResourceExhausted):
        create(rig, "restored", size, of(taken))

    assert abs(rig.pool.space.available() - room) < MIB // 4
    assert os.listdir(rig.pool.catalog.root / "staging") == []


def test_a_restart_drops_a_half_copy(scene: Scene) -> None:
    rig, size = scene.open(), scene.kind.size_bytes
    origin = create(rig, "origin", size)
    home = rig.pool.catalog.begin(rig.pool.snapshot_id_of("half"))
    record = rig.pool.catalog.read(rig.pool.catalog.get(origin))
    spec = VolumeSpec(size, AccessType.MOUNT, rig.pool.parameters(record), snapshot=True)
    share = rig.backend.features.shares_copies
    rig.backend.copy(home, rig.pool.catalog.get(origin), spec, Transfer(), share=share)

    rig = scene.open()

    assert os.listdir(rig.pool.catalog.root / "staging") == []
    assert rig.snapshots.listed(0, "", "", "") == ([], "")
    snapshot(rig, "half", origin)
    rig.settle()
    assert os.listdir(rig.pool.catalog.root / "trash") == []


@pytest.mark.parametrize("name", ["image", "image-xfs"])
def test_block_volumes_byte_for_byte(name: str, place: Path) -> None:
    chosen = next(kind for kind in ALL if kind.name == name)
    with set_up(chosen, place) as scene:
        rig = scene.open()
        block = (capability(AccessMode.SINGLE_NODE_WRITER, AccessType.BLOCK),)
        wanted = volume("origin", 4 * MIB, capabilities=block)
        origin = rig.controller.create_volume(wanted).id
        target, staging = place / "device", place / "staging"
        staging.mkdir()
        data = os.urandom(MIB)
        with device(rig, origin, staging, target) as path:
            path.write_bytes(b"")  # truncation is nothing to a device
            with open(path, "r+b") as file:
                file.seek(MIB)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not rig.backend.features.instant_copies:
                with pytest.raises(FailedPrecondition, match="in use"):
                    snapshot(rig, "s", origin)
            else:
                snapshot(rig, "s", origin)
        taken = snapshot(rig, "s", origin)
        request = replace(volume("restored", 6 * MIB, capabilities=block), source=of(taken))
        restored = rig.controller.create_volume(request).id
        with device(rig, restored, staging, target) as path:
            content = path.read_bytes()
        assert content == bytes(MIB) + data + bytes(4 * MIB)
        with pytest.raises(InvalidArgument):
            create(rig, "mounted", 64 * MIB, of(taken))


def test_one_that_somebody_else_has_frozen_is_told_from_one_that_takes_too_long(place: Path) -> None:
    chosen = next(kind for kind in ALL if kind.name == "image-xfs")
    with set_up(chosen, place) as scene:
        rig = scene.open()
        origin = rig.controller.create_volume(volume("origin", 16 * MIB)).id
        with in_pod(scene, rig, origin) as pod:
            subprocess.run(["fsfreeze", "--freeze", pod], check=True)
            try:
                with pytest.raises(
                    FailedPrecondition, match=r"frozen by somebody else: thaw it \(fsfreeze -u\)$"
                ):
                    snapshot(rig, "s", origin)
            finally:
                # It is as it was: frozen.
                subprocess.run(["fsfreeze", "--unfreeze", pod], check=True)
            snapshot(rig, "s", origin)


@contextmanager
def device(rig: Rig, volume_id: str, staging: Path, target: Path) -> Iterator[Path]:
    wanted = capability(AccessMode.SINGLE_NODE_WRITER, AccessType.BLOCK)
    rig.node.stage(staged(volume_id, staging, wanted))
    rig.node.publish(published(volume_id, target, staging, wanted))
    try:
        yield target
    finally:
        rig.node.unpublish(volume_id, str(target))
        rig.node.unstage(volume_id, str(staging))


@pytest.mark.parametrize("name", ["image-xfs", "image-btrfs"])
def test_a_group_is_of_one_moment(name: str, place: Path) -> None:
    """A writer puts the same number into every member, one after the other: members differ by one at most."""
    chosen = next(kind for kind in ALL if kind.name == name)
    with set_up(chosen, place) as scene, ExitStack() as pods:
        rig = scene.open()
        ids = [create(rig, f"v{number}", scene.kind.size_bytes) for number in range(3)]
        targets = [
            pods.enter_context(in_pod(scene, rig, one, f"pod{number}")) for number, one in enumerate(ids)
        ]
        ending = threading.Event()

        def write() -> None:
            fds = [os.open(target / "counter", os.O_RDWR | os.O_CREAT | os.O_DSYNC) for target in targets]
            number = 0
            while not ending.is_set():
                number += 1
                for fd in fds:
                    os.pwrite(fd, b"%08d" % number, 0)
            for fd in fds:
                os.close(fd)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            begun = [target / "counter" for target in targets]
            assert wait_until(lambda: all(one.exists() and one.stat().st_size for one in begun))
            groups = [rig.groups.create(f"g{number}", ids, {}) for number in range(5)]
        finally:
            ending.set()
            writer.join()

        for number, group in enumerate(groups):
            counters = []
            for member in group.snapshots:
                wanted = create(
                    rig, f"r{number}{member.record.id}", scene.kind.size_bytes, of(member.record.id)
                )
                with in_pod(scene, rig, wanted, "restored") as pod:
                    counters.append((ids.index(member.record.source), int((pod / "counter").read_bytes())))
            values = [value for _, value in sorted(counters)]
            # What was written first is never older than what was written after it.
            assert values == sorted(values, reverse=True), values
            assert values[0] - values[-1] <= 1, values
