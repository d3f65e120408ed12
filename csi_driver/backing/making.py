# SPDX-License-Identifier: Apache-2.0
"""Make a managed pool's filesystem, in a file that is not there yet, or on what was found blank.

mkfs runs on a fresh file only, whose name is never used twice: when the driver is killed its mkfs lives on, and may
write late. The file is then renamed into its place, or its content is brought to the device by this process itself:
the mark first, then everything, the first block last. Killed at any point, the next start finds nothing, or the mark.
Whether it may be made is the caller's business.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

from csi_driver.backing.identity import mark, new_uuid
from csi_driver.config import BackingConfig
from csi_driver.errors import ConfigurationError
from csi_driver.linux import files, filesystem, run
from csi_driver.linux.transplant import transplant, write_all

FIRST_BYTES = 4096
"""Where XFS has its superblock, and btrfs nothing: written last."""
_UUID_OPTIONS = {"xfs": ("-m", "reflink=1,uuid={}"), "btrfs": ("-U", "{}")}
_TIMEOUT_S = 600.0


def make_file(pool: str, backing: BackingConfig) -> UUID:
    """Make the file, with the filesystem in it; it appears whole, on disk, or not at all.

    Raises:
        ConfigurationError: no room, or mkfs could not.
    """
    uuid = new_uuid(pool)
    backing.target.parent.mkdir(parents=True, exist_ok=True)
    with _fresh(backing.target.parent, backing.target.name, backing) as image:
        path, fd = image
        size(fd, backing)
        _format(path, backing, uuid)
        files.sync(fd)
        directory = files.open_directory(backing.target.parent)
        try:
            files.rename(directory, path.name, directory, backing.target.name)
            files.sync(directory)
        finally:
            os.close(directory)
    return uuid


def fill(fd: int, pool: str, backing: BackingConfig, scratch: Path) -> UUID:
    """Bring the filesystem to a file or device that is blank, or half-made.

    Raises:
        ConfigurationError: no room in the `scratch` directory, or mkfs could not.
    """
    # Also of what is made again: mkfs.btrfs refuses a uuid that it finds on some device already.
    uuid = new_uuid(pool)
    write_all(fd, mark(pool, uuid), 0)
    files.sync(fd)
    with _fresh(scratch, "backing", backing) as image:
        path, image_fd = image
        os.ftruncate(image_fd, os.lseek(fd, 0, os.SEEK_END) & ~0xFFF)
        _format(path, backing, uuid)
        transplant(image_fd, fd, FIRST_BYTES)
        write_all(fd, os.pread(image_fd, FIRST_BYTES, 0), 0)
        files.sync(fd)
    return uuid


def size(fd: int, backing: BackingConfig) -> None:
    """Make the file as large as configured, and allocate its blocks where that is wanted; never shrinks.

    Raises:
        ConfigurationError: no room for all of it.
    """
    found = os.fstat(fd)
    try:
        missing = backing.size_bytes - found.st_blocks * 512 if backing.preallocate else 0
        # Asked first: what the kernel gets before it runs out, it keeps, and the disk would be full.
        if missing > files.usage(backing.target.parent).free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if found.st_size < backing.size_bytes:
            os.ftruncate(fd, backing.size_bytes)
        if backing.preallocate and found.st_blocks * 512 < backing.size_bytes:
            files.allocate(fd, 0, backing.size_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigurationError(
            f"{backing.where} file {str(backing.target)!r}: cannot have {backing.size_bytes} bytes: {error.strerror} "
            f"({_free(backing.target.parent)}): lower `size`, free some, or leave `preallocate` out"
        ) from error


def sweep(directory: Path, name: str) -> None:
    """Remove what makings of `name` that were killed have left."""
    for entry in directory.iterdir():
        if is_leftover(entry.name, name):
            entry.unlink(missing_ok=True)


def is_leftover(entry: str, name: str = "backing") -> bool:
    """Whether a directory's entry is such a remnant."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.new", entry) is not None


@contextmanager
def _fresh(directory: Path, name: str, backing: BackingConfig) -> Iterator[tuple[Path, int]]:
    path = directory / f".{name}.{secrets.token_hex(8)}.new"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield path, fd
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(backing, directory, error) from error
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):
            path.unlink()


def _format(path: Path, backing: BackingConfig, uuid: UUID) -> None:
    options = [option.format(uuid) for option in _UUID_OPTIONS[backing.fs_type]]
    try:
        filesystem.make(backing.fs_type, path, options, timeout_s=_TIMEOUT_S)
    except run.CommandFailed as error:
        if "No space left" in error.stderr:
            raise _no_room(backing, path.parent, error) from error
        raise


def _no_room(backing: BackingConfig, directory: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{backing.where}: no room for what a new {backing.fs_type} itself takes ({_free(directory)}): free some, or "
        f"put it elsewhere: {error}"
    )


def _free(directory: Path) -> str:
    return f"{files.usage(directory).free_bytes} bytes are free in {directory}"
