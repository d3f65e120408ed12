# SPDX-License-Identifier: Apache-2.0
"""How long each call takes at one client, compared with Probe and with the bare system calls it is made of."""

from bench.bare import Bare, bare_in
from bench.client import Client, Places
from bench.driver import served
from bench.measure import Stopwatch
from bench.report import Report, Row
from bench.scratch import Scratch
from bench.subjects import SUBJECTS, Subject, chosen, pool_of

NODE_CALLS = ("NodePublishVolume", "NodeGetVolumeStats", "NodeUnpublishVolume", "GetCapacity")
_MS = 1000.0


def measure_calls(report: Report, place: Scratch, backend: str | None, *, rounds: int) -> None:
    """One section: a driver with a pool for each backend, one client, calls in turns with their references."""
    for subject in chosen(SUBJECTS, backend):
        root, table = pool_of(place, subject.backend, subject.name.replace(" ", "-"))
        with (
            bare_in(place, root) as bare,
            served(place.root / "driver", {subject.kind.pool: table}) as driver,
        ):
            client = Client(driver.socket)
            watch = Stopwatch()
            places = Places.make(place.root / "kubelet", "calls")
            for number in range(-3, rounds):
                # The first rounds load code and make connections.
                _round(
                    watch if number >= 0 else Stopwatch(), client, bare, subject, places, f"calls-{number}"
                )
            client.close()
        report.add(f"Calls, {subject.name} ({rounds} rounds)", _rows(subject, watch), watch.summary())


def _round(watch: Stopwatch, client: Client, bare: Bare, subject: Subject, places: Places, name: str) -> None:
    kind = subject.kind
    watch.time("fsync", bare.fsync)
    if subject.formats:
        watch.time("fallocate + mkfs", lambda: bare.allocate_and_format(kind.size_bytes))
    watch.time("Probe", client.probe)
    volume_id = watch.time("CreateVolume", lambda: client.create(kind, name))
    if subject.formats:
        watch.time("loop + mount", bare.attach_and_mount)
        bare.undo_attach_and_mount()
        bare.remove_image()
    watch.time("Probe", client.probe)
    if client.stages:
        watch.time("NodeStageVolume", lambda: client.stage(kind, volume_id, places))
    watch.time("bind + unmount", bare.bind_unmount)
    watch.time("Probe", client.probe)
    watch.time("NodePublishVolume", lambda: client.publish(kind, volume_id, places))
    watch.time("Probe", client.probe)
    watch.time("NodeGetVolumeStats", lambda: client.stats(volume_id, places))
    watch.time("Probe", client.probe)
    watch.time("GetCapacity", lambda: client.capacity(kind))
    watch.time("Probe", client.probe)
    watch.time("NodeUnpublishVolume", lambda: client.unpublish(volume_id, places))
    watch.time("Probe", client.probe)
    if client.stages:
        watch.time("NodeUnstageVolume", lambda: client.unstage(volume_id, places))
    watch.time("fsync", bare.fsync)
    watch.time("Probe", client.probe)
    watch.time("DeleteVolume", lambda: client.delete(volume_id))


def _rows(subject: Subject, watch: Stopwatch) -> list[Row]:
    def fact(name: str) -> Row:
        return Row(subject.name, name, watch.p50(name) * _MS, "ms p50")

    def note(name: str) -> str:
        return f"{watch.p50(name) * _MS:.2f} ms"

    floor = watch.p50("Probe")
    rows = [fact("Probe"), fact("fsync"), fact("bind + unmount")]
    for name in NODE_CALLS:
        rows.append(Row(subject.name, name, watch.p50(name) / floor, "x Probe", 1.5, note=note(name)))
    syncs = ["DeleteVolume"] if subject.formats else ["CreateVolume", "DeleteVolume"]
    for name in syncs:
        above = (watch.p50(name) - floor) / watch.p50("fsync")
        rows.append(Row(subject.name, f"{name} - Probe", above, "fsyncs", 4, note=note(name)))
    if subject.formats:
        above = (watch.p50("CreateVolume") - floor) / watch.p50("fallocate + mkfs")
        rows += [fact("fallocate + mkfs"), fact("loop + mount")]
        rows.append(
            Row(
                subject.name,
                "CreateVolume - Probe",
                above,
                "x (fallocate + mkfs)",
                1.2,
                note=note("CreateVolume"),
            )
        )
        above = (watch.p50("NodeStageVolume") - floor) * _MS
        rows.append(
            Row(subject.name, "NodeStageVolume - Probe", above, "ms", 3, note=note("NodeStageVolume"))
        )
    rows += [fact(name) for name in ("NodeStageVolume", "NodeUnstageVolume") if name in watch.samples]
    return rows
