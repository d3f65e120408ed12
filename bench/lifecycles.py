# SPDX-License-Identifier: Apache-2.0
"""Whole lives of volumes a second, with one client and with eight, and what memory many lives leave behind."""

import statistics

from bench.driver import Driver, served
from bench.report import Report, Row
from bench.scratch import Scratch
from bench.subjects import LIVES, Subject, chosen, pool_of
from bench.workers import Done, Task, Workers

CLIENTS = 8
_MIB = 1 << 20


def measure_throughput(report: Report, place: Scratch, backend: str | None, *, seconds: float) -> None:
    """Lives a second: turns of one client and of eight, each a process."""
    for subject in chosen(LIVES, backend):
        _, table = pool_of(place, subject.backend, f"lives-{subject.name.replace(' ', '-')}")
        folder = place.root / "kubelet"
        with (
            served(place.root / "driver", {subject.kind.pool: table}) as driver,
            Workers(driver.socket, folder / "one", 1) as one,
            Workers(driver.socket, folder / "eight", CLIENTS) as eight,
        ):
            one.run(Task(subject.kind, "warm", count=5))
            alone: list[Done] = []
            together: list[Done] = []
            shares: list[dict[str, float]] = []
            for turn in range(3):
                alone.append(one.run(Task(subject.kind, f"a{turn}", seconds=seconds)))
                before = driver.cpu_s()
                together.append(eight.run(Task(subject.kind, f"b{turn}", seconds=seconds)))
                shares.append(_shares(before, driver, together[-1]))
        _add_throughput(report, subject, alone, together, shares)


def _shares(before: tuple[float, float], driver: Driver, done: Done) -> dict[str, float]:
    """Of one processor, how much each side used."""
    user, system = (after - first for after, first in zip(driver.cpu_s(), before, strict=True))
    return {
        "driver_user": user / done.seconds,
        "driver_kernel": system / done.seconds,
        "clients": done.cpu_s / done.seconds,
    }


def _add_throughput(
    report: Report, subject: Subject, alone: list[Done], together: list[Done], shares: list[dict[str, float]]
) -> None:
    single = statistics.median(done.per_second for done in alone)
    many = statistics.median(done.per_second for done in together)
    use = {key: statistics.median(share[key] for share in shares) for key in shares[0]}
    note = ", ".join(f"{key.replace('_', ' ')} {value:.0%}" for key, value in use.items())
    rows = [
        Row(subject.name, "lives, 1 client", single, "/s"),
        Row(subject.name, f"lives, {CLIENTS} clients", many, "/s", note=f"of a processor: {note}"),
        Row(subject.name, f"{CLIENTS} clients / 1", many / single, "x", 1.5, at_least=True),
    ]
    details = {
        "alone": [done.per_second for done in alone],
        "together": [done.per_second for done in together],
        "processor": use,
    }
    report.add(f"Lives a second, {subject.name}", rows, details)


def measure_memory(report: Report, place: Scratch, backend: str | None, *, lives: int) -> None:
    """Resident memory of a driver that has seen many lives."""
    for subject in chosen(LIVES[:1], backend) or chosen(LIVES, backend)[:1]:
        _, table = pool_of(place, subject.backend, "memory")
        with (
            served(place.root / "driver", {subject.kind.pool: table}) as driver,
            Workers(driver.socket, place.root / "kubelet" / "memory", CLIENTS) as workers,
        ):
            at_start = driver.resident_bytes()
            sizes = []
            for part in range(10):
                workers.run(Task(subject.kind, f"m{part}", count=max(1, lives // 10 // CLIENTS)))
                sizes.append(driver.resident_bytes())
        rows = [
            Row(subject.name, "resident at start", at_start / _MIB, "MiB"),
            Row(subject.name, f"resident after {lives // 10} lives", sizes[0] / _MIB, "MiB"),
            Row(subject.name, f"resident after {lives} lives", sizes[-1] / _MIB, "MiB", 48),
            Row(
                subject.name,
                f"growth from life {lives // 5} to {lives}",
                (sizes[-1] - sizes[1]) / _MIB,
                "MiB",
                0.5,
            ),
        ]
        report.add(f"Memory, {subject.name}", rows, {"resident_bytes": [at_start, *sizes]})
