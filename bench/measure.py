# SPDX-License-Identifier: Apache-2.0
"""Times of named actions, and what they come to.

A machine is never quiet: what is to be compared is timed in turns (A B A B), and compared by the median. What is
timed is not this module's business.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Durations by name, in seconds."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, action: Callable[[], T]) -> T:
        """Do it, and note how long it took."""
        began = time.perf_counter()
        result = action()
        self.samples[name].append(time.perf_counter() - began)
        return result

    def p50(self, name: str) -> float:
        """The median, in seconds."""
        return statistics.median(self.samples[name])

    def summary(self) -> dict[str, dict[str, float]]:
        """All that was timed, for the machine-readable file: milliseconds."""
        return {name: _summary(values) for name, values in self.samples.items()}


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "min_ms": round(ordered[0] * 1000, 4),
        "p50_ms": round(statistics.median(ordered) * 1000, 4),
        "p90_ms": round(ordered[int(len(ordered) * 0.9)] * 1000, 4),
        "max_ms": round(ordered[-1] * 1000, 4),
    }
