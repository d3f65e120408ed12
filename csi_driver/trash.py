# SPDX-License-Identifier: Apache-2.0
"""The trash of one pool: what was deleted and is kept for a while, and when it goes.

How a home is removed, and what room that gives back, is `pool`'s business.
"""

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from csi_driver import mutable
from csi_driver.catalog import Catalog, Home
from csi_driver.config import PoolConfig
from csi_driver.errors import Error, Unavailable

log = logging.getLogger(__name__)

_CLOCK_SLACK_S = 60.0
_PATIENCE_S = 5.0


class Trash:
    """What is in it, the disk says. `remove` makes a home go, `moved` is told of a new name for one."""

    def __init__(
        self,
        catalog: Catalog,
        config: PoolConfig,
        remove: Callable[[Home], None],
        moved: Callable[[str, str], None],
    ) -> None:
        self._catalog = catalog
        self._config = config
        self._remove = remove
        self._moved = moved
        self._guard = threading.Lock()
        # By the names of homes: their records are read once.
        self._retentions: dict[str, float] = {}

    def empty(self, now: float) -> float | None:
        """Remove what was deleted longer than its retention ago; seconds until the next is due, None for none."""
        with self._guard:
            return self._empty(now)

    def empty_due(self) -> None:
        """Give back at once what deleted volumes hold, where maintenance has not got to it yet."""
        if not self._guard.acquire(timeout=_PATIENCE_S):
            return  # it is at work on something large
        try:
            self._empty(time.time())
        except (OSError, Error) as error:
            log.error("pool %s: the trash cannot be emptied: %s", self._config.name, error)
        finally:
            self._guard.release()

    def _empty(self, now: float) -> float | None:
        due: list[float] = []
        failures: list[OSError | Error] = []
        for found, when in list(self._catalog.trashed()):
            retention_s = self._retention_s(found)
            home, wait = found, when + retention_s - now
            if when > now + _CLOCK_SLACK_S:
                # Deleted while the clock was ahead: kept from now on, not for so much longer.
                home, wait = self._redate(found), retention_s
            if wait > 0:
                due.append(wait)
                continue
            try:
                self._remove(home)
                self._retentions.pop(home.name, None)
            except (OSError, Error) as error:
                # One that cannot go yet (something is mounted in it) must not keep the others.
                failures.append(error)
        if failures:
            raise failures[0]
        return min(due, default=None)

    def _retention_s(self, home: Home) -> float:
        """How long it is kept: as its volume's class says, else as the pool does."""
        known = self._retentions.get(home.name)
        if known is not None:
            return known
        own: float | None = None
        try:
            own = mutable.parse(self._catalog.mutable(home)).retention_s
        except Unavailable:
            raise  # a file server that does not answer now: what it would say must not be guessed
        except (OSError, Error, msgspec.ValidationError) as error:
            log.error("pool %s: %s: kept as the pool says: %s", self._config.name, home.path, error)
        kept = self._config.retention_s if own is None else own
        self._retentions[home.name] = kept
        return kept

    def _redate(self, home: Home) -> Home:
        redated = self._catalog.trash(home)
        self._retentions.pop(home.name, None)
        self._moved(home.name, redated.name)
        return redated
