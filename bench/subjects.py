# SPDX-License-Identifier: Apache-2.0
"""What is measured: backends, the pools they get, and the volumes that are made in them."""

from dataclasses import dataclass
from pathlib import Path

from bench.client import Kind
from bench.scratch import Scratch

MIB, GIB = 1 << 20, 1 << 30
BACKENDS = ("directory", "btrfs", "image")
# Sparse: it takes what is written.
_BTRFS_BYTES = 100 * GIB


@dataclass(frozen=True)
class Subject:
    """One kind of volume, by the name that tables give it."""

    name: str
    backend: str
    kind: Kind

    @property
    def formats(self) -> bool:
        return bool(self.kind.fs_type)


SUBJECTS = (
    Subject("directory", "directory", Kind("directory", GIB)),
    Subject("btrfs", "btrfs", Kind("btrfs", GIB)),
    Subject("image block", "image", Kind("image", GIB, block=True)),
    Subject("image ext4", "image", Kind("image", 10 * GIB, fs_type="ext4")),
)
"""For the latency of calls."""

LIVES = (
    Subject("directory", "directory", Kind("directory", 64 * MIB)),
    Subject("btrfs", "btrfs", Kind("btrfs", 64 * MIB)),
    Subject("image block", "image", Kind("image", 64 * MIB, block=True)),
    Subject("image ext4", "image", Kind("image", 64 * MIB, fs_type="ext4")),
)
"""For whole lives, several at a time: small, for what is deleted takes room until its files are removed."""

_THIN = {"provisioning": "thin"}
KEPT = (
    Subject("directory", "directory", Kind("directory", MIB)),
    Subject("btrfs", "btrfs", Kind("btrfs", MIB)),
    Subject("image block", "image", Kind("image", MIB, block=True, parameters=_THIN)),
)
"""For keeping thousands: as small as can be."""


def chosen(subjects: tuple[Subject, ...], backend: str | None) -> list[Subject]:
    """Those of one backend, or all."""
    return [subject for subject in subjects if backend in (None, subject.backend)]


def pool_of(place: Scratch, backend: str, name: str = "") -> tuple[Path, str]:
    """A fresh pool for a backend: its root, and the lines of its table. `name` tells several of one backend apart."""
    folder = f"{name or backend}-pool"
    if backend == "btrfs":
        root = place.filesystem(folder, "btrfs", _BTRFS_BYTES)
    else:
        root = place.root / folder
        root.mkdir()
    lines = [f'backend = "{backend}"', f'root = "{root}"']
    if backend == "directory":
        # The machine's filesystem seldom has project quotas.
        lines.append("enforce_capacity = false")
    if backend == "btrfs":
        lines.append("enable_quota = true")
    return root, "\n".join(lines)
