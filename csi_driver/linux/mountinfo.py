# SPDX-License-Identifier: Apache-2.0
"""What is mounted in this mount namespace, as /proc/self/mountinfo tells it. Changes nothing.

Costs grow with the number of mounts, so the hot paths use `mount.find_mounted` instead. Directories are compared
as (device, path within the filesystem), which bind mounts and renamed mount points do not blur.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from csi_driver.linux import syscall

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. `root` is the path within the filesystem of what is seen at `target`.

    `device` is that of the superblock: for btrfs it is not the st_dev of the files.
    """

    mount_id: int
    parent_id: int
    device: int
    root: str
    target: str
    options: tuple[str, ...]
    fs_type: str
    source: str
    super_options: tuple[str, ...]
    shared: bool


def mounts() -> list[Mount]:
    """All mounts that this process can see, in the kernel's order (a stacked mount follows what it covers)."""
    return [parse(line) for line in _lines()]


def _lines() -> list[bytes]:
    # One open file and large reads: since kernel 5.8 the listing goes on from a cursor, so that mounts that
    # stay are seen even while others come and go.
    fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 20):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts).splitlines()


def parse(line: bytes) -> Mount:
    """One line of mountinfo, its octal escapes undone; bytes that are not UTF-8 as surrogates. See proc(5)."""
    # 36 35 98:0 /root /target rw,noatime master:1 … - ext3 /dev/root rw,errors=continue
    front, _, back = line.partition(b" - ")
    mount_id, parent_id, device, root, target, options, *optional = front.split(b" ")
    fs_type, source, super_options = (*back.split(b" "), b"", b"")[:3]
    return Mount(
        mount_id=int(mount_id),
        parent_id=int(parent_id),
        device=_device(device),
        root=_unescape(root),
        target=_unescape(target),
        options=_options(options),
        fs_type=_unescape(fs_type),
        source=_unescape(source),
        super_options=_options(super_options),
        shared=any(tag.startswith(b"shared:") for tag in optional),
    )


def _device(field: bytes) -> int:
    major, minor = field.split(b":")
    return os.makedev(int(major), int(minor))


@lru_cache(maxsize=256)
def _options(field: bytes) -> tuple[str, ...]:
    # A few combinations make up thousands of mounts.
    return tuple(_unescape(field).split(","))


def _unescape(field: bytes) -> str:
    if b"\\" in field:
        field = _ESCAPE.sub(lambda found: bytes((int(found[1], 8),)), field)
    return field.decode("utf-8", "surrogateescape")


def source_root(fd: int) -> tuple[int, str]:
    """(device, path within its filesystem) of what `fd` is: what mountinfo shows for a bind mount of it.

    Of a detached mount (not in mountinfo) the path begins at that mount's root and the device is the st_dev.

    Raises OSError: ENOENT if it has been deleted.
    """
    return _locate(fd, _lines())


def _locate(fd: int, lines: list[bytes]) -> tuple[int, str]:
    found = os.fstat(fd)
    path = os.readlink(f"/proc/self/fd/{fd}")
    if found.st_nlink == 0:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    mount_id = syscall.statx(fd, "", syscall.AT_EMPTY_PATH, syscall.STATX_MNT_ID).stx_mnt_id
    own = _find(mount_id, lines)
    if own is None:
        return found.st_dev, path
    return own.device, _join(own.root, _relative(path, own.target))


def find(mount_id: int) -> Mount | None:
    """The mount of this id (as statx's STATX_MNT_ID tells it); None if it is detached or gone."""
    return _find(mount_id, _lines())


def _find(mount_id: int, lines: list[bytes]) -> Mount | None:
    prefix = b"%d " % mount_id
    return next((parse(line) for line in lines if line.startswith(prefix)), None)


def _relative(path: str, base: str) -> str:
    """The rest of `path` below `base`; "" if they are the same."""
    if path == base:
        return ""
    prefix = base if base.endswith("/") else base + "/"
    if not path.startswith(prefix):
        # A mount's path and its files' paths are told by the same d_path; only a mount that was moved
        # between our two looks can disagree. EAGAIN: look again.
        raise OSError(errno.EAGAIN, "the mount moved while it was looked at", path)
    return path[len(prefix) :]


def _join(root: str, rest: str) -> str:
    return root if not rest else f"{root.rstrip('/')}/{rest}"


def _is_beneath(path: str, base: str) -> bool:
    return path == base or base == "/" or path.startswith(base + "/")


def mounts_of(fd: int) -> list[Mount]:
    """All mounts that show this directory (or file) or something below it, wherever they are mounted.

    Only of this mount namespace: what another namespace alone has mounted is not seen.
    """
    lines = _lines()
    device, root = _locate(fd, lines)
    number = b"%d:%d" % (os.major(device), os.minor(device))

    def shows(line: bytes) -> bool:
        fields = line.split(b" ", 4)
        return fields[2] == number and _is_beneath(_unescape(fields[3]), root)

    return [parse(line) for line in lines if shows(line)]


def mounts_named(name: str) -> list[Mount]:
    """All mounts that show something of this name in its filesystem. A plain name: no character that mountinfo escapes."""
    end = b"/" + os.fsencode(name)
    return [parse(line) for line in _lines() if line.split(b" ", 4)[3].endswith(end)]


def mounts_beneath(fd: int) -> list[Mount]:
    """All mounts whose mount point is this directory (or file) itself or below it.

    A mount on the same directory reached by another path (through a bind mount of a parent) counts as well.
    """
    lines = _lines()
    device, root = _locate(fd, lines)
    known = [parse(line) for line in lines]
    return [mount for mount, at in _mount_points(known) if at[0] == device and _is_beneath(at[1], root)]


def _mount_points(known: list[Mount]) -> Iterator[tuple[Mount, tuple[int, str]]]:
    by_id = {mount.mount_id: mount for mount in known}
    for mount in known:
        parent = by_id.get(mount.parent_id)
        if parent is not None and parent is not mount and _is_beneath(mount.target, parent.target):
            yield mount, (parent.device, _join(parent.root, _relative(mount.target, parent.target)))
