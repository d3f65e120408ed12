# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's `os` lacks, each as one function that raises OSError. No policy here.

Called by number where glibc 2.36 (Debian 12) has no wrapper. The numbers from 424 on are the same on every
architecture; `statx` and `renameat2` are older and differ. Every prototype is built once, at import, so that
threads share nothing mutable and a call costs about a microsecond. ctypes releases the GIL around each call.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Callable
from ctypes import (
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_long,
    c_size_t,
    c_uint,
    c_uint16,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
)
from typing import Any, Final

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_NO_AUTOMOUNT: Final = 0x800
AT_EMPTY_PATH: Final = 0x1000
AT_STATX_DONT_SYNC: Final = 0x4000
AT_RECURSIVE: Final = 0x8000

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08

RENAME_NOREPLACE: Final = 1

STATX_BASIC_STATS: Final = 0x7FF
STATX_MNT_ID: Final = 0x1000
STATX_DIOALIGN: Final = 0x2000
STATX_MNT_ID_UNIQUE: Final = 0x4000
STATX_ATTR_IMMUTABLE: Final = 0x10
STATX_ATTR_APPEND: Final = 0x20
STATX_ATTR_MOUNT_ROOT: Final = 0x2000

# The same on x86_64 and aarch64; the table says what we ship for.
_STATX: Final = {"x86_64": 332, "aarch64": 291}
_RENAMEAT2: Final = {"x86_64": 316, "aarch64": 276}
_QUOTACTL: Final = {"x86_64": 179, "aarch64": 60}
OPEN_TREE: Final = 428
MOVE_MOUNT: Final = 429
FSOPEN: Final = 430
FSCONFIG: Final = 431
FSMOUNT: Final = 432
OPENAT2: Final = 437
MOUNT_SETATTR: Final = 442
QUOTACTL_FD: Final = 443
STATMOUNT: Final = 457

libc = ctypes.CDLL(None, use_errno=True)


def _number(table: dict[str, int]) -> int:
    # An unknown machine gets a number that no kernel knows: ENOSYS with the call's name, not a wrong call.
    return table.get(platform.machine(), 0x7FFF)


def prototype(number: int, *arguments: type) -> Callable[..., int]:
    """A caller of syscall `number` with these argument types; returns the raw result (-1: see errno)."""
    function = ctypes.CFUNCTYPE(c_long, c_long, *arguments, use_errno=True)(("syscall", libc))

    def call(*values: object) -> int:
        return int(function(number, *values))

    return call


def failure(operation: str, name: str | bytes | os.PathLike[str], number: int | None = None) -> OSError:
    """The OSError of the system call that just failed in this thread, telling which call and on what."""
    code = ctypes.get_errno() if number is None else number
    return OSError(code, f"{operation}: {os.strerror(code)}", os.fsdecode(name))


def describe(fd: int) -> str:
    """What a descriptor is of, for error messages only."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"fd {fd}"


def is_gone(error: OSError) -> bool:
    """Whether a file of sysfs went away, before it was opened (ENOENT) or after (ENODEV)."""
    return error.errno in (errno.ENOENT, errno.ENODEV)


class Timestamp(ctypes.Structure):
    """struct statx_timestamp."""

    _fields_ = [("tv_sec", c_int64), ("tv_nsec", c_uint32), ("reserved", c_uint32)]


class Statx(ctypes.Structure):
    """struct statx, 256 bytes."""

    _fields_ = [
        ("stx_mask", c_uint32),
        ("stx_blksize", c_uint32),
        ("stx_attributes", c_uint64),
        ("stx_nlink", c_uint32),
        ("stx_uid", c_uint32),
        ("stx_gid", c_uint32),
        ("stx_mode", c_uint16),
        ("spare0", c_uint16),
        ("stx_ino", c_uint64),
        ("stx_size", c_uint64),
        ("stx_blocks", c_uint64),
        ("stx_attributes_mask", c_uint64),
        ("stx_atime", Timestamp),
        ("stx_btime", Timestamp),
        ("stx_ctime", Timestamp),
        ("stx_mtime", Timestamp),
        ("stx_rdev_major", c_uint32),
        ("stx_rdev_minor", c_uint32),
        ("stx_dev_major", c_uint32),
        ("stx_dev_minor", c_uint32),
        ("stx_mnt_id", c_uint64),
        ("stx_dio_mem_align", c_uint32),
        ("stx_dio_offset_align", c_uint32),
        ("spare3", c_uint64 * 12),
    ]
    stx_mask: int
    stx_attributes: int
    stx_mode: int
    stx_ino: int
    stx_attributes_mask: int
    stx_rdev_major: int
    stx_rdev_minor: int
    stx_dev_major: int
    stx_dev_minor: int
    stx_mnt_id: int
    stx_dio_mem_align: int
    stx_dio_offset_align: int

    @property
    def device(self) -> int:
        """st_dev."""
        return os.makedev(self.stx_dev_major, self.stx_dev_minor)


class OpenHow(ctypes.Structure):
    """struct open_how."""

    _fields_ = [("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64)]


class MountAttr(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = [
        ("attr_set", c_uint64),
        ("attr_clr", c_uint64),
        ("propagation", c_uint64),
        ("userns_fd", c_uint64),
    ]


_SIZEOF_OPEN_HOW: Final = ctypes.sizeof(OpenHow)
_SIZEOF_MOUNT_ATTR: Final = ctypes.sizeof(MountAttr)

_statx = prototype(_number(_STATX), c_int, c_char_p, c_int, c_uint, c_void_p)
_renameat2 = prototype(_number(_RENAMEAT2), c_int, c_char_p, c_int, c_char_p, c_uint)
_openat2 = prototype(OPENAT2, c_int, c_char_p, c_void_p, c_size_t)
_open_tree = prototype(OPEN_TREE, c_int, c_char_p, c_uint)
_move_mount = prototype(MOVE_MOUNT, c_int, c_char_p, c_int, c_char_p, c_uint)
_mount_setattr = prototype(MOUNT_SETATTR, c_int, c_char_p, c_uint, c_void_p, c_size_t)
_fsopen = prototype(FSOPEN, c_char_p, c_uint)
_fsconfig = prototype(FSCONFIG, c_int, c_uint, c_char_p, c_void_p, c_int)
_fsmount = prototype(FSMOUNT, c_int, c_uint, c_uint)
quotactl_fd = prototype(QUOTACTL_FD, c_uint, c_uint, c_uint, c_void_p)
quotactl = prototype(_number(_QUOTACTL), c_uint, c_char_p, c_uint, c_void_p)
raw_statmount = prototype(STATMOUNT, c_void_p, c_void_p, c_size_t, c_uint)

_umount2 = libc.umount2
_umount2.argtypes = [c_char_p, c_int]
_mount = libc.mount
_mount.argtypes = [c_char_p, c_char_p, c_char_p, c_uint64, c_char_p]
_statfs = libc.statfs
_statfs.argtypes = [c_char_p, c_void_p]
_fstatfs = libc.fstatfs
_fstatfs.argtypes = [c_int, c_void_p]
_syncfs = libc.syncfs
_syncfs.argtypes = [c_int]
_ioctl = libc.ioctl
_ioctl.argtypes = [c_int, c_ulong, c_void_p]
_fallocate = libc.fallocate64
_fallocate.argtypes = [c_int, c_int, c_int64, c_int64]


def statx(dir_fd: int, path: str | os.PathLike[str], flags: int, mask: int = STATX_BASIC_STATS) -> Statx:
    """statx(2)."""
    found = Statx()
    name = os.fsencode(path)
    if _statx(dir_fd, name, flags, mask, ctypes.byref(found)) < 0:
        raise failure("statx", name or describe(dir_fd))
    return found


def openat2(dir_fd: int, path: str, flags: int, mode: int, resolve: int) -> int:
    """openat2(2), kernel 5.6. O_CLOEXEC is added. EAGAIN (a rename raced with the walk) is tried again.

    Raises OSError: ELOOP a symlink was met, EXDEV the path leaves `dir_fd`, ENOENT, ENOTDIR, …
    """
    # openat2 refuses a mode without O_CREAT or O_TMPFILE, unlike open.
    creates = flags & (os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY))
    how = OpenHow(flags | os.O_CLOEXEC, mode if creates else 0, resolve)
    name = os.fsencode(path)
    for _ in range(128):
        fd = _openat2(dir_fd, name, ctypes.byref(how), _SIZEOF_OPEN_HOW)
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    raise failure("openat2", name)


def renameat2(old_dir_fd: int, old: str, new_dir_fd: int, new: str, flags: int) -> None:
    """renameat2(2)."""
    if _renameat2(old_dir_fd, os.fsencode(old), new_dir_fd, os.fsencode(new), flags) < 0:
        error = failure("renameat2", old)
        raise OSError(error.errno, error.strerror, old, None, new)


def open_tree(fd: int, flags: int) -> int:
    """open_tree(2) of the descriptor itself, close-on-exec."""
    tree = _open_tree(fd, b"", flags | AT_EMPTY_PATH | os.O_CLOEXEC)
    if tree < 0:
        raise failure("open_tree", describe(fd))
    return tree


def move_mount(mount_fd: int, target_fd: int, target: str | os.PathLike[str], flags: int) -> None:
    """move_mount(2) between two descriptors; `target` only names the second in errors."""
    if _move_mount(mount_fd, b"", target_fd, b"", flags) < 0:
        raise failure("move_mount", target)


def mount_setattr(mount_fd: int, attr_set: int, attr_clr: int) -> None:
    """mount_setattr(2), kernel 5.12, of the mount that is the descriptor."""
    attr = MountAttr(attr_set, attr_clr, 0, 0)
    if _mount_setattr(mount_fd, b"", AT_EMPTY_PATH, ctypes.byref(attr), _SIZEOF_MOUNT_ATTR) < 0:
        raise failure("mount_setattr", describe(mount_fd))


def fsopen(fs_type: str) -> int:
    """fsopen(2), close-on-exec. ENODEV: the kernel has no such filesystem."""
    fd = _fsopen(os.fsencode(fs_type), 1)
    if fd < 0:
        raise failure("fsopen", fs_type)
    return fd


def fsconfig(fs_fd: int, command: int, key: str | None, value: str | None, name: str) -> None:
    """fsconfig(2); `name` only names the object in errors."""
    key_bytes = None if key is None else os.fsencode(key)
    value_bytes = None if value is None else os.fsencode(value)
    if _fsconfig(fs_fd, command, key_bytes, value_bytes, 0) < 0:
        raise failure("fsconfig" if key is None else f"fsconfig {key}", name)


def fsmount(fs_fd: int, attributes: int, name: str) -> int:
    """fsmount(2): the detached mount, close-on-exec."""
    fd = _fsmount(fs_fd, 1, attributes)
    if fd < 0:
        raise failure("fsmount", name)
    return fd


def mount(source: str, target: str, fs_type: str | None, flags: int, data: str | None) -> None:
    """mount(2), for kernels without the calls above."""
    kind = None if fs_type is None else os.fsencode(fs_type)
    options = None if data is None else os.fsencode(data)
    if _mount(os.fsencode(source), os.fsencode(target), kind, flags, options) < 0:
        raise failure("mount", target)


def umount2(target: str | os.PathLike[str], flags: int) -> None:
    """umount2(2). EINVAL: not a mount point; EBUSY: in use."""
    if _umount2(os.fsencode(target), flags) < 0:
        raise failure("umount2", target)


def statfs_type(fd_or_path: int | os.PathLike[str]) -> int:
    """f_type of statfs(2), which Python's statvfs leaves out."""
    found = (c_long * 15)()  # struct statfs is 120 bytes on 64-bit machines, f_type its first word.
    if isinstance(fd_or_path, int):
        if _fstatfs(fd_or_path, found) < 0:
            raise failure("fstatfs", describe(fd_or_path))
    elif _statfs(os.fsencode(fd_or_path), found) < 0:
        raise failure("statfs", fd_or_path)
    return int(found[0]) & 0xFFFFFFFF


def syncfs(fd: int) -> None:
    """syncfs(2): write out all of the filesystem that the descriptor is on."""
    if _syncfs(fd) < 0:
        raise failure("syncfs", describe(fd))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) itself: glibc's posix_fallocate would write zeros where the filesystem cannot."""
    while _fallocate(fd, mode, offset, length) < 0:
        if ctypes.get_errno() != errno.EINTR:
            raise failure("fallocate", describe(fd))


def ioctl(fd: int, request: int, argument: Any, operation: str) -> int:
    """ioctl(2) with a ctypes object, a bytearray or an int; `operation` is the request's kernel name.

    Not `fcntl.ioctl`: with more than 1024 bytes it keeps the GIL, and all threads wait while the kernel writes a volume out.
    """
    pointer: object
    if isinstance(argument, int):
        pointer = argument
    elif isinstance(argument, bytearray):
        pointer = ctypes.byref((c_char * len(argument)).from_buffer(argument))
    else:
        pointer = ctypes.byref(argument)
    result = int(_ioctl(fd, request, pointer))
    if result < 0:
        raise failure(operation, describe(fd))
    return result


def request_code(direction: int, kind: int, number: int, size: int) -> int:
    """_IOC(): direction 0 none, 1 write, 2 read, 3 both (asm-generic, as on x86_64 and aarch64)."""
    return direction << 30 | size << 16 | kind << 8 | number
