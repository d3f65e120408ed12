# SPDX-License-Identifier: Apache-2.0
"""Mount, bind, look and unmount, each in microseconds and without parsing mountinfo.

The new mount API (kernel 5.12 for `mount_setattr`) makes a mount complete before anything can see it, and takes
descriptors, so that no symlink can redirect it. Kernels or sandboxes without it get mount(2) through
/proc/self/fd. What should be mounted where is not its business.
"""

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Sequence
from ctypes import c_char, c_uint32, c_uint64
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from csi_driver.linux import mountinfo, syscall
from csi_driver.linux.mountflags import ATIME, FLAGS, NONE
from csi_driver.linux.mountflags import Attributes as Attributes
from csi_driver.linux.mountflags import parse_flags as parse_flags
from csi_driver.linux.mountinfo import Mount as Mount
from csi_driver.linux.mountinfo import mounts as mounts
from csi_driver.linux.mountinfo import mounts_beneath as mounts_beneath
from csi_driver.linux.mountinfo import mounts_of as mounts_of
from csi_driver.linux.mountinfo import source_root as source_root

OPEN_TREE_CLONE: Final = 1
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8
MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR__ATIME: Final = 0x70
STATMOUNT_SB_BASIC: Final = 1
STATMOUNT_MNT_BASIC: Final = 2
SB_RDONLY: Final = 1
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000


class MountIdRequest(ctypes.Structure):
    """struct mnt_id_req, its first version."""

    _fields_ = [("size", c_uint32), ("spare", c_uint32), ("mnt_id", c_uint64), ("param", c_uint64)]


class Statmount(ctypes.Structure):
    """struct statmount without its strings."""

    _fields_ = [
        ("size", c_uint32),
        ("mnt_opts", c_uint32),
        ("mask", c_uint64),
        ("sb_dev_major", c_uint32),
        ("sb_dev_minor", c_uint32),
        ("sb_magic", c_uint64),
        ("sb_flags", c_uint32),
        ("fs_type", c_uint32),
        ("mnt_id", c_uint64),
        ("mnt_parent_id", c_uint64),
        ("mnt_id_old", c_uint32),
        ("mnt_parent_id_old", c_uint32),
        ("mnt_attr", c_uint64),
        ("mnt_propagation", c_uint64),
        ("rest", c_char * 512),
    ]
    sb_flags: int
    mnt_id_old: int
    mnt_attr: int


@dataclass(frozen=True, slots=True)
class Mounted:
    """What is seen at a mount point. `device` and `inode` are the stat(2) of the mount's root, `rdev` that of a device node.

    `readonly`: writes are refused, by the mount or by its filesystem; `attributes.readonly`: by the mount.
    """

    device: int
    inode: int
    rdev: int
    is_directory: bool
    readonly: bool
    attributes: Attributes
    mount_id: int


_LOOK: Final = syscall.AT_SYMLINK_NOFOLLOW | syscall.AT_NO_AUTOMOUNT | syscall.AT_STATX_DONT_SYNC
_WANTED: Final = syscall.STATX_BASIC_STATS | syscall.STATX_MNT_ID_UNIQUE


def find_mounted(target: Path) -> Mounted | None:
    """What is mounted at `target` (the topmost, if stacked); None if nothing is, or the path does not exist.

    O(1): statx(2) (kernel 5.8), then statmount(2) (6.8) or fstatvfs; asks no file server, where the kernel allows
    that. Never follows a symlink at the end. ESTALE, ENOTCONN and EIO of a dead filesystem are raised: something
    is mounted there, but cannot be looked at.
    """
    for _ in range(100):
        try:
            found = syscall.statx(syscall.AT_FDCWD, target, _LOOK, _WANTED)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not found.stx_attributes & syscall.STATX_ATTR_MOUNT_ROOT:
            return None
        with contextlib.suppress(
            FileNotFoundError
        ):  # Unmounted or covered between the two looks: look again.
            return _mounted(target, found)
    raise OSError(errno.EAGAIN, "mounts come and go too fast to be looked at", os.fspath(target))


def mounts_of_device(path: Path, device: int) -> list[Mount]:
    """All mounts that show the node of a block device (st_rdev `device`), whichever /dev it is from.

    A container that starts again may have another /dev; what was bound from the old one shows the device still.
    """
    named = mountinfo.mounts_named(path.name)
    return [entry for entry in named if (there := find_mounted(Path(entry.target))) and there.rdev == device]


def attributes_of(fd: int) -> Attributes:
    """The attributes of the mount that `fd` was opened through: what `bind` of it starts from."""
    found = syscall.statx(fd, "", syscall.AT_EMPTY_PATH | syscall.AT_STATX_DONT_SYNC, _WANTED)
    status = _statmount(found)
    return (_from_statvfs(fd) if status is None else _from_statmount(status))[0]


def _mounted(target: Path, found: syscall.Statx) -> Mounted:
    status = _statmount(found)
    attributes, readonly, mount_id = _look_again(target, found) if status is None else _from_statmount(status)
    return Mounted(
        device=found.device,
        inode=found.stx_ino,
        rdev=os.makedev(found.stx_rdev_major, found.stx_rdev_minor),
        is_directory=stat.S_ISDIR(found.stx_mode),
        readonly=readonly,
        attributes=attributes,
        mount_id=mount_id,
    )


def _statmount(found: syscall.Statx) -> Statmount | None:
    if not found.stx_mask & syscall.STATX_MNT_ID_UNIQUE:
        return None
    wanted = STATMOUNT_SB_BASIC | STATMOUNT_MNT_BASIC
    request = MountIdRequest(ctypes.sizeof(MountIdRequest), 0, found.stx_mnt_id, wanted)
    status = Statmount()
    size = ctypes.sizeof(status)
    if syscall.raw_statmount(ctypes.byref(request), ctypes.byref(status), size, 0) == 0:
        return status
    # ENOENT: just unmounted, or not of this mount namespace; ENOSYS; EPERM of a sandbox. statvfs tells all of it.
    return None


def _from_statmount(status: Statmount) -> tuple[Attributes, bool, int]:
    """(attributes, whether writes are refused by mount or filesystem, mount id as in mountinfo)."""
    attributes = _attributes(status.mnt_attr)
    return attributes, attributes.readonly or bool(status.sb_flags & SB_RDONLY), status.mnt_id_old


@lru_cache(maxsize=512)
def _attributes(bits: int) -> Attributes:
    present = {name: bool(bits & flags[0]) for name, flags in FLAGS.items()}
    present["relatime"] = not bits & MOUNT_ATTR__ATIME
    return Attributes(**present)


def _look_again(target: Path, found: syscall.Statx) -> tuple[Attributes, bool, int]:
    fd = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        now = seen(fd)
        if (now.device, now.stx_ino) != (found.device, found.stx_ino):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(target))
        return _from_statvfs(fd)
    finally:
        os.close(fd)


def _from_statvfs(fd: int) -> tuple[Attributes, bool, int]:
    flags = syscall.AT_EMPTY_PATH | syscall.AT_STATX_DONT_SYNC
    look = syscall.statx(fd, "", flags, syscall.STATX_BASIC_STATS | syscall.STATX_MNT_ID)
    mount_id = look.stx_mnt_id
    own = None if os.major(look.device) else mountinfo.find(mount_id)
    if own is not None:
        # No disk of its own: a file server may be behind it, and statvfs would ask that, for ever if it is dead.
        return _from_mountinfo(own)
    bits = os.fstatvfs(fd).f_flag
    present = {name: bool(bits & columns[2]) for name, columns in FLAGS.items()}
    present["strictatime"] = not (present["noatime"] or present["relatime"])
    readonly = present["readonly"]
    if readonly:
        # statvfs does not tell a read-only mount from a read-only filesystem; rare enough to read the list.
        own = mountinfo.find(mount_id)
        present["readonly"] = own is None or "ro" in own.options
    return Attributes(**present), readonly, mount_id


def _from_mountinfo(own: Mount) -> tuple[Attributes, bool, int]:
    attributes, _ = parse_flags(own.options)
    if not (attributes.noatime or attributes.relatime):
        attributes = replace(attributes, strictatime=True)
    return attributes, attributes.readonly or "ro" in own.super_options, own.mount_id


def mount_id_of(fd: int) -> int:
    """The id, as in mountinfo, of the mount that `fd` was opened through. Asks no file server."""
    flags = syscall.AT_EMPTY_PATH | syscall.AT_STATX_DONT_SYNC
    return int(syscall.statx(fd, "", flags, syscall.STATX_MNT_ID).stx_mnt_id)


def seen(fd: int) -> syscall.Statx:
    """stat(2) of an open file, as far as this machine knows it: no file server is asked."""
    flags = syscall.AT_EMPTY_PATH | syscall.AT_STATX_DONT_SYNC
    return syscall.statx(fd, "", flags, syscall.STATX_BASIC_STATS)


def bind(source_fd: int, target: Path, attributes: Attributes) -> None:
    """Mount the directory or file that `source_fd` is at `target`, with the attributes from its first moment.

    A symlink at the target is never followed (ELOOP). Attributes are added to those of the mount that the
    source lies in, never taken away: a source that is nosuid or read-only stays so. Only the kind of atime is
    replaced. Mounts beneath the source are not taken along. In a shared parent the new mount is shared.

    The source may lie in a detached mount (`mount_detached`). Kernels before 6.15 cannot clone that; there the detached
    mount itself is attached to the target for the blink of an eye and then replaced, so that it can be the source only once.

    Raises OSError: ELOOP, ENOENT, ENOTDIR or EINVAL (file on directory or the reverse), …
    """
    target_fd = _open_target(target)
    try:
        try:
            tree = _clone(source_fd, target_fd, target)
            try:
                _set_attributes(tree, attributes)
                _attach(tree, target_fd, target)
            finally:
                os.close(tree)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            _bind_without_tree(source_fd, target_fd, target, attributes)
    finally:
        os.close(target_fd)


def _open_target(target: Path) -> int:
    fd = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, "the mount target is a symlink", os.fspath(target))
    return fd


def _attach(mount_fd: int, target_fd: int, target: Path) -> None:
    syscall.move_mount(mount_fd, target_fd, target, MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)


def _set_attributes(mount_fd: int, attributes: Attributes) -> None:
    wanted = attributes.bits(0)
    atime = any(getattr(attributes, name) for name in ATIME)
    if wanted or atime:
        syscall.mount_setattr(mount_fd, wanted, MOUNT_ATTR__ATIME if atime else 0)


def private_view(fd: int) -> int:
    """The directory as a detached, read-only mount, in which no device node opens; closing the descriptor ends it.

    For reading a tree that strangers may be changing meanwhile. Nothing that is mounted in it can be seen.
    """
    view = syscall.open_tree(fd, OPEN_TREE_CLONE)
    try:
        syscall.mount_setattr(
            view, Attributes(readonly=True, nodev=True, nosuid=True, noatime=True).bits(0), MOUNT_ATTR__ATIME
        )
    except BaseException:
        os.close(view)
        raise
    return view


def _clone(source_fd: int, target_fd: int, target: Path) -> int:
    try:
        return syscall.open_tree(source_fd, OPEN_TREE_CLONE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        root_fd = _detached_root(source_fd)
        if root_fd is None:
            raise
    try:
        _attach(root_fd, target_fd, target)
    finally:
        os.close(root_fd)
    try:
        return syscall.open_tree(source_fd, OPEN_TREE_CLONE)
    finally:
        syscall.umount2(target, UMOUNT_NOFOLLOW | MNT_DETACH)


def _detached_root(fd: int) -> int | None:
    """The root of the detached mount that `fd` lies in; None if its mount is attached."""
    found = syscall.statx(fd, "", syscall.AT_EMPTY_PATH, syscall.STATX_BASIC_STATS | syscall.STATX_MNT_ID)
    if not stat.S_ISDIR(found.stx_mode) or mountinfo.find(found.stx_mnt_id) is not None:
        return None
    current = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    while True:
        look = syscall.statx(current, "", syscall.AT_EMPTY_PATH, syscall.STATX_MNT_ID)
        if look.stx_attributes & syscall.STATX_ATTR_MOUNT_ROOT:
            return current
        try:
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=current)
        finally:
            os.close(current)
        current = above


def _bind_without_tree(source_fd: int, target_fd: int, target: Path, attributes: Attributes) -> None:
    syscall.mount(f"/proc/self/fd/{source_fd}", f"/proc/self/fd/{target_fd}", None, MS_BIND, None)
    if attributes == NONE:
        return
    try:
        mounted = find_mounted(target)
        inherited = mounted.attributes if mounted else NONE
        atime = {name: getattr(attributes, name) for name in ATIME}
        both = {
            one.name: getattr(attributes, one.name) or getattr(inherited, one.name)
            for one in fields(attributes)
        }
        wanted = Attributes(**(both | atime if any(atime.values()) else both))
        # target_fd is what lies below the new mount; the mount itself must be opened anew.
        top_fd = _open_target(target)
        try:
            flags = MS_BIND | MS_REMOUNT | wanted.bits(1)
            syscall.mount("none", f"/proc/self/fd/{top_fd}", None, flags, None)
        finally:
            os.close(top_fd)
    except BaseException:
        syscall.umount2(target, UMOUNT_NOFOLLOW | MNT_DETACH)
        raise


def mount_device(
    device: Path,
    target: Path,
    fs_type: str,
    options: Sequence[str] = (),
    attributes: Attributes = NONE,
) -> None:
    """Mount a filesystem at `target`, never through a symlink there. `options` are the filesystem's own.

    With `attributes.readonly` the filesystem itself is read-only too (a read-only device demands that).

    Raises OSError with the kernel's own message where it gives one: ENODEV unknown filesystem, EINVAL bad option or
    superblock, EBUSY mounted the other way already, EACCES a read-only device mounted writable, …
    """
    target_fd = _open_target(target)
    try:
        try:
            mount_fd = mount_detached(device, fs_type, options, attributes)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            data = ",".join(options) or None
            syscall.mount(os.fspath(device), f"/proc/self/fd/{target_fd}", fs_type, attributes.bits(1), data)
            return
        try:
            _attach(mount_fd, target_fd, target)
        finally:
            os.close(mount_fd)
    finally:
        os.close(target_fd)


def mount_detached(
    device: Path,
    fs_type: str,
    options: Sequence[str] = (),
    attributes: Attributes = NONE,
) -> int:
    """Mount a filesystem where no one sees it; returns an O_PATH descriptor of its root. Closing that unmounts it.

    For openat(2) beneath it, and as the place of a `source_fd` for `bind`: keep it open until then.
    Raises OSError as `mount_device`.
    """
    name = os.fspath(device)
    fs_fd = syscall.fsopen(fs_type)
    try:
        try:
            _configure(fs_fd, name, options, attributes)
            return syscall.fsmount(fs_fd, attributes.bits(0), name)
        except OSError as error:
            said = _messages(fs_fd)
            if not said:
                raise
            raise OSError(error.errno, f"{error.strerror} ({said})", name) from None
    finally:
        os.close(fs_fd)


def _configure(fs_fd: int, name: str, options: Sequence[str], attributes: Attributes) -> None:
    syscall.fsconfig(fs_fd, FSCONFIG_SET_STRING, "source", name, name)
    if attributes.readonly:
        syscall.fsconfig(fs_fd, FSCONFIG_SET_FLAG, "ro", None, name)
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            syscall.fsconfig(fs_fd, FSCONFIG_SET_FLAG, key, None, name)
            continue
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = value[1:-1]  # Quotes are mount(8)'s, to protect commas; here each option travels alone.
        syscall.fsconfig(fs_fd, FSCONFIG_SET_STRING, key, value, name)
    syscall.fsconfig(fs_fd, FSCONFIG_CMD_CREATE, None, None, name)


def _messages(fs_fd: int) -> str:
    """The kernel's log of a failed mount: "e ext4: …" lines."""
    said = []
    with contextlib.suppress(OSError):  # ENODATA: no more.
        for _ in range(16):
            line = os.read(fs_fd, 4096).decode(errors="replace").strip()
            said.append(line[2:] if line[1:2] == " " else line)
    return "; ".join(said)


_PAUSES_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.3)


def unmount(target: Path, *, lazy: bool = False) -> None:
    """Unmount all that is mounted at `target`, one upon the other, and make sure of it. Not mounted or missing is fine.

    Never follows a symlink at the target. `lazy` hides the mounts at once and lets go when their last user does.

    Raises OSError: EBUSY still in use after about a second.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    pauses = iter(_PAUSES_S)
    while True:
        try:
            syscall.umount2(target, flags)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            # EINVAL: nothing was mounted there; if something is now, a rename or another mount came in between.
            if error.errno == errno.EINVAL and find_mounted(target) is None:
                return
            pause = next(pauses, None)
            if error.errno not in (errno.EBUSY, errno.EINVAL) or pause is None:
                raise
            time.sleep(pause)
            continue
        if find_mounted(target) is None:
            return
