# SPDX-License-Identifier: Apache-2.0
"""What backends have in common whose payload is a directory, `data`, that pods are bound to.

How such a directory is made and what limits it is each backend's own.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from csi_driver.backends.base import PAYLOAD_DIRECTORY, Directory
from csi_driver.catalog import Home
from csi_driver.errors import Error, ResourceExhausted
from csi_driver.linux import files, mount, treecopy
from csi_driver.linux.copy import Transfer
from csi_driver.model import HealthEntry, HealthStatus, Parameters, Stats

DEFAULT_MODE = 0o755
NO_DEVICE = "its volumes have no device of their own: I/O limits are for pools of images"
"""As mkfs makes the root of a new filesystem: root's. A pod that does not run as root sets `fsGroup`, or its
StorageClass `mode`, `uid` or `gid`."""


def set_owner(data_fd: int, parameters: Parameters) -> None:
    """Give a new payload directory the owner and mode that its parameters ask for; else it stays its maker's."""
    made = os.fstat(data_fd)
    uid = made.st_uid if parameters.uid is None else parameters.uid
    gid = made.st_gid if parameters.gid is None else parameters.gid
    # Each change is a request to a server, and one that squashes root refuses that of the owner.
    if (uid, gid) != (made.st_uid, made.st_gid):
        os.fchown(data_fd, uid, gid)
    # After the owner, whose change clears setuid and setgid.
    os.fchmod(data_fd, DEFAULT_MODE if parameters.mode is None else parameters.mode)


def open_data(home: Home) -> int | None:
    """An fd of the payload directory, or None if it is not there."""
    try:
        return home.open(PAYLOAD_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None


def attach(home: Home) -> Directory:
    """The payload to bind pods to.

    Raises:
        Error: it is gone.
    """
    fd = open_data(home)
    if fd is None:
        raise Error(missing(home))
    return Directory(fd)


def find_attached(home: Home) -> Directory | None:
    """The payload, which needs nothing to be usable."""
    fd = open_data(home)
    return None if fd is None else Directory(fd)


def copy(home: Home, source: Home, target_fd: int, transfer: Transfer, *, share: bool) -> None:
    """Fill the payload `target_fd` of `home` with all that is in the source's.

    Raises:
        ResourceExhausted: the store, or the quota, is full.
    """
    with attach(source) as original, Directory(mount.private_view(original.fd)) as view:
        try:
            treecopy.copy_tree(view.fd, target_fd, transfer, share=share)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ResourceExhausted(
                f"{home.id!r}: no room for a copy of {source.id!r}: {error.strerror}"
            ) from error


def holders(homes: Sequence[Home]) -> dict[str, str]:
    """Volume id to a mount that shows the home or something in it, wherever it is mounted. Reads the mounts once."""
    by_area: dict[int, dict[str, str]] = {}
    for home in homes:
        by_area.setdefault(home.area_fd, {})[home.name] = home.id
    found: dict[str, str] = {}
    known = mount.mounts() if by_area else []
    for area_fd, names in by_area.items():
        device, root = mount.source_root(area_fd)
        prefix = root.rstrip("/") + "/"
        for entry in known:
            if entry.device != device or not entry.root.startswith(prefix):
                continue
            volume_id = names.get(entry.root[len(prefix) :].partition("/")[0])
            if volume_id is not None:
                found.setdefault(volume_id, f"mounted at {entry.target}")
    return found


def filesystem_stats(fd: int) -> Stats:
    """What `df` shows of the directory."""
    usage = files.usage(fd)
    return Stats(
        total_bytes=usage.total_bytes,
        used_bytes=usage.used_bytes,
        available_bytes=usage.free_bytes,
        total_inodes=usage.total_inodes,
        used_inodes=usage.used_inodes,
        available_inodes=usage.free_inodes,
    )


def payload_health(home: Home) -> Iterable[HealthEntry]:
    """What can be wrong with any payload that is a directory."""
    fd = open_data(home)
    if fd is None:
        yield HealthEntry(HealthStatus.DATA_LOSS, "PayloadMissing", missing(home))
        return
    try:
        if files.is_read_only(fd):
            message = f"volume {home.id!r}: the pool's filesystem is read-only: see the kernel's log"
            yield HealthEntry(HealthStatus.DEGRADED, "ReadOnly", message)
    finally:
        os.close(fd)


def missing(home: Home) -> str:
    """The sentence for a payload that is gone."""
    return f"volume {home.id!r}: its directory {home.path / PAYLOAD_DIRECTORY} is missing: restore it from a backup"


def open_nearest(root: Path) -> int:
    """An fd of `root`, or of the nearest directory above that exists: its filesystem is where `root` will be made."""
    path = root.resolve()
    while not path.is_dir():
        path = path.parent
    return files.open_directory(path)
