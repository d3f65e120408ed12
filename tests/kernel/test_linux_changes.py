# SPDX-License-Identifier: Apache-2.0
"""Changed blocks: a base plus the delta is the target, byte for byte, whatever was done in between."""

import itertools
import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from csi_driver.linux import changes, copy, files
from tests.kernel.conftest import MIB, MakePool

SIZE = 16 * MIB
# Compressed extents tell nothing of what they hold.
POOLS = (("xfs", ""), ("btrfs", ""), ("btrfs", "compress-force=zstd"), ("ext4", ""))


def taken(pool: Path, name: str, *, share: bool = True) -> Path:
    """A snapshot of the image."""
    target = pool / name
    with open(pool / "image", "rb") as source, open(target, "w+b") as made:
        os.fsync(source.fileno())
        if share:
            files.clone_file(source.fileno(), made.fileno())
        else:
            copy.copy_sparse(source.fileno(), made.fileno(), copy.Transfer())
        os.fsync(made.fileno())
    return target


def disturb(image: Path, seed: random.Random, size: int) -> int:
    """Random writes, zeros, holes, fallocated ranges and growth; the size then."""
    with open(image, "r+b") as file:
        for _ in range(seed.randrange(1, 30)):
            offset, length = seed.randrange(size), seed.randrange(1, 300_000)
            length = min(length, size - offset)
            match seed.randrange(5):
                case 0:
                    files.punch(file.fileno(), offset, length)
                case 1:
                    file.seek(offset)
                    file.write(bytes(length))
                case _:
                    file.seek(offset)
                    file.write(seed.randbytes(length))
            file.flush()
        if seed.random() < 0.4:
            grown = size + seed.randrange(1, 64) * 4096
            files.allocate(file.fileno(), size, grown - size)
            size = grown
        os.fsync(file.fileno())
    return size


@pytest.mark.parametrize(("fs_type", "options"), POOLS)
def test_a_base_and_the_delta_are_the_target(make_pool: MakePool, fs_type: str, options: str) -> None:
    pool = make_pool(fs_type, mount=options)
    share = fs_type != "ext4"
    seed = random.Random(f"{fs_type}{options}")
    with open(pool / "image", "w+b") as file:
        files.allocate(file.fileno(), 0, SIZE)
    size = SIZE
    snapshots = []
    for number in range(8):
        size = disturb(pool / "image", seed, size)
        snapshots.append(taken(pool, f"s{number}", share=share))

    for _ in range(12):
        first, second = sorted(seed.sample(range(8), 2))
        with ExitStack() as opened:
            base, target = (opened.enter_context(open(snapshots[one], "rb")) for one in (first, second))
            found = list(changes.changed(base.fileno(), target.fileno(), share=share))
            made = bytearray(base.read().ljust(os.fstat(target.fileno()).st_size, b"\0"))
            whole = target.read()
            for start, end in found:
                made[start:end] = whole[start:end]
            assert made == whole
            assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
            half = len(whole) // 2
            later = list(changes.changed(base.fileno(), target.fileno(), half, share=share))
            assert later == [(max(start, half), end) for start, end in found if end > half] or not share
            rebuilt = bytearray(len(whole))
            for start, end in changes.allocated(target.fileno()):
                rebuilt[start:end] = whole[start:end]
            assert rebuilt == whole


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_no_more_is_told_than_was_written(make_pool: MakePool, fs_type: str) -> None:
    pool = make_pool(fs_type)
    (pool / "image").write_bytes(os.urandom(SIZE))
    base = taken(pool, "base")
    with open(pool / "image", "r+b") as file:
        for offset in (4096, 5 * MIB, SIZE - 4096):
            file.seek(offset)
            file.write(os.urandom(4096))
            file.flush()
    target = taken(pool, "target")

    with open(base, "rb") as old, open(target, "rb") as new:
        found = list(changes.changed(old.fileno(), new.fileno()))
        same = list(changes.changed(new.fileno(), new.fileno()))

    assert found == [(4096, 8192), (5 * MIB, 5 * MIB + 4096), (SIZE - 4096, SIZE)]
    assert same == []
