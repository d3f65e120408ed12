# SPDX-License-Identifier: Apache-2.0
"""A driver of one's own: `orlop serve` as a child of this process, on a scratch pool. For `demo`."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.cli.client import TIMEOUT_S, Client, refusals
from csi_driver.cli.scratch import Scratch
from csi_driver.linux.child import Child
from csi_driver.rpc.pb.csi_pb2 import ProbeRequest

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


class DriverFailed(Exception):
    """The driver did not start, or did not end as it should."""


class Driver:
    """Its process and a client of its socket, both anew after each `start`."""

    def __init__(self, place: Scratch) -> None:
        self._place = place
        self._child: Child | None = None
        self._client: Client | None = None

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def client(self) -> Client:
        if self._client is None:
            raise DriverFailed("the driver has not been started")
        return self._client

    def start(self) -> float:
        """Start it and connect; the seconds from there to its first answer.

        Raises:
            DriverFailed: it ended, or is silent.
        """
        argv: list[str | Path] = [sys.executable, "-m", "csi_driver", "serve", "--config", self._place.config]
        argv += ["--endpoint", f"unix://{self._place.socket}"]
        log = os.open(self._place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        began = time.monotonic()
        try:
            self._child = Child.start(argv, log)
        finally:
            os.close(log)
        self._wait_for_socket(self._child)
        self._client = Client.connect(f"unix://{self._place.socket}", START_TIMEOUT_S)
        with refusals("Probe"):
            self._client.identity.Probe(ProbeRequest(), timeout=TIMEOUT_S)
        return time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL, as a crash or the out-of-memory killer does it."""
        self._hang_up()
        self._running().kill()

    def stop(self) -> None:
        """SIGTERM, and an orderly end.

        Raises:
            DriverFailed: it took too long, or says that something went wrong.
        """
        self._hang_up()
        code = self._running().end(STOP_TIMEOUT_S)
        if code != 0:
            how = "did not end in time and was killed" if code is None else f"ended with exit code {code}"
            raise DriverFailed(f"orlop serve {how} after SIGTERM")

    def close(self) -> None:
        """See that nothing of it runs any more, whatever happened."""
        self._hang_up()
        if self._child is not None:
            self._child.kill()

    def log_tail(self, lines: int = 15) -> list[str]:
        """The end of what it has logged."""
        try:
            return self._place.log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            return []

    def _wait_for_socket(self, child: Child) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        # A socket of a driver that was killed is still there, and is replaced: only an answer tells.
        while not _accepts(self._place.socket):
            if child.exit_code() is not None:
                raise DriverFailed(
                    f"orlop serve ended with exit code {child.exit_code()} before it could answer"
                )
            if time.monotonic() > deadline:
                raise DriverFailed(f"orlop serve did not answer within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.005)

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _running(self) -> Child:
        if self._child is None:
            raise DriverFailed("the driver has not been started")
        return self._child


def _accepts(path: Path) -> bool:
    """Whether somebody listens on the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


@contextmanager
def driver(place: Scratch) -> Iterator[Driver]:
    """A driver that is not started yet, and that does not outlive the body."""
    made = Driver(place)
    try:
        yield made
    finally:
        made.close()
