# SPDX-License-Identifier: Apache-2.0
"""Discards punch holes into the file behind a loop device: whether they may is said for each attachment."""

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from csi_driver.linux import files, loop

MIB = 1 << 20
BLKDISCARD = 0x1277


def _discard(device: Path, length: int) -> int:
    """0, or the errno of a refusal."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", 0, length))
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(fd)
    return 0


@pytest.mark.parametrize("allowed", (True, False))
@pytest.mark.parametrize("earlier", (True, False))
def test_discard_is_as_said_whatever_the_device_was_before(
    scratch: Path, earlier: bool, allowed: bool
) -> None:
    image = os.open(scratch / "image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        files.allocate(image, 0, MIB)
        loop.detach(loop.attach(image, sector_size=4096, discard=earlier))
        device = loop.attach(image, sector_size=4096, discard=allowed)
        try:
            refusal = _discard(device.path, MIB)

            assert refusal == (0 if allowed else errno.EOPNOTSUPP)
            assert files.allocated_bytes(image) == (0 if allowed else MIB)
        finally:
            loop.detach(device)
    finally:
        os.close(image)


def test_a_thin_volume_gives_back_after_a_thick_one_had_its_device(scratch: Path) -> None:
    images = [
        os.open(scratch / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("thick", "thin")
    ]
    try:
        for image in images:
            files.allocate(image, 0, MIB)
        for _ in range(3):
            loop.detach(loop.attach(images[0], sector_size=4096, discard=False))
            thin = loop.attach(images[1], sector_size=4096)
            try:
                assert _discard(thin.path, MIB) == 0
            finally:
                loop.detach(thin)
    finally:
        for image in images:
            os.close(image)
