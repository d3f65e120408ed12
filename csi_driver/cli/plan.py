# SPDX-License-Identifier: Apache-2.0
"""What a demo tries, by the pool's backend: the pool's filesystem and options, the volume's filesystem and sizes."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from csi_driver.linux.filesystem import FILESYSTEMS
from csi_driver.model import MIB

POOL = "demo"
SMALLEST_BYTES = 64 * MIB
GROWTH_BYTES = 64 * MIB


class PoolBackend(StrEnum):
    """Backends that a machine with nothing but a disk can try."""

    IMAGE = "image"
    DIRECTORY = "directory"
    BTRFS = "btrfs"


class FsType(StrEnum):
    """Filesystems that an image can have."""

    EXT4 = "ext4"
    XFS = "xfs"
    BTRFS = "btrfs"


@dataclass(frozen=True, slots=True)
class Plan:
    """One demo. `fs_type` is "" where volumes are a part of the pool's filesystem."""

    backend: PoolBackend
    pool_fs_type: str
    fs_type: str
    size_bytes: int
    enforces: bool
    options: str = ""

    @property
    def grown_bytes(self) -> int:
        """What the volume is grown to."""
        return self.size_bytes + GROWTH_BYTES

    def config(self, root: Path) -> str:
        """The driver's configuration file."""
        return f'node_id = "demo-node"\n\n[pools.{POOL}]\nbackend = "{self.backend}"\nroot = "{root}"\n{self.options}'


def plan_for(backend: PoolBackend, fs_type: FsType | None) -> Plan:
    """The plan for a backend.

    Raises ValueError: this backend's volumes have no filesystem of their own to choose.
    """
    if backend is PoolBackend.IMAGE:
        chosen = fs_type or FsType.EXT4
        size_bytes = max(SMALLEST_BYTES, FILESYSTEMS[chosen].minimum_bytes)
        return Plan(backend, "ext4", chosen, size_bytes, enforces=True)
    if fs_type is not None:
        raise ValueError(f"volumes of a {backend} pool are a part of its filesystem: leave --fs-type out")
    if backend is PoolBackend.BTRFS:
        return Plan(backend, "btrfs", "", SMALLEST_BYTES, enforces=True, options="enable_quota = true\n")
    return Plan(backend, "ext4", "", SMALLEST_BYTES, enforces=False, options="enforce_capacity = false\n")
