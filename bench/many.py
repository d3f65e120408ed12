# SPDX-License-Identifier: Apache-2.0
"""Whether thousands of volumes kept slow anything down: two drivers in turns, one with an empty pool, one with a full."""

import statistics
import time

from bench.client import Client, Kind, Places
from bench.driver import Driver, served
from bench.measure import Stopwatch
from bench.report import Report, Row
from bench.scratch import Scratch
from bench.subjects import KEPT, Subject, chosen, pool_of
from bench.workers import Task, Workers
from csi_driver.rpc.pb import csi_pb2 as pb

CALLS = (
    "Probe",
    "CreateVolume",
    "NodeStageVolume",
    "NodePublishVolume",
    "NodeGetVolumeStats",
    "GetCapacity",
    "NodeUnpublishVolume",
    "NodeUnstageVolume",
    "DeleteVolume",
)
_FILLERS = 4
_STARTS = 5


def measure_many(report: Report, place: Scratch, backend: str | None, *, kept: int, rounds: int) -> None:
    """One section for each backend."""
    for subject in chosen(KEPT, backend):
        _, empty_table = pool_of(place, subject.backend, f"empty-{subject.backend}")
        _, full_table = pool_of(place, subject.backend, f"full-{subject.backend}")
        with (
            served(place.root / "empty", {subject.kind.pool: empty_table}) as empty,
            served(place.root / "full", {subject.kind.pool: full_table}) as full,
        ):
            filling_s = _fill(full, place, subject.kind, kept)
            empty_watch, full_watch = Stopwatch(), Stopwatch()
            _in_turns(place, subject.kind, rounds, [(empty, empty_watch), (full, full_watch)])
            starts = {"empty": _restart(empty), "full": _restart(full)}
        rows = _rows(subject, kept, empty_watch, full_watch, starts)
        rows.append(Row(subject.name, f"CreateVolume, {_FILLERS} clients", kept / filling_s, "/s"))
        details = {"empty": empty_watch.summary(), "full": full_watch.summary(), "starts_s": starts}
        report.add(f"With {kept} volumes kept, {subject.name}", rows, details)


def _fill(driver: Driver, place: Scratch, kind: Kind, kept: int) -> float:
    began = time.perf_counter()
    with Workers(driver.socket, place.root / "kubelet" / "fill", _FILLERS) as workers:
        workers.run(Task(kind, "kept", count=kept // _FILLERS, keep=True))
    return time.perf_counter() - began


def _in_turns(place: Scratch, kind: Kind, rounds: int, drivers: list[tuple[Driver, Stopwatch]]) -> None:
    sides = [(Client(driver.socket), watch) for driver, watch in drivers]
    places = [Places.make(place.root / "kubelet", f"side{number}") for number in range(len(sides))]
    for number in range(-3, rounds):
        # Who goes first changes, for the second finds the processor's caches warm.
        turn = list(zip(sides, places, strict=True))[:: 1 if number % 2 else -1]
        ids: dict[int, str] = {}
        for call in CALLS:
            for (client, watch), where in turn:
                kept_watch = watch if number >= 0 else Stopwatch()
                _call(kept_watch, call, client, kind, where, ids, f"turn-{number}")
    for client, watch in sides:
        request = pb.ListVolumesRequest(max_entries=100)
        for _ in range(10):
            watch.time("ListVolumes of 100", lambda: client.controller.ListVolumes(request, timeout=60))  # noqa: B023
        client.close()


def _call(
    watch: Stopwatch, call: str, client: Client, kind: Kind, places: Places, ids: dict[int, str], name: str
) -> None:
    if call == "CreateVolume":
        ids[id(client)] = watch.time(call, lambda: client.create(kind, name))
        return
    if call in ("NodeStageVolume", "NodeUnstageVolume") and not client.stages:
        return
    volume_id = ids.get(id(client), "")
    actions = {
        "Probe": client.probe,
        "NodeStageVolume": lambda: client.stage(kind, volume_id, places),
        "NodePublishVolume": lambda: client.publish(kind, volume_id, places),
        "NodeGetVolumeStats": lambda: client.stats(volume_id, places),
        "GetCapacity": lambda: client.capacity(kind),
        "NodeUnpublishVolume": lambda: client.unpublish(volume_id, places),
        "NodeUnstageVolume": lambda: client.unstage(volume_id, places),
        "DeleteVolume": lambda: client.delete(volume_id),
    }
    watch.time(call, actions[call])


def _restart(driver: Driver) -> list[float]:
    seconds = []
    for _ in range(_STARTS):
        driver.stop()
        seconds.append(driver.start())
    return seconds


def _rows(
    subject: Subject, kept: int, empty: Stopwatch, full: Stopwatch, starts: dict[str, list[float]]
) -> list[Row]:
    rows = []
    for call in (call for call in CALLS if call in full.samples):
        ratio = full.p50(call) / empty.p50(call)
        note = f"{full.p50(call) * 1000:.2f} ms"
        rows.append(Row(subject.name, call, ratio, "x with none", 1.1, note=note))
    listing = "ListVolumes of 100"
    rows.append(Row(subject.name, listing, full.p50(listing) * 1000, "ms p50"))
    rows.append(Row(subject.name, "start to socket, none", statistics.median(starts["empty"]), "s", 0.5))
    rows.append(Row(subject.name, f"start to socket, {kept}", statistics.median(starts["full"]), "s", 1.0))
    return rows
