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
from collections.abc import Iterator, Sequence
from ctypes import c_char, c_uint32, c_uint64
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from csi_driver.linux import mountinfo, syscall
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

# Per-mount flag: MOUNT_ATTR_…, MS_…, ST_… of statvfs. relatime is the absence of the other two.
_FLAGS: Final = {
    "readonly": (0x1, 0x1, 0x1),
    "nosuid": (0x2, 0x2, 0x2),
    "nodev": (0x4, 0x4, 0x4),
    "noexec": (0x8, 0x8, 0x8),
    "noatime": (0x10, 0x400, 0x400),
    "strictatime": (0x20, 0x1000000, 0),
    "relatime": (0, 0x200000, 0x1000),
    "nodiratime": (0x80, 0x800, 0x800),
    "nosymfollow": (0x200000, 0x100, 0x2000),
}
_ATIME: Final = ("noatime", "strictatime", "relatime")

# mount(8) option -> attribute and its value; the last one of several wins.
_OPTIONS: Final = {
    "ro": ("readonly", True),
    "rw": ("readonly", False),
    "nosuid": ("nosuid", True),
    "suid": ("nosuid", False),
    "nodev": ("nodev", True),
    "dev": ("nodev", False),
    "noexec": ("noexec", True),
    "exec": ("noexec", False),
    "noatime": ("noatime", True),
    "atime": ("noatime", False),
    "nodiratime": ("nodiratime", True),
    "diratime": ("nodiratime", False),
    "relatime": ("relatime", True),
    "norelatime": ("relatime", False),
    "strictatime": ("strictatime", True),
    "nostrictatime": ("strictatime", False),
    "nosymfollow": ("nosymfollow", True),
    "symfollow": ("nosymfollow", False),
}
# For mount(8) or /etc/fstab's readers only; the kernel knows nothing of them.
_USERLAND: Final = frozenset(("defaults", "auto", "noauto", "nofail", "_netdev", "silent", "loud", "async"))
_REFUSED: Final = frozenset(
    "bind rbind move remount loop offset sizelimit shared rshared private rprivate slave rslave unbindable runbindable"
    " user users owner group".split()
)


@dataclass(frozen=True)
class Attributes:
    """What belongs to one mount, not to the filesystem behind it. False: as the source has it (see `bind`)."""

    readonly: bool = False
    nosuid: bool = False
    nodev: bool = False
    noexec: bool = False
    noatime: bool = False
    nodiratime: bool = False
    relatime: bool = False
    strictatime: bool = False
    nosymfollow: bool = False

    def covers(self, wanted: "Attributes") -> bool:
        """Whether a mount with these attributes has all that are `wanted`."""
        return all(getattr(self, one.name) for one in fields(self) if getattr(wanted, one.name))

    def _bits(self, column: int) -> int:
        return sum(_FLAGS[one.name][column] for one in fields(self) if getattr(self, one.name))


_NONE: Final = Attributes()


def parse_flags(flags: Sequence[str]) -> tuple[Attributes, list[str]]:
    """Split mount(8) options into per-mount attributes and options of the filesystem itself, in order.

    An element may hold several, separated by commas outside double quotes; "rw", "defaults", "x-…" and the
    like are dropped. Of contradicting ones the last wins.

    Raises ValueError: an option that says what to mount rather than how ("bind", "remount", "shared", …).
    """
    attributes = _NONE
    rest: list[str] = []
    for option in (option for flag in flags for option in _split(flag)):
        name = option.partition("=")[0]
        if name in _REFUSED:
            raise ValueError(f"mount option {option!r} is not for a volume: leave it out")
        if option in _OPTIONS:
            attribute, value = _OPTIONS[option]
            if attribute in _ATIME and value:
                attributes = replace(attributes, noatime=False, relatime=False, strictatime=False)
            attributes = replace(attributes, **{attribute: value})
        elif option not in _USERLAND and not name.startswith(("x-", "X-", "comment")):
            rest.append(option)
    return attributes, rest


def _split(flag: str) -> Iterator[str]:
    # SELinux contexts have commas: context="system_u:object_r:container_file_t:s0:c1,c2".
    option, quoted = "", False
    for character in flag:
        if character == '"':
            quoted = not quoted
        if character == "," and not quoted:
            yield from filter(None, (option.strip(),))
            option = ""
        else:
            option += character
    yield from filter(None, (option.strip(),))


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


def _mounted(target: Path, found: syscall.Statx) -> Mounted:
    status = _statmount(found.stx_mnt_id) if found.stx_mask & syscall.STATX_MNT_ID_UNIQUE else None
    if status is None:
        attributes, readonly, mount_id = _look_without_statmount(target, found)
    else:
        attributes, readonly, mount_id = _from_statmount(status)
    return Mounted(
        device=found.device,
        inode=found.stx_ino,
        rdev=os.makedev(found.stx_rdev_major, found.stx_rdev_minor),
        is_directory=stat.S_ISDIR(found.stx_mode),
        readonly=readonly,
        attributes=attributes,
        mount_id=mount_id,
    )


def _statmount(unique_id: int) -> Statmount | None:
    request = MountIdRequest(
        ctypes.sizeof(MountIdRequest), 0, unique_id, STATMOUNT_SB_BASIC | STATMOUNT_MNT_BASIC
    )
    status = Statmount()
    size = ctypes.sizeof(status)
    if syscall.raw_statmount(ctypes.byref(request), ctypes.byref(status), size, 0) == 0:
        return status
    # ENOENT: just unmounted, or of another mount namespace; ENOSYS; EPERM of a sandbox. The old way tells all of it.
    return None


def _from_statmount(status: Statmount) -> tuple[Attributes, bool, int]:
    bits = int(status.mnt_attr)
    present = {name: bool(bits & flags[0]) for name, flags in _FLAGS.items()}
    present["relatime"] = not bits & MOUNT_ATTR__ATIME
    attributes = Attributes(**present)
    return attributes, attributes.readonly or bool(status.sb_flags & SB_RDONLY), int(status.mnt_id_old)


def _look_without_statmount(target: Path, found: syscall.Statx) -> tuple[Attributes, bool, int]:
    fd = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        again = syscall.statx(
            fd, "", syscall.AT_EMPTY_PATH | syscall.AT_STATX_DONT_SYNC, syscall.STATX_MNT_ID
        )
        if (again.device, again.stx_ino) != (found.device, found.stx_ino):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(target))
        bits = os.fstatvfs(fd).f_flag
    finally:
        os.close(fd)
    present = {name: bool(bits & flags[2]) for name, flags in _FLAGS.items()}
    present["strictatime"] = not (present["noatime"] or present["relatime"])
    readonly = present["readonly"]
    if readonly:
        # statvfs does not tell a read-only mount from a read-only filesystem; rare enough to read the list.
        own = mountinfo.find(again.stx_mnt_id)
        present["readonly"] = own is None or "ro" in own.options
    return Attributes(**present), readonly, again.stx_mnt_id


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
    wanted = attributes._bits(0)
    atime = any(getattr(attributes, name) for name in _ATIME)
    if wanted or atime:
        syscall.mount_setattr(mount_fd, wanted, MOUNT_ATTR__ATIME if atime else 0)


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
    if attributes == _NONE:
        return
    try:
        mounted = find_mounted(target)
        inherited = mounted.attributes if mounted else _NONE
        atime = {name: getattr(attributes, name) for name in _ATIME}
        both = {
            one.name: getattr(attributes, one.name) or getattr(inherited, one.name)
            for one in fields(attributes)
        }
        wanted = Attributes(**(both | atime if any(atime.values()) else both))
        # target_fd is what lies below the new mount; the mount itself must be opened anew.
        top_fd = _open_target(target)
        try:
            flags = MS_BIND | MS_REMOUNT | wanted._bits(1)
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
    attributes: Attributes = _NONE,
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
            syscall.mount(os.fspath(device), f"/proc/self/fd/{target_fd}", fs_type, attributes._bits(1), data)
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
    attributes: Attributes = _NONE,
) -> int:
    """Mount a filesystem where no one sees it; returns the descriptor of its root, and with its close it is unmounted.

    For openat(2) beneath it and as the place of a `source_fd` for `bind`. Raises OSError as `mount_device`.
    """
    name = os.fspath(device)
    fs_fd = syscall.fsopen(fs_type)
    try:
        try:
            _configure(fs_fd, name, options, attributes)
            return syscall.fsmount(fs_fd, attributes._bits(0), name)
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
            if error.errno == errno.EINVAL:
                if find_mounted(target) is None:
                    return
                raise
            pause = next(pauses, None)
            if error.errno != errno.EBUSY or pause is None:
                raise
            time.sleep(pause)
            continue
        if find_mounted(target) is None:
            return
