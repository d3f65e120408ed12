# SPDX-License-Identifier: Apache-2.0
"""How long snapshots, restores and clones take, and whether that depends on the size: images on xfs, in use.

The freeze itself is timed in this process, on the same filesystem, for the driver does not tell a caller of it.
"""

import ctypes
import os
import platform
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.client import Client, Kind, Places
from bench.contents import GIB, write
from bench.driver import served
from bench.measure import Stopwatch
from bench.report import Report, Row
from bench.scratch import Scratch, run
from csi_driver.linux import files
from csi_driver.linux.freeze import Freezer
from csi_driver.rpc.pb import csi_pb2 as pb

_MS = 1000.0
_PAUSE_S = 0.1
_MEMBARRIER_CMD_GLOBAL = 1
_SIZES = {"1 GiB": (GIB, GIB // 4), "10 GiB, 5 of data": (10 * GIB, 5 * GIB), "20 GiB": (20 * GIB, GIB // 4)}


def measure_copies(report: Report, place: Scratch, *, rounds: int) -> None:
    """Two sections: the calls by size, and the freeze."""
    pool = place.filesystem("xfs", "xfs", 256 * GIB)
    table = f'backend = "image"\nroot = "{pool}/pool"\nreserved = 0\n'
    watch = Stopwatch()
    with served(place.root / "driver", {"p": table}) as driver:
        client = Client(driver.socket)
        origins = [
            _Origin.make(client, place, name, Kind("p", size), data) for name, (size, data) in _SIZES.items()
        ]
        for number in range(-2, rounds):
            into = watch if number >= 0 else Stopwatch()
            for origin in origins:
                origin.measure(into, client, number)
        for origin in origins:
            origin.clear(client)
        client.close()
    report.add(f"Copies of an image in use, xfs ({rounds} rounds)", _rows(watch), watch.summary())
    shutil.rmtree(pool / "pool")
    _measure_freeze(report, place, rounds * 2)


@dataclass(frozen=True)
class _Origin:
    """A volume that a pod uses."""

    name: str
    kind: Kind
    id: str
    places: Places

    @classmethod
    def make(cls, client: Client, place: Scratch, name: str, kind: Kind, data: int) -> Self:
        made = cls(
            name,
            kind,
            client.create(kind, f"origin {name}"),
            Places.make(place.root / "kubelet", str(kind.size_bytes)),
        )
        client.stage(kind, made.id, made.places)
        client.publish(kind, made.id, made.places)
        write(made.places.target / "data", data)
        return made

    def measure(self, into: Stopwatch, client: Client, number: int) -> None:
        """A snapshot, a restore and a clone of it; and what was removed has gone."""
        into.time("Probe", client.probe)
        unique = f"{self.name} {number}"
        snapshot = into.time(f"CreateSnapshot {self.name}", lambda: _snapshot(client, self.id, unique))
        source = pb.VolumeContentSource(snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot))
        restored = into.time(
            f"restore {self.name}", lambda: _create(client, self.kind, f"r {unique}", source)
        )
        time.sleep(_PAUSE_S)
        volume = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=self.id))
        cloned = into.time(f"clone {self.name}", lambda: _create(client, self.kind, f"c {unique}", volume))
        client.delete(restored)
        client.delete(cloned)
        client.controller.DeleteSnapshot(pb.DeleteSnapshotRequest(snapshot_id=snapshot))
        time.sleep(3 * _PAUSE_S)

    def clear(self, client: Client) -> None:
        client.unpublish(self.id, self.places)
        client.unstage(self.id, self.places)
        client.delete(self.id)


def _snapshot(client: Client, volume_id: str, name: str) -> str:
    request = pb.CreateSnapshotRequest(source_volume_id=volume_id, name=name)
    answer = client.controller.CreateSnapshot(request, timeout=60).snapshot
    if not answer.ready_to_use:
        raise RuntimeError("a snapshot on a filesystem that shares blocks was not made at once")
    return str(answer.snapshot_id)


def _create(client: Client, kind: Kind, name: str, source: pb.VolumeContentSource) -> str:
    request = pb.CreateVolumeRequest(
        name=name,
        capacity_range=pb.CapacityRange(required_bytes=kind.size_bytes),
        volume_capabilities=[kind.capability],
        parameters={"pool": kind.pool},
        volume_content_source=source,
    )
    return str(client.controller.CreateVolume(request, timeout=60).volume.volume_id)


def _rows(watch: Stopwatch) -> list[Row]:
    probe = statistics.median(watch.samples["Probe"]) * _MS
    rows = [Row("", "Probe", probe, "ms")]
    for name in _SIZES:
        for call in ("CreateSnapshot", "restore", "clone"):
            median = statistics.median(watch.samples[f"{call} {name}"]) * _MS
            bound = probe + 15 if name.startswith("10") else None
            rows.append(Row(name, call, median, "ms", bound))
    for call in ("CreateSnapshot", "restore", "clone"):
        small, large = (statistics.median(watch.samples[f"{call} {name}"]) for name in ("1 GiB", "20 GiB"))
        rows.append(Row("20 GiB / 1 GiB", call, large / small, "x", 1.5))
    return rows


def _measure_freeze(report: Report, place: Scratch, rounds: int) -> None:
    """Freeze, clone, thaw of idle filesystems in images on xfs: of one, and of three together as a group has them.

    Pauses in between: right after a freeze the next one need not wait for the kernel's grace periods. Those are measured
    as they are without hurry.
    """
    images = [_Frozen.make(place, f"frozen{number}") for number in range(3)]
    watch, freezer = Stopwatch(), Freezer()
    try:
        for number in range(rounds + 1):
            into = watch if number else Stopwatch()
            for name, some in (("one", images[:1]), ("three", images)):
                time.sleep(_PAUSE_S)
                took = into.time(f"whole, {name}", lambda some=some: _freeze(freezer, some))  # type: ignore[misc]
                into.samples[f"frozen, {name}"].append(took)
            time.sleep(_PAUSE_S)
            into.time("grace period", _grace_period)
    finally:
        freezer.close()
        for image in images:
            image.clear()
    frozen = sorted(watch.samples["frozen, one"])
    grace = watch.p50("grace period") * _MS
    rows = [
        Row(
            "",
            "a grace period of RCU",
            grace,
            "ms",
            note="a freeze waits for three, which the kernel hurries",
        ),
        Row("", "frozen p50", statistics.median(frozen) * _MS, "ms"),
        Row("", "frozen p99", frozen[int(len(frozen) * 0.99)] * _MS, "ms", 5.0),
        Row("", "with syncfs and watchdog p50", watch.p50("whole, one") * _MS, "ms"),
        Row("", "three together / one", watch.p50("frozen, three") / watch.p50("frozen, one"), "x"),
    ]
    report.add(f"The freeze, idle ({rounds} rounds)", rows, watch.summary())


class _Frozen:
    """A mounted filesystem in an image."""

    def __init__(self, image: Path, target: Path, device: str) -> None:
        self.image = image
        self._target = target
        self._device = device
        self.fd = os.open(target, os.O_RDONLY)

    @classmethod
    def make(cls, place: Scratch, name: str) -> Self:
        image, target = place.root / "xfs" / name, place.root / name
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 10 * GIB)
        run("mkfs.ext4", "-q", "-F", image)
        target.mkdir()
        device = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
        run("mount", device, target)
        return cls(image, target, device)

    def clone(self) -> None:
        source, clone = os.open(self.image, os.O_RDONLY), os.open(f"{self.image}.c", os.O_RDWR | os.O_CREAT)
        files.clone_file(source, clone)
        os.close(source)
        os.close(clone)

    def clear(self) -> None:
        os.close(self.fd)
        run("umount", self._target)
        run("losetup", "--detach", self._device)
        self.image.unlink()


def _freeze(freezer: Freezer, images: list[_Frozen]) -> float:
    before = freezer.total_s
    with freezer.frozen([image.fd for image in images]):
        for image in images:
            image.clone()
    for image in images:
        os.unlink(f"{image.image}.c")
    return freezer.total_s - before


def _grace_period() -> None:
    """Wait until every processor has been through the scheduler, as each of a freeze's three steps does."""
    number = {"x86_64": 324, "aarch64": 283}[platform.machine()]
    if ctypes.CDLL(None, use_errno=True).syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "membarrier")
