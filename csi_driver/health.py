# SPDX-License-Identifier: Apache-2.0
"""What is known to be wrong with volumes and pools. Only looks; an entry stays as long as its condition does.

CSI 1.13 (alpha): volume health and storage health.
"""

from csi_driver.catalog import Home
from csi_driver.errors import Error, NotFound, Unavailable
from csi_driver.model import HealthEntry, HealthStatus, StorageEntry, StorageStatus
from csi_driver.pool import Pool
from csi_driver.pools import Pools


class Health:
    """Asks the kernel and the pools anew at every call."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def of_volume(self, pool: Pool, home: Home) -> list[HealthEntry]:
        """The conditions of one volume; empty when nothing is known to be wrong."""
        if not pool.is_present():
            return [HealthEntry(HealthStatus.INACCESSIBLE, "PoolMissing", _missing(pool))]
        entries = self._look(pool, home)
        if entries and not _stands(pool, home):
            return []  # deleted meanwhile: what is missing of it is meant to be
        return entries

    def _look(self, pool: Pool, home: Home) -> list[HealthEntry]:
        try:
            record = pool.catalog.read(home)
        except NotFound as error:
            return [HealthEntry(HealthStatus.DATA_LOSS, "RecordMissing", str(error))]
        except Unavailable as error:
            return [HealthEntry(HealthStatus.INACCESSIBLE, "ServerUnreachable", str(error))]
        except Error as error:
            return [HealthEntry(HealthStatus.DATA_LOSS, "RecordDamaged", str(error))]
        except OSError as error:
            return [_unreadable(home, error)]
        try:
            return pool.backend.health(home, record)
        except Unavailable as error:
            return [HealthEntry(HealthStatus.INACCESSIBLE, "ServerUnreachable", str(error))]
        except (OSError, Error) as error:
            return [_unreadable(home, error)]

    def of_storage(self) -> list[StorageEntry]:
        """The conditions of all pools, as this node sees them."""
        return [entry for pool in self._pools for entry in self.of_pool(pool)]

    def of_pool(self, pool: Pool) -> list[StorageEntry]:
        """The conditions of one pool."""
        if not pool.is_present():
            return [_storage(pool, StorageStatus.STORAGE_UNREACHABLE, "Missing", _missing(pool))]
        entries = []
        if pool.catalog.is_read_only():
            message = f"pool {pool.name!r}: the filesystem at {pool.catalog.root} is read-only: see the kernel's log"
            entries.append(_storage(pool, StorageStatus.STORAGE_DEGRADED, "ReadOnly", message))
        for reason, message in pool.backing_problems().items():
            entries.append(_storage(pool, StorageStatus.STORAGE_DEGRADED, reason, message))
        if pool.room() == 0:
            message = f"pool {pool.name!r}: has no room for another volume"
            entries.append(_storage(pool, StorageStatus.STORAGE_DEGRADED, "Full", message))
        return entries


def _stands(pool: Pool, home: Home) -> bool:
    try:
        return pool.catalog.stands(home)
    except (OSError, Error):
        return True  # not to be known now: what was seen of it is told


def _unreadable(home: Home, error: OSError | Error) -> HealthEntry:
    return HealthEntry(
        HealthStatus.INACCESSIBLE, "Unreadable", f"volume {home.id!r}: cannot be looked at: {error}"
    )


def _storage(pool: Pool, status: StorageStatus, reason: str, message: str) -> StorageEntry:
    # (status, reason) must not repeat in one answer, and a node has several pools.
    return StorageEntry(status, f"Pool{pool.name.capitalize()}{reason}", message)


def _missing(pool: Pool) -> str:
    return (
        f"pool {pool.name!r}: its directory {pool.catalog.root} is not there any more: is its disk mounted?"
    )
