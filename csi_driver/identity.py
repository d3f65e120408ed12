# SPDX-License-Identifier: Apache-2.0
"""Which pool a directory is: `pool.json`, written once, and found there by every driver that opens it after that."""

import os
import uuid
from pathlib import Path

import msgspec

from csi_driver.errors import ConfigurationError
from csi_driver.linux import files
from csi_driver.model import VolumeId

SCHEMA = 1
"""Of all that is written into a pool; a newer one is refused."""
POOL_FILE = "pool.json"


class PoolRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`pool.json`: moves with the disk."""

    schema: int
    uuid: str
    backend: str

    @property
    def tag(self) -> str:
        """What the ids of the pool's volumes say of it."""
        return self.uuid.replace("-", "")[:8]


def find_identity(root: Path, root_fd: int, backend: str, tag: str, volumes: str) -> PoolRecord:
    """That of the pool at `root`, made if there is none; `tag`: that one only; `volumes`: where its volumes are.

    Raises:
        ConfigurationError: another's, a newer version's, or damaged.
    """
    pool = _read(root, root_fd)
    if pool is None and not tag:
        _check_unused(root, root_fd, volumes)
        made = PoolRecord(schema=SCHEMA, uuid=str(uuid.uuid4()), backend=backend)
        files.write_once(root_fd, POOL_FILE, msgspec.json.encode(made))
        files.sync(root_fd)
        # Another driver may have been faster, where several may have the pool.
        pool = _read(root, root_fd)
    if pool is None or (tag and pool.tag != tag):
        raise ConfigurationError(
            f"{root / POOL_FILE}: not that of the pool with tag {tag or 'any'} that was here before: another "
            "filesystem is in its place: bring the right one back, and restart the driver if this one is"
        )
    if pool.schema > SCHEMA:
        raise ConfigurationError(
            f"{root / POOL_FILE}: written by a newer version of Orlop (schema {pool.schema}, this one knows "
            f"{SCHEMA}): install that version again"
        )
    if pool.backend != backend:
        raise ConfigurationError(
            f"pool root {root}: holds a pool of backend {pool.backend!r}, the configuration says {backend!r}: "
            "correct the configuration or give the new pool another root"
        )
    return pool


def _read(root: Path, root_fd: int) -> PoolRecord | None:
    try:
        return msgspec.json.decode(files.read(root_fd, POOL_FILE), type=PoolRecord)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"{root / POOL_FILE}: damaged ({error}): restore it from a backup"
        ) from error


def _check_unused(root: Path, root_fd: int, volumes: str) -> None:
    """A new uuid would make the volumes that are there strangers for ever: their ids say the old one."""
    try:
        fd = files.open_beneath(root_fd, volumes, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        orphan = next((name for name in sorted(os.listdir(fd)) if VolumeId.find(name)), None)
    finally:
        os.close(fd)
    if orphan is not None:
        raise ConfigurationError(
            f"{root / POOL_FILE}: missing, but there are volumes, {orphan} for one: restore it from a backup "
            f"(its uuid begins with {orphan.split('-')[1]})"
        )
