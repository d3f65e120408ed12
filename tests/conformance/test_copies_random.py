# SPDX-License-Identifier: Apache-2.0
"""Whatever was done to a volume: a copy of it is the volume at the moment of the copy, to the last byte and attribute."""

import os
import random
import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.model import MIB, AccessMode, AccessType, Source, SourceKind, TopologyRequirement
from tests.rig import IN_LAB, KINDS, SHARING, Kind, Rig, capability, published, staged, volume
from tests.scene import Scene, in_pod, set_up
from tests.trees import ATTRIBUTES, Tree, describe, differences

MOMENTS = 4
OVER_NFS = [one for one in ATTRIBUTES if one.startswith("user.")]
"""Extended attributes that NFS knows (4.2)."""
IMAGES = tuple(kind for kind in (*KINDS, *SHARING) if kind.backend == "image")
XFS_WITHIN = tuple(
    replace(kind, name=f"{kind.name}-of-xfs", options='fs_type = "xfs"\n', tools=("mkfs.xfs",), size_bytes=300 * MIB)
    for kind in IMAGES
)  # fmt: skip
TREES = (*(kind for kind in (*KINDS, *SHARING, *IN_LAB) if kind.needs_root), *XFS_WITHIN)


def named(kind: Kind) -> str:
    return kind.name


def seeded(kind: Kind, run: str) -> random.Random:
    """The first run is the same every time, the second one another one; which, the output of a failure says."""
    seed = os.environ.get("ORLOP_SEED") or (secrets.token_hex(4) if run == "new" else kind.name)
    print(f"ORLOP_SEED={seed} repeats it")  # noqa: T201 - shown if it fails
    return random.Random(seed)


@pytest.mark.parametrize("run", ["same", "new"])
@pytest.mark.parametrize("kind", TREES, ids=named)
def test_trees(kind: Kind, run: str, place: Path) -> None:
    """In use, and nothing is synced by hand: what a program wrote before the call is in the snapshot."""
    seed = seeded(kind, run)
    with set_up(kind, place, 6 << 30) as scene:
        rig = scene.open()
        origin = rig.controller.create_volume(volume("origin", kind.size_bytes)).id
        moments = {}
        with in_pod(scene, rig, origin) as pod:
            tree = Tree(pod, seed, OVER_NFS if kind.filesystem == "nfs" else ATTRIBUTES)
            for moment in range(MOMENTS):
                tree.disturb(60)
                taken = rig.snapshots.create(f"s{moment}", origin, {}, TopologyRequirement()).record.id
                moments[f"r{moment}"] = (Source(SourceKind.SNAPSHOT, taken), describe(pod))
            tree.disturb(30)
            moments["clone"] = (Source(SourceKind.VOLUME, origin), describe(pod))
            restore(rig, kind, "clone", moments["clone"][0])
            tree.disturb(30)
        rig.controller.delete_volume(origin)
        for name, (source, before) in moments.items():
            if name != "clone":
                restore(rig, kind, name, source)
            check(scene, rig, name, before)


def restore(rig: Rig, kind: Kind, name: str, source: Source) -> None:
    rig.controller.create_volume(replace(volume(name, kind.size_bytes), source=source))


def check(scene: Scene, rig: Rig, name: str, before: dict[bytes, tuple[object, ...]]) -> None:
    with in_pod(scene, rig, rig.pool.id_of(name), "restored") as pod:
        assert differences(before, describe(pod)) == []
    rig.controller.delete_volume(rig.pool.id_of(name))
    rig.settle()


@pytest.mark.parametrize("run", ["same", "new"])
@pytest.mark.parametrize("kind", IMAGES, ids=named)
def test_blocks(kind: Kind, run: str, place: Path) -> None:
    """A raw device: what was synced is in the snapshot. Where blocks cannot be shared, it is not in use meanwhile."""
    seed = seeded(kind, run)
    with set_up(kind, place) as scene:
        rig = scene.open()
        block = capability(AccessMode.SINGLE_NODE_WRITER, AccessType.BLOCK)
        wanted = volume("origin", 16 * MIB, capabilities=(block,))
        origin = rig.controller.create_volume(wanted).id
        moments = {}
        for moment in range(MOMENTS):
            with Device(rig, origin, place) as device:
                device.disturb(seed, 30)
                content = device.read()
                if rig.backend.features.instant_copies:
                    taken = rig.snapshots.create(f"s{moment}", origin, {}, TopologyRequirement()).record.id
                    device.disturb(seed, 10)
            if not rig.backend.features.instant_copies:
                taken = rig.snapshots.create(f"s{moment}", origin, {}, TopologyRequirement()).record.id
            moments[taken] = content
        rig.controller.delete_volume(origin)
        for taken, content in moments.items():
            larger = replace(
                volume(taken, 20 * MIB, capabilities=(block,)), source=Source(SourceKind.SNAPSHOT, taken)
            )
            restored = rig.controller.create_volume(larger).id
            with Device(rig, restored, place) as device:
                assert device.read() == content + bytes(4 * MIB)
            rig.controller.delete_volume(restored)


class Device:
    """A raw volume as a pod has it."""

    def __init__(self, rig: Rig, volume_id: str, place: Path) -> None:
        self._rig = rig
        self._id = volume_id
        self._target, self._staging = place / "device", place / "staging"

    def __enter__(self) -> "Device":
        self._staging.mkdir(exist_ok=True)
        wanted = capability(AccessMode.SINGLE_NODE_WRITER, AccessType.BLOCK)
        self._rig.node.stage(staged(self._id, self._staging, wanted))
        self._rig.node.publish(published(self._id, self._target, self._staging, wanted))
        return self

    def __exit__(self, *_: object) -> None:
        self._rig.node.unpublish(self._id, os.fspath(self._target))
        self._rig.node.unstage(self._id, os.fspath(self._staging))

    def disturb(self, seed: random.Random, steps: int) -> None:
        with open(self._target, "r+b") as file:
            for _ in range(steps):
                start = seed.randrange(16 * MIB - 100_000)
                length = seed.randrange(1, 100_000)
                file.seek(start)
                file.write(bytes(length) if seed.random() < 0.3 else seed.randbytes(length))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> bytes:
        return self._target.read_bytes()
