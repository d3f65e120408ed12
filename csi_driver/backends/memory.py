# SPDX-License-Identifier: Apache-2.0
"""A backend for tests of the layers above it, without root: never for data.

It keeps the whole contract, and only pretends to the one thing that needs a kernel: nothing stops a volume from
being written past its size. Its store is a number, `total`, of which each payload takes its size at once.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from csi_driver.backends import directories
from csi_driver.backends.base import NODE_MODES, PAYLOAD_DIRECTORY, Directory, Features, Store
from csi_driver.backends.parameters import check_fs_type, parse_parameters
from csi_driver.catalog import Home
from csi_driver.config import PoolConfig, read_options
from csi_driver.errors import ConfigurationError, ResourceExhausted
from csi_driver.linux import files, tree, treecopy
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    GIB,
    KIB,
    AccessType,
    HealthEntry,
    Parameters,
    Record,
    SizeLimits,
    Stats,
    VolumeSpec,
)
from csi_driver.values import parse_size

SIZE_FILE = "size"
FS_TYPE = "memfs"
_LIMITS = SizeLimits(minimum_bytes=4 * KIB, maximum_bytes=2**62, multiple_bytes=4 * KIB)


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    total: str | int = GIB
    instant_copies: bool = True
    server: str = ""


class MemoryBackend:
    """A pool whose volumes are directories with a number beside them."""

    def __init__(self, pool: PoolConfig) -> None:
        options = read_options(pool, _Options)
        try:
            self._total_bytes = parse_size(options.total)
        except ValueError as error:
            raise ConfigurationError(f"{pool.where} total: {error}") from error
        self._root = pool.root
        self._instant_copies = options.instant_copies
        self._server = options.server
        self._guard = threading.Lock()
        self._taken = _taken_beneath(pool.root)

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset({AccessType.MOUNT}),
            access_modes=NODE_MODES,
            instant_copies=self._instant_copies,
            server=self._server,
        )

    def check(self) -> None:
        return None

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        parsed = parse_parameters(parameters, fs_type)
        check_fs_type(parsed.fs_type, FS_TYPE)
        return parsed

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        return _LIMITS

    def make(self, home: Home, spec: VolumeSpec) -> None:
        home_fd = home.open_directory()
        with Directory(home_fd):
            self._resize(home, home_fd, spec.size_bytes)
            with Directory(files.ensure_directory(home_fd, PAYLOAD_DIRECTORY, mode=_mode(spec.parameters))):
                files.sync(home_fd)

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        home_fd = home.open_directory()
        with Directory(home_fd):
            self._resize(home, home_fd, spec.size_bytes)
            with (
                Directory(files.ensure_directory(home_fd, PAYLOAD_DIRECTORY, mode=0o700)) as data,
                directories.attach(source) as original,
            ):
                treecopy.copy_tree(original.fd, data.fd, transfer, share=False)

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        with directories.attach(home) as data:
            files.sync(data.fd)

    def allow(self, home: Home, size_bytes: int, held_bytes: int) -> None:
        return None

    def open_mounted(self, home: Home, record: Record) -> int | None:
        return None

    def clear(self, home: Home) -> None:
        home_fd = home.open_directory()
        with Directory(home_fd), self._guard:
            self._taken -= _size(home)
            tree.remove_tree(home_fd, SIZE_FILE)

    def size_bytes(self, home: Home) -> int:
        return _size(home)

    def grow(self, home: Home, size_bytes: int) -> int:
        home_fd = home.open_directory()
        with Directory(home_fd):
            if size_bytes > _size(home):
                self._resize(home, home_fd, size_bytes)
        return _size(home)

    def store(self) -> Store:
        return Store(self._total_bytes, self._total_bytes - self._taken)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        return _size(home)

    def content_bytes(self, home: Home) -> int:
        return self.written_bytes(home)

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        return size_bytes

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
        return list(directories.payload_health(home))

    def stats(self, home: Home, mounted: int) -> Stats:
        used = _used_beneath(home.path / PAYLOAD_DIRECTORY)
        total = _size(home)
        return Stats(total_bytes=total, used_bytes=used, available_bytes=max(0, total - used))

    def _resize(self, home: Home, home_fd: int, size_bytes: int) -> None:
        with self._guard:
            more = size_bytes - _size(home)
            if more > self._total_bytes - self._taken:
                raise ResourceExhausted(f"{home.path}: {more} bytes are not free in this pretended store")
            files.write_atomic(home_fd, SIZE_FILE, str(size_bytes).encode())
            self._taken += more


def _mode(parameters: Parameters) -> int:
    # The owner stays who runs the test: another one needs root.
    return directories.DEFAULT_MODE if parameters.mode is None else parameters.mode


def _size(home: Home) -> int:
    try:
        return int(files.read(home.area_fd, f"{home.name}/{SIZE_FILE}"))
    except FileNotFoundError:
        return 0


def _taken_beneath(root: Path) -> int:
    return sum(int(path.read_text()) for path in root.glob(f"*/*/{SIZE_FILE}"))


def _used_beneath(data: Path) -> int:
    return sum(path.lstat().st_size for path in data.rglob("*") if path.is_file() and not path.is_symlink())
