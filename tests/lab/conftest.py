# SPDX-License-Identifier: Apache-2.0
"""Tests that run inside the second kernel, and the disks they make there. `make test-lab` runs them."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import unavailable

DISKS = Path("/run/disks")
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
}
Filesystem = Callable[..., Path]


def run(*words: str | os.PathLike[str], **options: object) -> str:
    """A command that must succeed; what it says goes into the test's report."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    print(f"$ {' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}", end="")
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


@pytest.fixture(autouse=True, scope="session")
def second_kernel() -> None:
    if os.environ.get("LAB") != "1":
        unavailable("runs under a kernel of its own: `make test-lab`")


@pytest.fixture
def filesystem(tmp_path: Path) -> Iterator[Filesystem]:
    """Makes a filesystem on a loop device and mounts it; all of them are unmounted when the test is over."""
    made: list[Path] = []

    def make(fs_type: str, options: str = "", size: str = "512M") -> Path:
        target = tmp_path / f"{fs_type}{len(made)}"
        mount_new(fs_type, target, options, size)
        made.append(target)
        return target

    yield make
    for target in reversed(made):
        unmount_all(target)


def mount_new(fs_type: str, target: Path, options: str = "", size: str = "512M") -> None:
    """A new filesystem at `target`, in a file in memory that is gone with its mount."""
    DISKS.mkdir(exist_ok=True)
    image = DISKS / f"{os.getpid()}-{target.name}-{len(os.listdir(DISKS))}"
    run("truncate", "-s", size, image)
    run(*MKFS[fs_type], image)
    target.mkdir(parents=True, exist_ok=True)
    run("mount", "-o", ",".join(filter(None, ["loop", options])), image, target)
    image.unlink()


def unmount_all(target: Path) -> None:
    """Whatever is still mounted at or beneath `target`, the last one first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mounted in reversed(mounts):
        if mounted == str(target) or mounted.startswith(f"{target}/"):
            run("umount", mounted)
