# SPDX-License-Identifier: Apache-2.0
"""Counts of calls and their durations, kept where calls end and read at a scrape (`metrics`).

Not prometheus-client's own histogram: that is loaded only where somebody scrapes, and this costs a microsecond.
"""

import itertools
import math
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field

BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 25.0, 50.0, 120.0, 300.0, 600.0)
"""The buckets that Kubernetes' own CSI programs use, so that dashboards can lay them side by side."""

BUSY_S = 60.0
"""How long ago the last call may have ended in a driver that gets on."""


@dataclass(slots=True)
class Series:
    """Durations of the calls of one method that ended in one way."""

    seconds: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    """Calls per bucket, not cumulated; the last one is beyond all bounds."""


class Calls:
    """The calls of one process: those that have ended, counted, and those under way, by name."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._series: dict[tuple[str, str], Series] = {}
        self._running: dict[int, str] = {}
        self._numbers = itertools.count()
        self._ended_at = -math.inf

    def begin(self, method: str) -> int:
        """A call has begun; the number is for `end`."""
        number = next(self._numbers)
        self._running[number] = method
        return number

    def end(self, number: int, method: str, code: str, seconds: float) -> None:
        """It has ended."""
        with self._guard:
            self._running.pop(number, None)
            self._ended_at = time.monotonic()
            series = self._series.get((method, code))
            if series is None:
                series = self._series[method, code] = Series()
            series.seconds += seconds
            series.counts[bisect_left(BUCKETS_S, seconds)] += 1

    def running(self) -> list[str]:
        """The methods of the calls under way, one entry a call."""
        with self._guard:
            return sorted(self._running.copy().values())

    def are_getting_on(self, workers: int) -> bool:
        """Whether so many are under way that others wait, but not in vain: one has ended lately.

        A Probe waits for its turn like any call, and killing a driver that works its way through a burst helps nobody.
        """
        with self._guard:
            return len(self._running) >= workers and time.monotonic() - self._ended_at < BUSY_S

    def snapshot(self) -> dict[tuple[str, str], Series]:
        """A copy of all series, by method and code."""
        with self._guard:
            return {key: Series(series.seconds, list(series.counts)) for key, series in self._series.items()}
