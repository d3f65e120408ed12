# SPDX-License-Identifier: Apache-2.0
"""Loop devices by ioctl (kernel 5.8). Which image is which volume's is not its business.

A device is known by the (device, inode) of its backing file, never by a path: files are renamed, and sysfs shows
a path as some mount namespace once saw it. Nothing here is recorded; the kernel is asked each time.

What the kernel tells of a device whose file is on a server it may ask that server for, and so not tell at all while it
is dead. Devices that are `remote` carry a mark that can be seen without that: all others pass them over,
and `fence` knows them.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import stat
import time
from collections.abc import Iterator
from ctypes import c_uint8, c_uint32, c_uint64
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.linux import syscall
from csi_driver.linux.syscall import ioctl

LOOP_CLR_FD: Final = 0x4C01
LOOP_SET_STATUS64: Final = 0x4C04
LOOP_GET_STATUS64: Final = 0x4C05
LOOP_SET_CAPACITY: Final = 0x4C07
LOOP_CONFIGURE: Final = 0x4C0A
LOOP_CTL_REMOVE: Final = 0x4C81
LOOP_CTL_GET_FREE: Final = 0x4C82
LO_FLAGS_READ_ONLY: Final = 1
LO_FLAGS_AUTOCLEAR: Final = 4
LO_FLAGS_DIRECT_IO: Final = 16
BLKSSZGET: Final = 0x1268
BLKROSET: Final = 0x125D
BLKROGET: Final = 0x125E
BLKGETSIZE64: Final = 0x80081272
_REMOTE_MARK: Final = 0x4F7
"""The highest 12 bits of a device's size limit, which is then larger than any image, and so limits nothing: sysfs tells it
without asking anyone. Below are the minor number of the file's own device (20 bits) and whose it is (32)."""
_MINORS: Final = 0xFFFFF

_CONTROL: Final = "/dev/loop-control"
_SYS_BLOCK: Final = "/sys/block"
_PARTITIONS: Final = "/proc/partitions"
_READINGS: Final = 10
# Bytes that the kernel surely gives in one read, a page less what its last line may take.
_ONE_READ: Final = 4000
# Of threads that are given the same free number all but one are refused and ask again.
_ATTEMPTS: Final = 500
# What a device answers that another has taken, or is just being made or removed.
_TAKEN: Final = frozenset((errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOENT))
_CLEAR_TIMEOUT_S: Final = 1.0
_RELEASE_TIMEOUT_S: Final = 0.5


class LoopInfo64(ctypes.Structure):
    """struct loop_info64."""

    _fields_ = [
        ("lo_device", c_uint64),
        ("lo_inode", c_uint64),
        ("lo_rdevice", c_uint64),
        ("lo_offset", c_uint64),
        ("lo_sizelimit", c_uint64),
        ("lo_number", c_uint32),
        ("lo_encrypt_type", c_uint32),
        ("lo_encrypt_key_size", c_uint32),
        ("lo_flags", c_uint32),
        ("lo_file_name", c_uint8 * 64),
        ("lo_crypt_name", c_uint8 * 64),
        ("lo_encrypt_key", c_uint8 * 32),
        ("lo_init", c_uint64 * 2),
    ]


class LoopConfig(ctypes.Structure):
    """struct loop_config."""

    _fields_ = [
        ("fd", c_uint32),
        ("block_size", c_uint32),
        ("info", LoopInfo64),
        ("reserved", c_uint64 * 8),
    ]


@dataclass(frozen=True, slots=True)
class Loop:
    """An attached loop device. `device` is its own st_rdev; `backing_…` are st_dev and st_ino of the file behind it."""

    number: int
    path: Path
    device: int
    backing_device: int
    backing_inode: int
    readonly: bool
    direct_io: bool
    sector_size: int
    size_bytes: int


def all() -> list[Loop]:
    """Every attached loop device, in the order of their numbers. Linear in the attached ones."""
    return list(_attached())


def find(image_fd: int) -> list[Loop]:
    """The loop devices backed by this very file, in the order of their numbers."""
    image = os.fstat(image_fd)
    return list(_attached((image.st_dev, image.st_ino)))


def get(number: int) -> Loop | None:
    """The loop device of this number, if it is attached. O(1)."""
    return _look(number)


def _attached(backing: tuple[int, int] | None = None) -> Iterator[Loop]:
    """All attached devices, or those of one backing (device, inode)."""
    for number in _sized():
        loop = _look(number, backing)
        if loop is not None:
            yield loop


def _sized() -> list[int]:
    """The numbers of the devices that have a size, which only attached ones have.

    One read for all: to look at each device in sysfs takes a millisecond where a node keeps a hundred idle ones.
    """
    numbers: set[int] = set()
    before = None
    # The kernel goes on by position where a long list takes several reads: a disk that goes meanwhile hides another one.
    for _ in range(_READINGS):
        with open(_PARTITIONS, "rb") as file:
            listed = file.read()
        names = listed.split()[7::4]  # Behind the headline: major, minor, blocks, name.
        numbers |= {int(name[4:]) for name in names if name.startswith(b"loop") and name[4:].isdigit()}
        if listed == before or len(listed) < _ONE_READ:
            break
        before = listed
    return sorted(numbers)


@dataclass(frozen=True, slots=True)
class Remote:
    """Of a device whose file is on a server: 32 bits that tell one machine of several on this kernel from the others,
    and the file's own device (st_dev), which is that of the export's mounts."""

    owner: int
    device: int


def remote(number: int) -> Remote | None:
    """What was said of the device, if its file is on a server (see `attach`). Asks no server."""
    try:
        limit = _read_number(f"{_SYS_BLOCK}/loop{number}/loop/sizelimit")
    except OSError as error:
        if syscall.is_gone(error):
            return None  # Nothing is attached.
        raise
    if limit >> 52 != _REMOTE_MARK:
        return None
    return Remote(limit & 0xFFFFFFFF, os.makedev(0, limit >> 32 & _MINORS))


def numbers() -> list[int]:
    """The numbers of all attached devices, remote ones too, in order."""
    return _sized()


def _look(number: int, backing: tuple[int, int] | None = None) -> Loop | None:
    if remote(number) is not None:
        return None
    try:
        fd = _open(number, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
            return None  # Detached or removed meanwhile.
        raise
    try:
        info = _status(fd)
        if info is None or backing not in (None, (info.lo_device, info.lo_inode)):
            return None
        return _loop(fd, number, info)
    finally:
        os.close(fd)


def _status(fd: int) -> LoopInfo64 | None:
    info = LoopInfo64()
    try:
        ioctl(fd, LOOP_GET_STATUS64, info, "LOOP_GET_STATUS64")
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None  # Not attached.
        raise
    return info


def _loop(fd: int, number: int, info: LoopInfo64) -> Loop:
    size, sector = c_uint64(), c_uint32()
    ioctl(fd, BLKGETSIZE64, size, "BLKGETSIZE64")
    ioctl(fd, BLKSSZGET, sector, "BLKSSZGET")
    return Loop(
        number=number,
        path=Path(f"/dev/loop{number}"),
        device=os.fstat(fd).st_rdev,
        backing_device=int(info.lo_device),
        backing_inode=int(info.lo_inode),
        readonly=bool(info.lo_flags & LO_FLAGS_READ_ONLY),
        direct_io=bool(info.lo_flags & LO_FLAGS_DIRECT_IO),
        sector_size=sector.value,
        size_bytes=size.value,
    )


def _open(number: int, flags: int) -> int:
    """Open /dev/loopN, making the node if it is missing: a container sees the /dev of its start."""
    path = f"/dev/loop{number}"
    flags |= os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        _make_node(number, path)
        fd = os.open(path, flags)
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENOTBLK, "something else stands in the loop device's place: remove it", path)
    return fd


def _make_node(number: int, path: str) -> None:
    # Read, not computed: with max_part the minor is not the number.
    with open(f"{_SYS_BLOCK}/loop{number}/dev") as file:
        major, minor = file.read().split(":")
    try:
        os.mknod(path, stat.S_IFBLK | 0o660, os.makedev(int(major), int(minor)))
    except FileExistsError:
        pass  # devtmpfs or another thread was faster.


def attach(
    image_fd: int,
    *,
    readonly: bool = False,
    direct_io: bool = True,
    sector_size: int = 512,
    discard: bool = True,
    remote: Remote | None = None,
) -> Loop:
    """Put the file behind a free loop device. The descriptor may be closed afterwards.

    With `remote` the file is one on a server: the device keeps the caller's own open file description, with the locks on it.

    Without `discard` a writable device refuses discards, which would punch holes into the file and give the blocks away.

    `sector_size` (bytes: 512, 1024, 2048, 4096) is what users of the device see. Direct I/O is used where it can be (see
    `Loop.direct_io`): the file's filesystem must allow it, in units no larger than `sector_size`. The device
    stays until `detach`, or the end of the machine. Attaching one file twice is not prevented: `find` first.

    Raises OSError: EBUSY no free device could be had, ENOENT no loop driver, EACCES or EROFS the image cannot be
    written, EINVAL bad sector size, …
    """
    # Opened anew: the caller's descriptor may be read-only, or O_PATH, or share flags with others.
    mode = os.O_RDONLY if readonly else os.O_RDWR
    backing_fd = (
        os.dup(image_fd) if remote is not None else os.open(f"/proc/self/fd/{image_fd}", mode | os.O_CLOEXEC)
    )
    try:
        control_fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            flags = LO_FLAGS_READ_ONLY if readonly else 0
            if direct_io and _can_direct_io(backing_fd):
                flags |= LO_FLAGS_DIRECT_IO
            config = LoopConfig(fd=backing_fd, block_size=sector_size)
            config.info.lo_flags = flags
            if remote is not None:
                minor = os.minor(remote.device) & _MINORS
                config.info.lo_sizelimit = _REMOTE_MARK << 52 | minor << 32 | remote.owner
            return _attach_free(control_fd, config, discard)
        finally:
            os.close(control_fd)
    finally:
        os.close(backing_fd)


def _can_direct_io(fd: int) -> bool:
    # Some kernels (6.1) believe an overlay that promises what the filesystem below it cannot; then all I/O fails.
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _attach_free(control_fd: int, config: LoopConfig, discard: bool) -> Loop:
    for attempt in range(_ATTEMPTS):
        number = ioctl(control_fd, LOOP_CTL_GET_FREE, 0, "LOOP_CTL_GET_FREE")
        try:
            found = _attach_to(number, config, discard)
            if found is not None:
                return found
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        else:
            # EBUSY: somebody else has taken it, whom it may serve.
            with contextlib.suppress(OSError):
                ioctl(control_fd, LOOP_CTL_REMOVE, number, "LOOP_CTL_REMOVE")
        if attempt > 3:
            time.sleep(random.uniform(0, 0.002))
    raise OSError(errno.EBUSY, f"no free loop device in {_ATTEMPTS} attempts", _CONTROL)


def _attach_to(number: int, config: LoopConfig, discard: bool) -> Loop | None:
    """Attach to this device, or leave it as it was; None if it can never again be what is asked."""
    flags = int(config.info.lo_flags)
    fd = _open(number, os.O_RDONLY if flags & LO_FLAGS_READ_ONLY else os.O_RDWR)
    try:
        _configure(fd, config)
        with contextlib.ExitStack() as undo:
            undo.callback(ioctl, fd, LOOP_CLR_FD, 0, "LOOP_CLR_FD")
            _clear_readonly(fd, flags)
            if not _settle_discard(number, flags, discard):
                return None
            info = _status(fd)
            if info is None:
                raise OSError(errno.EBUSY, "detached by another meanwhile", f"/dev/loop{number}")
            attached = _loop(fd, number, info)
            undo.pop_all()
            return attached
    finally:
        os.close(fd)


def _settle_discard(number: int, flags: int, discard: bool) -> bool:
    """Make the device refuse or take discards; False if it takes none and never will again.

    Kernels since 6.9 keep the refusal when the file goes, and let nobody lift it. So it is looked at first: to make a
    device refuse waits until its queue is empty (some 15 ms), and each device costs that once.
    """
    if flags & LO_FLAGS_READ_ONLY:
        return True
    folder = f"{_SYS_BLOCK}/loop{number}/queue"
    now, possible = (
        _read_number(f"{folder}/{name}") for name in ("discard_max_bytes", "discard_max_hw_bytes")
    )
    if now and not discard:
        with open(f"{folder}/discard_max_bytes", "w") as limit:
            limit.write("0")
    return not (discard and possible and not now)


def _read_number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def _configure(fd: int, config: LoopConfig) -> None:
    try:
        ioctl(fd, LOOP_CONFIGURE, config, "LOOP_CONFIGURE")
    except OSError as error:
        if error.errno != errno.EINVAL or not config.info.lo_flags & LO_FLAGS_DIRECT_IO:
            raise
        # Some kernels refuse impossible direct I/O where others leave it off.
        plain = LoopConfig.from_buffer_copy(config)
        plain.info.lo_flags &= ~LO_FLAGS_DIRECT_IO
        ioctl(fd, LOOP_CONFIGURE, plain, "LOOP_CONFIGURE")


def _clear_readonly(fd: int, flags: int) -> None:
    """`blockdev --setro` outlives the file that the device had then, and would refuse writes to ours."""
    readonly = c_uint32()
    ioctl(fd, BLKROGET, readonly, "BLKROGET")
    if readonly.value and not flags & LO_FLAGS_READ_ONLY:
        ioctl(fd, BLKROSET, c_uint32(0), "BLKROSET")


def detach(loop: Loop) -> None:
    """Take the file from behind the device, and see that it is gone. Fine if that is done, or another file is there now.

    Raises OSError: EBUSY mounted, or open somewhere, for about a second; the device is left as it was.
    """
    deadline = time.monotonic() + _CLEAR_TIMEOUT_S
    pause = 0.001
    while not _clear(loop):
        if time.monotonic() > deadline:
            keep(loop)
            raise OSError(errno.EBUSY, "loop device still in use", os.fspath(loop.path))
        time.sleep(pause)
        pause = min(pause * 2, 0.1)


def release(loop: Loop) -> bool:
    """Take the file from behind the device, at once or when its last user lets go; whether it is gone already.

    A mount that another mount namespace has copied keeps a device in use for as long as that namespace lives, and
    nobody here can end it. The kernel clears the device then (LO_FLAGS_AUTOCLEAR). `keep` takes it back. What only takes
    the kernel a moment, after an unmount, is waited for.
    """
    if _clear(loop):
        return True
    ours = _open_if_ours(loop, os.O_RDONLY)
    if ours is None:
        return True
    fd, _ = ours
    try:
        ioctl(fd, LOOP_CLR_FD, 0, "LOOP_CLR_FD")
    finally:
        os.close(fd)
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while not _is_gone(loop):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_gone(loop: Loop) -> bool:
    now = get(loop.number)
    return now is None or (now.backing_device, now.backing_inode) != (loop.backing_device, loop.backing_inode)


def _open_if_ours(loop: Loop, flags: int) -> tuple[int, LoopInfo64] | None:
    try:
        fd = _open(loop.number, flags)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
            return None
        raise
    info = _status(fd)
    if info is None or (info.lo_device, info.lo_inode) != (loop.backing_device, loop.backing_inode):
        os.close(fd)
        return None
    return fd, info


def _clear(loop: Loop) -> bool:
    try:
        # O_EXCL: a mounted device refuses here, before LOOP_CLR_FD would mark it to vanish at its last close.
        ours = _open_if_ours(loop, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    if ours is None:
        return True
    fd, _ = ours
    try:
        ioctl(fd, LOOP_CLR_FD, 0, "LOOP_CLR_FD")
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EBUSY):
            raise
    finally:
        os.close(fd)  # The last close clears it.
    if not os.path.exists(f"{_SYS_BLOCK}/loop{loop.number}/loop"):
        return True
    return _is_gone(loop)


def keep(loop: Loop) -> bool:
    """Undo the mark that LOOP_CLR_FD left on a device in use, lest it vanish from under a later user.

    Returns: whether it has its file for good; False when it was too late, and the device is letting go.
    """
    ours = _open_if_ours(loop, os.O_RDONLY)
    if ours is None:
        return False
    try:
        return clear_autoclear(ours[0])
    finally:
        os.close(ours[0])


def clear_autoclear(fd: int) -> bool:
    """The same for a device that is open already."""
    info = _status(fd)
    if info is None:
        return False
    try:
        if not info.lo_flags & LO_FLAGS_AUTOCLEAR:
            return True
        info.lo_flags &= ~LO_FLAGS_AUTOCLEAR
        # While this descriptor is open the last close has not been, so the mark comes off in time or not at all.
        ioctl(fd, LOOP_SET_STATUS64, info, "LOOP_SET_STATUS64")
        now = _status(fd)
        return now is not None and not now.lo_flags & LO_FLAGS_AUTOCLEAR
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False


def take_over(loop: Loop, *, discard: bool = True) -> bool:
    """Make of a device that is found attached what `attach` would have made: whoever attached it may have died halfway.

    Returns: whether it could be had; False when it is letting go of its file.
    """
    if not keep(loop):
        return False
    _settle_discard(loop.number, LO_FLAGS_READ_ONLY if loop.readonly else 0, discard)
    return True


def refresh_size(loop: Loop) -> Loop:
    """Let the device take the size that its file has now; returns it as it is then. ENXIO if it is detached."""
    ours = _open_if_ours(loop, os.O_RDONLY)
    if ours is None:
        raise OSError(errno.ENXIO, "the loop device no longer has this file", os.fspath(loop.path))
    fd, info = ours
    try:
        ioctl(fd, LOOP_SET_CAPACITY, 0, "LOOP_SET_CAPACITY")
        return _loop(fd, loop.number, info)
    finally:
        os.close(fd)


def available() -> str | None:
    """Why loop devices cannot be used here, with the remedy; None if they can."""
    try:
        fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"{_CONTROL} is missing: load the kernel module (modprobe loop) and let the container see the host's /dev"
    except OSError as error:
        return f"{_CONTROL}: {error.strerror}: the driver must run as root, in a privileged container"
    try:
        fcntl.ioctl(fd, LOOP_CTL_GET_FREE)
    except OSError as error:
        return f"{_CONTROL} gives no device: {error.strerror} (CAP_SYS_ADMIN is needed; see also max_loop)"
    finally:
        os.close(fd)
    return None
