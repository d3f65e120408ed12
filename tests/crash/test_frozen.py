# SPDX-License-Identifier: Apache-2.0
"""A served driver dies, or stops to move, while it holds a pod's filesystem still: the pod writes on, and nothing is kept.

The copy is of a pool that cannot share blocks, so that the freeze lasts long enough to be met from outside.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.client import Client, Kind, Places
from bench.driver import Driver
from csi_driver.backends.base import Directory
from csi_driver.linux import freeze
from csi_driver.model import MIB
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.rig import KINDS
from tests.scene import Scene, clean_place, set_up

pytestmark = pytest.mark.crash

IMAGE = next(kind for kind in KINDS if kind.name == "image")
VOLUME = Kind("p", 512 * MIB)
DATA_BYTES = 180 * MIB
# Longer than a slow disk takes for a whole copy, which is made with the pod held still.
LIMIT_S = 10.0
STILL_S = 0.05


@pytest.fixture
def place() -> Iterator[Path]:
    with clean_place() as path:
        yield path


class Writer:
    """A pod's program, which writes for as long as it is let."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._ending = threading.Event()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)
        # A daemon: a filesystem that is never thawed must not keep the tests from ending.
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def is_still(self) -> bool:
        before = self.count
        time.sleep(STILL_S)
        return self.count == before

    def wait(self, timeout_s: float) -> float:
        """Until it writes on; how long that took."""
        began, before = time.monotonic(), self.count
        while self.count == before:
            assert time.monotonic() - began < timeout_s, "still frozen"
            time.sleep(0.005)
        return time.monotonic() - began

    def end(self) -> None:
        self._ending.set()
        self._thread.join()
        os.close(self._fd)

    def _write(self) -> None:
        while not self._ending.is_set():
            os.pwrite(self._fd, b"%08d" % self.count, 0)
            os.fdatasync(self._fd)
            self.count += 1


@contextmanager
def in_use(scene: Scene, place: Path) -> Iterator[tuple[Driver, Client, str, Writer]]:
    """A driver, and a volume that a pod writes to; taken down at the end by a driver that has not died."""
    config = place / "orlop.toml"
    config.write_text(
        f'driver_name = "crash.orlop.dev"\nnode_id = "n"\nfreeze_timeout = "{LIMIT_S:g}s"\n[pools.p]\n'
        f'backend = "image"\nroot = "{scene.root}"\nreserved = 0\n',
        encoding="utf-8",
    )
    driver, places = Driver(place, config), Places.make(place, "pod")
    driver.start()
    client = Client(driver.socket)
    origin = client.create(VOLUME, "origin")
    client.stage(VOLUME, origin, places)
    client.publish(VOLUME, origin, places)
    with open(places.target / "data", "wb") as file:
        file.write(os.urandom(DATA_BYTES))
        os.fsync(file.fileno())
    writer = Writer(places.target / "counter")
    try:
        yield driver, client, origin, writer
    finally:
        with Directory(os.open(places.target, os.O_RDONLY)) as target:
            freeze.thaw_left(target.fd)  # or a test that fails would not end
        writer.end()
        client.close()
        driver.kill()
        driver.start()
        client = Client(driver.socket)
        client.unpublish(origin, places)
        client.unstage(origin, places)
        client.close()
        driver.stop()


def watchdogs(pid: int) -> list[int]:
    """The processes that a driver has started."""
    children = Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for thread in children for child in thread.read_text().split()]


def snapshot(client: Client, origin: str) -> Any:
    request = pb.CreateSnapshotRequest(source_volume_id=origin, name="s")
    return client.controller.CreateSnapshot.future(request, timeout=60)


def wait_for_copy(scene: Scene) -> None:
    """Until the driver copies, which it does with the filesystem frozen."""
    deadline = time.monotonic() + 30
    while not list(scene.root.glob("staging/*/image")):
        assert time.monotonic() < deadline, "no copy began"
        time.sleep(0.001)


def test_its_death(place: Path) -> None:
    with set_up(IMAGE, place, 2 << 30) as scene, in_use(scene, place) as (driver, client, origin, writer):
        call = snapshot(client, origin)
        wait_for_copy(scene)
        os.kill(driver.pid, signal.SIGSTOP)
        assert writer.is_still(), "the copy had ended before it could be met"

        driver.kill()

        # Long before its time was up.
        assert writer.wait(LIMIT_S) < LIMIT_S / 2
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        driver.start()
        again = Client(driver.socket)
        assert os.listdir(scene.root / "staging") == os.listdir(scene.root / "snapshots") == []
        assert snapshot(again, origin).result().snapshot.ready_to_use
        again.close()


def test_its_death_and_its_watchdogs_at_once(place: Path) -> None:
    """As when a container runs out of memory: the kernel kills all that is in it."""
    with set_up(IMAGE, place, 2 << 30) as scene, in_use(scene, place) as (driver, client, origin, writer):
        call = snapshot(client, origin)
        wait_for_copy(scene)
        all_of_it = [*watchdogs(driver.pid), driver.pid]
        assert len(all_of_it) == 2
        for pid in all_of_it:
            os.kill(pid, signal.SIGSTOP)
        assert writer.is_still(), "the copy had ended before it could be met"
        for pid in all_of_it:
            os.kill(pid, signal.SIGKILL)
        driver.kill()
        assert writer.is_still(), "somebody has thawed it, and this proves nothing"

        # A start that fails must not take away what tells the next one.
        good = (place / "orlop.toml").read_text()
        (place / "other").mkdir()
        (place / "other" / "pool.json").write_text("nothing of ours")
        (place / "orlop.toml").write_text(f'{good}[pools.q]\nbackend = "image"\nroot = "{place}/other"\n')
        with pytest.raises(RuntimeError, match="did not start"):
            driver.start()
        (place / "orlop.toml").write_text(good)
        driver.start()

        writer.wait(LIMIT_S)
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_its_standing_still(place: Path) -> None:
    with set_up(IMAGE, place, 2 << 30) as scene, in_use(scene, place) as (driver, client, origin, writer):
        call = snapshot(client, origin)
        wait_for_copy(scene)
        os.kill(driver.pid, signal.SIGSTOP)
        assert writer.is_still(), "the copy had ended before it could be met"

        assert writer.wait(2 * LIMIT_S) < 1.5 * LIMIT_S
        os.kill(driver.pid, signal.SIGCONT)

        # What was copied is of no one moment.
        assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert os.listdir(scene.root / "staging") == os.listdir(scene.root / "snapshots") == []
        assert snapshot(client, origin).result().snapshot.ready_to_use
