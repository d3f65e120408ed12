# SPDX-License-Identifier: Apache-2.0
"""The configuration file: TOML into checked values. Every refusal names the file, the key and the remedy.

What a backend's own keys mean is the backend's business: they arrive in `PoolConfig.options` and are read with
`read_options`. Whether the machine can do what is asked is `Backend.check`'s.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from csi_driver.errors import ConfigurationError, unknown_keys
from csi_driver.model import POOL_NAME
from csi_driver.values import Reserved, parse_duration, parse_reserved, parse_size

S = TypeVar("S", bound=msgspec.Struct)
V = TypeVar("V")

DRIVER_NAME = "local.orlop.dev"
SHARED_DRIVER_NAME = "shared.orlop.dev"
SHARED_BACKENDS = ("nfs",)
EXPORT_ROOTS = "/run/orlop/pools"
"""Where a controller mounts exports, a directory each, if nothing else is said."""
DEFAULT_PATH = Path("/etc/orlop/config.toml")
_DRIVER_NAME = re.compile(r"(?=.{1,63}$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.IGNORECASE)
_TAG = re.compile(r"[0-9a-f]{8}")


FsType = Literal["xfs", "btrfs"]
SMALLEST_BACKING = 320 << 20
"""Bytes in which each of these filesystems can be made, and grown later."""


@dataclass(frozen=True, slots=True)
class BackingConfig:
    """`[pools.NAME.backing]`: where a managed pool's own filesystem lies. `size_bytes` is 0 for a device."""

    target: Path
    is_device: bool
    fs_type: FsType
    size_bytes: int
    preallocate: bool
    where: str


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """One `[pools.NAME]`; `where` names the file and the table for messages about `options`."""

    name: str
    backend: str
    root: Path
    reserved: Reserved = field(default_factory=lambda: Reserved(share=0.05))
    retention_s: float = 0.0
    classes: tuple[str, ...] = ()
    static_roots: tuple[Path, ...] = ()
    mounted: bool = False
    shared: bool = False
    """Every node reaches it, and others may work in it at the same time."""
    backing: BackingConfig | None = None
    copy_bandwidth: int = 0
    """Bytes a second that background copies into the pool may move together; 0: no limit."""
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


Expansion = Literal["node", "controller"]
Role = Literal["all", "node"]
"""What a process does: everything, or only what a node needs whose volumes are on servers."""
Scope = Literal["node", "shared"]
"""Where a driver's volumes are: each on one node, or on servers that every node reaches."""


@dataclass(frozen=True, slots=True)
class Config:
    """All that the file says; command line and environment may override the first few."""

    pools: Mapping[str, PoolConfig]
    driver_name: str = DRIVER_NAME
    scope: Scope = "node"
    role: Role = "all"
    node_id: str = ""
    region: str = ""
    zone: str = ""
    default_pool: str = ""
    expansion: Expansion = "node"
    max_volumes_per_node: int = 0
    retired_tags: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    """Pools and types that other nodes of the cluster have, and this one has not."""
    workers: int = 16
    drain_timeout_s: float = 20.0
    freeze_timeout_s: float = 5.0
    copy_jobs: int = 2


class _Pool(msgspec.Struct, forbid_unknown_fields=True):
    backend: str = "image"
    root: str = ""
    reserved: str | int = "5%"
    retention: str | int = 0
    classes: list[str] = []
    static_roots: list[str] = []
    mounted: bool = False
    backing: dict[str, Any] = {}
    copy_bandwidth: str | int = 0


class _Backing(msgspec.Struct, forbid_unknown_fields=True):
    file: str = ""
    device: str = ""
    size: str | int = 0
    filesystem: Literal["", "xfs", "btrfs"] = ""
    preallocate: bool = False


class _File(msgspec.Struct, forbid_unknown_fields=True):
    driver_name: str = ""
    scope: Scope = "node"
    node_id: str = ""
    region: str = ""
    zone: str = ""
    default_pool: str = ""
    expansion: Expansion = "node"
    max_volumes_per_node: int = 0
    retired_tags: list[str] = []
    elsewhere: list[str] = []
    workers: int = 16
    drain_timeout: str | int = "20s"
    freeze_timeout: str | int = "5s"
    copy_jobs: int = 2
    pools: dict[str, dict[str, Any]] = {}


def load(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigurationError: it cannot be read, or something in it is wrong.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}; name the file with --config") from error
    return parse(text, str(path))


def parse(text: str, name: str = "configuration") -> Config:
    """Check a configuration given as text; `name` is what messages call it."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{name}: not valid TOML: {error}") from error
    file = _convert(raw, _File, name)
    if not file.pools and file.scope == "node":
        raise ConfigurationError(
            f"{name}: no pool is configured: add a table [pools.NAME] with at least a root"
        )
    pools = {
        pool: _pool(pool, table, name, shared=file.scope == "shared") for pool, table in file.pools.items()
    }
    _check_file(file, pools, name)
    return Config(
        pools=pools,
        driver_name=file.driver_name or (SHARED_DRIVER_NAME if file.scope == "shared" else DRIVER_NAME),
        scope=file.scope,
        node_id=file.node_id,
        region=file.region,
        zone=file.zone,
        default_pool=file.default_pool,
        expansion=file.expansion,
        max_volumes_per_node=file.max_volumes_per_node,
        retired_tags=frozenset(file.retired_tags),
        elsewhere=frozenset(file.elsewhere),
        workers=file.workers,
        drain_timeout_s=_at(f"{name}: drain_timeout", parse_duration, file.drain_timeout),
        freeze_timeout_s=_at(f"{name}: freeze_timeout", parse_duration, file.freeze_timeout),
        copy_jobs=file.copy_jobs,
    )


def read_options(pool: PoolConfig, kind: type[S]) -> S:
    """A backend's own keys of a pool, as its msgspec Struct.

    Raises:
        ConfigurationError: an unknown key or a wrong type; names the pool's known keys.
    """
    return _convert(dict(pool.options), kind, pool.where, also_known=_Pool.__struct_fields__)


def _pool(pool: str, table: dict[str, Any], name: str, *, shared: bool) -> PoolConfig:
    where = f"{name}: [pools.{pool}]"
    if not POOL_NAME.fullmatch(pool):
        raise ConfigurationError(
            f"{where}: a pool's name is a letter and up to 15 letters or digits, lower case"
        )
    common = {key: value for key, value in table.items() if key in _Pool.__struct_fields__}
    parsed = _convert(common, _Pool, where)
    root = parsed.root or (f"{EXPORT_ROOTS}/{pool}" if parsed.backend in SHARED_BACKENDS else "")
    if not root.startswith("/"):
        raise ConfigurationError(
            f"{where} root {parsed.root!r}: give the absolute path of the pool's directory"
        )
    return PoolConfig(
        name=pool,
        backend=parsed.backend,
        root=Path(root),
        reserved=_at(f"{where} reserved", parse_reserved, parsed.reserved),
        retention_s=_at(f"{where} retention", parse_duration, parsed.retention),
        classes=tuple(parsed.classes),
        static_roots=tuple(_absolute(f"{where} static_roots", root) for root in parsed.static_roots),
        mounted=parsed.mounted,
        backing=_backing(parsed, f"{name}: [pools.{pool}.backing]", shared=shared),
        shared=shared,
        copy_bandwidth=_at(f"{where} copy_bandwidth", parse_size, parsed.copy_bandwidth),
        options={key: value for key, value in table.items() if key not in common},
        where=where,
    )


def _backing(pool: _Pool, where: str, *, shared: bool) -> BackingConfig | None:
    if not pool.backing:
        return None
    if pool.backend in SHARED_BACKENDS or shared:
        raise ConfigurationError(
            f"{where}: a pool of backend {pool.backend!r} lies on its server: leave it out"
        )
    given = _convert(pool.backing, _Backing, where)
    if bool(given.file) == bool(given.device):
        raise ConfigurationError(f"{where}: name either a file or a device, where the pool's filesystem lies")
    fs_type: FsType = given.filesystem or ("btrfs" if pool.backend == "btrfs" else "xfs")
    if pool.backend == "btrfs" and fs_type != "btrfs":
        raise ConfigurationError(f'{where} filesystem {fs_type!r}: a pool of backend "btrfs" needs "btrfs"')
    return BackingConfig(
        target=_target(given, where),
        is_device=bool(given.device),
        fs_type=fs_type,
        size_bytes=_backing_size(given, where),
        preallocate=given.preallocate,
        where=where,
    )


def _target(given: _Backing, where: str) -> Path:
    if given.file:
        return _absolute(f"{where} file", given.file)
    path = _absolute(f"{where} device", given.device)
    if not path.is_relative_to("/dev"):
        raise ConfigurationError(f"{where} device {given.device!r}: give a block device in /dev")
    return path


def _backing_size(given: _Backing, where: str) -> int:
    if given.device:
        for key, value in (("size", given.size), ("preallocate", given.preallocate)):
            if value:
                raise ConfigurationError(
                    f"{where} {key} {value!r}: a device is as large as it is: leave it out"
                )
        return 0
    size_bytes = _at(f"{where} size", parse_size, given.size) & ~0xFFF
    if size_bytes < SMALLEST_BACKING:
        raise ConfigurationError(
            f"{where} size {given.size!r}: give the size of the pool's filesystem, at least 320Mi"
        )
    return size_bytes


def _check_file(file: _File, pools: Mapping[str, PoolConfig], name: str) -> None:
    for pool in pools.values():
        allowed = (*SHARED_BACKENDS, "directory") if file.scope == "shared" else None
        if (pool.backend in SHARED_BACKENDS) if allowed is None else (pool.backend not in allowed):
            raise ConfigurationError(
                f"{pool.where} backend {pool.backend!r}: not in a driver of scope {file.scope!r}: what all nodes reach (nfs, "
                'and directories of a filesystem that all have mounted) has a driver of its own, with scope = "shared"'
            )
    if file.driver_name and not _DRIVER_NAME.fullmatch(file.driver_name):
        raise ConfigurationError(
            f"{name}: driver_name {file.driver_name!r}: at most 63 letters, digits, '-' and '.', like {DRIVER_NAME}"
        )
    if file.default_pool and file.default_pool not in pools:
        raise ConfigurationError(
            f"{name}: default_pool {file.default_pool!r}: no such pool; configured: {', '.join(sorted(pools))}"
        )
    for tag in file.retired_tags:
        if not _TAG.fullmatch(tag):
            raise ConfigurationError(
                f"{name}: retired_tags {tag!r}: give the 8 hex digits in the middle of the lost volumes' ids"
            )
    if not 1 <= file.workers <= 256:
        raise ConfigurationError(f"{name}: workers {file.workers}: give a number from 1 to 256")
    if not 1 <= file.copy_jobs <= 64:
        raise ConfigurationError(f"{name}: copy_jobs {file.copy_jobs}: give a number from 1 to 64")
    if file.max_volumes_per_node < 0:
        raise ConfigurationError(
            f"{name}: max_volumes_per_node {file.max_volumes_per_node}: give 0 (found out) or more"
        )
    _check_roots(pools, name)


def _check_roots(pools: Mapping[str, PoolConfig], name: str) -> None:
    """Pools must not lie in one another: one's volumes would be the other's data."""
    for one in pools.values():
        for other in pools.values():
            if one is not other and (one.root == other.root or other.root in one.root.parents):
                raise ConfigurationError(
                    f"{name}: [pools.{one.name}] root {str(one.root)!r} is the root of [pools.{other.name}] "
                    "or lies in it: give each pool a directory of its own"
                )
    _check_backings([(pool, pool.backing) for pool in pools.values() if pool.backing], pools)


def _check_backings(managed: list[tuple[PoolConfig, BackingConfig]], pools: Mapping[str, PoolConfig]) -> None:
    known: dict[Path, str] = {}
    for pool, backing in managed:
        target = str(backing.target)
        if backing.target in known:
            raise ConfigurationError(
                f"{backing.where} {target!r}: is the backing of [pools.{known[backing.target]}] already: give each "
                "pool its own"
            )
        known[backing.target] = pool.name
        for other in pools.values():
            if other.root == backing.target or other.root in backing.target.parents:
                raise ConfigurationError(
                    f"{backing.where} file {target!r}: lies in the root of [pools.{other.name}]: put it beside it"
                )
        if pool.root in (Path("/"), Path(target)) or pool.root.parent == Path("/"):
            raise ConfigurationError(
                f"{pool.where} root {str(pool.root)!r}: a filesystem is mounted there, which the directory above it must "
                "show to the node: give a directory in another one than '/'"
            )


def _convert(raw: dict[str, Any], kind: type[S], where: str, also_known: tuple[str, ...] = ()) -> S:
    unknown = raw.keys() - set(kind.__struct_fields__)
    if unknown:
        message = unknown_keys(where, unknown, {*kind.__struct_fields__, *also_known})
        raise ConfigurationError(f"{message}; correct or remove it")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}".replace("`$.", "`")) from error


def _at(where: str, reader: Callable[[str | int], V], value: str | int) -> V:
    try:
        return reader(value)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _absolute(where: str, path: str) -> Path:
    if not path.startswith("/") or path == "/" or ".." in Path(path).parts:
        raise ConfigurationError(
            f"{where} {path!r}: give the absolute path of a directory, without '..', not '/'"
        )
    return Path(path)
