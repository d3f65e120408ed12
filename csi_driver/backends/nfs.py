# SPDX-License-Identifier: Apache-2.0
"""Volumes as directories on a file server's export: every node reaches them, and many may at once.

The controller has the export mounted at the pool's root, and works on it in a child (`apart`), for all here may hang;
nodes mount it for themselves, by what the volume's context says. No server enforces a directory's size, so a volume's
capacity is unknown.
"""

import os
from collections.abc import Mapping, Sequence

import msgspec

from csi_driver.backends import directories
from csi_driver.backends.base import NODE_MODES, PAYLOAD_DIRECTORY, Directory, Features, Store
from csi_driver.backends.parameters import (
    MODE,
    MOUNT_PERMISSIONS,
    ON_DELETE,
    SUB_DIR,
    SUB_PATH,
    check_fs_type,
    parse_parameters,
)
from csi_driver.catalog import Home
from csi_driver.config import PoolConfig, read_options
from csi_driver.errors import ConfigurationError, invalid
from csi_driver.linux import export, files
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    KIB,
    MIB,
    AccessType,
    HealthEntry,
    Parameters,
    Record,
    SizeLimits,
    Stats,
    VolumeSpec,
)

FS_TYPE = "nfs"
_SYNONYMS = {SUB_DIR: SUB_PATH, MOUNT_PERMISSIONS: MODE}
"""What classes made for other NFS drivers say."""
# A size is only remembered: any will do.
_LIMITS = SizeLimits(minimum_bytes=MIB, maximum_bytes=2**62, multiple_bytes=4 * KIB)


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    server: str
    path: str
    mount_options: list[str] = []
    """How the controller mounts it, and nodes where a StorageClass says nothing else."""


class NfsBackend:
    """See `base.Backend` for what each method promises."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        options = read_options(pool, _Options)
        if not options.path.startswith("/"):
            raise ConfigurationError(
                f"{pool.where} path {options.path!r}: give the absolute path of an export"
            )
        self._source = export.Source(
            f"{options.server}:{options.path}", FS_TYPE, tuple(options.mount_options)
        )

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset({AccessType.MOUNT}),
            access_modes=NODE_MODES,
            enforces_capacity=False,
            server=self._source.server,
            export=self._source,
        )

    def check(self) -> None:
        root = self._pool.root
        standing = export.find_source(root)
        if standing == self._source.source:
            return
        if standing is not None:
            raise ConfigurationError(
                f"{self._pool.where} root {str(root)!r}: {standing} is mounted there: unmount it, or give the pool "
                "another root"
            )
        try:
            export.mount(self._source, root)
        except OSError as error:
            raise ConfigurationError(
                f"{self._pool.where}: {self._source.source} cannot be mounted at {root}: {error}"
            ) from error

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        parsed = parse_parameters(_usual(parameters), fs_type, further=(ON_DELETE,))
        check_fs_type(parsed.fs_type, FS_TYPE)
        return parsed

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        return _LIMITS

    def make(self, home: Home, spec: VolumeSpec) -> None:
        with Directory(home.open_directory()) as opened:
            os.mkdir(PAYLOAD_DIRECTORY, 0o700, dir_fd=opened.fd)
        with directories.attach(home) as data:
            directories.set_owner(data.fd, spec.parameters)
            files.sync(data.fd)

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        with Directory(home.open_directory()) as opened:
            os.mkdir(PAYLOAD_DIRECTORY, 0o700, dir_fd=opened.fd)
        with directories.attach(home) as data:
            # Nothing is counted, so the server may share blocks wherever it can (NFSv4.2).
            directories.copy(home, source, data.fd, transfer, share=True)

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        with directories.attach(home) as data:
            files.sync_filesystem(data.fd)

    def allow(self, home: Home, size_bytes: int, held_bytes: int) -> None:
        """Nothing: nothing is limited."""

    def open_mounted(self, home: Home, record: Record) -> int | None:
        return None

    def clear(self, home: Home) -> None:
        """Nothing: the directory goes with the home."""

    def size_bytes(self, home: Home) -> int:
        return 0

    def grow(self, home: Home, size_bytes: int) -> int:
        return 0

    def store(self) -> Store:
        usage = files.usage(self._pool.root)
        return Store(usage.total_bytes, usage.free_bytes)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        return 0

    def content_bytes(self, home: Home) -> int:
        return 0

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        return 0

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
        return {}

    def health(self, home: Home, record: Record) -> list[HealthEntry]:
        return list(directories.payload_health(home))

    def stats(self, home: Home, mounted: int) -> Stats:
        return directories.filesystem_stats(mounted)


def _usual(parameters: Mapping[str, str]) -> dict[str, str]:
    usual = {key: value for key, value in parameters.items() if key not in _SYNONYMS}
    for key, meant in _SYNONYMS.items():
        value = parameters.get(key, "")
        if key == MOUNT_PERMISSIONS and not value.strip("0"):
            continue  # to leave the mode as it is
        if value and usual.setdefault(meant, value) != value:
            raise invalid(f"parameters.{key}", value, f"the same as {meant}, which says {usual[meant]!r}")
    return usual
