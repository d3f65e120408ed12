# SPDX-License-Identifier: Apache-2.0
"""What of a volume can change after it was made, from a VolumeAttributesClass's text to values.

Whether a pool can do what they say is `modify`'s business; how a device is held to its limits, `linux.throttle`'s.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass

from csi_driver.errors import InvalidArgument, invalid, unknown_keys
from csi_driver.model import KIB, PLACEMENT_KEYS
from csi_driver.values import parse_duration, parse_size

RETENTION = "retention"
READ_BPS, WRITE_BPS, READ_IOPS, WRITE_IOPS = "readBps", "writeBps", "readIops", "writeIops"
KEYS = (RETENTION, READ_BPS, WRITE_BPS, READ_IOPS, WRITE_IOPS)
FIXED = (
    *PLACEMENT_KEYS,
    "fsType",
    "mode",
    "uid",
    "gid",
    "subPath",
    "mkfsOptions",
    "provisioning",
    "onDelete",
    "subDir",
    "mountPermissions",
)
"""Parameters of a StorageClass: decided when a volume is made."""
UNLIMITED = "max"

# With less, mounting the volume would take minutes. The kernel keeps operations a second in 32 bits.
_BPS = (64 * KIB, 2**63 - 1)
_IOPS = (10, 2**32 - 2)


@dataclass(frozen=True, slots=True)
class IoLimits:
    """What all pods of a node together may read from and write to a volume in a second; 0 is no limit."""

    read_bps: int = 0
    write_bps: int = 0
    read_iops: int = 0
    write_iops: int = 0

    def __bool__(self) -> bool:
        return any(astuple(self))


@dataclass(frozen=True, slots=True)
class Mutable:
    """All that can change. `retention_s` None: the pool's."""

    retention_s: float | None = None
    limits: IoLimits = IoLimits()


def parse(given: Mapping[str, str]) -> Mutable:
    """The mutable parameters as values. What is not given is as if the volume had no class.

    Raises:
        InvalidArgument: an unknown key, one that is fixed when a volume is made, or a bad value.
    """
    fixed = sorted(given.keys() & set(FIXED))
    if fixed:
        raise InvalidArgument(
            f"mutable_parameters: {', '.join(map(repr, fixed))}: decided by the StorageClass when a volume is made, and "
            f"never changed: make a new volume of another class, and copy the data; what can change: {', '.join(KEYS)}"
        )
    unknown = given.keys() - set(KEYS)
    if unknown:
        raise InvalidArgument(unknown_keys("mutable_parameters", unknown, KEYS))
    return Mutable(
        retention_s=_read(given, RETENTION, parse_duration) if RETENTION in given else None,
        limits=IoLimits(
            read_bps=_limit(given, READ_BPS, parse_size, _BPS),
            write_bps=_limit(given, WRITE_BPS, parse_size, _BPS),
            read_iops=_limit(given, READ_IOPS, _number, _IOPS),
            write_iops=_limit(given, WRITE_IOPS, _number, _IOPS),
        ),
    )


def _limit(given: Mapping[str, str], key: str, reader: Callable[[str], int], allowed: tuple[int, int]) -> int:
    if given.get(key, UNLIMITED) == UNLIMITED:
        return 0
    value = int(_read(given, key, reader))
    lowest, highest = allowed
    if not lowest <= value <= highest:
        raise invalid(
            f"mutable_parameters.{key}",
            given[key],
            f"give a number from {lowest} to {highest}, or {UNLIMITED!r} for no limit",
        )
    return value


def _read(given: Mapping[str, str], key: str, reader: Callable[[str], float]) -> float:
    try:
        return reader(given[key])
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"mutable_parameters.{key}: {error}") from error


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is not a number: write operations a second, like 500")
    return int(text)
