# SPDX-License-Identifier: Apache-2.0
"""The machine of a soak: pools on filesystems of their own, the driver over them, and what is left at the end."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bench.driver import Driver, write_config
from bench.scratch import Scratch

GIB = 1 << 30
AREAS = ("volumes", "staging", "trash")
SETTLE_S = 120.0
# Directories of a filesystem grow with their entries and never shrink, and btrfs frees at its next commit.
SPACE_TOLERANCE = {"directory": 1 << 20, "image": 1 << 20, "btrfs": 16 << 20}


@dataclass(frozen=True)
class Scene:
    """Where everything is."""

    place: Scratch
    driver: Driver
    pools: dict[str, Path]

    def free_bytes(self) -> dict[str, int]:
        """What each pool's filesystem has free, once it has written everything out."""
        free = {}
        for name, root in self.pools.items():
            fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
                status = os.fstatvfs(fd)
            finally:
                os.close(fd)
            free[name] = status.f_bavail * status.f_frsize
        return free

    def descriptors(self) -> list[str]:
        """What the driver has open beneath the pools, and how much else."""
        return sorted(_targets(self.driver.pid))

    def leftovers(self) -> list[str]:
        """What is there that a driver without volumes does not have, in words."""
        roots = set(self.pools.values())
        left = [f"mounted: {point}" for point in self.place.mounts() if point not in roots]
        filesystems = {root.with_name(f"{root.name}.filesystem") for root in roots}
        left += [f"{name}: {file}" for name, file in self.place.loops().items() if file not in filesystems]
        for name, root in self.pools.items():
            for area in AREAS:
                folder = root / area
                left += [f"pool {name}: {area}/{entry}" for entry in os.listdir(folder)]
        return left + self._strangers()

    def _strangers(self) -> list[str]:
        """Processes other than the driver and ourselves that hold something beneath."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            if pid not in (os.getpid(), self.driver.pid):
                held = [target for target in _targets(pid) if target.startswith(f"{self.place.root}/")]
                found += [f"process {pid} holds {held[0]}"] if held else []
        return found

    def settled(self) -> list[str]:
        """`leftovers`, once background work has had its time."""
        deadline = time.monotonic() + SETTLE_S
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


def _targets(pid: int) -> list[str]:
    targets = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            targets.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    except OSError:
        pass  # It ended while we looked.
    return targets


def set_scene(place: Scratch) -> Scene:
    """Pools on fresh filesystems, and a driver that is not started yet."""
    pools = {
        "image": place.filesystem("image", "ext4", 24 * GIB),
        "directory": place.filesystem("directory", "ext4", 2 * GIB),
        "btrfs": place.filesystem("btrfs", "btrfs", 16 * GIB),
    }
    options = {"directory": "enforce_capacity = false", "btrfs": "enable_quota = true"}
    config = place.root / "orlop.toml"
    tables = {
        name: f'backend = "{name}"\nroot = "{root}"\nreserved = 0\n{options.get(name, "")}'
        for name, root in pools.items()
    }
    write_config(config, tables)
    return Scene(place, Driver(place.root, config), pools)
