# SPDX-License-Identifier: Apache-2.0
"""A directory for one run, and filesystems in it for pools to lie on. What is put there is not this module's business."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}
_DETACH_TIMEOUT_S = 60.0
_UNMOUNT_TRIES = 20


def run(*argv: str | Path) -> str:
    """What the program printed; RuntimeError with its complaint if it failed."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Scratch:
    """One run's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def filesystem(self, name: str, kind: str, size_bytes: int, *options: str, sparse: bool = True) -> Path:
        """A fresh filesystem of its own, mounted; on a loop device whose file is sparse, or else written in full."""
        image, target = self.root / f"{name}.filesystem", self.root / name
        target.mkdir()
        with image.open("wb") as file:
            file.truncate(size_bytes)
            if not sparse:
                _write_zeros(file.fileno(), size_bytes)
        run(*MKFS[kind], image)
        device = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
        run("mount", *(("-o", ",".join(options)) if options else ()), device, target)
        return target

    def mounts(self) -> list[Path]:
        """Mount points beneath, the youngest first."""
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            points = [Path(os.fsdecode(line.split()[4])) for line in mountinfo]
        return [point for point in reversed(points) if point.is_relative_to(self.root)]

    def loops(self) -> dict[str, Path]:
        """Loop devices over files beneath: device to file."""
        listing = run("losetup", "--list", "--json", "--output", "NAME,BACK-FILE").strip()
        devices = json.loads(listing)["loopdevices"] if listing else []
        files = {
            device["name"]: Path((device["back-file"] or "").removesuffix(" (deleted)")) for device in devices
        }
        return {name: file for name, file in files.items() if file.is_relative_to(self.root)}

    def clear(self) -> None:
        # A device in use goes when its last user does: first, so that none keeps the filesystem that its file is on.
        self._detach()
        for point in self.mounts():
            _unmount(point)
        self._detach()
        deadline = time.monotonic() + _DETACH_TIMEOUT_S
        while self.loops() and time.monotonic() < deadline:
            time.sleep(0.05)
        shutil.rmtree(self.root)

    def _detach(self) -> None:
        for device in self.loops():
            run("losetup", "--detach", device)


def _unmount(point: Path) -> None:
    """With patience, then lazily: what still uses it must not keep the rest from being cleared."""
    for _ in range(_UNMOUNT_TRIES):
        try:
            run("umount", point)
            return
        except RuntimeError:
            time.sleep(0.1)
    run("umount", "--lazy", point)


def _write_zeros(fd: int, size_bytes: int) -> None:
    block = bytes(1 << 20)
    for _ in range(size_bytes >> 20):
        os.write(fd, block)
    os.fsync(fd)


@contextmanager
def scratch(beneath: Path) -> Iterator[Scratch]:
    """A fresh one in `beneath`, cleared at the end."""
    place = Scratch(Path(tempfile.mkdtemp(prefix="orlop-bench-", dir=beneath)))
    try:
        yield place
    finally:
        place.clear()
