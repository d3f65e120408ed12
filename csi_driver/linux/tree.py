# SPDX-License-Identifier: Apache-2.0
"""Remove a directory tree that strangers have filled: deep, oddly named, immutable, with subvolumes in it.

Never through a symlink, never into another mount, and not at all while anything is mounted in it. Whether the
tree may go is the caller's decision.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from csi_driver.linux import btrfs, mountinfo, syscall
from csi_driver.linux.syscall import ioctl

FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IMMUTABLE_FL: Final = 0x10
FS_APPEND_FL: Final = 0x20

# NO_XDEV is about mounts, not devices: a btrfs subvolume is entered, anything mounted is not (EXDEV).
_WITHIN: Final = (
    syscall.RESOLVE_BENEATH
    | syscall.RESOLVE_NO_SYMLINKS
    | syscall.RESOLVE_NO_MAGICLINKS
    | syscall.RESOLVE_NO_XDEV
)
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# Subdirectories remembered per level; a directory with more is read again for the rest.
_BATCH: Final = 4096


@dataclass
class _Level:
    """A directory being emptied: its name in the parent, its identity, the subdirectories still to enter."""

    name: str
    identity: tuple[int, int]
    below: list[str] = field(default_factory=list)


def remove_tree(dir_fd: int, name: str, check: Callable[[], None] = lambda: None) -> None:
    """Remove `name`, a single component beneath `dir_fd`, with all that is in it. Missing is fine.

    `check` is called for each entry, and may raise: what is gone by then is gone, the rest may be removed later.

    Uses one descriptor at a time however deep the tree is. Clears immutable and append-only flags that are in
    the way; deletes nested btrfs subvolumes, read-only ones too.

    Raises OSError:
        EBUSY: something is mounted at or below it; nothing has been removed then. (If it was mounted after
            the look: EBUSY or EXDEV at that point; the mount is never entered.)
        EINVAL: `name` is not a single component.
        EROFS, EIO, …: stopped there; may be repeated.
    """
    if not name or name in (".", "..") or "/" in name:
        raise OSError(errno.EINVAL, "not a single path component", name)
    try:
        fd = syscall.openat2(dir_fd, name, os.O_PATH | os.O_NOFOLLOW, 0, _WITHIN & ~syscall.RESOLVE_NO_XDEV)
    except FileNotFoundError:
        return
    try:
        _refuse_mounts(fd, name)
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
    if not is_directory:
        _unlink(dir_fd, name)
    elif not _remove_directory(dir_fd, name):
        _walk(dir_fd, name, check)


def _refuse_mounts(fd: int, name: str) -> None:
    try:
        inside = mountinfo.mounts_beneath(fd)
    except FileNotFoundError:
        return  # Removed by another meanwhile.
    if inside:
        more = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
        raise OSError(errno.EBUSY, f"still mounted inside: {inside[0].target}{more}", name)


def _walk(dir_fd: int, name: str, check: Callable[[], None]) -> None:
    top = os.fstat(dir_fd)
    levels = [_Level(name, (0, 0))]
    fd = _enter(dir_fd, levels[0])
    try:
        while fd is not None and levels:
            level = levels[-1]
            if not level.below:
                level.below = _empty(fd, check)
            if level.below:
                below = _Level(level.below.pop(), (0, 0))
                if _remove_directory(fd, below.name):
                    continue
                entered = _enter(fd, below)
                if entered is not None:
                    os.close(fd)
                    fd = entered
                    levels.append(below)
                continue
            levels.pop()
            upper = levels[-1].identity if levels else (top.st_dev, top.st_ino)
            fd = _leave(fd, level.name, upper)
    finally:
        if fd is not None:
            os.close(fd)


def _enter(dir_fd: int, level: _Level) -> int | None:
    try:
        fd = syscall.openat2(dir_fd, level.name, _DIRECTORY, 0, _WITHIN)
    except FileNotFoundError:
        return None
    found = os.fstat(fd)
    level.identity = (found.st_dev, found.st_ino)
    if found.st_ino == btrfs.BTRFS_FIRST_FREE_OBJECTID and btrfs.is_subvolume(fd):
        btrfs.set_readonly(fd, False)
    return fd


def _leave(fd: int, name: str, upper: tuple[int, int]) -> int:
    """Close `fd`, remove it from its parent, return the parent's descriptor."""
    try:
        # Not beneath anything, so only trusted when it is the very directory that we came from.
        parent = os.open("..", _DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    finally:
        os.close(fd)
    found = os.fstat(parent)
    if (found.st_dev, found.st_ino) != upper:
        os.close(parent)
        raise OSError(errno.ESTALE, "moved elsewhere while it was being removed", name)
    try:
        _remove_directory(parent, name)
    except BaseException:
        os.close(parent)
        raise
    return parent


def _empty(fd: int, check: Callable[[], None]) -> list[str]:
    """Unlink all that is not a directory; return the names of (some of) the directories."""
    below: list[str] = []
    # FileNotFoundError: another has removed this very directory meanwhile.
    with contextlib.suppress(FileNotFoundError), os.scandir(fd) as entries:
        for entry in entries:
            check()
            if not entry.is_dir(follow_symlinks=False):
                _unlink(fd, entry.name)
                continue
            below.append(entry.name)
            if len(below) >= _BATCH:
                break
    return below


def _unlink(dir_fd: int, name: str) -> None:
    try:
        _permitted(dir_fd, name, is_directory=False)
    except FileNotFoundError:
        return


def _remove_directory(dir_fd: int, name: str) -> bool:
    """Remove an empty directory or a subvolume without nested ones; False if it must be emptied first."""
    with contextlib.suppress(FileNotFoundError):  # Removed by another, at whatever step.
        try:
            _permitted(dir_fd, name, is_directory=True)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return btrfs.delete_if_subvolume(dir_fd, name)
    return True


def _permitted(dir_fd: int, name: str, *, is_directory: bool) -> None:
    remove = os.rmdir if is_directory else os.unlink
    try:
        remove(name, dir_fd=dir_fd)
        return
    except PermissionError:
        pass
    # The flag may be on the entry or on the directory that holds it.
    _clear_flags(dir_fd)
    try:
        fd = syscall.openat2(dir_fd, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, 0, _WITHIN)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    else:
        try:
            _clear_flags(fd)
        finally:
            os.close(fd)
    remove(name, dir_fd=dir_fd)


def _clear_flags(fd: int) -> None:
    flags = bytearray(8)
    try:
        ioctl(fd, FS_IOC_GETFLAGS, flags, "FS_IOC_GETFLAGS")
        now = int.from_bytes(flags[:4], "little")
        kept = now & ~(FS_IMMUTABLE_FL | FS_APPEND_FL)
        if kept != now:
            ioctl(fd, FS_IOC_SETFLAGS, bytearray(kept.to_bytes(8, "little")), "FS_IOC_SETFLAGS")
    except OSError as error:
        # No such flags on this filesystem or kind of file, so they are not what is in the way.
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
