# SPDX-License-Identifier: Apache-2.0
"""A volume on its way to a pod and back, on a real kernel, as kubelet asks for it."""

import errno
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from csi_driver.backends.base import Device
from csi_driver.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from csi_driver.linux import loop, mount
from csi_driver.model import (
    MIB,
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    PublishRequest,
)
from tests.kernel.conftest import MakePool
from tests.kernel.node_scene import Scene
from tests.rig import capability, staged

BLOCK = Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER)
RWOP = capability(AccessMode.SINGLE_NODE_SINGLE_WRITER)
SIZES = {"ext4": 32 * MIB, "xfs": 300 * MIB, "btrfs": 256 * MIB}


@pytest.fixture
def scene(workshop: Path, scratch: Path) -> Iterator[Scene]:
    scene = Scene.make(workshop, scratch / "pool")
    yield scene
    scene.rig.close()


def refused(action: object, number: int) -> bool:
    assert callable(action)
    with pytest.raises(OSError) as caught:
        action()
    return caught.value.errno == number


def below(path: Path) -> list[int]:
    """The mounts there, by their ids."""
    return [entry.mount_id for entry in mount.mounts() if Path(entry.target).is_relative_to(path)]


@pytest.mark.parametrize("fs_type", SIZES)
def test_a_pod_gets_an_empty_root_with_the_owner_and_mode_asked_for(scene: Scene, fs_type: str) -> None:
    volume = scene.create("v", SIZES[fs_type], fsType=fs_type, mode="2770", uid="1000", gid="2000")

    target = scene.run(volume)

    status = target.stat()
    assert list(target.iterdir()) == []
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2770, 1000, 2000)
    scene.end(volume)


@pytest.mark.parametrize("fs_type", SIZES)
def test_data_stays_when_the_pod_ends_and_another_starts(scene: Scene, fs_type: str) -> None:
    volume = scene.create("v", SIZES[fs_type], fsType=fs_type)
    (scene.run(volume) / "kept").write_text("yes")
    scene.end(volume)

    target = scene.run(volume, "next")

    assert (target / "kept").read_text() == "yes"
    scene.end(volume, "next")


def test_two_pods_share_a_volume_and_one_of_them_reads_only(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    writer = scene.run(volume)
    reader = scene.publish(volume, "reader", readonly=True)

    (writer / "shared").write_text("now")

    assert (reader / "shared").read_text() == "now"
    assert refused(lambda: (reader / "no").write_text("no"), errno.EROFS)
    scene.end(volume, "pod", "reader")


def test_a_reader_only_access_mode_is_read_only_without_being_told(scene: Scene) -> None:
    only = capability(AccessMode.MULTI_NODE_READER_ONLY)
    volume = scene.create("v", 32 * MIB, only)

    target = scene.run(volume, wanted=only)

    assert refused(lambda: (target / "no").write_text("no"), errno.EROFS)
    scene.end(volume)


def test_a_raw_device_is_its_size_and_read_only_where_asked(scene: Scene) -> None:
    volume = scene.create("v", 8 * MIB, BLOCK)
    target = scene.run(volume, wanted=BLOCK)
    reader = scene.publish(volume, "reader", BLOCK, readonly=True)

    with open(target, "r+b", buffering=0) as device:
        assert device.seek(0, os.SEEK_END) == 8 * MIB
        device.seek(0)
        device.write(b"x" * 4096)
        os.fsync(device.fileno())
    with pytest.raises(PermissionError), open(reader, "r+b", buffering=0) as device:
        device.write(b"y" * 4096)

    with open(reader, "rb") as device:
        assert device.read(4096) == b"x" * 4096
    scene.end(volume, "pod", "reader")


def test_a_volume_ends_at_its_size_and_the_neighbour_never_notices(scene: Scene) -> None:
    small, neighbour = scene.create("small", 16 * MIB), scene.create("neighbour", 16 * MIB)
    target, other = scene.run(small), scene.run(neighbour, "other")
    (other / "mine").write_bytes(b"m" * MIB)

    def fill() -> None:
        with open(target / "big", "wb", buffering=0) as file:
            for _ in range(64):
                file.write(b"\0" * MIB)

    assert refused(fill, errno.ENOSPC)
    (other / "more").write_bytes(b"m" * MIB)
    assert (other / "mine").read_bytes() == b"m" * MIB
    scene.end(small)
    scene.end(neighbour, "other")


@pytest.mark.parametrize("fs_type", SIZES)
def test_growth_while_the_pod_writes_loses_nothing(scene: Scene, fs_type: str) -> None:
    volume = scene.create("v", SIZES[fs_type], fsType=fs_type)
    target = scene.run(volume)
    (target / "before").write_bytes(b"b" * MIB)
    before = os.statvfs(target)

    scene.grow(volume, 2 * SIZES[fs_type])

    after = os.statvfs(target)
    assert after.f_blocks * after.f_frsize > 1.5 * before.f_blocks * before.f_frsize
    assert (target / "before").read_bytes() == b"b" * MIB
    assert scene.rig.controller.get_volume(volume.id).size_bytes == 2 * SIZES[fs_type]
    scene.end(volume)


def test_a_volume_grown_by_the_controller_alone_fills_its_device_at_the_next_stage(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    scene.run(volume)
    scene.end(volume)
    scene.rig.controller.expand_volume(volume.id, CapacityRange(64 * MIB), None)

    target = scene.run(volume)

    usage = os.statvfs(target)
    assert usage.f_blocks * usage.f_frsize > 48 * MIB
    scene.end(volume)


def test_growth_is_never_shrinking_and_may_be_asked_again(scene: Scene) -> None:
    volume = scene.create("v", 300 * MIB, fsType="xfs")
    target = scene.run(volume)

    sizes = [
        scene.rig.node.expand(volume.id, str(target), "", CapacityRange(size))
        for size in (400 * MIB, 400 * MIB, 300 * MIB)
    ]

    assert sizes == [400 * MIB] * 3
    scene.end(volume)


def test_publish_again_is_fine_and_otherwise_is_already_exists(scene: Scene) -> None:
    volume, other = scene.create("v", 32 * MIB), scene.create("other", 32 * MIB)
    scene.stage(other)
    scene.run(volume)

    scene.publish(volume)

    with pytest.raises(AlreadyExists):
        scene.publish(volume, readonly=True)
    with pytest.raises(AlreadyExists):
        scene.publish(other)
    scene.end(volume)
    scene.end(other, "elsewhere")


def test_publish_before_stage_is_refused_and_leaves_nothing(scene: Scene) -> None:
    for wanted in (capability(), BLOCK):
        volume = scene.create(f"v-{wanted.access_type}", 32 * MIB, wanted)

        with pytest.raises(FailedPrecondition, match="NodeStageVolume"):
            scene.publish(volume, wanted=wanted)

        assert not (scene.kubelet / "pod").exists()
        scene.delete(volume)


def test_stage_refuses_what_the_volume_is_not(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)

    with pytest.raises(FailedPrecondition, match="block"):
        scene.stage(volume, BLOCK)
    with pytest.raises(FailedPrecondition, match="xfs"):
        scene.stage(volume, capability(fs_type="xfs"))

    scene.delete(volume)


def test_a_failed_stage_leaves_no_device_behind(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    wrong = Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER, mount_flags=("nonsense=1",))

    with pytest.raises(InvalidArgument, match="nonsense"):
        scene.stage(volume, wrong)

    scene.delete(volume)


def test_read_write_once_pod_has_one_target(scene: Scene) -> None:
    for number, wanted in enumerate((RWOP, Capability(AccessType.BLOCK, RWOP.access_mode))):
        volume = scene.create(f"v{number}", 32 * MIB, wanted)
        scene.run(volume, wanted=wanted)

        scene.publish(volume, wanted=wanted)
        with pytest.raises(FailedPrecondition, match="SINGLE_NODE_SINGLE_WRITER"):
            scene.publish(volume, "second", wanted)

        scene.rig.node.unpublish(volume.id, str(scene.kubelet / "pod"))
        scene.publish(volume, "second", wanted)
        scene.end(volume, "second")


def test_mount_flags_hold(scene: Scene) -> None:
    wanted = Capability(
        AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER, mount_flags=("noexec", "noatime", "commit=30")
    )
    volume = scene.create("v", 32 * MIB, wanted)

    target = scene.run(volume, wanted=wanted)

    entry = next(entry for entry in mount.mounts() if entry.target == str(target))
    assert {"noexec", "noatime"} <= set(entry.options)
    assert "commit=30" in entry.super_options
    scene.end(volume)


def test_targets_are_left_alone_when_they_hold_what_is_not_ours(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    foreign = scene.kubelet / "pod"
    foreign.mkdir()
    (foreign / "precious").write_text("data")

    with pytest.raises(FailedPrecondition, match="files"):
        scene.rig.node.unpublish(volume.id, str(foreign))

    assert (foreign / "precious").read_text() == "data"


def test_a_symlink_in_the_targets_place_is_not_followed(scene: Scene, workshop: Path) -> None:
    volume = scene.create("v", 32 * MIB)
    scene.stage(volume)
    elsewhere = workshop / "elsewhere"
    elsewhere.mkdir()
    (scene.kubelet / "pod").symlink_to(elsewhere)

    with pytest.raises(FailedPrecondition):
        scene.publish(volume)

    assert mount.find_mounted(elsewhere) is None
    (scene.kubelet / "pod").unlink()
    scene.end(volume)


def test_mounts_stacked_on_a_target_all_go(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    target = scene.run(volume)
    with open(target / "kept", "w") as file:
        file.write("yes")
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(3):
        mount.bind(fd, target, mount.Attributes())
    os.close(fd)

    scene.rig.node.unpublish(volume.id, str(target))

    assert not target.exists()
    assert (scene.publish(volume) / "kept").read_text() == "yes"
    scene.end(volume)


def test_unknown_volumes_are_unpublished_and_unstaged_without_complaint(scene: Scene) -> None:
    scene.rig.node.unpublish("nobody", str(scene.kubelet / "nowhere" / "at" / "all"))
    scene.rig.node.unstage("nobody", str(scene.kubelet / "nowhere"))

    with pytest.raises(NotFound):
        scene.rig.node.publish(PublishRequest("nobody", str(scene.kubelet / "pod"), capability()))


def test_a_volume_in_use_is_not_deleted(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    scene.run(volume)

    with pytest.raises(FailedPrecondition, match="in use"):
        scene.delete(volume)

    scene.end(volume)
    scene.delete(volume)
    with pytest.raises(NotFound):
        scene.rig.controller.get_volume(volume.id)


def test_a_mount_copied_into_another_namespace_keeps_no_pod_from_ending(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    target = scene.run(volume)
    (target / "kept").write_text("yes")
    script = "mount --make-rprivate / && echo ready && cat >/dev/null"
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"

        scene.end(volume)
        with pytest.raises(FailedPrecondition, match="in use"):
            scene.delete(volume)
        assert (scene.run(volume) / "kept").read_text() == "yes"
        scene.end(volume)

    for _ in range(1200):
        if not scene.rig.controller.get_volume(volume.id).in_use:
            break
        time.sleep(0.05)
    scene.delete(volume)


def test_stage_right_after_a_device_was_let_go_gets_a_device_that_stays(scene: Scene) -> None:
    volume = scene.create("v", 16 * MIB)
    for number in range(30):
        target = scene.run(volume)
        (target / str(number)).write_text("x")
        device = scene.rig.backend.find_attached(scene.rig.pool.catalog.get(volume.id), volume.record)
        assert isinstance(device, Device)
        # Somebody looks at the device (blkid, udev) while the pod ends: it is cleared at their close.
        fd = os.open(device.path, os.O_RDONLY)
        closing = threading.Timer(0.002 * (number % 5), os.close, [fd])
        closing.start()
        scene.end(volume)
        closing.join()

    assert len(list(scene.run(volume).iterdir())) == 30
    scene.end(volume)
    scene.delete(volume)


def test_stats_tell_bytes_and_inodes_and_a_devices_size(scene: Scene) -> None:
    volume, device = scene.create("v", 32 * MIB), scene.create("b", 8 * MIB, BLOCK)
    target, raw = scene.run(volume), scene.run(device, "raw", BLOCK)
    (target / "file").write_bytes(b"f" * 4 * MIB)

    stats = scene.rig.node.stats(volume.id, str(target))

    usage = os.statvfs(target)
    assert stats.total_bytes == usage.f_blocks * usage.f_frsize
    assert stats.used_bytes >= 4 * MIB
    assert stats.total_inodes == usage.f_files
    assert scene.rig.node.stats(device.id, str(raw)).total_bytes == 8 * MIB
    with pytest.raises(NotFound):
        scene.rig.node.stats(volume.id, str(scene.kubelet / "nowhere"))
    scene.end(volume)
    scene.end(device, "raw")


def test_stats_are_of_a_path_that_shows_the_volume(scene: Scene) -> None:
    volume, other = scene.create("v", 32 * MIB), scene.create("o", 32 * MIB)
    part = scene.create("p", 32 * MIB, subPath="deep/down")
    device, raw = scene.create("b", 8 * MIB, BLOCK), scene.create("c", 8 * MIB, BLOCK)
    shown = {one.id: scene.run(one, f"pod-{one.record.name}") for one in (volume, other, part)}
    shown |= {one.id: scene.run(one, f"pod-{one.record.name}", BLOCK) for one in (device, raw)}
    reader = scene.publish(raw, "reader", BLOCK, readonly=True)

    for one in shown:
        for another, path in shown.items():
            if one == another:
                assert scene.rig.node.stats(one, str(path)).total_bytes > 0
            else:
                with pytest.raises(NotFound):
                    scene.rig.node.stats(one, str(path))
    assert scene.rig.node.stats(raw.id, str(reader)).total_bytes == 8 * MIB
    assert scene.rig.node.stats(volume.id, str(scene.staging(volume))).total_bytes > 0
    for wrong in (scene.kubelet, Path("/proc"), Path("/dev/null"), scene.kubelet / "nowhere"):
        with pytest.raises(NotFound):
            scene.rig.node.stats(volume.id, str(wrong))
        with pytest.raises(NotFound):
            scene.rig.node.stats(device.id, str(wrong))

    scene.end(raw, "pod-c", "reader")
    for ended in (volume, other, part, device):
        scene.end(ended, f"pod-{ended.record.name}")
    with pytest.raises(NotFound):
        scene.rig.node.stats(volume.id, str(shown[volume.id]))


def test_after_a_reboot_the_data_is_there(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    target = scene.run(volume)
    (target / "kept").write_text("yes")
    os.sync()
    # What a reboot takes away: every mount and every loop device, and the process.
    for path in (target, scene.staging(volume)):
        mount.unmount(path)
    for device in loop.all():
        if device.backing_inode == (scene.rig.pool.catalog.get(volume.id).path / "image").stat().st_ino:
            loop.detach(device)
    scene.restart()

    assert (scene.run(volume) / "kept").read_text() == "yes"
    scene.end(volume)


def test_after_the_drivers_death_everything_is_found_again(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    target = scene.run(volume)
    before = below(scene.kubelet)

    scene.restart()
    scene.run(volume)

    assert below(scene.kubelet) == before
    assert (target / ".").exists()
    scene.end(volume)
    scene.delete(volume)


def test_sub_path_is_made_with_the_claims_name_and_nothing_else_is_seen(scene: Scene) -> None:
    parts = "${pvc.metadata.namespace}/${pvc.metadata.name}"
    volume = scene.create("v", 32 * MIB, subPath=parts, uid="1000", mode="0700")

    target = scene.run(volume)

    (target / "file").write_text("x")
    inside = scene.staging(volume) / "data" / "shop" / "data"
    assert (inside / "file").read_text() == "x"
    assert (inside.stat().st_uid, inside.stat().st_mode & 0o7777) == (1000, 0o700)
    scene.end(volume)


def test_sub_path_never_follows_a_symlink_that_the_pod_planted(scene: Scene, workshop: Path) -> None:
    volume = scene.create("v", 32 * MIB, subPath="a/b")
    outside = workshop / "outside"
    outside.mkdir()
    scene.stage(volume)
    root = scene.staging(volume) / "data"
    for planted in ("a", "a/b"):
        path = root / planted
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(outside)

        with pytest.raises(FailedPrecondition, match=r"subPath 'a/b'.*symbolic"):
            scene.publish(volume)

        path.unlink()
    assert list(outside.iterdir()) == []
    scene.end(volume)


def test_sub_path_holds_while_the_pod_swaps_directories_for_symlinks(scene: Scene, workshop: Path) -> None:
    volume = scene.create("v", 32 * MIB, subPath="a/b")
    outside = workshop / "outside"
    (outside / "b").mkdir(parents=True)
    secret = (outside / "b").stat().st_ino
    scene.stage(volume)
    root = scene.staging(volume) / "data"
    (root / "real" / "b").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    ending = threading.Event()

    def swap() -> None:
        while not ending.is_set():
            for name in ("real", "link"):
                # The driver may have made an `a` of its own in between: then it is the pod's turn to go elsewhere.
                with suppress(OSError):
                    os.rename(root / name, root / "a")
                    os.rename(root / "a", root / name)
                with suppress(OSError):
                    os.rename(root / "a", root / f"driver-{secrets.token_hex(4)}")

    pod = threading.Thread(target=swap)
    pod.start()
    seen = 0
    for _ in range(300):
        try:
            target = scene.publish(volume)
        except FailedPrecondition:
            pass  # The symlink was there first.
        except OSError as error:
            assert error.errno in (errno.ENOENT, errno.EEXIST, errno.EAGAIN, errno.EXDEV)
        else:
            seen += 1
            assert target.stat().st_ino != secret
        scene.rig.node.unpublish(volume.id, str(scene.kubelet / "pod"))
    ending.set()
    pod.join()

    assert seen, "the race was never run to its end"
    scene.end(volume)


def test_bad_mount_flags_are_named(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    wrong = Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER, mount_flags=("bind",))

    with pytest.raises(InvalidArgument, match="bind"):
        scene.stage(volume, wrong)


def test_publish_again_is_fine_where_the_pool_itself_is_mounted_nosuid(
    workshop: Path, make_pool: MakePool
) -> None:
    disk = make_pool("ext4", mount="nosuid,nodev")
    scene = Scene.make(workshop, disk / "pool", 'backend = "directory"\nenforce_capacity = false')
    volume = scene.create("v", 8 * MIB)

    scene.run(volume)
    scene.publish(volume)

    with pytest.raises(AlreadyExists, match="not readonly"):
        scene.publish(volume, readonly=True)
    scene.end(volume)
    scene.rig.close()


def test_publish_again_is_fine_when_the_filesystem_turned_read_only(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    scene.run(volume)
    subprocess.run(["mount", "-o", "remount,ro", scene.staging(volume)], check=True)

    scene.publish(volume)

    scene.end(volume)


def test_a_path_in_the_pool_is_neither_mounted_on_nor_unmounted_nor_removed(scene: Scene) -> None:
    volume = scene.create("v", 16 * MIB)
    trash = scene.rig.pool.catalog.root / "trash"

    for call in (scene.rig.node.unpublish, scene.rig.node.unstage):
        with pytest.raises(InvalidArgument, match="pool 'p'"):
            call(volume.id, str(trash))
    with pytest.raises(InvalidArgument, match="pool 'p'"):
        scene.rig.node.stage(staged(volume.id, trash))

    assert trash.is_dir()
