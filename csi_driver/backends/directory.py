# SPDX-License-Identifier: Apache-2.0
"""Volumes as plain directories, each limited by a project quota of the pool's filesystem (ext4 or XFS).

The fastest volumes there are: nothing lies between a pod and the filesystem. Without project quotas nothing stops
a volume from filling the pool, so such a pool is refused unless it says that it wants that.

A volume's project id is kept where pods cannot reach it, on its home, and nowhere else.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from csi_driver.backends import directories
from csi_driver.backends.base import NODE_MODES, PAYLOAD_DIRECTORY, Directory, Features, Store
from csi_driver.backends.parameters import check_fs_type, parse_parameters
from csi_driver.catalog import Home
from csi_driver.config import PoolConfig, read_options
from csi_driver.errors import ConfigurationError, ResourceExhausted
from csi_driver.linux import files, quota
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    KIB,
    MIB,
    AccessType,
    HealthEntry,
    HealthStatus,
    Parameters,
    Record,
    SizeLimits,
    Stats,
    VolumeSpec,
)

# The home and its record are counted too: some KiB.
_LIMITS = SizeLimits(minimum_bytes=MIB, maximum_bytes=2**62, multiple_bytes=4 * KIB)

FIRST_ID, LAST_ID = 0x4000_0000, 0x7FFF_FFFF
"""Project ids that volumes get: above those that people give by hand, and kubelet (from 1048577 on)."""


BYTES_PER_INODE = 16 * KIB
"""A volume may have a file for each of these, as many as mkfs.ext4 gives a filesystem of its size."""


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    enforce_capacity: bool = True


class DirectoryBackend:
    """See `base.Backend` for what each method promises."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        self._enforces = read_options(pool, _Options).enforce_capacity
        # Ids are looked for and taken by one thread at a time.
        self._guard = threading.Lock()
        self._fs_type = ""
        self._shares = False

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset({AccessType.MOUNT}),
            access_modes=NODE_MODES,
            enforces_capacity=self._enforces,
            server=os.fspath(self._pool.root) if self._pool.shared else "",
            shares_copies=self._shares,
            writer_pays=self._shares,
        )

    def check(self) -> None:
        with Directory(directories.open_nearest(self._pool.root)) as directory:
            self._fs_type = files.filesystem_type(directory.fd)
            problem = (quota.state(directory.fd) or _inherited(directory.fd)) if self._enforces else None
            self._shares = not files.is_read_only(directory.fd) and files.supports_reflink(directory.fd)
        if problem:
            raise ConfigurationError(
                f"{self._pool.where}: the sizes of volumes cannot be enforced at {self._pool.root}: {problem}; or use "
                'backend = "image"; or set enforce_capacity = false, and any volume can fill the whole pool'
            )

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        parsed = parse_parameters(parameters, fs_type)
        check_fs_type(parsed.fs_type, self._fs_type)
        return parsed

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        return _LIMITS

    def make(self, home: Home, spec: VolumeSpec) -> None:
        with Directory(home.open_directory()) as opened:
            if self._enforces:
                # Before anything is made in it: only what comes later belongs to the project.
                self._set_limit(home, self._take_id(home, opened.fd), spec.size_bytes)
            os.mkdir(PAYLOAD_DIRECTORY, 0o700, dir_fd=opened.fd)
            with directories.attach(home) as data:
                directories.set_owner(data.fd, spec.parameters)
                files.sync(data.fd)

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        with Directory(home.open_directory()) as opened:
            if self._enforces:
                # What is copied counts; a snapshot needs no limit, for nobody writes to it.
                project_id = self._take_id(home, opened.fd)
                if not spec.snapshot:
                    self._set_limit(home, project_id, spec.size_bytes)
            os.mkdir(PAYLOAD_DIRECTORY, 0o700, dir_fd=opened.fd)
        with directories.attach(home) as data:
            directories.copy(home, source, data.fd, transfer, share=share)

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        with directories.attach(home) as data:
            files.sync_filesystem(data.fd)

    def allow(self, home: Home, size_bytes: int, held_bytes: int) -> None:
        """Nothing: project quota counts what a volume refers to, shared or not."""

    def open_mounted(self, home: Home, record: Record) -> int | None:
        return None

    def clear(self, home: Home) -> None:
        """Lift the limit. The id itself is free once the home's files are gone."""
        if not self._enforces:
            return
        with Directory(home.open_directory()) as opened:
            project_id = quota.project(opened.fd)
        if FIRST_ID <= project_id <= LAST_ID:
            quota.set_limit(home.area_fd, project_id, 0)

    def size_bytes(self, home: Home) -> int:
        return self._quota(home).limit_bytes

    def grow(self, home: Home, size_bytes: int) -> int:
        if not self._enforces:
            return 0
        with Directory(home.open_directory()) as opened:
            project_id = quota.project(opened.fd)
        if not project_id:
            # Made while sizes were not enforced: what is in it belongs to no project, so a limit would hold nothing.
            return 0
        if quota.get(home.area_fd, project_id).limit_bytes < size_bytes:
            self._set_limit(home, project_id, size_bytes)
        return quota.get(home.area_fd, project_id).limit_bytes

    def store(self) -> Store:
        usage = files.usage(self._pool.root)
        return Store(usage.total_bytes, usage.free_bytes)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        return self._quota(home).used_bytes

    def content_bytes(self, home: Home) -> int:
        return self.written_bytes(home)

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        return size_bytes if self._enforces else 0

    def attach(self, home: Home, record: Record, *, readonly: bool = False) -> Directory:
        return directories.attach(home)

    def find_attached(self, home: Home, record: Record, *, readonly: bool = False) -> Directory | None:
        return directories.find_attached(home)

    def detach(self, home: Home) -> None:
        return None

    def limits_problem(self) -> str:
        return directories.NO_DEVICE

    def limit(self, home: Home, record: Record) -> None:
        return None

    def holders(self, homes: Sequence[Home]) -> dict[str, str]:
        return directories.holders(homes)

    def health(self, home: Home, record: Record) -> list[HealthEntry]:
        entries = list(directories.payload_health(home))
        size_bytes = self.size_bytes(home)
        if self._enforces and size_bytes < record.size_bytes:
            message = (
                f"volume {home.id!r}: its quota is {size_bytes} bytes (0: none), not {record.size_bytes}: it was made "
                "while sizes were not enforced, or somebody changed the quota"
            )
            entries.append(HealthEntry(HealthStatus.DEGRADED, "SizeNotEnforced", message))
        return entries

    def stats(self, home: Home, mounted: int) -> Stats:
        below = directories.filesystem_stats(mounted)
        used = self._quota(home)
        if not used.limit_bytes:
            return below
        # Asked by id, not by statvfs: that follows the project of the directory, which its owner may change.
        return Stats(
            total_bytes=used.limit_bytes,
            used_bytes=used.used_bytes,
            available_bytes=max(0, min(used.limit_bytes - used.used_bytes, below.available_bytes)),
            total_inodes=used.limit_inodes,
            used_inodes=used.used_inodes,
            available_inodes=max(0, min(used.limit_inodes - used.used_inodes, below.available_inodes)),
        )

    def _quota(self, home: Home) -> quota.ProjectUsage:
        if not self._enforces:
            return quota.ProjectUsage(0, 0, 0, 0)
        with Directory(home.open_directory()) as opened:
            project_id = quota.project(opened.fd)
        if not project_id:
            return quota.ProjectUsage(0, 0, 0, 0)
        return quota.get(home.area_fd, project_id)

    def _set_limit(self, home: Home, project_id: int, size_bytes: int) -> None:
        # Files take room that is not counted as theirs (XFS) or of which there is an end (ext4): without a limit on
        # their number a volume of empty files could fill the pool.
        quota.set_limit(home.area_fd, project_id, size_bytes, inodes=size_bytes // BYTES_PER_INODE)

    def _take_id(self, home: Home, home_fd: int) -> int:
        """A project id of its own for the home: from here on the filesystem counts the home itself by it."""
        with self._guard:
            project_id = free_id(home.id, lambda wanted: _is_used(home.area_fd, wanted))
            quota.set_project(home_fd, project_id)
        return project_id


def free_id(volume_id: str, is_used: Callable[[int], bool]) -> int:
    """A project id that nothing uses, the same one for the same volume if it can be.

    Raises:
        ResourceExhausted: all are used.
    """
    count = LAST_ID - FIRST_ID + 1
    # The end of the id is of a hash already; where two volumes meet, the later one takes the next.
    start = int(volume_id[-8:], 16) % count
    for step in range(count):
        project_id = FIRST_ID + (start + step) % count
        if not is_used(project_id):
            return project_id
    raise ResourceExhausted("every project id for volumes is used on this filesystem")


def _is_used(root_fd: int, project_id: int) -> bool:
    found = quota.get(root_fd, project_id)
    return bool(found.limit_bytes or found.limit_inodes or found.used_bytes or found.used_inodes)


def _inherited(root_fd: int) -> str | None:
    """Why volumes cannot have projects of their own here; None if they can."""
    project = quota.project(root_fd)
    if not project:
        return None
    # What is made in a directory with a project has that project, and the kernel moves nothing from one to another.
    return f"the directory belongs to project {project} itself: take it out (chattr -p 0 -P) or choose another root"
