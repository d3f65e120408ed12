# SPDX-License-Identifier: Apache-2.0
"""A pool to try things on: a filesystem of its own in a sparse file, and the proof that nothing of it is left.

Everything lies beneath one directory, and every loop device has its file there, so what is left can be found by
asking the kernel, whoever made it. What is done on the pool is not this module's business.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.cli import kernel
from csi_driver.linux import files, filesystem, loop, mount
from csi_driver.model import GIB

FILESYSTEM_BYTES = 4 * GIB
"""Sparse: it takes what is written to it, some ten MiB."""
BESIDE_BYTES = GIB
"""What the disk beneath must have free: the demo fills a volume."""
MOUNT_OPTIONS = {"btrfs": ("commit=1",)}
"""btrfs frees a deleted subvolume after its next commit, and half a minute is long to look at."""
RELEASE_TIMEOUT_S = 20.0
PLACE = Path("/var/tmp")  # not /tmp, which may be memory


class Scratch:
    """`root` and all beneath it: `pool` is a filesystem of its own, the rest lies on the machine's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pool = root / "pool"
        self.image = root / "pool.filesystem"
        self.socket = root / "csi.sock"
        self.config = root / "orlop.toml"
        self.log = root / "driver.log"

    def mount_pool(self, fs_type: str) -> None:
        """Give the pool its filesystem.

        Raises OSError, or run.CommandError: the machine cannot.
        """
        self.pool.mkdir()
        fd = os.open(self.image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, FILESYSTEM_BYTES)
            filesystem.make(fs_type, self.image)
            device = loop.attach(fd)
        finally:
            os.close(fd)
        mount.mount_device(device.path, self.pool, fs_type, MOUNT_OPTIONS.get(fs_type, ()))

    def mounts(self) -> list[str]:
        """Where volumes are mounted; the pool's own mount does not count."""
        return [one.target for one in kernel.mounts_beneath(self.root) if one.target != str(self.pool)]

    def loops(self) -> dict[str, str]:
        """Volumes' loop devices and their files; the pool's own does not count."""
        devices = kernel.loops_beneath(self.root)
        return {name: file for name, file in devices.items() if file != str(self.image)}

    def left(self) -> list[str]:
        """What the driver has left of its volumes: mounts, loop devices, files."""
        mounts = [f"mounted: {target}" for target in self.mounts()]
        loops = [f"attached: {name} over {file}" for name, file in self.loops().items()]
        return mounts + loops + self._homes()

    def _homes(self) -> list[str]:
        areas = [self.pool / name for name in ("volumes", "snapshots", "staging", "trash")]
        return [
            f"in the pool: {home.relative_to(self.pool)}"
            for area in areas
            if area.is_dir()
            for home in area.iterdir()
        ]

    def clear(self) -> None:
        """Take everything down, the driver's remains too.

        Raises OSError: something still uses it; says what is left and how to remove it.
        """
        try:
            self._take_down()
        except OSError as error:
            devices = kernel.loops_beneath(self.root)
            remedy = "; ".join([f"losetup -d {name}" for name in devices] + [f"rm -r {self.root}"])
            raise OSError(
                error.errno,
                f"{error}; something else uses the scratch pool: when it has ended, run: {remedy}",
            ) from error

    def _take_down(self) -> None:
        for target in reversed(self.mounts()):
            mount.unmount(Path(target))
        # The volumes' images lie in the pool and keep it busy, so its own device comes last.
        _detach(self.loops())
        mount.unmount(self.pool)
        _detach(kernel.loops_beneath(self.root))
        # Refuses what has a mount in it, which a plain rmtree would empty.
        parent = files.open_directory(self.root.parent)
        try:
            files.remove_tree(parent, self.root.name)
        finally:
            os.close(parent)

    def gone(self) -> bool:
        """Whether the machine is as it was."""
        return not (self.root.exists() or kernel.mounts_beneath(self.root) or kernel.loops_beneath(self.root))


@contextmanager
def scratch(fs_type: str, place: Path = PLACE) -> Iterator[Scratch]:
    """A mounted scratch pool for the body; taken down afterwards, however the body ends."""
    made = Scratch(Path(tempfile.mkdtemp(prefix="orlop-demo-", dir=place)))
    try:
        made.mount_pool(fs_type)
        yield made
    finally:
        made.clear()


def _detach(names: Iterable[str]) -> None:
    for name in names:
        device = loop.get(int(name.removeprefix("/dev/loop")))
        if device is not None:
            _detach_patiently(device)


def _detach_patiently(device: loop.Loop) -> None:
    # Somebody may be looking at it: whoever lists loop devices opens each.
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        try:
            return loop.detach(device)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise


def missing_room(place: Path = PLACE) -> str:
    """Why a scratch pool cannot be made there; "" if it can."""
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return f"{place}: {error.strerror}: name another directory with --directory"
    if free < BESIDE_BYTES:
        return f"{place}: has less than 1 GiB free: name another directory with --directory"
    return ""


def settle(scratch: Scratch, timeout_s: float = 10.0) -> list[str]:
    """What is left once deleted volumes are gone, which the driver removes in the background."""
    deadline = time.monotonic() + timeout_s
    while (left := scratch.left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
