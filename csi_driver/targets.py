# SPDX-License-Identifier: Apache-2.0
"""One path that a pod sees: make it show a directory or a device, and take that away again.

The kernel is asked what is there, nothing is remembered. A target is made by `mkdir` or as an empty file, and only
ever removed by `rmdir` or `unlink`: what a pod wrote can not be lost here, whatever is mounted or not.
"""

import errno
import os
import stat
from pathlib import Path

from csi_driver.errors import AlreadyExists, FailedPrecondition
from csi_driver.linux import mount
from csi_driver.linux.mount import Attributes, Mounted
from csi_driver.linux.syscall import Statx


def ensure_bound(source_fd: int, target: Path, attributes: Attributes) -> None:
    """Make `target` show what `source_fd` is open on, with these attributes.

    Raises:
        AlreadyExists: something else is mounted there, or the same with other attributes.
        FailedPrecondition: the target cannot be made (its parent is the caller's to make).
    """
    source = mount.seen(source_fd)
    mounted = mount.find_mounted(target)
    if mounted is not None:
        _check_same(mounted, source, target)
        _check_attributes(mounted.attributes, mount.attributes_of(source_fd), attributes, target)
        return
    made = _make(target, directory=stat.S_ISDIR(source.stx_mode))
    try:
        mount.bind(source_fd, target, attributes)
    except BaseException:
        if made:
            _remove(target)
        raise


def ensure_unbound(target: Path) -> None:
    """Make `target` show nothing and be gone; fine when it is already.

    Raises:
        FailedPrecondition: something that was never mounted there stands in the way.
    """
    mount.unmount(target)
    _remove(target)


def _check_same(mounted: Mounted, source: Statx, target: Path) -> None:
    if stat.S_ISDIR(source.stx_mode):
        same = (mounted.device, mounted.inode) == (source.device, source.stx_ino)
    else:
        same = mounted.rdev == os.makedev(source.stx_rdev_major, source.stx_rdev_minor)
    if not same:
        raise AlreadyExists(
            f"target_path {os.fspath(target)!r}: another volume, or another part of it, is there"
        )


def _check_attributes(have: Attributes, inherited: Attributes, wanted: Attributes, target: Path) -> None:
    """A bind has what its source's mount has, and what was asked for (the filesystem may be read-only by itself)."""
    for flag in ("readonly", "nosuid", "nodev", "noexec"):
        missing = getattr(wanted, flag) and not getattr(have, flag)
        surplus = getattr(have, flag) and not (getattr(wanted, flag) or getattr(inherited, flag))
        if missing or surplus:
            now = f"not {flag}" if missing else flag
            raise AlreadyExists(
                f"target_path {os.fspath(target)!r}: already published, {now}: unpublish it first"
            )


def _make(target: Path, *, directory: bool) -> bool:
    """Whether it was made now (and is ours to undo)."""
    try:
        if directory:
            os.mkdir(target, 0o750)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o640))
    except FileExistsError:
        _check_kind(target, directory=directory)
        return False
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FailedPrecondition(
            f"target_path {os.fspath(target)!r}: its parent directory does not exist: the caller makes it"
        ) from error
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise FailedPrecondition(
            f"target_path {os.fspath(target)!r}: is on a read-only filesystem"
        ) from error
    return True


def _check_kind(target: Path, *, directory: bool) -> None:
    mode = os.lstat(target).st_mode
    if stat.S_ISDIR(mode) != directory or stat.S_ISLNK(mode):
        wanted = "directory" if directory else "file"
        raise FailedPrecondition(
            f"target_path {os.fspath(target)!r}: is there, and is no {wanted}: remove it"
        )


def _remove(target: Path) -> None:
    try:
        mode = os.lstat(target).st_mode
        if stat.S_ISDIR(mode):
            os.rmdir(target)
        elif stat.S_ISREG(mode) and not os.lstat(target).st_size:
            os.unlink(target)
        else:
            raise FailedPrecondition(
                f"target_path {os.fspath(target)!r}: is no mount target: remove it by hand"
            )
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FailedPrecondition(
            f"target_path {os.fspath(target)!r}: nothing is mounted there, but it holds files that belong to no "
            "volume of this driver: look at them and remove them by hand"
        ) from error
