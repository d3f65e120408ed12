# SPDX-License-Identifier: Apache-2.0
"""The one background thread: removes what was deleted or left half made, and counts anew what volumes have taken.

It shares nothing with calls but the pools themselves; a failure is logged and tried again at the next round.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from csi_driver.errors import Error
from csi_driver.pool import Pool
from csi_driver.pools import Pools

log = logging.getLogger(__name__)

REFRESH_S = 10.0
"""How old what `Space` knows of writes may get, in seconds."""
SWEEP_S = 300.0
"""How often pools that other drivers have too are looked through for what was left half made, in seconds."""


class Maintenance:
    """Runs from `start` to `stop`. `sweep` is what there is to do in such a pool beyond its own."""

    def __init__(
        self,
        pools: Pools,
        sweep: Callable[[Pool], None],
        refresh_s: float = REFRESH_S,
        sweep_s: float = SWEEP_S,
    ) -> None:
        self._pools = pools
        self._sweep = sweep
        self._refresh_s = refresh_s
        self._sweep_s = sweep_s
        self.failures: Counter[str] = Counter()
        """By the names of pools: how often something did not work."""
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)
        for pool in pools:
            pool.on_trash = self._wake.set

    def start(self) -> None:
        """Begin; what earlier runs left in the trash is looked at first."""
        self._wake.set()
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End after the removal that is under way, or leave it to the next start."""
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def is_at_work(self) -> bool:
        """Whether it has not ended (yet)."""
        return self._thread.is_alive()

    def _run(self) -> None:
        refreshed = time.monotonic()
        swept = -math.inf
        while not self._ending.is_set():
            self._wake.wait(self._refresh_s)
            self._wake.clear()
            refresh = time.monotonic() - refreshed >= self._refresh_s
            sweep = time.monotonic() - swept >= self._sweep_s
            for pool in self._pools:
                if self._ending.is_set():
                    return
                if not pool.adopted:
                    self._try(pool, pool.adopt)
                if sweep and pool.is_apart:
                    self._try(pool, pool.sweep)
                    self._try(pool, partial(self._sweep, pool))
                self._try(pool, pool.empty_trash)
                if refresh:
                    self._try(pool, pool.refresh)
            if refresh:
                refreshed = time.monotonic()
            if sweep:
                swept = time.monotonic()

    def _try(self, pool: Pool, work: Callable[[], object]) -> None:
        try:
            work()
        except (OSError, Error) as error:
            self.failures[pool.name] += 1
            log.error(
                "pool %s: maintenance failed, it is tried again in %g s: %s",
                pool.name,
                self._refresh_s,
                error,
            )
        except Exception:  # the one thread of its kind: without it, nothing deleted would ever go
            self.failures[pool.name] += 1
            log.exception("pool %s: maintenance failed unexpectedly, it is tried again", pool.name)
