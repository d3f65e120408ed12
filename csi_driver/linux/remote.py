# SPDX-License-Identifier: Apache-2.0
"""Everything that asks a file server, and so may hang: done by children of their own, never for longer than told.

A process that waits for a dead server can be killed, but not interrupted. So what asks one is a child with its own process
group, and one that is late is killed with all that it started. A server that was late is not asked again for a while:
its calls fail at once, and other servers' calls never wait for it. A child that is deaf even to SIGKILL (it has unwritten
data) is named, never waited for again, and at most a few of them are left behind. What is on the server, and what
children and their callers tell one another, is not this module's business.
"""

import array
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from csi_driver.errors import Unavailable

log = logging.getLogger(__name__)

NODE_WORKER: Final = "csi_driver.linux.remote_worker"
KEEPER: Final = "csi_driver.linux.fence_worker"
"""The same for images, which are more than directories."""
MOST_LEFT_BEHIND: Final = 4
"""Children of one server that are stuck in the kernel; with so many, none is started until one has ended."""

_PACKAGE_PARENT: Final = Path(__file__).resolve().parents[2]
_HEADER: Final = struct.Struct("!I")
_REAP_S: Final = 1.0
_START_S: Final = 30.0
"""How long a child may take to be there, which depends on this machine alone: half a second, if it has little else to do."""
_FIRST_PAUSE_S: Final = 2.0
_LONGEST_PAUSE_S: Final = 60.0
_PATIENCE_S: Final = 5.0
_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Message:
    """What goes between a child and us; `fd` is a descriptor that came with it (the receiver's to close), or -1."""

    content: bytes
    fd: int = -1


def send(connection: socket.socket, message: Message) -> None:
    """Send all of it. The descriptor stays the sender's."""
    header = _HEADER.pack(len(message.content))
    if message.fd < 0:
        connection.sendall(header + message.content)
    else:
        socket.send_fds(connection, [header], [message.fd])
        connection.sendall(message.content)


def receive(connection: socket.socket) -> Message:
    """The next message. EOFError if the other side has ended, TimeoutError as the socket is set."""
    header, ancillary, _, _ = connection.recvmsg(_HEADER.size, socket.CMSG_SPACE(4))
    fd = _descriptor(ancillary)
    (size,) = _HEADER.unpack(header + _exactly(connection, _HEADER.size - len(header), ended=not header))
    return Message(_exactly(connection, size), fd)


def _exactly(connection: socket.socket, size: int, *, ended: bool = False) -> bytes:
    parts: list[bytes] = []
    while size:
        part = b"" if ended else connection.recv(size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found = int(array.array("i", data[:4])[0])
            os.set_inheritable(found, False)
            return found
    return -1


class Breaker:
    """Whether one server is asked now: after it was late it is left alone for a while, longer each time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pause_s = 0.0
        self._asked_again_at = 0.0
        self._left_behind: list[Worker] = []

    def problem(self) -> str:
        """Why calls fail at once now; "" when they are tried."""
        wait = self._asked_again_at - time.monotonic()
        return f"did not answer: asked again in {wait:.0f} s" if wait > 0 else ""

    def check(self) -> None:
        """Raises Unavailable while the server is not asked."""
        problem = self.problem()
        if problem:
            raise Unavailable(f"server {self.name!r}: {problem}")

    def answered(self) -> None:
        """It did: the next late answer is the first one."""
        self._pause_s = 0.0

    def was_late(self) -> None:
        """It did not within its time."""
        self._pause_s = min(self._pause_s * 2 or _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._asked_again_at = time.monotonic() + self._pause_s

    def leave_behind(self, worker: "Worker") -> None:
        """This one cannot be killed: it is never waited for again, only looked after."""
        log.error("server %s: process %d is stuck in the kernel: left behind", self.name, worker.pid)
        self._left_behind.append(worker)

    def left_behind(self) -> list[int]:
        """The processes that are stuck in the kernel yet."""
        self._left_behind = [worker for worker in self._left_behind if not worker.has_ended()]
        return [worker.pid for worker in self._left_behind]

    def check_start(self, *, always: bool = False) -> None:
        """Raises Unavailable: so many children are stuck that another one would only join them.

        Twice as many for what is done `always`: pods must be able to end.
        """
        stuck = self.left_behind()
        if len(stuck) >= MOST_LEFT_BEHIND * (2 if always else 1):
            raise Unavailable(
                f"server {self.name!r}: processes {', '.join(map(str, stuck))} are stuck in the kernel, waiting for it: "
                "they end when it is back, or with this machine"
            )


class Worker:
    """A child and the way to talk to it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process = process
        self._connection = connection

    @classmethod
    def start(cls, module: str, name: str) -> "Worker":
        """Run `python -m module FD name` in a session of its own; FD is its end of a stream.

        It is there when this returns. Unavailable: it is not, within its time.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C", "PYTHONPATH": os.fspath(_PACKAGE_PARENT)},
            )
        worker = cls(process, ours)
        try:
            worker.hear(time.monotonic() + _START_S, lambda: None)
        except (TimeoutError, EOFError) as error:
            worker.kill()
            raise Unavailable(f"server {name!r}: the process that asks it does not start: repeat") from error
        return worker

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def tell(self, content: bytes, end: float) -> None:
        """Send it a message. TimeoutError at the deadline, EOFError if it has ended."""
        self._until(end)
        try:
            send(self._connection, Message(content))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def hear(self, end: float, look: Callable[[], None]) -> Message:
        """Its next message; `look` is called now and then meanwhile, and may raise. Raises as `tell`."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while not poll.poll(1000 * max(0.0, min(end - time.monotonic(), _LOOK_S))):
            if time.monotonic() >= end:
                raise TimeoutError
            look()
        self._until(end)
        try:
            return receive(self._connection)
        except ConnectionResetError as error:
            raise EOFError from error

    def whereabouts(self) -> str:
        """Which function of the kernel it sleeps in (proc_pid_wchan(5)), so that one knows what it waits for; or "running"."""
        try:
            function = Path(f"/proc/{self.pid}/wchan").read_text()
        except OSError:
            return "hidden by the kernel"
        return f"in {function}" if function.strip("0") else "running"

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

    def _until(self, end: float) -> None:
        self._connection.settimeout(max(0.001, end - time.monotonic()))


Answer = Callable[[bytes], bytes | None]
"""For messages of a child before it is done: what to tell it; None: this one was the last."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing for a child to do. Each of its messages may take `timeout_s`."""

    name: str
    content: bytes
    timeout_s: float
    answer: Answer = lambda _: None
    look: Callable[[], None] = lambda: None
    always: bool = False
    """Also while the server is not asked: it helps without an answer."""


class Lane:
    """One child at a time, which does one thing after the other for callers that take turns."""

    def __init__(
        self,
        breaker: Breaker,
        module: str,
        begin: Callable[[Worker], None] = lambda _worker: None,
    ) -> None:
        self._breaker = breaker
        self._module = module
        self._begin = begin
        """Said to each new child first; what it raises is the caller's."""
        self._turn = threading.Lock()
        self._busy_since = 0.0
        self._worker: Worker | None = None

    def do(self, task: Task) -> Message:
        """Have the child do it; its last message.

        Raises:
            Unavailable: the server does not answer, or has not lately, or others wait for it.
        """
        if not task.always:
            self._breaker.check()
        self._take_turn(task.timeout_s)
        try:
            if not task.always:
                self._breaker.check()
            self._busy_since = time.monotonic()
            return self._do(task)
        finally:
            self._turn.release()

    def drop(self) -> None:
        """End the child; the next call starts another."""
        with self._turn:
            self._drop()

    def _take_turn(self, timeout_s: float) -> None:
        # Behind one that is slow the others wait a moment only, lest one server has all threads of the driver.
        end = time.monotonic() + timeout_s
        while not self._turn.acquire(timeout=0.1):
            now = time.monotonic()
            if now > end or now > self._busy_since + _PATIENCE_S:
                raise Unavailable(f"server {self._breaker.name!r}: another call waits for it: repeat")

    def _do(self, task: Task) -> Message:
        try:
            worker = self._ready(task)
            worker.tell(task.content, time.monotonic() + task.timeout_s)
            while True:
                said = worker.hear(time.monotonic() + task.timeout_s, task.look)
                told = task.answer(said.content)
                if told is None:
                    break
                worker.tell(told, time.monotonic() + task.timeout_s)
        except (TimeoutError, EOFError) as error:
            self._breaker.was_late()
            how = f"died within {task.timeout_s:g} s"
            if isinstance(error, TimeoutError) and self._worker is not None:
                how = f"did not end within {task.timeout_s:g} s: its process is {self._worker.whereabouts()}"
            self._drop()
            raise Unavailable(f"server {self._breaker.name!r}: {task.name} {how}") from error
        except BaseException:
            # Not at its end, so of no more use.
            self._drop()
            raise
        self._breaker.answered()
        return said

    def _ready(self, task: Task) -> Worker:
        if self._worker is not None and self._worker.has_ended():
            self._drop()
        if self._worker is None:
            self._breaker.check_start(always=task.always)
            self._worker = Worker.start(self._module, self._breaker.name)
            self._begin(self._worker)
        return self._worker

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None and not worker.kill():
            self._breaker.leave_behind(worker)


class Server:
    """What a node wants of one file server: mounting, opening, measuring. See `remote_worker` for the operations."""

    def __init__(self, breaker: Breaker, module: str = NODE_WORKER) -> None:
        self._lane = Lane(breaker, module)

    def call(
        self, operation: str, timeout_s: float, *, always: bool = False, **arguments: object
    ) -> tuple[dict[str, Any], int]:
        """Have the worker do it: what it found, and a descriptor it opened for us (ours to close), or -1.

        Raises:
            OSError: what the operation failed with, as if it had been done here.
            Unavailable: the server does not answer, or has not lately.
        """
        content = json.dumps({"operation": operation, **arguments}).encode()
        said = self._lane.do(Task(operation, content, timeout_s, always=always))
        values: dict[str, Any] = json.loads(said.content)
        number = values.get("errno")
        if number is not None:
            raise OSError(number, values["error"], values.get("path"))
        return values, said.fd

    def close(self) -> None:
        """End the worker. The next call would start another."""
        self._lane.drop()


@dataclass(slots=True)
class Servers:
    """Every server that has been asked for, by name."""

    _known: dict[str, tuple[Breaker, Server]] = field(default_factory=dict)
    _keepers: dict[str, Server] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def named(self, name: str) -> Server:
        """The server of this name."""
        return self._find(name)[1]

    def keeper(self, name: str) -> Server:
        """The same server by another child, for images: they take long."""
        breaker = self.breaker(name)
        with self._guard:
            if name not in self._keepers:
                self._keepers[name] = Server(breaker, KEEPER)
            return self._keepers[name]

    def breaker(self, name: str) -> Breaker:
        """Whether the server of this name is asked, for all who ask it."""
        return self._find(name)[0]

    def all(self) -> list[Breaker]:
        """Those of every server that was ever asked for."""
        with self._guard:
            return [breaker for breaker, _ in self._known.values()]

    def close(self) -> None:
        """End every worker."""
        with self._guard:
            known = [*(server for _, server in self._known.values()), *self._keepers.values()]
        for server in known:
            server.close()

    def _find(self, name: str) -> tuple[Breaker, Server]:
        with self._guard:
            if name not in self._known:
                breaker = Breaker(name)
                self._known[name] = breaker, Server(breaker)
            return self._known[name]
