# SPDX-License-Identifier: Apache-2.0
"""Copy a directory tree that strangers may be writing in, with everything that a file is.

Kept: content (shared or copied, holes stay holes), owner, mode, times, extended attributes and so ACLs and file
capabilities, hard links within the tree, symlinks, fifos, sockets, device nodes, any name, any depth. Not kept: flags
of chattr(1), and what is mounted in the tree. Not of one moment: what changes meanwhile is copied as it is met.

The source is resolved beneath its descriptor, through no symlink, and should be a view of its own (`mount.private_view`),
for a file can be a mount point as well; the destination must be out of everybody's sight.
"""

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import Final

from csi_driver.linux import files, syscall
from csi_driver.linux.copy import Transfer, copy_sparse

_WITHIN: Final = (
    syscall.RESOLVE_BENEATH
    | syscall.RESOLVE_NO_SYMLINKS
    | syscall.RESOLVE_NO_MAGICLINKS
    | syscall.RESOLVE_NO_XDEV
)
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
# A name of one part: there is nothing to resolve. Non-blocking, for a fifo that has taken a file's place meanwhile.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PIECE: Final = 4000
"""Bytes of a path that are surely resolved at once (PATH_MAX is 4096)."""
_CANNOT_SHARE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY)
_NO_ATTRIBUTES: Final = (errno.EOPNOTSUPP, errno.ENODATA)
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")


@dataclass
class _Copy:
    """One run: where from and to, and the first place of each file with several names."""

    src_fd: int
    dst_fd: int
    transfer: Transfer
    share: bool
    links: dict[tuple[int, int], str] = field(default_factory=dict)


def copy_tree(src_fd: int, dst_fd: int, transfer: Transfer, *, share: bool) -> None:
    """Fill the empty directory `dst_fd` with what is in `src_fd`, and make it like it. Not synced.

    With `share`, files share their blocks with the source's where the filesystem can. What disappears meanwhile is
    left out.

    Raises copy.Stopped; OSError: ENOSPC, EDQUOT, EIO, EPERM without root's powers, …
    """
    run = _Copy(src_fd, dst_fd, transfer, share)
    _inherit_nothing(dst_fd)
    waiting = [""]
    while waiting:
        transfer.check()
        waiting += _copy_directory(run, waiting.pop())


def _inherit_nothing(dst_fd: int) -> None:
    """No ACL but the source's, for it and what is made in it: where the pool is, there may be a default one."""
    for name in _attributes(dst_fd):
        if name in _ACLS:
            os.removexattr(dst_fd, name)


def _copy_directory(run: _Copy, path: str) -> list[str]:
    """All of one directory but what is in those beneath it, which are made, and whose paths come back."""
    try:
        source = _open(run.src_fd, path)
    except (FileNotFoundError, NotADirectoryError):
        return []  # gone, or replaced by something that is no directory any more
    except OSError as error:
        # A mount point, or a symlink put in a directory's place: what is there is not the volume's.
        if error.errno not in (errno.EXDEV, errno.ELOOP):
            raise
        return []
    try:
        target = _open(run.dst_fd, path)
        try:
            below = _copy_entries(run, source, target, path)
            # Complete: what will be made in its subdirectories changes nothing of it.
            _describe(source, target, os.fstat(source))
        finally:
            os.close(target)
    finally:
        os.close(source)
    return below


def _copy_entries(run: _Copy, source: int, target: int, path: str) -> list[str]:
    below = []
    with os.scandir(source) as entries:
        for entry in entries:
            name = entry.name
            try:
                if entry.is_file(follow_symlinks=False):
                    _copy_file(run, source, target, path, name)
                elif entry.is_dir(follow_symlinks=False):
                    os.mkdir(name, 0o700, dir_fd=target)
                    below.append(os.path.join(path, name))
                else:
                    _copy_special(run, source, target, path, name)
            except FileNotFoundError:
                continue
    return below


def _copy_special(run: _Copy, source: int, target: int, path: str, name: str) -> None:
    found = os.stat(name, dir_fd=source, follow_symlinks=False)
    if found.st_nlink > 1 and _link(run, target, path, name, found):
        return
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    elif stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, "replaced while it was copied", name)
    else:
        os.mknod(name, found.st_mode, found.st_rdev, dir_fd=target)
    _describe_unopened(source, target, name, found)


def _link(run: _Copy, target: int, path: str, name: str, found: os.stat_result) -> bool:
    """Give a file that has been copied already its other name; False if this is the first."""
    place = os.path.join(path, name)
    identity = (found.st_dev, found.st_ino)
    first = run.links.setdefault(identity, place)
    if first == place:
        return False
    folder, _, leaf = first.rpartition("/")
    parent = _open(run.dst_fd, folder)
    try:
        os.link(leaf, name, src_dir_fd=parent, dst_dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        # The first name was gone before it could be copied.
        run.links[identity] = place
        return False
    finally:
        os.close(parent)
    return True


def _copy_file(run: _Copy, source: int, target: int, path: str, name: str) -> None:
    try:
        src_fd = os.open(name, _FILE, dir_fd=source)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EACCES):
            raise
        raise FileNotFoundError(errno.ENOENT, "replaced while it was copied", name) from error
    try:
        found = os.fstat(src_fd)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "replaced while it was copied", name)
        if found.st_nlink == 1 or not _link(run, target, path, name, found):
            _copy_opened(run, src_fd, target, name, found)
    finally:
        os.close(src_fd)


def _copy_opened(run: _Copy, src_fd: int, target: int, name: str, found: os.stat_result) -> None:
    # Writable until its content is there: some servers ask the file's mode at each write.
    mode = found.st_mode & 0o777 | 0o600
    dst_fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=target)
    try:
        if found.st_size:
            _copy_content(run, src_fd, dst_fd, found)
        else:
            run.transfer.advance(0)
        _describe(src_fd, dst_fd, found)
    finally:
        os.close(dst_fd)


def _copy_content(run: _Copy, src_fd: int, dst_fd: int, found: os.stat_result) -> None:
    if run.share:
        try:
            files.clone_file(src_fd, dst_fd)
        except OSError as error:
            if error.errno not in _CANNOT_SHARE:
                raise
        else:
            run.transfer.advance(0)
            return
    copy_sparse(src_fd, dst_fd, run.transfer, found)


def _describe(src_fd: int, dst_fd: int, found: os.stat_result) -> None:
    """Owner, mode, attributes and times, in the order in which one does not undo the other.

    To look costs less than to change: what is right since it was made is left as it is.
    """
    made = os.fstat(dst_fd)
    mode = stat.S_IMODE(found.st_mode)
    if (found.st_uid, found.st_gid) != (made.st_uid, made.st_gid):
        os.fchown(dst_fd, found.st_uid, found.st_gid)
        os.fchmod(dst_fd, mode)
    elif mode != stat.S_IMODE(made.st_mode):
        os.fchmod(dst_fd, mode)
    for name in _attributes(src_fd):
        try:
            os.setxattr(dst_fd, name, os.getxattr(src_fd, name))
        except OSError as error:
            if error.errno not in _NO_ATTRIBUTES:
                raise
    os.utime(dst_fd, ns=(found.st_atime_ns, found.st_mtime_ns))


def _describe_unopened(source: int, target: int, name: str, found: os.stat_result) -> None:
    """The same for what must not be opened: symlinks, fifos, sockets, devices."""
    os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(name, stat.S_IMODE(found.st_mode), dir_fd=target)
    old, new = f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}"
    for attribute in _attributes(old):
        try:
            os.setxattr(
                new, attribute, os.getxattr(old, attribute, follow_symlinks=False), follow_symlinks=False
            )
        except OSError as error:
            if error.errno not in _NO_ATTRIBUTES:
                raise
    os.utime(name, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def _attributes(place: int | str) -> list[str]:
    try:
        return os.listxattr(place) if isinstance(place, int) else os.listxattr(place, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        return []


def _open(root_fd: int, path: str) -> int:
    """The directory at a path beneath `root_fd`, however long the path is."""
    encoded = os.fsencode(path)
    if len(encoded) <= _PIECE:
        return syscall.openat2(root_fd, path or ".", _DIRECTORY, 0, _WITHIN)
    cut = encoded.rindex(b"/", 0, _PIECE)
    upper = _open(root_fd, os.fsdecode(encoded[:cut]))
    try:
        return _open(upper, os.fsdecode(encoded[cut + 1 :]))
    finally:
        os.close(upper)
