# SPDX-License-Identifier: Apache-2.0
"""How fast content is moved and compared: full copies against cp, changed blocks against reading both. No driver."""

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.report import Report, Row
from bench.scratch import Scratch
from csi_driver.linux import changes, copy, files, mount, treecopy

GIB = 1 << 30
_BLOCK = 4096
_CHUNK = 8 << 20


def measure_contents(report: Report, place: Scratch, share: float) -> None:
    """Two sections: full copies, changed blocks."""
    _measure_full(report, place, files_count=int(100_000 * share))
    _measure_delta(report, place, size=int(10 * share) * GIB or GIB)


def _measure_full(report: Report, place: Scratch, files_count: int) -> None:
    """Copies that share nothing, against cp on the same ext4."""
    root = place.filesystem("ext4", "ext4", 16 * GIB)
    write(root / "data", GIB)
    with (root / "data").open("r+b") as file:
        file.truncate(4 * GIB)
    tree = root / "tree"
    tree.mkdir()
    for folder in range(files_count // 200):
        (tree / f"d{folder}").mkdir()
        for number in range(200):
            (tree / f"d{folder}" / f"f{number}").write_bytes(b"x" * 1000)
    os.sync()
    ratios: dict[str, list[float]] = {"file": [], "tree": []}
    for _ in range(3):
        theirs = _timed(
            lambda: subprocess.run(["cp", "--sparse=always", root / "data", root / "b"], check=True)
        )
        (root / "b").unlink()
        ours = _timed(lambda: _copy_file(f"{root}/data", f"{root}/b"))
        (root / "b").unlink()
        ratios["file"].append(theirs / ours)
        theirs = _timed(lambda: subprocess.run(["cp", "-a", tree, root / "t"], check=True))
        shutil.rmtree(root / "t")
        ours = _timed(lambda: _copy_tree(f"{tree}", f"{root}/t"))
        shutil.rmtree(root / "t")
        ratios["tree"].append(theirs / ours)
    rows = [
        Row(
            "1 GiB of data in 4 GiB",
            "speed / cp --sparse=always",
            statistics.median(ratios["file"]),
            "x",
            0.9,
            True,
        ),
        Row(
            f"{files_count:,} small files", "speed / cp -a", statistics.median(ratios["tree"]), "x", 1.0, True
        ),
    ]
    report.add("Full copies, ext4", rows, ratios)


def _timed(action: Callable[[], object]) -> float:
    os.sync()
    began = time.perf_counter()
    action()
    os.sync()
    return time.perf_counter() - began


def _copy_file(source: str, target: str) -> None:
    src_fd, dst_fd = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT)
    copy.copy_sparse(src_fd, dst_fd, copy.Transfer())
    os.close(src_fd)
    os.close(dst_fd)


def _copy_tree(source: str, target: str) -> None:
    os.mkdir(target)
    src_fd, dst_fd = os.open(source, os.O_RDONLY), os.open(target, os.O_RDONLY)
    view = mount.private_view(src_fd)
    treecopy.copy_tree(view, dst_fd, copy.Transfer(), share=False)
    for fd in (view, src_fd, dst_fd):
        os.close(fd)


def _measure_delta(report: Report, place: Scratch, size: int) -> None:
    """1 % of an image's blocks written at random between two clones of it, on xfs."""
    root = place.filesystem("delta", "xfs", 4 * size + GIB)
    image = root / "image"
    write(image, size)
    with image.open("r+b") as file:
        _clone(file.fileno(), root / "base")
        for _ in range(size // _BLOCK // 100):
            os.pwrite(file.fileno(), random.randbytes(_BLOCK), random.randrange(size // _BLOCK) * _BLOCK)
        os.fsync(file.fileno())
        _clone(file.fileno(), root / "target")
    base, target = os.open(root / "base", os.O_RDONLY), os.open(root / "target", os.O_RDONLY)
    found = list(changes.changed(base, target))
    deltas = [_timed_alone(lambda: list(changes.changed(base, target))) for _ in range(5)]
    for fd in (base, target):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    reading = _timed_alone(lambda: _read_both(base, target, size))
    for fd in (base, target):
        os.close(fd)
    delta = statistics.median(deltas)
    subject = f"1 % of {size // GIB} GiB"
    rows = [
        Row(subject, "delta", delta * 1000, "ms", note=f"{len(found)} ranges"),
        Row(subject, "reading both, not cached", reading * 1000, "ms"),
        Row(subject, "speed / reading both", reading / delta, "x", 50.0, True),
    ]
    report.add("Changed blocks, xfs", rows, {"deltas_s": deltas, "reading_s": reading})


def _clone(source: int, target: Path) -> None:
    with target.open("w+b") as file:
        files.clone_file(source, file.fileno())
        os.fsync(file.fileno())


def _read_both(base: int, target: int, size: int) -> int:
    return sum(
        os.pread(base, _CHUNK, start) != os.pread(target, _CHUNK, start) for start in range(0, size, _CHUNK)
    )


def _timed_alone(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def write(path: Path, size: int) -> None:
    """A file of so many random bytes, on disk."""
    block = random.randbytes(_CHUNK)
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
