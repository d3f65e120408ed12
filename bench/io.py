# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.io`: the data path with fio, each backend against the bare filesystem beneath it (root).

A volume of a served driver and a file beside the pool take turns; the ratio of a turn is the volume's bandwidth by the
bare file's, and the table has the median of the turns. Filesystems other than the machine's own lie on a loop device
themselves (their file written in full), so their bare figures are lower; the ratios are what counts.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from bench.client import Client, Kind, Places
from bench.driver import served
from bench.fio import JOBS, Job, prepare, run_fio, smooth
from bench.isolation import enter_own_namespace
from bench.report import Report, Row, machine
from bench.scratch import Scratch, scratch

GIB = 1 << 30
_ROOM_S = 60.0
OUTPUT = Path(__file__).parents[1] / ".cache" / "bench" / "io.json"


@dataclass(frozen=True)
class Variant:
    """A pool, what lies beneath it ("" for the machine's own filesystem), and its volumes."""

    name: str
    backend: str
    beneath: str = ""
    options: str = ""
    fs_type: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    target: float | None = None
    extra: bool = False
    """Only when asked for by name, or with --all."""


VARIANTS = (
    Variant("directory", "directory", options="enforce_capacity = false", target=0.95),
    Variant("btrfs", "btrfs", "btrfs", "enable_quota = true", target=0.95),
    Variant("image", "image", fs_type="ext4"),
    Variant("image-zeroed", "image", options='preallocate = "zeroed"', fs_type="ext4"),
    Variant("image-on-xfs", "image", "xfs", fs_type="ext4"),
    Variant("image-xfs", "image", fs_type="xfs", extra=True),
    Variant("image-buffered", "image", options="direct_io = false", fs_type="ext4", extra=True),
    Variant("image-thin", "image", fs_type="ext4", parameters=(("provisioning", "thin"),), extra=True),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.io", description=__doc__)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--only", choices=names, action="append", help="this variant (may be repeated)")
    parser.add_argument("--all", action="store_true", help="also the variants that explain the default ones")
    parser.add_argument("--quick", action="store_true", help="one short turn of each: a first look")
    parser.add_argument("--job", metavar="TEXT", default="", help="only jobs whose name has this in it")
    parser.add_argument(
        "--size", type=float, default=1.0, metavar="GIB", help="of the file (%(default)s GiB)"
    )
    parser.add_argument(
        "--beneath", type=Path, default=Path("/var/tmp"), help="where pools are made (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the machine-readable file (%(default)s)")
    return parser.parse_args()


@dataclass(frozen=True)
class Pool:
    """A served pool, and a bare directory beside it on the same filesystem."""

    client: Client
    kind: Kind
    bare: Path
    kubelet: Path

    @contextmanager
    def volume(self, name: str) -> Iterator[Path]:
        """A fresh volume, published while the body runs."""
        client, places = self.client, Places.make(self.kubelet, name)
        volume_id = self._create(name)
        if client.stages:
            client.stage(self.kind, volume_id, places)
        client.publish(self.kind, volume_id, places)
        try:
            yield places.target
        finally:
            client.unpublish(volume_id, places)
            if client.stages:
                client.unstage(volume_id, places)
            client.delete(volume_id)

    def _create(self, name: str) -> str:
        """The volume's id. The last volume's room comes back in the background."""
        deadline = time.monotonic() + _ROOM_S
        while True:
            try:
                return self.client.create(self.kind, name)
            except grpc.RpcError as error:
                exhausted = cast(grpc.Call, error).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                if not exhausted or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


@contextmanager
def pool(place: Scratch, variant: Variant, size_bytes: int) -> Iterator[Pool]:
    """A pool of this variant, on a filesystem of its own if it names one."""
    base = place.root / variant.name
    if variant.beneath:
        base = place.filesystem(variant.name, variant.beneath, 8 * size_bytes, sparse=False)
    else:
        base.mkdir()
    (base / "bare").mkdir()
    table = f'backend = "{variant.backend}"\nroot = "{base / "pool"}"\nreserved = 0\n{variant.options}'
    # Room for the file, and for the metadata of a filesystem around it. On btrfs what is overwritten stays charged until
    # nothing of its extent is left: random writes to one file take up to twice its size, and more for a while.
    volume_bytes = size_bytes * 3 if variant.backend == "btrfs" else size_bytes * 5 // 4
    kind = Kind("p", volume_bytes, fs_type=variant.fs_type, parameters=dict(variant.parameters))
    with served(place.root / f"driver-{variant.name}", {"p": table}) as driver:
        client = Client(driver.socket)
        yield Pool(client, kind, base / "bare", place.root / "kubelet")
        client.close()


class Comparison:
    """The jobs of one variant. `figures`: by job, (bare, volume) bandwidths of each turn."""

    def __init__(self, pool: Pool, size_bytes: int, *, turns: int, seconds: float) -> None:
        self.figures: dict[str, list[tuple[float, float]]] = {}
        self._pool = pool
        self._size_bytes = size_bytes
        self._turns = turns
        self._seconds = seconds

    def rewritten(self, jobs: list[Job]) -> None:
        """One volume for all of them, whose file has been written in full."""
        with self._pool.volume("rewritten") as volume:
            files = (self._pool.bare / "file", volume / "file")
            for path in files:
                prepare(path, self._size_bytes, written=True)
            for job in jobs:
                self.figures[job.name] = [self._turn(job, files, turn) for turn in range(self._turns)]

    def fresh(self, job: Job) -> None:
        """A volume for each turn: what was written once is not fresh again."""
        self.figures[job.name] = []
        for turn in range(self._turns):
            with self._pool.volume(f"fresh-{job.mode}-{job.depth}-{turn}") as volume:
                files = (self._pool.bare / "fresh", volume / "fresh")
                for path in files:
                    prepare(path, self._size_bytes, written=False)
                self.figures[job.name].append(self._turn(job, files, turn))
                for path in files:
                    smooth(path, self._size_bytes)
                files[0].unlink()

    def _turn(self, job: Job, files: tuple[Path, Path], turn: int) -> tuple[float, float]:
        """Who goes first changes."""
        found = {
            path: run_fio(job, path, self._size_bytes, self._seconds)
            for path in files[:: 1 if turn % 2 else -1]
        }
        return found[files[0]], found[files[1]]


def measure(
    report: Report, place: Scratch, variant: Variant, jobs: list[Job], size_bytes: int, *, quick: bool
) -> None:
    """One section."""
    turns, seconds = (1, 0.5) if quick else (3, 0.7)
    with pool(place, variant, size_bytes) as made:
        comparison = Comparison(made, size_bytes, turns=turns, seconds=seconds)
        comparison.rewritten([job for job in jobs if not job.fresh])
        for job in (job for job in jobs if job.fresh):
            comparison.fresh(job)
    rows = [_row(variant, name, figures) for name, figures in comparison.figures.items()]
    beneath = variant.beneath or f"the filesystem of {place.root.parent}"
    report.add(f"{variant.name}, on {beneath}", rows, comparison.figures)


def _row(variant: Variant, job: str, figures: list[tuple[float, float]]) -> Row:
    ratios = [volume / bare for bare, volume in figures]
    note = f"bare {statistics.median(bare for bare, _ in figures) / 1e6:,.0f} MB/s, turns "
    note += f"{min(ratios):.2f} to {max(ratios):.2f}"
    return Row(
        variant.name, job, statistics.median(ratios), "x bare", variant.target, at_least=True, note=note
    )


def main() -> int:
    arguments = parse_arguments()
    enter_own_namespace("bench.io")
    if shutil.which("fio") is None:
        sys.exit("bench.io: fio not found: install the Debian package fio")
    report = Report()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    jobs = [job for job in JOBS if arguments.job in job.name]
    wanted = arguments.only or [variant.name for variant in VARIANTS if arguments.all or not variant.extra]
    with scratch(arguments.beneath) as place:
        for variant in (variant for variant in VARIANTS if variant.name in wanted):
            measure(report, place, variant, jobs, int(arguments.size * GIB), quick=arguments.quick)
    report.write(arguments.output)
    report.print_end(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
