# SPDX-License-Identifier: Apache-2.0
"""Images on a file server behind loop devices here, each locked for as long as its device has it.

The lock belongs to the open file description that the kernel keeps for the device: it needs no process, and ends
with the device, or when the server has not heard from this machine for a lease. From then on the kernel refuses whatever
is written to the device (nfs.recover_lost_locks is off): what another machine has taken over is out of reach. It needs
NFSv4, where locks and data go by the same state; `problem` tells.

`all`, `find` and `bases` ask sysfs and mountinfo alone, which asks no server; whatever else is here may have to wait for one.
"""

import errno
import os
import re
import subprocess
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.linux import loop, mount, mountinfo, syscall
from csi_driver.linux.syscall import ioctl, umount2

IMAGE: Final = re.compile(r"/volumes/(?P<id>[^/]+)/image(?: \(deleted\))?")
"""How the path of a volume's image ends, wherever its export is mounted."""
RECOVER_LOST_LOCKS: Final = Path("/sys/module/nfs/parameters/recover_lost_locks")
_SYS_BLOCK: Final = Path("/sys/block")
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_O_PATH_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Held:
    """A volume's image behind a loop device.

    `backing` is its path in the mount that it was opened by. When the mount namespace of who did that has ended (a pod that
    was replaced), that begins at the export's root. `export` is the device of the export's mounts, wherever they are.
    """

    number: int
    owner: int
    volume_id: str
    backing: Path
    export: int
    device: int
    size_bytes: int
    readonly: bool

    @property
    def path(self) -> Path:
        """The device's node."""
        return Path(f"/dev/loop{self.number}")


def all(node: str) -> list[Held]:
    """Every image that this node holds. Asks no server."""
    # Nodes that are containers have one kernel, and see one another's devices.
    return [held for held in _every() if held.owner == _owner(node)]


def find(volume_id: str, node: str) -> list[Held]:
    """The node's devices of this volume: one to write to and one to read only, at most. Asks no server."""
    return [held for held in all(node) if held.volume_id == volume_id]


def of_device(device: int) -> Held | None:
    """The image behind this device (st_rdev), if it is one of these. Asks no server."""
    return next((held for held in _every() if held.device == device), None)


def _every() -> list[Held]:
    return [held for number in loop.numbers() if (held := _look(number)) is not None]


def _owner(node: str) -> int:
    return zlib.crc32(node.encode())


def _look(number: int) -> Held | None:
    remote = loop.remote(number)
    if remote is None:
        return None
    folder = _SYS_BLOCK / f"loop{number}"
    try:
        backing = (folder / "loop/backing_file").read_text().rstrip("\n")
        major, minor = (folder / "dev").read_text().split(":")
        size, readonly = (int((folder / name).read_text()) for name in ("size", "ro"))
    except OSError as error:
        if syscall.is_gone(error):
            return None  # Detached meanwhile.
        raise
    found = IMAGE.search(backing)
    return Held(
        number=number,
        owner=remote.owner,
        volume_id=found["id"] if found else "",
        backing=Path(backing),
        export=remote.device,
        device=os.makedev(int(major), int(minor)),
        size_bytes=size * 512,
        readonly=bool(readonly),
    )


def problem(root: Path) -> str:
    """Why nothing on the export that is mounted at `root` can be fenced; "" when it can. Asks no server."""
    entry = next((one for one in reversed(mountinfo.mounts()) if one.target == os.fspath(root)), None)
    if entry is None or not entry.fs_type.startswith("nfs"):
        return f"no NFS export is mounted at {root}"
    told = dict(option.partition("=")[::2] for option in entry.super_options)
    if not told.get("vers", "").startswith("4"):
        return (
            f"{entry.source} is mounted with NFSv{told.get('vers', '?')}, whose locks do not keep writes off: images need "
            "NFSv4 (mount option nfsvers=4.2, and a server that speaks it)"
        )
    if told.get("local_lock", "none") != "none":
        return (
            f"{entry.source} is mounted with local_lock={told['local_lock']}: leave nolock and local_lock out"
        )
    if "soft" in told or "softerr" in told:
        return (
            f"{entry.source} is mounted soft: a late answer would be a lost write: leave soft and softerr out"
        )
    try:
        recovers = RECOVER_LOST_LOCKS.read_text().strip() not in ("0", "N")
    except FileNotFoundError:
        recovers = False
    if recovers:
        return "the kernel's parameter nfs.recover_lost_locks is on, and so nothing is fenced: set it to 0"
    return ""


def hold(image_fd: int, node: str, *, readonly: bool, sector_size: int, discard: bool) -> Held:
    """Put the locked image behind a loop device, which keeps the lock. May wait for the server."""
    attached = loop.attach(
        image_fd,
        readonly=readonly,
        sector_size=sector_size,
        discard=discard,
        remote=loop.Remote(_owner(node), os.fstat(image_fd).st_dev),
    )
    held = _look(attached.number)
    if held is None:
        raise OSError(errno.EBUSY, "detached by another meanwhile", os.fspath(attached.path))
    return held


def keep(held: Held) -> bool:
    """Take back a device that was told to vanish with its last user; False when it is too late. May wait."""
    fd = _open(held)
    if fd is None:
        return False
    try:
        return loop.clear_autoclear(fd)
    finally:
        os.close(fd)


def refresh(held: Held, image: Path) -> Held:
    """Let the device take the size that its image (see `seen`) has now. May wait."""
    # Opening it is what makes this machine ask for the size that another one has given it.
    image_fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fstat(image_fd)
        fd = _open(held)
        if fd is None:
            raise OSError(errno.ENXIO, "the loop device no longer has this image", os.fspath(held.path))
        try:
            ioctl(fd, loop.LOOP_SET_CAPACITY, 0, "LOOP_SET_CAPACITY")
        finally:
            os.close(fd)
    finally:
        os.close(image_fd)
    found = _look(held.number)
    return found or held


def bases(held: Held, exports: Path) -> list[mountinfo.Mount]:
    """Where the image's export is mounted, in a directory in `exports`. Asks no server.

    Two exports of one server may be one filesystem to the kernel: all of them.
    """
    mounts = mountinfo.mounts()
    return [one for one in mounts if one.device == held.export and Path(one.target).parent == exports]


def seen(held: Held, exports: Path) -> Path:
    """The image, in the one of its `bases` that has it. May wait.

    Raises FileNotFoundError: it is not there any more, or its export is not mounted.
    """
    for base in bases(held, exports):
        inside = held.backing.is_relative_to(base.target)
        path = Path(base.target) / held.backing.relative_to(base.target if inside else "/")
        if path.exists():
            return path
    raise FileNotFoundError(
        errno.ENOENT, "its export is not mounted, or the image is gone", os.fspath(held.backing)
    )


def let_go(volume_id: str, node: str, target: Path, patience_s: float) -> bool:
    """Unmount what is at `target` and take the volume's devices away; whether they are gone already.

    What waits for a dead server goes on in the kernel: the mount is out of sight, what is unwritten is written when
    the server is back, and only then are device and lock gone.
    """
    devices = find(volume_id, node)
    # In this order, for the kernel then lets go by itself, whatever becomes of us: marked, they vanish with their last user.
    for held in devices:
        _mark(held)
    _unmount(target, patience_s)
    for held in find(volume_id, node):
        _mark(held)
    end = time.monotonic() + patience_s
    while find(volume_id, node):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _mark(held: Held) -> None:
    """LOOP_CLR_FD: at once where nobody has the device open, else with its last user."""
    fd = _open(held)
    if fd is None:
        return
    try:
        ioctl(fd, loop.LOOP_CLR_FD, 0, "LOOP_CLR_FD")
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EBUSY):
            raise
    finally:
        os.close(fd)


def _unmount(target: Path, patience_s: float) -> None:
    while mount.find_mounted(target) is not None:
        try:
            fd = os.open(target, _O_PATH_DIRECTORY)
        except NotADirectoryError:
            umount2(target, _MNT_DETACH | _UMOUNT_NOFOLLOW)
            continue
        try:
            umount2(target, _MNT_DETACH | _UMOUNT_NOFOLLOW)
            # Whoever has it last waits for the server, in an exit that nothing can hurry: that shall not be us.
            last = subprocess.Popen(["true"], stdin=subprocess.DEVNULL, pass_fds=[fd])
        finally:
            os.close(fd)
        try:
            last.wait(patience_s)
        except subprocess.TimeoutExpired:
            last.poll()


def _open(held: Held) -> int | None:
    """The device, if it has this image yet."""
    try:
        fd = os.open(held.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
            return None
        raise
    # Open, it cannot be given to another one.
    now = _look(held.number)
    if now is None or (now.volume_id, now.owner, now.readonly) != (held.volume_id, held.owner, held.readonly):
        os.close(fd)
        return None
    return fd
