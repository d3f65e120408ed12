# SPDX-License-Identifier: Apache-2.0
"""What only btrfs has: quotas that are off or of the wrong kind, and subvolumes that pods make in their volumes."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.backends.btrfs import LEVEL
from csi_driver.errors import ConfigurationError
from csi_driver.linux import btrfs
from csi_driver.model import MIB, CapacityRange
from tests.rig import FULL_QGROUPS, KINDS, Rig, volume
from tests.scene import Scene, fill, in_pod, set_up

BTRFS = next(kind for kind in KINDS if kind.name == "btrfs")
AS_CONFIGURED = replace(BTRFS, options="")
# The kernel's cleaner works in the background.
CLEANED_S = 120.0


@pytest.fixture
def scene(place: Path) -> Iterator[Scene]:
    with set_up(BTRFS, place) as scene:
        yield scene


@pytest.fixture
def root_fd(scene: Scene) -> Iterator[int]:
    assert scene.filesystem is not None
    fd = os.open(scene.filesystem, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def enable_full_qgroups(root_fd: int) -> None:
    btrfs.enable_quota(root_fd, "qgroup")
    assert btrfs.quota_mode(root_fd) == "qgroup"


def create(rig: Rig, name: str = "a", size_bytes: int = 16 * MIB) -> str:
    return rig.controller.create_volume(volume(name, size_bytes)).id


def open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def test_quotas_are_not_enabled_unasked(scene: Scene, root_fd: int) -> None:
    with pytest.raises(ConfigurationError, match=r"quota enable --simple .*enable_quota = true"):
        scene.use(AS_CONFIGURED)

    assert btrfs.quota_mode(root_fd) == "off"
    assert not scene.root.exists()


def test_quotas_are_enabled_when_asked_and_then_just_used(scene: Scene, root_fd: int) -> None:
    scene.open()
    assert btrfs.quota_mode(root_fd) == "simple"

    assert scene.use(AS_CONFIGURED).backend.features.enforces_capacity


def test_full_qgroups_need_consent_and_are_not_called_enforced(scene: Scene, root_fd: int) -> None:
    enable_full_qgroups(root_fd)

    with pytest.raises(ConfigurationError, match="full_qgroups = true"):
        scene.open()
    rig = scene.use(FULL_QGROUPS)

    assert not rig.backend.features.enforces_capacity
    assert rig.controller.create_volume(volume("a", 16 * MIB)).size_bytes == 16 * MIB


def test_full_qgroups_limit_what_is_written_plainly(scene: Scene, root_fd: int) -> None:
    enable_full_qgroups(root_fd)
    rig = scene.use(FULL_QGROUPS)
    volume_id = create(rig)

    with in_pod(scene, rig, volume_id) as path:
        done, error = fill(path / "x", 32 * MIB)
        assert error is not None
        assert done <= 16 * MIB
    rig.controller.expand_volume(volume_id, CapacityRange(32 * MIB), None)
    assert not btrfs.is_inconsistent(root_fd)
    rig.controller.delete_volume(volume_id)
    rig.settle()

    assert os.listdir(scene.root / "trash") == []


def test_root_elsewhere_is_refused(place: Path) -> None:
    with pytest.raises(ConfigurationError, match="give a root on btrfs"):
        Scene(BTRFS, place, place / "pool", None).open()

    assert not (place / "pool").exists()


@pytest.mark.parametrize("snapshot", [False, True])
def test_subvolumes_that_a_pod_makes_count_for_its_volume(scene: Scene, snapshot: bool) -> None:
    rig = scene.open()
    volume_id = create(rig)

    with in_pod(scene, rig, volume_id) as path:
        fd = open_directory(path)
        if snapshot:
            btrfs.snapshot(fd, fd, "nested")
        else:
            btrfs.create_subvolume(fd, "nested")
        os.close(fd)
        done, error = fill(path / "nested" / "x", 64 * MIB)
        stats = rig.node.stats(volume_id, str(path))

    assert error is not None
    assert done <= 16 * MIB
    assert stats.available_bytes < MIB


def test_volume_with_nested_subvolumes_is_deleted_whole(scene: Scene, root_fd: int) -> None:
    rig = scene.open()
    volume_id = create(rig)
    with in_pod(scene, rig, volume_id) as path:
        fd = open_directory(path)
        btrfs.create_subvolume(fd, "one")
        btrfs.snapshot(fd, fd, "frozen", readonly=True)
        one = open_directory(path / "one")
        btrfs.create_subvolume(one, "two")
        for opened in (one, fd):
            os.close(opened)
        fill(path / "one" / "two" / "x", 64 * MIB)  # and full

    rig.controller.delete_volume(volume_id)
    rig.settle()

    assert os.listdir(scene.root / "trash") == []


def test_quota_groups_go_with_their_volumes(scene: Scene, root_fd: int) -> None:
    rig = scene.open()
    for number in range(5):
        volume_id = create(rig, f"v{number}")
        with in_pod(scene, rig, volume_id) as path:
            fill(path / "x", MIB)
        rig.controller.delete_volume(volume_id)
    kept = create(rig, "kept")
    rig.settle()

    deadline = time.monotonic() + CLEANED_S
    while len(btrfs.qgroup_numbers(root_fd, LEVEL)) > 1 and time.monotonic() < deadline:
        time.sleep(0.5)
        rig = scene.open()  # what was left is found again

    assert len(btrfs.qgroup_numbers(root_fd, LEVEL)) == 1
    assert rig.controller.get_volume(kept).size_bytes == 16 * MIB
    # 5 is the filesystem's own, and the volume has one of each level.
    assert len(btrfs.qgroup_numbers(root_fd, 0)) == 2


def test_quotas_switched_off_keep_no_trash_and_nothing_half_made(scene: Scene, root_fd: int) -> None:
    rig = scene.open()
    volume_id = create(rig)
    subprocess.run(["btrfs", "quota", "disable", os.fspath(scene.root)], check=True)

    with pytest.raises(OSError) as caught:
        create(rig, "b")
    rig.controller.delete_volume(volume_id)
    rig.settle()

    assert caught.value.errno == errno.ENOTCONN
    assert os.listdir(scene.root / "trash") == os.listdir(scene.root / "staging") == []


def test_lost_limit_is_told_and_growing_sets_it_anew(scene: Scene, root_fd: int) -> None:
    rig = scene.open()
    volume_id = create(rig)
    [number] = btrfs.qgroup_numbers(root_fd, LEVEL)
    btrfs.set_limit(root_fd, btrfs.qgroup_id(LEVEL, number), 0)

    assert [entry.reason for entry in rig.controller.volume_health(volume_id)] == ["SizeNotEnforced"]
    rig.controller.expand_volume(volume_id, CapacityRange(16 * MIB), None)

    assert rig.controller.volume_health(volume_id) == []
    assert rig.controller.get_volume(volume_id).size_bytes == 16 * MIB


def test_lost_count_of_full_qgroups_is_told(scene: Scene, root_fd: int) -> None:
    enable_full_qgroups(root_fd)
    rig = scene.use(FULL_QGROUPS)
    volume_id = create(rig)
    with in_pod(scene, rig, volume_id) as path:
        fill(path / "x", MIB)
        fd = open_directory(path)
        btrfs.snapshot(fd, fd, "nested")
        os.close(fd)
    os.sync()

    assert btrfs.is_inconsistent(root_fd)
    assert "QuotaInconsistent" in [entry.reason for entry in rig.controller.volume_health(volume_id)]


def test_pools_filesystem_is_not_what_a_pod_is_told(scene: Scene) -> None:
    rig = scene.open()
    volume_id = create(rig)

    with in_pod(scene, rig, volume_id) as path:
        stats = rig.node.stats(volume_id, str(path))

    assert stats.total_bytes == 16 * MIB
    assert stats.total_inodes == 0
