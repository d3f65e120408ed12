# SPDX-License-Identifier: Apache-2.0
"""How long snapshots, restores and clones take, and whether that depends on the size: images on xfs, in use.

The freeze itself is timed in this process, on the same filesystem, for the driver does not tell a caller of it.
"""

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable

from bench.client import Client, Kind, Places
from bench.driver import served
from bench.measure import Stopwatch
from bench.report import Report, Row
from bench.scratch import Scratch
from csi_driver.linux import copy, files, mount, treecopy
from csi_driver.linux.freeze import Freezer
from csi_driver.rpc.pb import csi_pb2 as pb

GIB = 1 << 30
_MS = 1000.0
_SIZES = {"1 GiB": (GIB, GIB // 4), "10 GiB, 5 of data": (10 * GIB, 5 * GIB), "20 GiB": (20 * GIB, GIB // 4)}


def measure_copies(report: Report, place: Scratch, *, rounds: int) -> None:
    """Three sections: the calls by size, the freeze, and full copies against cp."""
    pool = place.filesystem("xfs", "xfs", 128 * GIB)
    table = f'backend = "image"\nroot = "{pool}/pool"\nreserved = 0\n'
    watch = Stopwatch()
    with served(place.root / "driver", {"p": table}) as driver:
        client = Client(driver.socket)
        for name, (size, data) in _SIZES.items():
            _measure_size(watch, client, place, name, Kind("p", size), data, rounds)
        client.close()
    report.add(f"Copies of an image in use, xfs ({rounds} rounds)", _rows(watch), watch.summary())
    shutil.rmtree(pool / "pool")
    _measure_freeze(report, place, rounds * 10)
    _measure_full(report, place)


def _measure_size(
    watch: Stopwatch, client: Client, place: Scratch, name: str, kind: Kind, data: int, rounds: int
) -> None:
    origin = client.create(kind, f"origin {name}")
    places = Places.make(place.root / "kubelet", f"p{kind.size_bytes}")
    client.stage(kind, origin, places)
    client.publish(kind, origin, places)
    file = places.target / "data"
    _write(file, data)
    for number in range(-2, rounds):
        into = watch if number >= 0 else Stopwatch()
        into.time("Probe", client.probe)
        snapshot = into.time(f"CreateSnapshot {name}", lambda n=number: _snapshot(client, origin, f"s{n}"))  # type: ignore[misc]
        source = pb.VolumeContentSource(snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot))
        restored = into.time(f"restore {name}", lambda n=number, s=source: _create(client, kind, f"r{n}", s))  # type: ignore[misc]
        volume = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=origin))
        cloned = into.time(f"clone {name}", lambda n=number, s=volume: _create(client, kind, f"c{n}", s))  # type: ignore[misc]
        client.delete(restored)
        client.delete(cloned)
        client.controller.DeleteSnapshot(pb.DeleteSnapshotRequest(snapshot_id=snapshot))
        time.sleep(0.1)
    client.unpublish(origin, places)
    client.unstage(origin, places)
    client.delete(origin)
    time.sleep(1)


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


def _write(path: "os.PathLike[str]", size: int) -> None:
    block = random.randbytes(8 << 20)
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())


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
    """Freeze, clone, thaw of an idle filesystem in an image on xfs."""
    image = place.root / "xfs" / "image"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 10 * GIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    target = place.root / "frozen"
    target.mkdir()
    device = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(["mount", device, target], check=True)
    samples, whole = [], []
    freezer = Freezer()
    fd = os.open(target, os.O_RDONLY)
    try:
        for number in range(rounds + 5):
            source, clone = os.open(image, os.O_RDONLY), os.open(f"{image}.c", os.O_RDWR | os.O_CREAT)
            before, began = freezer.total_s, time.perf_counter()
            with freezer.frozen([fd]):
                files.clone_file(source, clone)
            if number >= 5:
                samples.append((freezer.total_s - before) * _MS)
                whole.append((time.perf_counter() - began) * _MS)
            os.close(source)
            os.close(clone)
            os.unlink(f"{image}.c")
    finally:
        os.close(fd)
        freezer.close()
        subprocess.run(["umount", target], check=True)
        subprocess.run(["losetup", "--detach", device], check=True)
        image.unlink()
    samples.sort()
    rows = [
        Row("", "frozen p50", statistics.median(samples), "ms"),
        Row("", "frozen p99", samples[int(len(samples) * 0.99)], "ms", 5.0),
        Row("", "with syncfs and watchdog p50", statistics.median(whole), "ms"),
    ]
    report.add(f"The freeze, idle ({rounds} rounds)", rows, samples)


def _measure_full(report: Report, place: Scratch) -> None:
    """Copies that share nothing, against cp on the same ext4."""
    root = place.filesystem("ext4", "ext4", 16 * GIB)
    _write(root / "data", GIB)
    with (root / "data").open("r+b") as file:
        file.truncate(4 * GIB)
    tree = root / "tree"
    tree.mkdir()
    for folder in range(500):
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
        Row("100,000 small files", "speed / cp -a", statistics.median(ratios["tree"]), "x", 1.0, True),
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
