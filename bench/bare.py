# SPDX-License-Identifier: Apache-2.0
"""The bare system calls that a driver cannot do without, made in a row with nothing around them."""

import os
import shutil
from pathlib import Path

from bench.scratch import Scratch
from csi_driver.linux import loop, syscall

MKFS_EXT4 = ("mkfs.ext4", "-F", "-q", "-b", "4096", "-m", "0", "-E")
MKFS_EXTENDED = "nodiscard,lazy_itable_init=1,lazy_journal_init=1,assume_storage_prezeroed=1"
"""What the driver runs for a volume of zeros."""
_EMPTY_PATHS = 0x04 | 0x40  # MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
_BLOCK = bytes(4096)


class Bare:
    """References on the filesystem that `folder` lies on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        (folder / "source").mkdir(exist_ok=True)
        (folder / "target").mkdir(exist_ok=True)
        mkfs = shutil.which(MKFS_EXT4[0])
        assert mkfs is not None, "the image backend needs it too"
        self._mkfs = mkfs

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._log)

    def fsync(self) -> None:
        """A block appended to a file, and fsync(2) of it."""
        os.write(self._log, _BLOCK)
        os.fsync(self._log)

    def bind_unmount(self) -> None:
        """A directory bound to another, and unmounted."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        source, target = os.open(self._folder / "source", flags), os.open(self._folder / "target", flags)
        tree = syscall.open_tree(source, 1)
        syscall.move_mount(tree, target, "target", _EMPTY_PATHS)
        for fd in (tree, target, source):
            os.close(fd)
        syscall.umount2(self._folder / "target", 0)

    def allocate_and_format(self, size_bytes: int) -> None:
        """fallocate(2) of a new image, and mkfs.ext4 on it."""
        image = self._folder / "image"
        fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        syscall.fallocate(fd, 0, 0, size_bytes)
        os.close(fd)
        child = os.posix_spawn(self._mkfs, [*MKFS_EXT4, MKFS_EXTENDED, os.fspath(image)], os.environ)
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"mkfs.ext4 ended with status {status}")

    def attach_and_mount(self) -> None:
        """LOOP_CONFIGURE of that image with direct I/O, and mount(2) of it."""
        fd = os.open(self._folder / "image", os.O_RDWR | os.O_CLOEXEC)
        attached = loop.attach(fd, sector_size=4096, discard=False)
        os.close(fd)
        syscall.mount(os.fspath(attached.path), os.fspath(self._folder / "target"), "ext4", 0, None)

    def undo_attach_and_mount(self) -> None:
        fd = os.open(self._folder / "image", os.O_RDONLY | os.O_CLOEXEC)
        syscall.umount2(self._folder / "target", 0)
        for attached in loop.find(fd):
            loop.detach(attached)
        os.close(fd)

    def remove_image(self) -> None:
        (self._folder / "image").unlink()


def bare_in(place: Scratch, pool: Path) -> Bare:
    """References on the same filesystem as a pool's: in it where that is one of its own, else beside it."""
    beside = pool if os.path.ismount(pool) else place.root
    return Bare(beside / "bare")
