# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.lab`: volumes on file servers, under the second kernel (`make bench-lab`): ratios within one run.

The servers are that kernel's own, reached over its own network: no cable, no disk. So a round trip is short here, and what
the driver adds to it weighs more than it does anywhere else.
"""

import argparse
import os
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TypeVar

import grpc

from bench.client import Client
from bench.driver import Driver
from bench.measure import Stopwatch
from bench.report import Report, Row, machine
from bench.scratch import run
from csi_driver.linux import syscall
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.lab.disks import Disk
from tests.lab.drivers import MANY
from tests.lab.hosts import GaneshaServer, KernelServer

T = TypeVar("T")
OUTPUT = Path(__file__).parents[1] / ".cache" / "bench" / "lab.json"
MANY_VOLUMES = 100
_EMPTY_PATHS = 0x04 | 0x40  # MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
_CLONE = 1  # OPEN_TREE_CLONE
_MS = 1000.0
_TIMEOUT_S = 120.0
_CONFIG = 'scope = "shared"\ndriver_name = "bench.orlop.dev"\nnode_id = "bench"\n'
_POOL = '[pools.{name}]\nbackend = "nfs"\nserver = "{server}"\npath = "/share"\nroot = "{root}"\n'
CALLS = ("NodePublishVolume", "NodeGetVolumeStats", "NodeUnpublishVolume", "CreateVolume", "DeleteVolume")


@dataclass(frozen=True)
class Place:
    """Two servers, a driver with a pool on each, and a client of it."""

    root: Path
    well: KernelServer
    other: GaneshaServer
    client: Client

    def repeat(self, call: Callable[[], T]) -> T:
        """As Kubernetes does, until it works."""
        ending = threading.Event()
        for _ in range(100):
            try:
                return call()
            except grpc.RpcError as error:
                failure = error
                ending.wait(1)
        raise failure

    def target(self, name: str) -> Path:
        return self.root / "pods" / name

    def create(self, pool: str, name: str) -> pb.Volume:
        request = pb.CreateVolumeRequest(
            name=name,
            volume_capabilities=[MANY],
            capacity_range=pb.CapacityRange(required_bytes=1 << 20),
            parameters={"pool": pool},
        )
        return self.client.controller.CreateVolume(request, timeout=_TIMEOUT_S).volume

    def publish(self, volume: pb.Volume, name: str) -> None:
        request = pb.NodePublishVolumeRequest(
            volume_id=volume.volume_id,
            target_path=os.fspath(self.target(name)),
            volume_capability=MANY,
            volume_context=volume.volume_context,
        )
        self.client.node.NodePublishVolume(request, timeout=_TIMEOUT_S)

    def unpublish(self, volume: pb.Volume, name: str) -> None:
        request = pb.NodeUnpublishVolumeRequest(
            volume_id=volume.volume_id, target_path=os.fspath(self.target(name))
        )
        self.client.node.NodeUnpublishVolume(request, timeout=_TIMEOUT_S)

    def stats(self, volume: pb.Volume, name: str) -> None:
        request = pb.NodeGetVolumeStatsRequest(
            volume_id=volume.volume_id, volume_path=os.fspath(self.target(name))
        )
        self.client.node.NodeGetVolumeStats(request, timeout=_TIMEOUT_S)


@contextmanager
def set_up() -> Iterator[Place]:
    out = sys.stdout
    with ExitStack() as undo:
        undo.enter_context(redirect_stdout(StringIO()))  # what the servers take to set up
        root = Path(tempfile.mkdtemp(prefix="orlop-bench-", dir="/run"))
        (root / "pods").mkdir()
        disks = [Disk.make("xfs", root / f"disk{number}", "2G") for number in range(2)]
        for disk in disks:
            disk.mount()
            (disk.target / "share").mkdir()
            undo.callback(disk.remove)
        well, other = KernelServer(disks[0].target), GaneshaServer(disks[1].target)
        for server in (well, other):
            undo.callback(server.remove)
            server.start()
        servers = {"well": well, "other": other}
        pools = [
            _POOL.format(name=name, server=one.address, root=root / name) for name, one in servers.items()
        ]
        (root / "orlop.toml").write_text(_CONFIG + "".join(pools))
        driver = Driver(root, root / "orlop.toml")
        undo.callback(_unmount_all)
        driver.start()
        undo.callback(driver.stop)
        client = Client(driver.socket)
        undo.callback(client.close)
        with redirect_stdout(out):
            yield Place(root, well, other, client)


def _unmount_all() -> None:
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split()[2].startswith("nfs"):
            run("umount", "-l", line.split()[1])


# Calls


def measure_calls(report: Report, place: Place, rounds: int) -> None:
    """One client, nothing else: calls in turns with Probe, the bare bind and a round trip to the server."""
    watch = Stopwatch()
    place.repeat(lambda: place.create("other", "first"))
    standing = place.repeat(lambda: place.create("well", "standing"))
    # From here on the export is mounted.
    place.publish(standing, "standing")
    round_trip = _round_trips(place)
    for number in range(-3, rounds):
        # The first rounds load code and make connections.
        _round(watch if number >= 0 else Stopwatch(), place, standing, round_trip, number)
    before = _operations(place.root / "well")
    round_trip()
    requests = _operations(place.root / "well") - before
    before = _operations(place.root / "well")
    volume = place.create("well", "counted")
    operations = _operations(place.root / "well") - before
    place.client.controller.DeleteVolume(
        pb.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=_TIMEOUT_S
    )
    probe, bind, trip = (watch.p50(name) for name in ("Probe", "bind", "round trip"))

    def fact(name: str) -> Row:
        return Row("nfs", name, watch.p50(name) * _MS, "ms p50")

    above = (watch.p50("NodePublishVolume") - probe - bind) * _MS
    trips = (watch.p50("CreateVolume") - probe) / trip
    rows = [fact("Probe"), fact("bind"), fact("round trip"), *(fact(name) for name in CALLS)]
    rows.append(Row("nfs", "NodePublishVolume - Probe - bind", above, "ms", 3))
    rows.append(Row("nfs", "CreateVolume - Probe", trips, "round trips", 12))
    rows.append(Row("nfs", "a round trip", requests.total(), "requests"))
    kinds = ", ".join(f"{count} {name}" for name, count in operations.most_common())
    rows.append(Row("nfs", "a CreateVolume", operations.total(), "requests", note=kinds))
    report.add(f"Calls, an export that is mounted ({rounds} rounds)", rows, watch.summary())


def _round(
    watch: Stopwatch, place: Place, standing: pb.Volume, round_trip: Callable[[], None], number: int
) -> None:
    watch.time("Probe", place.client.probe)
    watch.time("round trip", round_trip)
    volume = watch.time("CreateVolume", lambda: place.create("well", f"v{number}"))
    watch.time("Probe", place.client.probe)
    _bind(watch, place)
    watch.time("NodePublishVolume", lambda: place.publish(volume, "pod"))
    watch.time("round trip", round_trip)
    watch.time("NodeGetVolumeStats", lambda: place.stats(volume, "pod"))
    watch.time("Probe", place.client.probe)
    watch.time("NodeUnpublishVolume", lambda: place.unpublish(volume, "pod"))
    request = pb.DeleteVolumeRequest(volume_id=volume.volume_id)
    watch.time("DeleteVolume", lambda: place.client.controller.DeleteVolume(request, timeout=_TIMEOUT_S))


def _bind(watch: Stopwatch, place: Place) -> None:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    target = place.target("bare")
    target.mkdir(exist_ok=True)

    def bind() -> None:
        source_fd, target_fd = os.open(place.target("standing"), flags), os.open(target, flags)
        tree = syscall.open_tree(source_fd, _CLONE)
        syscall.move_mount(tree, target_fd, "target", _EMPTY_PATHS)
        for fd in (tree, target_fd, source_fd):
            os.close(fd)

    watch.time("bind", bind)
    syscall.umount2(target, 0)


def _round_trips(place: Place) -> Callable[[], None]:
    """One request to the server: how full it is, which nothing caches."""
    root = os.open(place.root / "well", os.O_RDONLY)

    def ask() -> None:
        os.statvfs(root)

    return ask


def _operations(root: Path) -> Counter[str]:
    """The requests that the driver's own mount has made so far, by their kinds."""
    # The driver's mounts are this process's: they share a mount namespace.
    text = Path("/proc/self/mountstats").read_text()
    part = next(one for one in text.split("device ") if f" mounted on {root} with" in one)
    counts = re.findall(r"^\s+([A-Z_]+): (\d+)", part.split("per-op statistics")[1], re.MULTILINE)
    return Counter({name: int(count) for name, count in counts})


# Many volumes of one export


def measure_sharing(report: Report, place: Place) -> None:
    """Publishing many volumes of one export, against a mount for each."""
    watch = Stopwatch()
    volumes = [place.create("well", f"many{number}") for number in range(MANY_VOLUMES)]

    def publish_all() -> None:
        for number, volume in enumerate(volumes):
            place.publish(volume, f"many{number}")

    def mount_all() -> None:
        for number, volume in enumerate(volumes):
            target = place.target(f"own{number}")
            target.mkdir(exist_ok=True)
            source = f"{place.well.address}:/share/{volume.volume_context['directory']}"
            run("mount", "-t", "nfs", source, target)

    for _ in range(2):
        watch.time("publishes", publish_all)
        for number, volume in enumerate(volumes):
            place.unpublish(volume, f"many{number}")
        watch.time("mounts", mount_all)
        for number in range(MANY_VOLUMES):
            run("umount", place.target(f"own{number}"))
    rows = [Row("nfs", name, watch.p50(name), "s") for name in ("publishes", "mounts")]
    ratio = watch.p50("publishes") / watch.p50("mounts")
    rows.append(Row("nfs", "publishes", ratio, "x mounts", 0.2))
    report.add(f"{MANY_VOLUMES} volumes of one export", rows, watch.summary())


# A dead server


def measure_death(report: Report, place: Place, rounds: int) -> None:
    """Calls for one server while the other one answers, and while it is frozen; what is asked of that one is the same."""
    victim, volume = place.create("other", "victim"), place.create("well", "bystander")
    place.publish(victim, "victim")
    place.publish(volume, "bystander")
    alive, dead = Stopwatch(), Stopwatch()
    refused = 0
    for _ in range(2):
        with _asked(place, victim) as counts:
            _calls(alive, place, volume, rounds)
        place.other.freeze()
        with _asked(place, victim) as counts:
            # The first call is late, and the others wait for that.
            _calls(dead, place, volume, rounds)
        refused += counts["refused"]
        place.other.thaw()
        place.repeat(lambda: place.stats(victim, "victim"))
        place.repeat(lambda: place.create("other", "victim"))
    rows = [Row("nfs", "calls for the dead server that were refused", refused, "calls")]
    for name in CALLS:
        before, after = (_p99(watch.samples[name]) * _MS for watch in (alive, dead))
        rows.append(
            Row("nfs", f"{name}, p99", after / before, "x", 1.2, note=f"{before:.1f} -> {after:.1f} ms")
        )
    report.add(
        f"One of two servers dead ({2 * rounds} rounds each)",
        rows,
        {"alive": alive.summary(), "dead": dead.summary()},
    )
    place.unpublish(victim, "victim")
    place.unpublish(volume, "bystander")


def _calls(watch: Stopwatch, place: Place, volume: pb.Volume, rounds: int) -> None:
    for number in range(rounds):
        made = watch.time("CreateVolume", lambda number=number: place.create("well", f"d{number}"))  # type: ignore[misc]
        watch.time("NodePublishVolume", lambda: place.publish(volume, "pod"))
        watch.time("NodeGetVolumeStats", lambda: place.stats(volume, "bystander"))
        watch.time("NodeUnpublishVolume", lambda: place.unpublish(volume, "pod"))
        request = pb.DeleteVolumeRequest(volume_id=made.volume_id)
        watch.time(
            "DeleteVolume",
            lambda request=request: place.client.controller.DeleteVolume(request, timeout=_TIMEOUT_S),  # type: ignore[misc]
        )


@contextmanager
def _asked(place: Place, victim: pb.Volume) -> Iterator[dict[str, int]]:
    """Meanwhile kubelet and the provisioner ask for volumes of the other server, ten times a second."""
    counts = {"answered": 0, "refused": 0}
    ending = threading.Event()

    def ask() -> None:
        number = 0
        while not ending.wait(0.1):
            number += 1
            try:
                if number % 2:
                    place.stats(victim, "victim")
                else:
                    place.create("other", "victim")
                counts["answered"] += 1
            except grpc.RpcError:
                counts["refused"] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield counts
    finally:
        ending.set()
        thread.join()


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lab", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the machine-readable file (%(default)s)")
    arguments = parser.parse_args()
    if os.environ.get("LAB") != "1":
        parser.error("runs under a kernel of its own: make bench-lab")
    report = Report()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    with set_up() as place:
        measure_calls(report, place, arguments.rounds)
        measure_sharing(report, place)
        measure_death(report, place, arguments.rounds)
    report.write(arguments.output)
    report.print_end(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
