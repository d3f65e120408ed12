# SPDX-License-Identifier: Apache-2.0
"""Everything that asks a file server, and so may hang: done by a child of its own per server, never for longer than told.

A process that waits for a dead NFS server can be killed, but not interrupted. So each server has a worker process
(`remote_worker`), which opens, mounts and measures for us and hands descriptors over; one that is late is killed with its
whole group, and the next call gets a new one. A server that was late is not asked again for a while: its calls fail
at once, and other servers' calls never wait for it. What is on the server is not its business.
"""

import array
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from csi_driver.errors import Unavailable

log = logging.getLogger(__name__)

_PACKAGE_PARENT: Final = Path(__file__).resolve().parents[2]
_MESSAGE: Final = 1 << 16
_REAP_S: Final = 1.0
_FIRST_PAUSE_S: Final = 2.0
_LONGEST_PAUSE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker said; `fd` is a descriptor it opened for us (ours to close), or -1."""

    values: dict[str, Any]
    fd: int = -1


class Server:
    """One file server, by name. Calls to it take turns; each has a deadline, the waiting for its turn included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._turn = threading.Lock()
        self._worker: _Worker | None = None
        self._pause_s = 0.0
        self._asked_again_at = 0.0
        self._abandoned: list[_Worker] = []

    def call(self, operation: str, timeout_s: float, *, always: bool = False, **arguments: object) -> Answer:
        """Have the worker do it; `always`: also while the server is not asked, for what helps without its answer.

        Raises:
            OSError: what the operation failed with, as if it had been done here.
            Unavailable: the server does not answer, or has not lately.
        """
        end = time.monotonic() + timeout_s
        self._check_pause(always)
        if not self._turn.acquire(timeout=timeout_s):
            raise Unavailable(
                f"server {self.name!r}: other calls wait for it: no turn within {timeout_s:g} s"
            )
        try:
            self._check_pause(always)
            return self._ask(operation, end, timeout_s, arguments)
        finally:
            self._turn.release()

    def problem(self) -> str:
        """Why calls fail at once now; "" when they are tried."""
        wait = self._asked_again_at - time.monotonic()
        return f"did not answer: asked again in {wait:.0f} s" if wait > 0 else ""

    def close(self) -> None:
        """End the worker. The next call would start another."""
        with self._turn:
            if self._worker is not None:
                self._worker.kill()
                self._worker = None

    def _check_pause(self, always: bool) -> None:
        problem = self.problem()
        if problem and not always:
            raise Unavailable(f"server {self.name!r}: {problem}")

    def _ask(self, operation: str, end: float, timeout_s: float, arguments: dict[str, object]) -> Answer:
        self._abandoned = [worker for worker in self._abandoned if not worker.has_ended()]
        if self._worker is None or self._worker.has_ended():
            self._worker = _Worker.start(self.name)
        try:
            answer = self._worker.ask({"operation": operation, **arguments}, end)
        except (TimeoutError, EOFError) as error:
            self._give_up(self._worker)
            raise Unavailable(
                f"server {self.name!r}: {operation} did not end within {timeout_s:g} s"
            ) from error
        self._pause_s = 0.0
        number = answer.values.get("errno")
        if number is not None:
            raise OSError(number, answer.values["error"], answer.values.get("path"))
        return answer

    def _give_up(self, worker: "_Worker") -> None:
        self._worker = None
        self._pause_s = min(self._pause_s * 2 or _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._asked_again_at = time.monotonic() + self._pause_s
        if not worker.kill():
            # Deaf even to SIGKILL: never waited for again, only looked after.
            log.error("server %s: process %d is stuck in the kernel: left behind", self.name, worker.pid)
            self._abandoned.append(worker)


class _Worker:
    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process = process
        self._connection = connection

    @classmethod
    def start(cls, name: str) -> "_Worker":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "csi_driver.linux.remote_worker", str(theirs.fileno()), name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C", "PYTHONPATH": os.fspath(_PACKAGE_PARENT)},
            )
        return cls(process, ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, request: dict[str, object], end: float) -> Answer:
        """TimeoutError at the deadline, EOFError if it died."""
        try:
            self._connection.settimeout(max(0.001, end - time.monotonic()))
            self._connection.send(json.dumps(request).encode())
            message, ancillary, _, _ = self._connection.recvmsg(_MESSAGE, socket.CMSG_SPACE(4))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error
        if not message:
            raise EOFError
        return Answer(json.loads(message), _descriptor(ancillary))

    def kill(self) -> bool:
        """Kill it and what it started; whether it is gone."""
        self._connection.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended by itself
        try:
            self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return False
        return True


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found = array.array("i", data[:4])[0]
            os.set_inheritable(found, False)
            return found
    return -1


@dataclass(slots=True)
class Servers:
    """Every server that has been asked for, by name."""

    _known: dict[str, Server] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def named(self, name: str) -> Server:
        """The server of this name."""
        with self._guard:
            return self._known.setdefault(name, Server(name))

    def close(self) -> None:
        """End every worker."""
        with self._guard:
            known = list(self._known.values())
        for server in known:
            server.close()
