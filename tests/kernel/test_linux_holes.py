# SPDX-License-Identifier: Apache-2.0
"""What of a file is data: never less than was written, however it was, and no more than that after it was read."""

import mmap
import os
import random
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from csi_driver.linux import copy, files, holes, online, syscall
from tests.kernel.conftest import MIB, MakePool

FILESYSTEMS = ("ext4", "xfs", "btrfs")
SIZE = 8 * MIB
BLOCK = 4096
# ext4 writes zeros to what is left unwritten beside a write if that is no more than so much (extent_max_zeroout_kb).
NEAR = 32 * 1024 // BLOCK


class Written:
    """A file that random things are done to, and which of its blocks anybody wrote in."""

    def __init__(self, path: Path, seed: random.Random, *, mapped: bool) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.direct_fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.seed = seed
        self.mapped = mapped
        self.blocks: set[int] = set()
        os.ftruncate(self.fd, SIZE)
        self.memory = mmap.mmap(self.fd, SIZE)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)
        os.close(self.direct_fd)

    def do_something(self) -> None:
        start = self.seed.randrange(SIZE)
        end = min(SIZE, start + self.seed.randrange(1, 200_000))
        match self.seed.randrange(8):
            case 0 | 1:
                os.pwrite(self.fd, self.seed.randbytes(end - start), start)
                self._touch(start, end)
            case 2:
                if self.mapped:
                    # Marks all of a folio as written, which may be large.
                    self.memory[start:end] = self.seed.randbytes(end - start)
            case 3:
                start -= start % BLOCK
                # Anonymous memory is aligned as direct writes must be.
                with mmap.mmap(-1, BLOCK) as page:
                    page[:] = self.seed.randbytes(BLOCK)
                    os.pwrite(self.direct_fd, page, start)
                self._touch(start, start + BLOCK)
            case 4:
                files.allocate(self.fd, start, end - start)
            case 5:
                files.punch(self.fd, start, end - start)
                # The ends of it, within blocks, are zeroed by writing.
                self._touch(start, start + 1)
                self._touch(end - 1, end)
            case 6:
                os.pread(self.fd, end - start, start)
            case 7:
                os.fsync(self.fd)

    def blocks_near(self, distance: int) -> set[int]:
        return {block + by for block in self.blocks for by in range(-distance, distance + 1)}

    def _touch(self, start: int, end: int) -> None:
        self.blocks.update(range(start // BLOCK, -(-end // BLOCK)))


@pytest.mark.parametrize("allocated", [True, False])
@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_a_copy_is_equal_and_holds_what_was_written(
    make_pool: MakePool, fs_type: str, allocated: bool
) -> None:
    pool = make_pool(fs_type)
    for number in range(8):
        seed = random.Random(f"{fs_type}{allocated}{number}")
        with closing(Written(pool / f"a{number}", seed, mapped=number % 2 > 0)) as written:
            if allocated:
                files.allocate(written.fd, 0, SIZE)
            for _ in range(4):
                for _ in range(seed.randrange(1, 25)):
                    written.do_something()
                # Dirty pages and all: whatever must be written out, the copy itself has to see to.
                with open(pool / "copy", "w+b") as target:
                    copy.copy_sparse(written.fd, target.fileno(), copy.Transfer())
                assert (pool / "copy").read_bytes() == os.pread(written.fd, SIZE, 0)
                # Now every page is cached.
                ranges = list(holes.data_ranges(written.fd, SIZE))
                found = {block for start, end in ranges for block in range(start // BLOCK, -(-end // BLOCK))}
                assert written.mapped or found <= written.blocks_near(NEAR if fs_type == "ext4" else 0)
                assert holes.data_bytes(written.fd) == sum(end - start for start, end in ranges)


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_what_was_never_written_is_no_data_though_it_was_read(make_pool: MakePool, fs_type: str) -> None:
    pool = make_pool(fs_type)
    with open(pool / "image", "w+b") as file:
        files.allocate(file.fileno(), 0, 32 * MIB)
        os.pwrite(file.fileno(), b"x", 5 * MIB)
        assert len(file.read()) == 32 * MIB

        assert list(holes.data_ranges(file.fileno(), 32 * MIB)) == [
            (5 * MIB, 5 * MIB + os.fstatvfs(file.fileno()).f_frsize)
        ]


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 65537])
def test_small_files(ext4_pool: Path, size: int) -> None:
    with open(ext4_pool / "file", "w+b") as file:
        file.write(os.urandom(size))
        file.flush()
        assert list(holes.data_ranges(file.fileno(), size)) == ([(0, size)] if size else [])
        file.truncate(size + 40_000)
        found = holes.data_bytes(file.fileno())
        assert size <= found <= -(-size // BLOCK) * BLOCK


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("beneath", ["ext4", "xfs"])
def test_the_image_of_a_frozen_filesystem(
    make_pool: MakePool, workshop: Path, beneath: str, direct_io: str
) -> None:
    """What programs wrote in the filesystem within, through memory too, is in its copy when it is frozen."""
    pool, target, seed = make_pool(beneath), workshop / "within", random.Random(beneath)
    image = pool / "image"
    with open(image, "w+b") as file:
        files.allocate(file.fileno(), 0, 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    target.mkdir()
    losetup = ["losetup", "--find", "--show", f"--direct-io={direct_io}", os.fspath(image)]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["mount", device, target], check=True)
    within = os.open(target, os.O_RDONLY)
    try:
        for number in range(4):
            file_fd = os.open(target / f"file{number}", os.O_RDWR | os.O_CREAT)
            files.allocate(file_fd, 0, 4 * MIB)
            with mmap.mmap(file_fd, 4 * MIB) as memory:
                for _ in range(20):
                    at = seed.randrange(4 * MIB - 10_000)
                    memory[at : at + 10_000] = seed.randbytes(10_000)
                os.pwrite(file_fd, seed.randbytes(50_000), seed.randrange(MIB))
                os.close(file_fd)
                syscall.syncfs(within)
                online.freeze(within)
                try:
                    copied, content = _copied(image, pool / "copy")
                finally:
                    online.thaw(within)
            assert copied == content
            assert (pool / "copy").stat().st_blocks * 512 < 32 * MIB
    finally:
        os.close(within)
        subprocess.run(["umount", target], check=True)
        subprocess.run(["losetup", "--detach", device], check=True)


def _copied(source: Path, target: Path) -> tuple[bytes, bytes]:
    with open(source, "rb") as old, open(target, "w+b") as new:
        copy.copy_sparse(old.fileno(), new.fileno(), copy.Transfer())
    return target.read_bytes(), source.read_bytes()
