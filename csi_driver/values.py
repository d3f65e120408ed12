# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and shares as people write them in a configuration or a parameter: text to numbers."""

import re
from dataclasses import dataclass

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTPE]i?)?B?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Reserved:
    """The part of a pool's filesystem that volumes never get: bytes, or a share of its size."""

    bytes: int = 0
    share: float = 0.0

    def of(self, total_bytes: int) -> int:
        """Bytes reserved in a filesystem of `total_bytes`."""
        return self.bytes + int(total_bytes * self.share)


def parse_size(value: str | int) -> int:
    """Bytes from `1073741824`, "1Gi", "500MB"; ValueError says what is accepted."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a size: write bytes, or a number with Ki Mi Gi Ti or K M G T")
    number, unit = match.groups()
    base = 1024 if (unit or "").endswith("i") else 1000
    power = " KMGTPE".index(unit[0]) if unit else 0
    unit_bytes = int(base**power)
    whole, _, part = number.partition(".")
    return int(whole) * unit_bytes + (int(float(f"0.{part}") * unit_bytes) if part else 0)


def parse_duration(value: str | int) -> float:
    """Seconds from `90`, "90s", "15m", "24h", "7d"; ValueError says what is accepted."""
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"{value!r} is not a duration: write a number with s, m, h or d")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def parse_reserved(value: str | int) -> Reserved:
    """A share ("5%") or bytes ("10Gi"); ValueError says what is accepted."""
    text = str(value).strip()
    if not text.endswith("%"):
        return Reserved(bytes=parse_size(value))
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f'{value!r} is not a share: write a percentage from "0%" to "99%"')
    return Reserved(share=share)
