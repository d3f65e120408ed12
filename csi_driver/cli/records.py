# SPDX-License-Identifier: Apache-2.0
"""What a pool's directory says of its volumes, read beside a running driver: no lock is taken, nothing is written.

So what is read may be a moment old, and what cannot be read is told, not raised. The driver's own way is `catalog`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from csi_driver.backends.base import PAYLOAD_DIRECTORY, PAYLOAD_IMAGE
from csi_driver.catalog import RECORD_FILE, STAGING, TRASH, VOLUMES
from csi_driver.config import PoolConfig
from csi_driver.identity import POOL_FILE, SCHEMA, PoolRecord
from csi_driver.model import Record


@dataclass(frozen=True, slots=True)
class Home:
    """A volume's directory. `record` is None when it cannot be read: `problem` says why."""

    id: str
    pool: str
    path: Path
    record: Record | None
    problem: str = ""

    @property
    def image(self) -> Path:
        return self.path / PAYLOAD_IMAGE

    @property
    def data(self) -> Path:
        return self.path / PAYLOAD_DIRECTORY


@dataclass(frozen=True, slots=True)
class Contents:
    """A pool as it lies there. `problem` is why it cannot be read at all."""

    homes: list[Home] = field(default_factory=list)
    staging: list[str] = field(default_factory=list)
    trash: list[str] = field(default_factory=list)
    pool: PoolRecord | None = None
    problem: str = ""


def read_pool(config: PoolConfig) -> Contents:
    """Everything there is in a pool's directory."""
    try:
        pool = msgspec.json.decode((config.root / POOL_FILE).read_bytes(), type=PoolRecord)
    except FileNotFoundError:
        return Contents(problem="there is no pool yet: it is made when the driver starts")
    except (OSError, msgspec.DecodeError) as error:
        return Contents(problem=f"{config.root / POOL_FILE}: cannot be read: {error}")
    try:
        return Contents(
            homes=[_home(config, name) for name in _names(config.root / VOLUMES)],
            staging=_names(config.root / STAGING),
            trash=_names(config.root / TRASH),
            pool=pool,
        )
    except OSError as error:
        return Contents(pool=pool, problem=f"{config.root}: cannot be read: {error}")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _home(config: PoolConfig, volume_id: str) -> Home:
    path = config.root / VOLUMES / volume_id
    record, problem = None, ""
    try:
        record = msgspec.json.decode((path / RECORD_FILE).read_bytes(), type=Record)
    except FileNotFoundError:
        problem = f"{RECORD_FILE} is missing"
    except (OSError, msgspec.DecodeError) as error:
        problem = f"{RECORD_FILE}: {error}"
    else:
        if record.schema > SCHEMA:
            problem = (
                f"{RECORD_FILE}: written by a newer version (schema {record.schema}, this one knows {SCHEMA})"
            )
        elif record.id != volume_id:
            problem = f"{RECORD_FILE}: belongs to {record.id}"
    return Home(volume_id, config.name, path, record, problem)
