# SPDX-License-Identifier: Apache-2.0
"""Volumes as plain directories, each limited by a project quota of the pool's filesystem (ext4 or XFS).

The fastest volumes there are: nothing lies between a pod and the filesystem. Without project quotas nothing stops
a volume from filling the pool, so such a pool is refused unless it says that it wants that.
"""

import os
from collections.abc import Mapping, Sequence

import msgspec

from csi_driver.backends import directories, projects
from csi_driver.backends.base import NODE_MODES, PAYLOAD_DIRECTORY, Directory, Features, Store
from csi_driver.backends.parameters import check_fs_type, parse_parameters
from csi_driver.backends.projects import Projects
from csi_driver.catalog import Home
from csi_driver.config import PoolConfig, read_options
from csi_driver.errors import ConfigurationError
from csi_driver.linux import files
from csi_driver.linux.copy import Transfer
from csi_driver.model import AccessType, HealthEntry, Parameters, Record, SizeLimits, Stats, VolumeSpec


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    enforce_capacity: bool = True


class DirectoryBackend:
    """See `base.Backend` for what each method promises."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        self._sizes = Projects(enforced=read_options(pool, _Options).enforce_capacity)
        self._fs_type = ""
        self._shares = False

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset({AccessType.MOUNT}),
            access_modes=NODE_MODES,
            enforces_capacity=self._sizes.enforced,
            server=os.fspath(self._pool.root) if self._pool.shared else "",
            shares_copies=self._shares,
            writer_pays=self._shares,
        )

    def check(self) -> None:
        with Directory(directories.open_nearest(self._pool.root)) as directory:
            self._fs_type = files.filesystem_type(directory.fd)
            problem = self._sizes.problem(directory.fd)
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
        return projects.LIMITS

    def make(self, home: Home, spec: VolumeSpec) -> None:
        with Directory(home.open_directory()) as opened:
            self._sizes.begin(home, opened.fd, spec.size_bytes)
            os.mkdir(PAYLOAD_DIRECTORY, 0o700, dir_fd=opened.fd)
            with directories.attach(home) as data:
                directories.set_owner(data.fd, spec.parameters)
                files.sync(data.fd)

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        with Directory(home.open_directory()) as opened:
            # What is copied counts; a snapshot needs no limit, for nobody writes to it.
            self._sizes.begin(home, opened.fd, None if spec.snapshot else spec.size_bytes)
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
        self._sizes.lift(home)

    def size_bytes(self, home: Home) -> int:
        return self._sizes.usage(home).limit_bytes

    def grow(self, home: Home, size_bytes: int) -> int:
        return self._sizes.grow(home, size_bytes)

    def store(self) -> Store:
        usage = files.usage(self._pool.root)
        return Store(usage.total_bytes, usage.free_bytes)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        return self._sizes.usage(home).used_bytes

    def content_bytes(self, home: Home) -> int:
        return self.written_bytes(home)

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        return size_bytes if self._sizes.enforced else 0

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
        return [*directories.payload_health(home), *self._sizes.health(home, record)]

    def stats(self, home: Home, mounted: int) -> Stats:
        return self._sizes.stats(home, directories.filesystem_stats(mounted))
