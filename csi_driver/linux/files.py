# SPDX-License-Identifier: Apache-2.0
"""Files and directories beneath an open directory: safe resolution, atomic creation, space, locks.

Every path here is resolved beneath a descriptor, through no symlink. Which file means what is the caller's
business. Removing whole trees is in `tree` (re-exported here), for it needs to know of mounts.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.linux import syscall
from csi_driver.linux.syscall import ioctl
from csi_driver.linux.tree import remove_tree as remove_tree

_SAFE: Final = syscall.RESOLVE_BENEATH | syscall.RESOLVE_NO_SYMLINKS | syscall.RESOLVE_NO_MAGICLINKS
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
FALLOC_FL_WRITE_ZEROES: Final = 0x80
FICLONE: Final = 0x40049409

_ST_RDONLY: Final = 1
_F_OFD_GETLK: Final = 36
_F_OFD_SETLK: Final = 37
_FLOCK: Final = "hhxxxxqqixxxx"
_BLOCK: Final = 512
_ZEROS: Final = 4 << 20

# f_type of statfs(2), from linux/magic.h.
FILESYSTEM_MAGIC: Final = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x00C36400: "ceph",
    0x65735546: "fuse",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x01021997: "9p",
    0x858458F6: "ramfs",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x4D44: "vfat",
    0x9660: "iso9660",
    0x5346544E: "ntfs",
    0x1373: "devfs",
    0x9FA0: "proc",
    0x62656572: "sysfs",
}


def open_directory(path: Path) -> int:
    """Open the directory read-only. ELOOP or ENOTDIR if its last component is a symlink."""
    return os.open(path, _DIRECTORY)


def open_beneath(dir_fd: int, path: str, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    """Open `path` beneath `dir_fd`, through no symlink and never out of it; mounts are crossed.

    Always O_CLOEXEC. openat2(2), kernel 5.6.

    Raises OSError: ELOOP a symlink on the way or at the end, EXDEV an absolute path or one that leaves
    `dir_fd`, ENOENT, ENOTDIR and whatever open(2) says.
    """
    if not flags & os.O_PATH:
        # Implied by RESOLVE_NO_SYMLINKS; together with O_DIRECTORY it would call a symlink ENOTDIR.
        flags &= ~os.O_NOFOLLOW
    return syscall.openat2(dir_fd, path, flags, mode, _SAFE)


def ensure_directory(
    dir_fd: int, path: str, *, mode: int = 0o755, uid: int = -1, gid: int = -1, durable: bool = True
) -> int:
    """Make sure that directory `path` stands beneath `dir_fd`; return a readable descriptor of it.

    Missing components appear complete (owner, mode, synced) or not at all; existing ones are left as they are. An
    owner of -1 is the caller. Without `durable` they appear whole too, and a crash of the machine may undo them.
    The descriptor serves as `source_fd` of `mount.bind`. Who loses a race uses what the winner made.

    Raises OSError: ENOTDIR a non-directory in the way, ELOOP a symlink, EXDEV `..` or an absolute path.
    """
    components = [component for component in path.split("/") if component not in ("", ".")]
    if path.startswith("/") or ".." in components:
        raise OSError(errno.EXDEV, "the path leaves its directory", path)
    try:
        return open_beneath(dir_fd, "/".join(components) or ".", _DIRECTORY)
    except FileNotFoundError:
        pass
    current = open_beneath(dir_fd, ".", _DIRECTORY)
    for component in components:
        try:
            below = _ensure_component(current, component, mode, uid, gid, durable)
        finally:
            os.close(current)
        current = below
    return current


def _ensure_component(dir_fd: int, name: str, mode: int, uid: int, gid: int, durable: bool) -> int:
    try:
        return open_beneath(dir_fd, name, _DIRECTORY)
    except FileNotFoundError:
        pass
    temporary = unfinished(name)
    # One that a crash has left, or that another is making alike at this moment, is gone on with.
    with contextlib.suppress(FileExistsError):
        os.mkdir(temporary, 0o700, dir_fd=dir_fd)
    try:
        made = open_beneath(dir_fd, temporary, _DIRECTORY)
        try:
            os.fchown(made, uid, gid)
            os.fchmod(made, mode)  # After chown, which clears setgid; mkdir's mode is cut by the umask.
            if durable:
                os.fsync(made)
        finally:
            os.close(made)
        rename(dir_fd, temporary, dir_fd, name)
    except (FileExistsError, FileNotFoundError):
        _try_rmdir(dir_fd, temporary)  # Another was faster.
    except BaseException:
        _try_rmdir(dir_fd, temporary)
        raise
    else:
        if durable:
            os.fsync(dir_fd)
    return open_beneath(dir_fd, name, _DIRECTORY)


def _try_rmdir(dir_fd: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=dir_fd)


def unfinished(name: str) -> str:
    """What `name` is called while it is being made: always the same, so that the next try takes a crash's remains over."""
    return f".{os.fsdecode(os.fsencode(name)[:200])}.new"


def write_new(dir_fd: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Make the file `name` with this content, synced. FileExistsError if there is one. A crash may leave a part of it."""
    fd = open_beneath(dir_fd, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        _ensure_mode(fd, mode)
        _write_all(fd, data)
        sync(fd)
    finally:
        os.close(fd)


def _ensure_mode(fd: int, mode: int) -> None:
    # The umask may have cut it. To look is free, also where to change is a request to a server.
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)


def write_atomic(dir_fd: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Make `name` hold exactly `data`, all or nothing, and its content synced.

    One writer at a time. The rename itself is durable once the caller syncs the directory. A crash may leave
    `unfinished(name)`, which the next try overwrites.
    """
    temporary = unfinished(name)
    fd = open_beneath(dir_fd, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.fchmod(fd, mode)
            _write_all(fd, data)
            sync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        os.unlink(temporary, dir_fd=dir_fd)
        raise


def write_once(dir_fd: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Make the file `name` with this content, all or nothing, unless there is one: of several writers one wins.

    Not durable until the caller syncs the directory.
    """
    temporary = f".{name}.{secrets.token_hex(8)}.new"
    write_new(dir_fd, temporary, data, mode)
    try:
        # Not a rename: on some network filesystems it cannot but replace.
        os.link(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        with contextlib.suppress(FileExistsError):
            rename(dir_fd, temporary, dir_fd, name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=dir_fd)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except OSError as error:
            raise syscall.failure("write", syscall.describe(fd), error.errno) from None


def read(dir_fd: int, path: str) -> bytes:
    """The whole content of a file beneath `dir_fd`. FileNotFoundError if there is none."""
    # O_NONBLOCK: a fifo in the file's place must not hang us; a directory gives EISDIR at the read.
    fd = open_beneath(dir_fd, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        parts = []
        # One byte more than the size, so that the usual file ends with two reads.
        while part := os.read(fd, max(os.fstat(fd).st_size + 1, 4096)):
            parts.append(part)
        return b"".join(parts)
    except OSError as error:
        raise syscall.failure("read", path, error.errno) from None
    finally:
        os.close(fd)


def sync(fd: int) -> None:
    """fsync(2). EIO, ENOSPC and EDQUOT here mean that the data is not on the disk."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise syscall.failure("fsync", syscall.describe(fd), error.errno) from None


def sync_filesystem(fd: int) -> None:
    """syncfs(2): everything on the descriptor's filesystem is on the disk when this returns."""
    syscall.syncfs(fd)


def sync_directory(dir_fd: int, path: str = ".") -> None:
    """Make the names in a directory beneath `dir_fd` durable (or those of `dir_fd` itself)."""
    fd = open_beneath(dir_fd, path, _DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def rename(old_dir_fd: int, old: str, new_dir_fd: int, new: str) -> None:
    """Rename, and never replace: renameat2(2) with RENAME_NOREPLACE. Not durable until the directories are synced.

    Where the filesystem has no such rename (EINVAL: some network filesystems), it looks first, so that two
    renames to one name at the same moment are not told apart there.

    Raises OSError: EEXIST (FileExistsError), ENOENT, EXDEV, …
    """
    try:
        syscall.renameat2(old_dir_fd, old, new_dir_fd, new, syscall.RENAME_NOREPLACE)
        return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
    try:
        os.stat(new, dir_fd=new_dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        # A true EINVAL (a directory into itself, '.') comes again from here.
        os.rename(old, new, src_dir_fd=old_dir_fd, dst_dir_fd=new_dir_fd)
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), old, None, new)


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve the bytes `offset` … `offset + length` on disk (they read as zero if new); the file grows to hold them.

    fallocate(2) mode 0, never emulated. Raises OSError: ENOSPC, EDQUOT, EFBIG, EOPNOTSUPP. After ENOSPC a part may
    be allocated: free it by truncating or removing the file.
    """
    syscall.fallocate(fd, 0, offset, length)


def write_zeros(fd: int, start: int, end: int) -> None:
    """Turn what is allocated but unwritten between `start` and `end` into written zeros; what is written stays.

    Then the first write of each block need not change the file's extents. The disk does it by itself where kernel (6.17)
    and disk can; else all of it is written, past the page cache where possible, which takes as long as the disk takes.
    No one else may write there meanwhile. Not synced.
    """
    sync(fd)  # What waits in the page cache for its first writing counts as written from here on.
    direct = os.O_DIRECT if direct_io_alignment(fd) else 0
    writer = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC | direct)
    try:
        with mmap.mmap(-1, _ZEROS) as zeros:
            for first, last in _unwritten(fd, start, end):
                _write_zeros(writer, zeros, first, last)
    finally:
        os.close(writer)


def _unwritten(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges that read as zero for want of data: unwritten extents look like holes."""
    while start < end:
        first = os.lseek(fd, start, os.SEEK_HOLE)
        try:
            start = os.lseek(fd, first, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # No data behind.
                raise
            start = end
        if first < min(start, end):
            yield first, min(start, end)


def _write_zeros(fd: int, zeros: mmap.mmap, first: int, last: int) -> None:
    try:
        syscall.fallocate(fd, FALLOC_FL_WRITE_ZEROES, first, last - first)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    with memoryview(zeros) as view:
        while first < last:
            first += os.pwrite(fd, view[: min(_ZEROS, last - first)], first)


def punch(fd: int, offset: int, length: int) -> None:
    """Give the bytes back to the filesystem; they read as zero, the file's size stays. EOPNOTSUPP where it cannot."""
    syscall.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def allocated_bytes(fd: int) -> int:
    """Bytes that the file occupies on disk, fallocated ones included."""
    return os.fstat(fd).st_blocks * _BLOCK


@dataclass(frozen=True)
class Usage:
    """What statvfs(3) says; free means available to an ordinary user. Counts of inodes are 0 where unlimited."""

    total_bytes: int
    free_bytes: int
    used_bytes: int
    total_inodes: int
    free_inodes: int
    used_inodes: int
    read_only: bool


def usage(fd_or_path: int | Path) -> Usage:
    """Space and inodes of the filesystem. May hang on a dead network filesystem."""
    try:
        found = os.statvfs(fd_or_path)
    except OSError as error:
        raise syscall.failure("statvfs", _name(fd_or_path), error.errno) from None
    size = found.f_frsize
    return Usage(
        total_bytes=found.f_blocks * size,
        free_bytes=found.f_bavail * size,
        used_bytes=(found.f_blocks - found.f_bfree) * size,
        total_inodes=found.f_files,
        free_inodes=found.f_favail,
        used_inodes=found.f_files - found.f_ffree,
        read_only=bool(found.f_flag & _ST_RDONLY),
    )


def is_of(fd: int, device: int) -> bool:
    """Whether the file or directory is on this device (st_dev)."""
    return os.fstat(fd).st_dev == device


def is_read_only(fd_or_path: int | Path) -> bool:
    """Whether the mount or its filesystem refuses writes now."""
    return usage(fd_or_path).read_only


def _name(fd_or_path: int | Path) -> str:
    return syscall.describe(fd_or_path) if isinstance(fd_or_path, int) else os.fspath(fd_or_path)


def lock(dir_fd: int, name: str) -> int | None:
    """Take the exclusive flock(2) on file `name` (created if missing); None if another holds it.

    The lock lasts until the returned descriptor is closed, or the process ends, however it ends.
    """
    # Not open for writing: that would keep an administrator from remounting the filesystem read-only.
    os.close(open_beneath(dir_fd, name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
    fd = open_beneath(dir_fd, name, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def lock_whole(fd: int, *, shared: bool = False) -> bool:
    """Lock the file for this open file description, against everybody, on other machines too; False if another has it.

    fcntl(2) F_OFD_SETLK, which network filesystems pass on to their server. It ends with the last descriptor of the
    description, whoever has that. `shared` keeps out only those who want it alone.
    """
    return _try_lock(fd, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, 0, 0)


def is_locked(fd: int) -> bool:
    """Whether anybody has such a lock on the file, here or elsewhere."""
    return _ofd_lock(fd, _F_OFD_GETLK, fcntl.F_WRLCK, 0, 0) != fcntl.F_UNLCK


def lock_byte(fd: int, offset: int) -> bool:
    """The same for one byte, which the file need not have."""
    return _try_lock(fd, fcntl.F_WRLCK, offset, 1)


def unlock_byte(fd: int, offset: int) -> None:
    """Give that one back."""
    _ofd_lock(fd, _F_OFD_SETLK, fcntl.F_UNLCK, offset, 1)


def _try_lock(fd: int, kind: int, offset: int, length: int) -> bool:
    try:
        _ofd_lock(fd, _F_OFD_SETLK, kind, offset, length)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _ofd_lock(fd: int, command: int, kind: int, offset: int, length: int) -> int:
    # struct flock: type, whence, start, length (0: to the end), pid (none)
    asked = struct.pack(_FLOCK, kind, os.SEEK_SET, offset, length, 0)
    return int(struct.unpack(_FLOCK, fcntl.fcntl(fd, command, asked))[0])


def direct_io_alignment(fd: int) -> int | None:
    """Bytes that offsets and lengths of O_DIRECT must be multiples of on this regular file; None: not possible.

    statx(2) STATX_DIOALIGN, kernel 6.1; where it does not tell, O_DIRECT is tried and 4096 assumed.
    """
    found = syscall.statx(fd, "", syscall.AT_EMPTY_PATH, syscall.STATX_DIOALIGN)
    if found.stx_mask & syscall.STATX_DIOALIGN:
        return found.stx_dio_offset_align or None
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    return 4096


def filesystem_type(fd_or_path: int | Path) -> str:
    """The filesystem's name as mount(8) has it ("ext4" for ext2 and ext3 as well); "0x…" if unknown."""
    magic = syscall.statfs_type(fd_or_path)
    return FILESYSTEM_MAGIC.get(magic, f"{magic:#x}")


def clone_file(src_fd: int, dst_fd: int) -> None:
    """Make the destination share the source's whole content (FICLONE).

    Raises OSError: EOPNOTSUPP or EINVAL where the filesystem cannot, EXDEV on two filesystems.
    """
    ioctl(dst_fd, FICLONE, src_fd, "FICLONE")


def supports_reflink(dir_fd: int) -> bool:
    """Whether files in this directory can share content: tried, with two nameless files."""
    source = _nameless(dir_fd)
    try:
        target = _nameless(dir_fd)
        try:
            os.write(source, b"\1" * 4096)
            clone_file(source, target)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EXDEV, errno.ENOSYS):
                return False
            raise
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True


def _nameless(dir_fd: int) -> int:
    try:
        return open_beneath(dir_fd, ".", os.O_RDWR | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    name = f".{secrets.token_hex(8)}.tmp"
    fd = open_beneath(dir_fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name, dir_fd=dir_fd)
    return fd
