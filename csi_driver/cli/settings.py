# SPDX-License-Identifier: Apache-2.0
"""`orlop config`: a configuration as `serve` would read it, told in words; and what other commands need of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.table import Table

from csi_driver import backends
from csi_driver.cli import terminal, words
from csi_driver.config import DEFAULT_PATH, DRIVER_NAME, BackingConfig, Config, PoolConfig, load
from csi_driver.errors import ConfigurationError
from csi_driver.values import Reserved

GOOD, WRONG = 0, 2

CONFIG_VARIABLE, ENDPOINT_VARIABLE = "ORLOP_CONFIG", "CSI_ENDPOINT"
KUBELET_DIR = Path("/var/lib/kubelet")


@dataclass(frozen=True, slots=True)
class _Pool:
    """What a pool's table comes to."""

    name: str
    backend: str
    root: str
    enforces_capacity: bool
    reserved: str
    retention_s: float
    classes: tuple[str, ...]
    is_default: bool
    backing: dict[str, Any] | None
    options: dict[str, Any]


def config_path(given: Path | None) -> Path:
    """The file that `serve` would read."""
    return given or Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_PATH)


def find_config(given: Path | None) -> Config | None:
    """The configuration; None when no file is named and there is none.

    Raises:
        ConfigurationError: there is one, and it is wrong.
    """
    path = config_path(given)
    if given is None and not path.exists():
        return None
    return load(path)


def endpoint_of(given: str | None, config: Config | None, kubelet_dir: Path = KUBELET_DIR) -> str:
    """The socket to ask: as given, as the environment says, or where it is for kubelet."""
    driver_name = config.driver_name if config else DRIVER_NAME
    usual = f"unix://{kubelet_dir}/plugins/{driver_name}/csi.sock"
    return given or os.environ.get(ENDPOINT_VARIABLE) or usual


def check(path: Path, *, as_json: bool) -> int:
    """Tell what a configuration means, or the one thing that is wrong with it; returns the exit code."""
    try:
        config = load(path)
        pools = _look(config)
    except ConfigurationError as error:
        if as_json:
            terminal.write_json({"ok": False, "file": str(path), "error": str(error)})
        else:
            terminal.complain(str(error))
        return WRONG
    if as_json:
        terminal.write_json(
            {"ok": True, "file": str(path), "driver_name": config.driver_name, "pools": pools}
        )
    else:
        _show(path, config, pools)
    return GOOD


def _look(config: Config) -> list[_Pool]:
    enforcing = {
        name: backends.create(pool).features.enforces_capacity for name, pool in config.pools.items()
    }
    return [_pool(config, pool, enforcing) for pool in config.pools.values()]


def _pool(config: Config, pool: PoolConfig, enforcing: Mapping[str, bool]) -> _Pool:
    # As `Pools.candidates` has it: the one that is named, or any that keeps its sizes.
    is_default = config.default_pool == pool.name if config.default_pool else enforcing[pool.name]
    return _Pool(
        name=pool.name,
        backend=pool.backend,
        root=str(pool.root),
        enforces_capacity=enforcing[pool.name],
        reserved=_reserved(pool.reserved),
        retention_s=pool.retention_s,
        classes=pool.classes,
        is_default=is_default or len(config.pools) == 1,
        backing=_backing(pool.backing) if pool.backing else None,
        options=dict(pool.options),
    )


def _backing(backing: BackingConfig) -> dict[str, Any]:
    return {
        "device" if backing.is_device else "file": str(backing.target),
        "filesystem": backing.fs_type,
        "size_bytes": backing.size_bytes,
        "preallocate": backing.preallocate,
    }


def _place(pool: _Pool) -> str:
    """Where a pool is, and what the driver makes and mounts for that."""
    if pool.backing is None:
        return pool.root
    backing = pool.backing
    size = f" of {words.size(backing['size_bytes'])}" if backing["size_bytes"] else ""
    kind = "preallocated " if backing["preallocate"] else ""
    return f"{pool.root}\n{kind}{backing['filesystem']}{size} in {backing.get('file') or backing['device']}"


def _reserved(reserved: Reserved) -> str:
    return f"{reserved.share * 100:g}%" if reserved.share else words.size(reserved.bytes)


def _toml(value: object) -> str:
    return msgspec.json.encode(value).decode()  # of what a pool's options hold, JSON and TOML write the same


def _show(path: Path, config: Config, pools: list[_Pool]) -> None:
    console = terminal.console()
    console.print(
        f"[green]ok[/] {path}: driver {config.driver_name}, {len(pools)} pool{'s' * (len(pools) != 1)}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("pool", "backend", "root", "sizes", "reserved", "deleted are kept", "types", "options"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("pool", "backend", "reserved"))
    for pool in pools:
        table.add_row(
            f"{pool.name} *" if pool.is_default else pool.name,
            pool.backend,
            _place(pool),
            "enforced" if pool.enforces_capacity else "[yellow]not enforced[/]",
            pool.reserved,
            words.duration(pool.retention_s) if pool.retention_s else "no",
            ", ".join(pool.classes),
            ", ".join(f"{key} = {_toml(value)}" for key, value in pool.options.items()),
        )
    terminal.print_table(table)
    console.print("* takes the volumes of a StorageClass that names neither pool nor type.")
    console.print("Whether this machine can serve them, [bold]orlop doctor[/] tells.")
