# SPDX-License-Identifier: Apache-2.0
"""What backends have in common whose payload is an image: a file with a filesystem in it, or a raw device's content.

Where images lie, and how they become devices, is each backend's own.
"""

import errno
import os
import secrets
from collections.abc import Callable
from dataclasses import replace

from csi_driver.backends.base import PAYLOAD_IMAGE
from csi_driver.backends.parameters import MKFS_OPTIONS
from csi_driver.catalog import Home
from csi_driver.errors import Error, ResourceExhausted, Unavailable, invalid
from csi_driver.linux import files, filesystem, run
from csi_driver.linux.filesystem import FILESYSTEMS
from csi_driver.model import (
    KIB,
    MIB,
    TIB,
    AccessType,
    HealthEntry,
    HealthStatus,
    Parameters,
    Record,
    SizeLimits,
    VolumeSpec,
)

SECTOR_BYTES = 4 * KIB
"""Logical sector of a device that holds a filesystem: every pool filesystem can do direct I/O at it."""

SMALLEST_DEVICE = MIB
LARGEST = 16 * TIB
MISSING = "ImageMissing"
"""The reason in a health answer that says that there is nothing more to look at."""


MOUNT_OPTIONS = {
    # It refuses a second filesystem of the same uuid otherwise, and a restored volume is just that.
    "xfs": ("nouuid",),
    # It discards by default, which would punch holes into a thick image. A user's mount option wins: it comes later.
    "btrfs": ("nodiscard",),
}


def with_filesystem(
    parsed: Parameters, options: str, access_type: AccessType, usual: str, possible: tuple[str, ...]
) -> Parameters:
    """The parameters with the filesystem that a volume is to have, and the mkfs options that the class gives for it.

    Raises:
        InvalidArgument: it cannot be had, or one of the options cannot.
    """
    if access_type is AccessType.BLOCK:
        # A class serves claims of both kinds: what it says of filesystems is not said to a block volume.
        return replace(parsed, fs_type="", mkfs_options=())
    chosen = parsed.fs_type or usual
    if chosen not in possible:
        raise invalid("fsType", chosen, f"volumes can be formatted with {', '.join(possible)}")
    try:
        mkfs_options = tuple(filesystem.parse_options(chosen, options))
    except ValueError as error:
        raise invalid(f"parameters.{MKFS_OPTIONS}", options, str(error)) from error
    return replace(parsed, fs_type=chosen, mkfs_options=mkfs_options)


def size_limits(access_type: AccessType, fs_type: str) -> SizeLimits:
    """What sizes can be made."""
    if access_type is AccessType.BLOCK:
        return SizeLimits(SMALLEST_DEVICE, LARGEST, SECTOR_BYTES)
    return SizeLimits(FILESYSTEMS[fs_type].minimum_bytes, LARGEST, SECTOR_BYTES)


def build(
    home: Home,
    spec: VolumeSpec,
    allocate: Callable[[int], None],
    fill: Callable[[int], None] = lambda _: None,
) -> None:
    """Make the image: `allocate` gives the empty file its size, `fill` works on it once it is formatted."""
    # Never the same name twice: the mkfs of a driver that was killed lives on, may open its image late, and must
    # not find the one that is made here, which may hold data by the time it writes.
    building = f".{secrets.token_hex(8)}.{PAYLOAD_IMAGE}"
    fd = home.open(building, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        allocate(fd)
        if spec.access_type is AccessType.MOUNT:
            format_image(home, building, spec.parameters)
        fill(fd)
        files.sync(fd)
    finally:
        os.close(fd)
    path = f"{home.name}/{building}"
    files.rename(home.area_fd, path, home.area_fd, f"{home.name}/{PAYLOAD_IMAGE}")


def open_image(home: Home, flags: int) -> int:
    """An fd of the image.

    Raises:
        Error: it is gone.
    """
    try:
        return home.open(PAYLOAD_IMAGE, flags)
    except FileNotFoundError as error:
        raise Error(missing(home)) from error


def stat(home: Home) -> os.stat_result:
    """The image as the filesystem has it. FileNotFoundError if it is gone."""
    return os.stat(f"{home.name}/{PAYLOAD_IMAGE}", dir_fd=home.area_fd, follow_symlinks=False)


def size_bytes(home: Home) -> int:
    """How large the image is.

    Raises:
        Error: it is gone.
    """
    try:
        return stat(home).st_size
    except FileNotFoundError as error:
        raise Error(missing(home)) from error


def missing(home: Home) -> str:
    """The sentence for an image that is gone."""
    return f"volume {home.id!r}: its image {home.path / PAYLOAD_IMAGE} is missing: restore it from a backup"


def health(home: Home, record: Record) -> list[HealthEntry]:
    """What is wrong with the image as a file."""
    try:
        image = stat(home)
    except FileNotFoundError:
        return [HealthEntry(HealthStatus.DATA_LOSS, MISSING, missing(home))]
    if image.st_size < record.size_bytes:
        message = f"volume {home.id!r}: its image has {image.st_size} of {record.size_bytes} bytes"
        return [HealthEntry(HealthStatus.DATA_LOSS, "ImageShort", message)]
    return []


def format_image(home: Home, image: str, parameters: Parameters) -> None:
    """Make the filesystem that the parameters ask for."""
    try:
        filesystem.make(parameters.fs_type, home.path / image, parameters.mkfs_options)
    except run.CommandMissing as error:
        raise ResourceExhausted(f"volume {home.id!r}: cannot be made on this node: {error}") from error
    except run.CommandFailed as error:
        if error.timed_out:
            raise Unavailable(f"volume {home.id!r}: {error}") from error
        if parameters.mkfs_options:
            options = " ".join(parameters.mkfs_options)
            raise invalid(
                f"parameters.{MKFS_OPTIONS}", options, f"correct or leave them out: {error}"
            ) from error
        raise Error(f"volume {home.id!r}: {error}") from error


def extend(fd: int, start: int, end: int, *, thin: bool, name: str) -> None:
    """Make the image `end` bytes long; as it was when that fails."""
    try:
        if thin:
            os.ftruncate(fd, end)
        else:
            files.allocate(fd, start, end - start)
    except OSError as error:
        # The kernel keeps what it got before it ran out.
        os.ftruncate(fd, start)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"volume {name!r}: the pool's filesystem has no {end - start} bytes left"
            ) from error
        if error.errno == errno.EFBIG:
            raise ResourceExhausted(
                f"volume {name!r}: {end} bytes are more than the pool's filesystem can have in a file"
            ) from error
        raise


def is_thin(image: os.stat_result) -> bool:
    """Whether blocks are missing: an image that has them all keeps them all, whatever it was asked to be."""
    return image.st_blocks * 512 < image.st_size
