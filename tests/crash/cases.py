# SPDX-License-Identifier: Apache-2.0
"""The operations that are killed, what a caller does after that, and what must be there in the end."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from csi_driver.model import (
    MIB,
    CapacityRange,
    Record,
    SnapshotRecord,
    Source,
    SourceKind,
    TopologyRequirement,
)
from tests.rig import Kind, Rig, inline, published, staged, volume
from tests.scene import Scene, in_pod, loops_beneath, mounts_beneath

INLINE = "csi-1f0e"
CONTENT = b"kept\n" * 1000
# What a killed driver's mkfs needs to end, and btrfs to give space back.
SETTLE_S = 60.0
# Where what was removed is freed in the background: how long to wait for more of it.
BACKGROUND_S = {"served": 0.5, "xfs": 0.1, "btrfs": 0.1}
TOLERANCE_BYTES = MIB

IMAGE_XFS = Kind(
    "image-xfs",
    "image",
    "ext4",
    'fs_type = "xfs"\n',
    ("mkfs.xfs",),
    size_bytes=320 * MIB,
    written_at_once=True,
)


@dataclass(frozen=True)
class Case:
    """What an operation works on: one volume named `a`, or an inline one, and its paths."""

    scene: Scene
    pods: Path
    content: bytes = CONTENT
    """What is in the volume."""

    @property
    def size_bytes(self) -> int:
        return self.scene.kind.size_bytes

    @property
    def staging(self) -> Path:
        return self.pods / "staging"

    @property
    def target(self) -> Path:
        return self.pods / "target"

    def create(self, rig: Rig) -> None:
        rig.controller.create_volume(volume("a", self.size_bytes))

    def delete(self, rig: Rig) -> None:
        rig.controller.delete_volume(rig.pool.id_of("a"))

    def fill(self, rig: Rig) -> None:
        """A volume with something in it that must never be lost."""
        self.create(rig)
        if self.scene.kind.needs_root:
            with in_pod(self.scene, rig, rig.pool.id_of("a"), "filling") as path:
                (path / "kept").write_bytes(self.content)
            remove_staging(self.scene, "filling")

    def empty_trash(self, rig: Rig) -> None:
        rig.pool.empty_trash()

    def grow(self, rig: Rig) -> None:
        rig.controller.expand_volume(rig.pool.id_of("a"), CapacityRange(2 * self.size_bytes), None)

    def modify(self, rig: Rig) -> None:
        rig.controller.modify_volume(rig.pool.id_of("a"), {"retention": "0"})

    def stage(self, rig: Rig) -> None:
        self.staging.mkdir(exist_ok=True)  # kubelet does
        rig.node.stage(staged(rig.pool.id_of("a"), self.staging))

    def unstage(self, rig: Rig) -> None:
        rig.node.unstage(rig.pool.id_of("a"), str(self.staging))
        if self.staging.exists():
            self.staging.rmdir()

    def publish(self, rig: Rig) -> None:
        rig.node.publish(published(rig.pool.id_of("a"), self.target, self.staging))

    def unpublish(self, rig: Rig) -> None:
        rig.node.unpublish(rig.pool.id_of("a"), str(self.target))

    def expand(self, rig: Rig) -> None:
        where = self.staging if rig.backend.features.stages else self.target
        wanted = CapacityRange(2 * self.size_bytes)
        rig.node.expand(rig.pool.id_of("a"), str(where), str(self.staging), wanted)

    def snapshot(self, rig: Rig) -> None:
        rig.snapshots.create("s", rig.pool.id_of("a"), {}, TopologyRequirement())

    def delete_snapshot(self, rig: Rig) -> None:
        rig.snapshots.delete(rig.pool.snapshot_id_of("s"))

    def restore(self, rig: Rig) -> None:
        source = Source(SourceKind.SNAPSHOT, rig.pool.snapshot_id_of("s"))
        rig.controller.create_volume(replace(volume("copy", 2 * self.size_bytes), source=source))

    def clone(self, rig: Rig) -> None:
        source = Source(SourceKind.VOLUME, rig.pool.id_of("a"))
        rig.controller.create_volume(replace(volume("copy", self.size_bytes), source=source))

    def delete_copy(self, rig: Rig) -> None:
        rig.controller.delete_volume(rig.pool.id_of("copy"))

    def second(self, rig: Rig) -> None:
        rig.controller.create_volume(volume("b", self.size_bytes))

    def group(self, rig: Rig) -> None:
        rig.groups.create("g", [rig.pool.id_of("a"), rig.pool.id_of("b")], {})

    def delete_group(self, rig: Rig) -> None:
        rig.groups.delete(rig.pool.group_id_of("g"), [])

    def delete_second(self, rig: Rig) -> None:
        rig.controller.delete_volume(rig.pool.id_of("b"))

    def publish_inline(self, rig: Rig) -> None:
        rig.node.publish(inline(INLINE, self.target, self.size_bytes))

    def unpublish_inline(self, rig: Rig) -> None:
        rig.node.unpublish(INLINE, str(self.target))


Step = Callable[[Case, Rig], None]


@dataclass(frozen=True)
class Operation:
    """`before` leads to where `act` is called; `undo` are the calls of a caller that gives up."""

    act: Step
    before: tuple[Step, ...] = ()
    undo: tuple[Step, ...] = ()
    needs_root: bool = True


UP = (Case.fill, Case.stage)
OPERATIONS = {
    "create": Operation(Case.create, undo=(Case.delete,), needs_root=False),
    "delete": Operation(Case.delete, (Case.fill,), (Case.delete,), needs_root=False),
    "empty-trash": Operation(
        Case.empty_trash, (Case.fill, Case.delete), (Case.empty_trash,), needs_root=False
    ),
    "grow": Operation(Case.grow, (Case.fill,), (Case.grow, Case.delete), needs_root=False),
    "modify": Operation(Case.modify, (Case.fill,), (Case.delete,), needs_root=False),
    "stage": Operation(Case.stage, (Case.fill,), (Case.unstage,)),
    "unstage": Operation(Case.unstage, UP, (Case.unstage,)),
    "publish": Operation(Case.publish, UP, (Case.unpublish, Case.unstage)),
    "unpublish": Operation(Case.unpublish, (*UP, Case.publish), (Case.unpublish, Case.unstage)),
    # The caller cannot take a growth back; the filesystem may be grown when it is next staged.
    "expand": Operation(Case.expand, (*UP, Case.publish), (Case.unpublish, Case.unstage, Case.grow)),
    "snapshot": Operation(Case.snapshot, (Case.fill,), (Case.delete_snapshot,), needs_root=False),
    "snapshot-in-use": Operation(Case.snapshot, (*UP, Case.publish), (Case.delete_snapshot,)),
    "delete-snapshot": Operation(
        Case.delete_snapshot, (Case.fill, Case.snapshot), (Case.delete_snapshot,), needs_root=False
    ),
    "restore": Operation(Case.restore, (Case.fill, Case.snapshot), (Case.delete_copy,), needs_root=False),
    "clone": Operation(Case.clone, (Case.fill,), (Case.delete_copy,), needs_root=False),
    "clone-in-use": Operation(Case.clone, (*UP, Case.publish), (Case.delete_copy,)),
    "group-in-use": Operation(Case.group, (*UP, Case.publish, Case.second), (Case.delete_group,)),
    "group": Operation(Case.group, (Case.fill, Case.second), (Case.delete_group,), needs_root=False),
    "delete-group": Operation(
        Case.delete_group, (Case.fill, Case.second, Case.group), (Case.delete_group,), needs_root=False
    ),
    "publish-inline": Operation(Case.publish_inline, undo=(Case.unpublish_inline,)),
    "unpublish-inline": Operation(Case.unpublish_inline, (Case.publish_inline,), (Case.unpublish_inline,)),
}


COPIES = (
    "snapshot",
    "snapshot-in-use",
    "delete-snapshot",
    "restore",
    "clone",
    "clone-in-use",
    "group",
    "group-in-use",
    "delete-group",
)


# Elsewhere they are the same as of what is not in use, or refused.
FROZEN = ("clone-in-use", "group-in-use")


@dataclass(frozen=True)
class Picture:
    """All that an operation may leave. Equal pictures: the same state, but for what time decides."""

    volumes: dict[str, tuple[int, Record]]
    snapshots: tuple[SnapshotRecord, ...]
    entries: tuple[str, ...]
    mounts: tuple[str, ...]
    loops: int
    pods: tuple[str, ...]
    shown_bytes: int
    """The size of the filesystem that the pod sees."""
    available_bytes: int

    @classmethod
    def take(cls, case: Case, rig: Rig) -> "Picture":
        root, place = rig.pool.catalog.root, case.scene.place
        homes = [rig.pool.catalog.home(volume_id) for volume_id in rig.pool.catalog.ids()]
        records = {home.id: rig.pool.catalog.read(home) for home in homes}
        return Picture(
            snapshots=tuple(
                structs.replace(one.record, created_at=0.0, shares={})
                for one in rig.snapshots.listed(0, "", "", "")[0]
            ),
            volumes={home.id: (rig.backend.size_bytes(home), _timeless(records[home.id])) for home in homes},
            entries=tuple(
                sorted(
                    os.path.relpath(path, root)
                    for area in ("volumes", "snapshots", "groups", "staging", "trash")
                    for path in (root / area).glob("*/*")
                )
            ),
            mounts=tuple(
                sorted(target for target in mounts_beneath(place) if target != str(case.scene.filesystem))
            ),
            loops=len(loops_beneath(root)),
            pods=tuple(sorted(f"{path.name} {path.is_dir()}" for path in case.pods.iterdir())),
            shown_bytes=case.target.is_dir() and os.statvfs(case.target).f_blocks,
            available_bytes=rig.controller.capacity((), {}, None).available_bytes,
        )

    def same(self, other: "Picture") -> bool:
        near = abs(self.available_bytes - other.available_bytes) <= TOLERANCE_BYTES
        return near and replace(self, available_bytes=0) == replace(other, available_bytes=0)


def _timeless(record: Record) -> Record:
    # How much was shared depends on what the filesystem had written by then.
    return structs.replace(record, created_at=0.0, shares={})


def settled(case: Case, rig: Rig, expected: Picture) -> Picture:
    """The picture once the background work is done; waits for the expected one."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        rig.settle()
        found = Picture.take(case, rig)
        if found.same(expected) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def run(case: Case, steps: tuple[Step, ...]) -> None:
    """Each call by a new process: nothing may be remembered."""
    for step in steps:
        step(case, case.scene.open())
    case.scene.current.close()


def picture_after(case: Case, steps: tuple[Step, ...]) -> Picture:
    run(case, steps)
    rig = case.scene.open()
    rig.settle()
    found = Picture.take(case, rig)
    pause_s = BACKGROUND_S.get("served" if case.scene.kind.served else case.scene.kind.filesystem)
    while pause_s is not None:
        time.sleep(pause_s)
        rig.settle()
        before, found = found, Picture.take(case, rig)
        if found.same(before):
            break
    return found


def clear(case: Case, empty: Picture) -> None:
    """Back to an empty pool, by the calls that a caller would make."""
    if case.scene.kind.needs_root:
        run(case, (Case.unpublish, Case.unpublish_inline, Case.unstage))
        check_content(case, "a")
    copies = (Case.delete_group, Case.delete_snapshot, Case.delete_copy, Case.delete_second)
    run(case, (*copies, Case.delete))
    rig = case.scene.open()
    found = settled(case, rig, empty)
    assert found.same(empty), f"not back to {empty}: {found}"
    case.scene.current.close()


def remove_staging(scene: Scene, name: str) -> None:
    if not scene.kind.used_elsewhere:
        (scene.place / f"{name}-staging").rmdir()


def check_content(case: Case, name: str) -> None:
    """The volume of this name, if there is one, has all that was written or nothing yet."""
    rig = case.scene.open()
    volume_id = rig.pool.id_of(name)
    if rig.pool.catalog.find(volume_id) is None:
        return
    with in_pod(case.scene, rig, volume_id, "reading") as path:
        names = [entry.name for entry in path.iterdir()]
        assert names in ([], ["kept"])
        if names:
            assert (path / "kept").read_bytes() == case.content
    remove_staging(case.scene, "reading")
