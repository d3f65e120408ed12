# SPDX-License-Identifier: Apache-2.0
"""Locked images behind loop devices that tell whose they are without asking anyone. Files of this machine stand for a server's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.linux import fence, files, loop
from csi_driver.linux.fence import Held
from tests.conftest import require_root

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    require_root()
    path = tmp_path / "volumes/v-1/image"
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, 8 * MIB)
    yield path
    for node in ("one", "two"):
        assert fence.let_go("v-1", node, tmp_path / "nowhere", 5)


def hold(image: Path, node: str = "one", *, readonly: bool = False) -> Held:
    fd = os.open(image, os.O_RDONLY if readonly else os.O_RDWR)
    try:
        assert readonly or files.lock_whole(fd)
        return fence.hold(fd, node, readonly=readonly, sector_size=4096, discard=True)
    finally:
        os.close(fd)


def is_locked(image: Path) -> bool:
    fd = os.open(image, os.O_RDWR)
    try:
        assert files.is_locked(fd) is not files.lock_whole(fd)
        return not files.lock_whole(fd)
    finally:
        os.close(fd)


def test_the_device_has_the_lock_for_as_long_as_it_lives(image: Path, tmp_path: Path) -> None:
    assert not is_locked(image)
    held = hold(image)

    assert is_locked(image)
    assert (held.volume_id, held.size_bytes, held.readonly) == ("v-1", 8 * MIB, False)
    assert held.export == os.makedev(0, os.minor(image.stat().st_dev))
    assert held.backing == image and os.stat(held.path).st_rdev == held.device
    assert fence.of_device(held.device) == held
    # In use when it is let go: with its last user.
    with open(held.path, "rb"):
        assert not fence.let_go("v-1", "one", tmp_path / "nowhere", 0.1)
        assert is_locked(image)
    assert fence.let_go("v-1", "one", tmp_path / "nowhere", 5)
    assert not is_locked(image) and fence.of_device(held.device) is None


def test_a_device_that_was_told_to_go_can_be_kept(image: Path, tmp_path: Path) -> None:
    held = hold(image)
    with open(held.path, "rb"):
        assert not fence.let_go("v-1", "one", tmp_path / "nowhere", 0.1)
        assert fence.keep(held)
    assert fence.find("v-1", "one") == [held] and is_locked(image)
    assert fence.let_go("v-1", "one", tmp_path / "nowhere", 5)
    assert not fence.keep(held)


def test_who_asks_every_device_passes_them_over(image: Path) -> None:
    held = hold(image)
    fd = os.open(image, os.O_RDONLY)
    try:
        # Asked for its status, the kernel would ask the server.
        assert held.number not in [one.number for one in loop.all()]
        assert loop.find(fd) == [] and loop.get(held.number) is None
    finally:
        os.close(fd)
    assert held.number in loop.numbers()


def test_nodes_that_share_a_kernel_know_their_own(image: Path) -> None:
    one, two = hold(image), hold(image, "two", readonly=True)

    assert fence.find("v-1", "one") == [one] and fence.find("v-1", "two") == [two]
    assert two.readonly
    with pytest.raises(PermissionError), open(two.path, "r+b", buffering=0) as device:
        device.write(bytes(4096))


def test_a_device_takes_the_size_that_its_image_has(image: Path) -> None:
    held = hold(image)
    os.truncate(image, 16 * MIB)
    assert fence.find("v-1", "one")[0].size_bytes == 8 * MIB

    assert fence.refresh(held, image).size_bytes == 16 * MIB


def test_a_mount_that_fences_nothing_is_told(tmp_path: Path) -> None:
    assert "no NFS export is mounted" in fence.problem(tmp_path)
