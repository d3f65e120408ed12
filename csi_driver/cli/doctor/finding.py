# SPDX-License-Identifier: Apache-2.0
"""What a look at something came to, so that it can be counted, shown and read by machines."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is; the order is that of exit codes."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. What is not well says why that matters and what to do."""

    area: str
    level: Level
    what: str
    why: str = ""
    remedy: str = ""


def ok(area: str, what: str) -> Finding:
    return Finding(area, Level.OK, what)


def warning(area: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(area, Level.WARNING, what, why, remedy)


def error(area: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(area, Level.ERROR, what, why, remedy)
