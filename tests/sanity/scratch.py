# SPDX-License-Identifier: Apache-2.0
"""A scratch directory with a filesystem of its own for a pool, and the proof that nothing is left of it.

Everything a run makes lies beneath one directory, and every loop device it makes has its file there; so what is left
behind can be found by asking the kernel, whoever made it. Which driver runs there is not this module's business.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Volumes of csi-sanity are 10 GiB each, and fully allocated. The file beneath is sparse: it takes a few MB.
POOL_FILESYSTEM_BYTES = 200 << 30
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
}


def run(*argv: str | Path) -> str:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def mounts_beneath(directory: Path) -> list[Path]:
    """Mount points at or beneath a directory, the youngest first."""
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        points = [
            os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")) for line in mountinfo
        ]
    return [Path(point) for point in reversed(points) if Path(point).is_relative_to(directory)]


def loops_beneath(directory: Path) -> dict[str, str]:
    """Loop devices whose backing file lies beneath a directory: device to file."""
    listing = run("losetup", "--list", "--json", "--output", "NAME,BACK-FILE").strip()
    devices = json.loads(listing)["loopdevices"] if listing else []
    files = {device["name"]: device["back-file"] or "" for device in devices}
    # A deleted file keeps its name in the listing, with a remark behind it.
    return {name: file for name, file in files.items() if Path(file).is_relative_to(directory)}


class Scratch:
    """One run's directory: `pool` is a filesystem of its own, the rest lies on the machine's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pool = root / "pool"
        self.filesystem = root / "pool.filesystem"

    def mount_pool(self, filesystem: str) -> None:
        self.pool.mkdir()
        self.filesystem.touch()
        os.truncate(self.filesystem, POOL_FILESYSTEM_BYTES)
        run(*MKFS[filesystem], self.filesystem)
        run("mount", "-o", "loop", self.filesystem, self.pool)

    def leaks(self) -> list[str]:
        """What the driver has left, in words; the pool's own mount and loop device do not count."""
        left = [f"mounted: {point}" for point in mounts_beneath(self.root) if point != self.pool]
        loops = loops_beneath(self.root)
        left += [
            f"{name}: {file}" for name, file in loops.items() if not file.startswith(str(self.filesystem))
        ]
        for kind in ("volumes", "snapshots", "staging", "trash"):
            folder = self.pool / kind
            left += (
                [f"in the pool: {kind}/{entry.name}" for entry in folder.iterdir()] if folder.is_dir() else []
            )
        return left

    def clear(self) -> None:
        for point in mounts_beneath(self.root):
            run("umount", point)
        for device in loops_beneath(self.root):
            run("losetup", "--detach", device)
        shutil.rmtree(self.root)


@contextmanager
def scratch(filesystem: str) -> Iterator[Scratch]:
    # Not /tmp: where that is memory, thick volumes of 10 GiB would not fit.
    place = Scratch(Path(tempfile.mkdtemp(prefix="orlop-sanity-", dir="/var/tmp")))
    try:
        place.mount_pool(filesystem)
        yield place
    finally:
        place.clear()
