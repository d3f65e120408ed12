# SPDX-License-Identifier: Apache-2.0
"""Filesystems to test on: each in a file in the second kernel's memory, mounted with the options a test asks for."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests import rig

DISKS = Path("/run/disks")
MKFS = {
    "ext4": ["mkfs.ext4", "-q"],
    "ext4-prjquota": ["mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
}


def run(*words: str | os.PathLike[str]) -> str:
    """A command that must succeed; what it says goes into the test's report."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    print(f"$ {' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}", end="")
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Disk:
    """A filesystem in a file, and where it is mounted."""

    image: Path
    target: Path

    @classmethod
    def make(cls, kind: str, target: Path, size: str = "512M") -> "Disk":
        DISKS.mkdir(exist_ok=True)
        image = DISKS / f"{len(os.listdir(DISKS))}-{kind}"
        run("truncate", "-s", size, image)
        run(*MKFS[kind], image)
        target.mkdir(parents=True, exist_ok=True)
        return cls(image, target)

    def mount(self, options: str = "") -> None:
        run("mount", "-o", ",".join(filter(None, ["loop", options])), self.image, self.target)

    def unmount(self) -> None:
        """Whatever is mounted at or beneath the target, the last one first."""
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mounted in reversed(mounts):
            if mounted == str(self.target) or mounted.startswith(f"{self.target}/"):
                rig.unmount(Path(mounted))

    def remove(self) -> None:
        self.unmount()
        self.image.unlink()
