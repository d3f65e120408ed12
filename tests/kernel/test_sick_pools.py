# SPDX-License-Identifier: Apache-2.0
"""Pools that are full, read-only or gone, and volumes that lost something: clear errors, honest health, no leftovers."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import Error, FailedPrecondition, ResourceExhausted
from csi_driver.model import (
    MIB,
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    HealthStatus,
    StorageStatus,
)
from tests.kernel.conftest import MakePool
from tests.kernel.node_scene import Scene
from tests.rig import capability

BLOCK = Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER)
PLAIN = (capability(),)


@pytest.fixture
def scene(workshop: Path, ext4_pool: Path) -> Iterator[Scene]:
    scene = Scene.make(workshop, ext4_pool / "pool")
    yield scene
    scene.rig.close()


def reasons(scene: Scene) -> set[tuple[StorageStatus, str]]:
    return {(entry.status, entry.reason) for entry in scene.rig.node.storage_health()}


def remount(pool: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", pool], check=True)


def test_a_full_pool_refuses_and_keeps_nothing(scene: Scene) -> None:
    room = scene.rig.controller.capacity(PLAIN, {}, None)
    largest = scene.create("largest", room.maximum_volume_bytes - MIB)

    with pytest.raises(ResourceExhausted, match="bytes are needed"):
        scene.create("next", 64 * MIB)

    assert not list((scene.rig.pool.catalog.root / "staging").iterdir())
    scene.delete(largest)
    assert scene.create("next", 64 * MIB).size_bytes == 64 * MIB


def test_a_disk_filled_by_others_is_told_and_refused(scene: Scene, ext4_pool: Path) -> None:
    usage = os.statvfs(ext4_pool)
    with open(ext4_pool / "others", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, usage.f_bavail * usage.f_frsize - 4 * MIB)
    scene.rig.settle()

    assert scene.rig.controller.capacity(PLAIN, {}, None).available_bytes <= 4 * MIB
    with pytest.raises(ResourceExhausted):
        scene.create("v", 64 * MIB)


def test_a_pool_that_goes_read_only_says_so(scene: Scene, ext4_pool: Path) -> None:
    volume = scene.create("v", 32 * MIB)
    remount(ext4_pool, "ro")

    with pytest.raises(ResourceExhausted, match="Read-only"):
        scene.create("next", 32 * MIB)
    assert (StorageStatus.STORAGE_DEGRADED, "PoolPReadOnly") in reasons(scene)

    remount(ext4_pool, "rw")
    assert reasons(scene) == set()
    scene.create("next", 32 * MIB)
    scene.delete(volume)


def test_a_pool_whose_disk_is_gone_takes_nothing_and_says_so(workshop: Path, make_pool: MakePool) -> None:
    disk = make_pool("ext4")
    scene = Scene.make(workshop, disk / "pool")
    volume = scene.create("v", 32 * MIB)
    # Lazily, as an impatient administrator would: the driver's own descriptors keep it alive.
    subprocess.run(["umount", "--lazy", disk], check=True)

    assert scene.rig.controller.capacity(PLAIN, {}, None).available_bytes == 0
    with pytest.raises(ResourceExhausted, match="mounted"):
        scene.create("next", 32 * MIB)
    assert reasons(scene) == {(StorageStatus.STORAGE_UNREACHABLE, "PoolPMissing")}
    health = scene.rig.controller.volume_health(volume.id)
    assert [(entry.status, entry.reason) for entry in health] == [(HealthStatus.INACCESSIBLE, "PoolMissing")]
    assert list(disk.iterdir()) == [], "nothing may be made in the disk's empty place"
    scene.rig.close()


def test_a_missing_or_short_image_is_lost_data_and_listed(scene: Scene) -> None:
    gone, short, well = (scene.create(name, 8 * MIB, BLOCK) for name in ("gone", "short", "well"))
    root = scene.rig.pool.catalog.root / "volumes"
    (root / gone.id / "image").unlink()
    os.truncate(root / short.id / "image", 4 * MIB)

    listed, token = scene.rig.controller.list_health(0, "")

    assert token == ""
    assert {volume_id: [(one.status, one.reason) for one in health] for volume_id, health in listed} == {
        gone.id: [(HealthStatus.DATA_LOSS, "ImageMissing")],
        short.id: [(HealthStatus.DATA_LOSS, "ImageShort")],
    }
    assert scene.rig.node.volume_health(well.id) == []
    for call in (
        lambda: scene.stage(gone, BLOCK),
        lambda: scene.publish(gone, wanted=BLOCK),
        lambda: scene.rig.controller.get_volume(gone.id),
        lambda: scene.rig.node.expand(gone.id, str(scene.kubelet), "", CapacityRange(16 * MIB)),
    ):
        with pytest.raises(Error, match=rf"{gone.id}.*is missing: restore it from a backup"):
            call()
    scene.delete(gone)


def test_a_filesystem_that_cannot_be_mounted_is_told_and_never_formatted(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    image = scene.rig.pool.catalog.root / "volumes" / volume.id / "image"
    image.write_bytes(b"\0" * 32 * MIB)

    with pytest.raises(Error, match=rf"{volume.id}.*ext4.*cannot be mounted.*check it"):
        scene.stage(volume)

    assert not any(image.read_bytes())
    scene.delete(volume)


def test_a_filesystem_that_the_kernel_made_read_only_is_degraded(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    target = scene.run(volume)
    assert scene.rig.node.volume_health(volume.id) == []

    subprocess.run(["mount", "-o", "remount,ro", scene.staging(volume)], check=True)

    health = scene.rig.node.volume_health(volume.id, str(target))
    assert [(entry.status, entry.reason) for entry in health] == [
        (HealthStatus.DEGRADED, "FilesystemReadOnly")
    ]
    scene.end(volume)


def test_a_deleted_volume_is_kept_for_the_retention_and_counted(workshop: Path, ext4_pool: Path) -> None:
    scene = Scene.make(workshop, ext4_pool / "pool", 'backend = "image"\nretention = "1h"')
    volume = scene.create("v", 64 * MIB)
    room = scene.rig.pool.capacity().available_bytes

    scene.delete(volume)

    trash = scene.rig.pool.catalog.root / "trash"
    assert [path.name.partition(".")[0] for path in trash.iterdir()] == [volume.id]
    assert scene.rig.pool.capacity().available_bytes <= room
    scene.restart()
    assert scene.rig.pool.capacity().available_bytes <= room
    scene.rig.close()


def test_thin_volumes_promise_more_than_there_is_and_take_what_is_written(
    workshop: Path, ext4_pool: Path
) -> None:
    options = 'backend = "image"\nprovisioning = "thin"\novercommit = 3.0'
    scene = Scene.make(workshop, ext4_pool / "pool", options)
    room = scene.rig.controller.capacity(PLAIN, {}, None).available_bytes
    store = scene.rig.backend.store()

    volumes = [scene.create(f"v{number}", 200 * MIB) for number in range(3)]

    assert room > 2 * store.free_bytes
    assert store.free_bytes - scene.rig.backend.store().free_bytes < 32 * MIB
    with pytest.raises(ResourceExhausted):
        scene.create("more", 400 * MIB)
    for volume in volumes:
        scene.delete(volume)
    scene.rig.close()


def test_delete_of_a_volume_in_use_keeps_it_whole(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    (scene.run(volume) / "kept").write_text("yes")

    with pytest.raises(FailedPrecondition):
        scene.delete(volume)

    assert (scene.kubelet / "pod" / "kept").read_text() == "yes"
    scene.end(volume)
