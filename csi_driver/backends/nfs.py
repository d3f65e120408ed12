# SPDX-License-Identifier: Apache-2.0
"""Volumes as directories on a file server's export: every node reaches them, and many may at once.

The controller has the export mounted at the pool's root, and works on it in a child (`apart`), for all here may hang;
nodes mount it for themselves, by what the volume's context says. No client can have a directory's size enforced, so a
volume's capacity is unknown; unless the controller runs on the server itself (`on_server`), where the pool's root is the
directory that is exported, and project quotas of its filesystem keep the sizes.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from csi_driver.backends import directories, exported, projects
from csi_driver.backends.base import NODE_MODES, PAYLOAD_DIRECTORY, Directory, Features, Store
from csi_driver.backends.parameters import (
    MODE,
    MOUNT_PERMISSIONS,
    ON_DELETE,
    PROVISIONING,
    SUB_DIR,
    SUB_PATH,
    check_fs_type,
    parse_parameters,
)
from csi_driver.backends.projects import Projects
from csi_driver.catalog import Home
from csi_driver.config import EXPORT_ROOTS, PoolConfig, read_options
from csi_driver.errors import ConfigurationError, invalid
from csi_driver.linux import files
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    AccessType,
    HealthEntry,
    Parameters,
    Record,
    SizeLimits,
    Stats,
    VolumeSpec,
)

_SYNONYMS = {SUB_DIR: SUB_PATH, MOUNT_PERMISSIONS: MODE}
"""What classes made for other NFS drivers say."""


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    server: str
    path: str
    provisioning: Literal["directory"] = "directory"
    """Pools of images are `nfs_image`'s."""
    mount_options: list[str] = []
    """How the controller mounts it, and nodes where a StorageClass says nothing else."""
    on_server: bool = False
    """The controller runs on the server, where the pool's root is what the server exports as `path`."""


class NfsBackend:
    """See `base.Backend` for what each method promises."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        options = read_options(pool, _Options)
        self._source = exported.source(pool, options.server, options.path, options.mount_options)
        self._on_server = options.on_server
        if self._on_server and pool.root.is_relative_to(EXPORT_ROOTS):
            raise ConfigurationError(
                f"{pool.where} on_server: give as root the directory of this machine that the server exports as "
                f"{options.path!r}"
            )
        self._sizes = Projects(enforced=self._on_server)
        self._shares = False

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset({AccessType.MOUNT}),
            access_modes=NODE_MODES,
            enforces_capacity=self._sizes.enforced,
            server=os.fspath(self._pool.root) if self._on_server else self._source.server,
            export=self._source,
            shares_copies=self._shares,
            writer_pays=self._shares,
        )

    def check(self) -> None:
        if self._on_server:
            self._check_exported()
        else:
            exported.ensure_mounted(self._pool, self._source)

    def _check_exported(self) -> None:
        root = self._pool.root
        if not root.is_dir():
            raise ConfigurationError(
                f"{self._pool.where} root {str(root)!r}: no such directory: with on_server it is the one that this "
                f"machine exports as {self._source.source}"
            )
        with Directory(files.open_directory(root)) as opened:
            problem = self._sizes.problem(opened.fd)
            self._shares = not files.is_read_only(opened.fd) and files.supports_reflink(opened.fd)
        if problem:
            raise ConfigurationError(
                f"{self._pool.where}: the sizes of volumes cannot be enforced at {root}: {problem}; or leave "
                "on_server out, and any volume can fill the whole export"
            )

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        own = _usual(parameters)
        exported.check_provisioning(self._pool, own.pop(PROVISIONING, ""), "directory")
        parsed = parse_parameters(own, fs_type, further=(ON_DELETE,))
        check_fs_type(parsed.fs_type, exported.FS_TYPE)
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
            self._sizes.begin(home, opened.fd, None if spec.snapshot else spec.size_bytes)
            os.mkdir(PAYLOAD_DIRECTORY, 0o700, dir_fd=opened.fd)
        with directories.attach(home) as data:
            # Where nothing is counted, the server may share blocks wherever it can (NFSv4.2).
            share = share or not self._sizes.enforced
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
        return "its volumes are on a file server: I/O limits are for pools of images on a node's own disks"

    def limit(self, home: Home, record: Record) -> None:
        return None

    def holders(self, homes: Sequence[Home]) -> dict[str, str]:
        # Other nodes' mounts are not seen from here. Kubernetes deletes no volume that a pod has claimed.
        return {} if not self._on_server else directories.holders(homes)

    def health(self, home: Home, record: Record) -> list[HealthEntry]:
        return [*directories.payload_health(home), *self._sizes.health(home, record)]

    def stats(self, home: Home, mounted: int) -> Stats:
        return self._sizes.stats(home, directories.filesystem_stats(mounted))


def _usual(parameters: Mapping[str, str]) -> dict[str, str]:
    usual = {key: value for key, value in parameters.items() if key not in _SYNONYMS}
    for key, meant in _SYNONYMS.items():
        value = parameters.get(key, "")
        if key == MOUNT_PERMISSIONS and not value.strip("0"):
            continue  # to leave the mode as it is
        if value and usual.setdefault(meant, value) != value:
            raise invalid(f"parameters.{key}", value, f"the same as {meant}, which says {usual[meant]!r}")
    return usual
