# SPDX-License-Identifier: Apache-2.0
"""A managed pool's filesystem in use: its loop device, its mount, its growth, and what the file's own disk has left.

The kernel is asked each time; nothing is recorded but which filesystem belongs at a mount point, in a file beneath it.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import msgspec

from csi_driver.backends.base import Store
from csi_driver.backing.making import is_leftover
from csi_driver.config import BackingConfig, PoolConfig
from csi_driver.errors import ConfigurationError
from csi_driver.linux import files, filesystem, loop, mount, online

log = logging.getLogger(__name__)

RECORD_FILE = "backing.json"
"""In the directory beneath the mount: seen only while nothing is mounted there."""
SECTOR_BYTES = 4096


class BackingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Which filesystem belongs at a mount point, and where it was when it was mounted first."""

    pool: str
    uuid: str
    target: str


@dataclass(frozen=True, slots=True)
class Backing:
    """What a managed pool stands on, mounted. `file` is the (device, inode) of its file; None for a device."""

    pool: str
    config: BackingConfig
    file: tuple[int, int] | None

    def bound(self, store: Store) -> Store:
        """The pool's room as it really is: a sparse file can hold no more than its own disk has for it."""
        if self.file is None:
            return store
        return Store(store.total_bytes, max(0, store.free_bytes - self._missing_bytes()))

    def problems(self, store: Store) -> dict[str, str]:
        """What is known to be wrong: a reason in one word, and a sentence."""
        if self.file is None:
            return {}
        try:
            found = os.stat(self.config.target)
        except OSError as error:
            return {"BackingMissing": self._gone(error.strerror or str(error))}
        if (found.st_dev, found.st_ino) != self.file:
            return {"BackingMissing": self._gone("another file has its name")}
        missing = self._missing_bytes()
        if missing <= store.free_bytes:
            return {}
        return {
            "HostFull": f"pool {self.pool!r}: the disk of its file {self.config.target} lacks "
            f"{missing - store.free_bytes} bytes of what the pool's volumes may still write: free some there"
        }

    def _missing_bytes(self) -> int:
        """Bytes of the file that it does not have yet and its disk could not give it."""
        try:
            found, host = os.stat(self.config.target), files.usage(self.config.target.parent)
        except OSError:
            return self.config.size_bytes
        return max(0, found.st_size - found.st_blocks * 512 - host.free_bytes)

    def _gone(self, why: str) -> str:
        return (
            f"pool {self.pool!r}: its file {self.config.target} is not there any more ({why}): the pool lasts until it "
            "is unmounted, so copy the volumes away"
        )


def read_record(root: Path) -> BackingRecord | None:
    """Which filesystem belongs at `root`, where nothing is mounted; None if none does.

    Raises:
        ConfigurationError: it cannot be understood.
    """
    try:
        return msgspec.json.decode((root / RECORD_FILE).read_bytes(), type=BackingRecord)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"{root / RECORD_FILE}: damaged ({error}): remove it if you are sure which filesystem belongs at {root}"
        ) from error


def write_record(root: Path, record: BackingRecord) -> None:
    """Say which filesystem belongs here; on disk when this returns."""
    fd = files.open_directory(root)
    try:
        files.write_atomic(fd, RECORD_FILE, msgspec.json.encode(record) + b"\n")
        files.sync(fd)
    finally:
        os.close(fd)


def check_empty(pool: PoolConfig) -> None:
    """Nothing may be hidden by the mount, least of all a pool that was there before.

    Raises:
        ConfigurationError: something would be.
    """
    for name in sorted(os.listdir(pool.root)):
        if name not in (RECORD_FILE, files.unfinished(RECORD_FILE)) and not is_leftover(name):
            raise ConfigurationError(
                f"{pool.where} root {str(pool.root)!r}: the pool's filesystem is to be mounted there, and it would hide "
                f"{name!r}, which is in that directory: move it away, or give the pool another root"
            )


def check_nowhere_else(pool: PoolConfig, backing: BackingConfig, fd: int) -> None:
    """Before anything is changed: no other driver has the pool, under another root.

    Raises:
        ConfigurationError: it is mounted there.
    """
    loops = {one.device: os.fspath(one.path) for one in loop.find(fd)}
    devices = {os.fstat(fd).st_rdev: os.path.realpath(backing.target)} if backing.is_device else loops
    for entry in mount.mounts():
        # btrfs tells a device of its own there, not the disk's.
        if entry.root == "/" and (entry.device in devices or entry.source in devices.values()):
            raise ConfigurationError(
                f"{pool.where} root {str(pool.root)!r}: {backing.target} is mounted at {entry.target} already: end the driver "
                "that has it, and unmount it; or say that root"
            )


def ensure_mounted(pool: PoolConfig, backing: BackingConfig, fd: int, uuid: UUID) -> None:
    """Mount the filesystem at the pool's root, or see that what is mounted there is that one.

    Raises:
        ConfigurationError: something else is mounted there.
    """
    if mount.find_mounted(pool.root) is None:
        _mount(pool, backing, fd)
    elif problem := wrong_mount(pool.root, backing, uuid):
        raise ConfigurationError(
            f"{pool.where} root {str(pool.root)!r}: {problem}: unmount it, or correct the configuration"
        )


def wrong_mount(root: Path, backing: BackingConfig, uuid: UUID) -> str:
    """Why what is mounted at `root` is not the filesystem of this uuid; "" if it is."""
    root_fd = files.open_directory(root)
    try:
        kind = files.filesystem_type(root_fd)
        if kind != backing.fs_type:
            return f"a filesystem of kind {kind} is mounted there, not the pool's own {backing.fs_type}"
        there = online.mounted_uuid(kind, root_fd)
        if there != uuid:
            return f"the {kind} with uuid {there} is mounted there, not that of {backing.target} ({uuid})"
        if mount.source_root(root_fd)[1] != "/":
            return f"only a part of the {kind} in {backing.target} is mounted there"
    finally:
        os.close(root_fd)
    return ""


def _mount(pool: PoolConfig, backing: BackingConfig, fd: int) -> None:
    attached = None if backing.is_device else _attach(backing, fd)
    device = Path(os.path.realpath(backing.target)) if attached is None else attached.path
    try:
        mount.mount_device(
            device, pool.root, backing.fs_type, _options(pool, backing), mount.Attributes(noatime=True)
        )
    except OSError as error:
        if attached is not None:
            loop.release(attached)
        remedy = "see the kernel's log; check it, and restore it from a backup if it is damaged"
        if _has_quota(pool, backing):
            remedy += "; perhaps this kernel has no XFS quotas: take another backend then, or enforce_capacity = false"
        raise ConfigurationError(
            f"{backing.where}: the {backing.fs_type} in {backing.target} cannot be mounted: {error.strerror}: {remedy}"
        ) from error
    root_fd = files.open_directory(pool.root)
    try:
        os.fchmod(root_fd, 0o700)
        if not _is_shared(pool.root):
            log.warning(
                "pool %s: its mount at %s is no other mount namespace's: where this is a pod's, it ends with the pod",
                pool.name,
                pool.root,
            )
    finally:
        os.close(root_fd)


def _is_shared(root: Path) -> bool:
    """Whether the node sees the mount too. In a pod whose own it is, it would end with the pod."""
    return any(one.shared for one in mount.mounts() if one.target == os.path.realpath(root))


def _options(pool: PoolConfig, backing: BackingConfig) -> tuple[str, ...]:
    options = []
    if _has_quota(pool, backing):
        options.append("prjquota")
    if not backing.is_device and not backing.preallocate:
        # What is deleted in the pool goes back to the disk that the file lies on.
        options.append("discard" if backing.fs_type == "xfs" else "discard=async")
    elif backing.preallocate and backing.fs_type == "btrfs":
        options.append("nodiscard")
    return tuple(options)


def _has_quota(pool: PoolConfig, backing: BackingConfig) -> bool:
    """XFS enforces what directory volumes promise only where it is mounted so."""
    wanted = pool.options.get("enforce_capacity") is not False
    return backing.fs_type == "xfs" and pool.backend == "directory" and wanted


def _attach(backing: BackingConfig, fd: int) -> loop.Loop:
    discard = not backing.preallocate
    for standing in loop.find(fd):
        if not standing.readonly and loop.take_over(standing, discard=discard):
            return standing
    return loop.attach(fd, sector_size=SECTOR_BYTES, discard=discard)


def grow(pool: PoolConfig, backing: BackingConfig, fd: int) -> None:
    """Let loop device and filesystem be as large as the file or device is now."""
    if backing.is_device:
        size_bytes = online.device_size(fd)
    else:
        size_bytes = os.fstat(fd).st_size
        for attached in loop.find(fd):
            if attached.size_bytes != size_bytes:
                loop.refresh_size(attached)
    root_fd = files.open_directory(pool.root)
    try:
        if not files.is_read_only(root_fd):
            filesystem.grow(backing.fs_type, root_fd, size_bytes)
    finally:
        os.close(root_fd)
