# SPDX-License-Identifier: Apache-2.0
"""Stop all writes to mounted filesystems for a moment, and never for longer, whatever becomes of this process.

A filesystem that stays frozen hangs every program that writes to it, and closing a descriptor thaws nothing. So a
second process (`watchdog`) holds the descriptors: it thaws when this one dies, or when time is up. What is done in
the moment is the caller's business.
"""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from csi_driver.linux import online, syscall

BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

EXPEDITED: Final = Path("/sys/kernel/rcu_expedited")
"""Where the kernel is told to hurry its grace periods."""

_START_S: Final = 30.0
_ANSWER_S: Final = 10.0
_SYNCS: Final = 4
_QUICK_S: Final = 0.02
_MOST_TOGETHER: Final = 16


class FreezeFailed(Exception):
    """The filesystems could not be frozen, or not for as long as was needed."""


class FrozenAlready(FreezeFailed):
    """Somebody else has frozen one of them; says who can end that."""


class Freezer:
    """Freezes one set of filesystems at a time. Its watchdog starts at the first freeze and ends with `close`."""

    def __init__(self, limit_s: float = 5.0, expedited: Path = EXPEDITED) -> None:
        self.limit_s = limit_s
        self._expedited = expedited
        self.longest_s = 0.0
        self.count = 0
        self.total_s = 0.0
        self.counts = [0] * (len(BUCKETS_S) + 1)
        """Freezes by how long they lasted, per bucket; the last one is beyond all bounds."""
        self._guard = threading.Lock()
        self._watchdog: _Watchdog | None = None

    @contextmanager
    def frozen(self, fds: Sequence[int]) -> Iterator[float]:
        """Nothing is written to the filesystems of `fds` while the body runs; it gets its deadline (time.monotonic).

        They are written out before, so that the moment is short. The body's work counts only if this ends well.

        Raises:
            FreezeFailed: one is frozen by somebody else, or the body took longer than the limit, so that the
                filesystems were thawed under it.
        """
        with self._guard:
            # First, so that a new one starts while all is written out.
            self._ready()
        # Without the guard: it may take minutes on a slow disk, and others freeze theirs meanwhile.
        _write_out(fds, self.limit_s)
        written = time.monotonic()
        with self._guard:
            if time.monotonic() - written > _QUICK_S:
                # Others were frozen meanwhile, and these were written to.
                _raise_first(_together(syscall.syncfs, fds))
            dog = self._ready()
            dog.guard(fds, self.limit_s)
            began = time.monotonic()
            held: list[int] = []
            late = True
            try:
                failures = _together(_freeze, fds)
                held += [fd for fd, failure in zip(fds, failures, strict=True) if failure is None]
                _raise_first(failures)
                yield began + self.limit_s
            finally:
                late = not _thaw(held)
                self._count(time.monotonic() - began)
                late = not dog.release() or late
            if late:
                raise FreezeFailed(
                    f"it took longer than freeze_timeout, {self.limit_s:g} s, and the filesystem was thawed meanwhile"
                )

    def close(self) -> None:
        """End the watchdog."""
        with self._guard:
            if self._watchdog is not None:
                self._watchdog.close()
                self._watchdog = None

    def _ready(self) -> "_Watchdog":
        if self._watchdog is None or not self._watchdog.is_alive():
            self._watchdog = _Watchdog(self._expedited)
        return self._watchdog

    def _count(self, seconds: float) -> None:
        self.count += 1
        self.total_s += seconds
        self.longest_s = max(self.longest_s, seconds)
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1


class _Watchdog:
    """The second process, and the socket to it. The protocol is in `watchdog`."""

    def __init__(self, expedited: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = Path(__file__).with_name("watchdog.py")
        try:
            # Isolated: it needs nothing of ours, and starts in a few milliseconds so.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", program, str(theirs.fileno()), expedited],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A Ctrl-C is not for it: its end would be the freeze's guard gone.
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        # A process that starts on a busy node is late, not lost.
        ours.settimeout(_START_S)

    def is_alive(self) -> bool:
        if self._process.poll() is None:
            return True
        self._socket.close()
        return False

    def guard(self, fds: Sequence[int], limit_s: float) -> None:
        """It holds the filesystems from here on: they are thawed at the limit, or when this process dies."""
        try:
            socket.send_fds(self._socket, [f"{limit_s}".encode()], list(fds))
            answer = self._socket.recv(16)
        except OSError as error:
            self.close()
            raise FreezeFailed(f"the watchdog of freezes does not answer: {error}") from error
        if answer != b"armed":
            self.close()
            raise FreezeFailed("the watchdog of freezes has died")
        self._socket.settimeout(_ANSWER_S)

    def release(self) -> bool:
        """It need not any more. False: it has thawed, as time was up."""
        try:
            self._socket.send(b"done")
            return self._socket.recv(16) == b"ended"
        except OSError:
            self.close()
            return False

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _write_out(fds: Sequence[int], limit_s: float) -> None:
    """Leave as little to be written under the freeze as can be: what came in a long writing makes for a shorter one.

    Raises FreezeFailed: it never got short. The kernel writes what is left with its writers held, and lets nobody thaw before.
    """
    took = 0.0
    for _ in range(_SYNCS):
        began = time.monotonic()
        _raise_first(_together(syscall.syncfs, fds))
        took = time.monotonic() - began
        if took < _QUICK_S:
            return
    if took > limit_s:
        raise FreezeFailed(
            f"what is written to it meanwhile took {took:.0f} s to reach the disk, and so would the freeze"
        )


def _together(action: Callable[[int], None], fds: Sequence[int]) -> list[BaseException | None]:
    """Do it to all at the same time; what each failed with. All have ended when this returns.

    A freeze waits three times until every processor has passed through the kernel's scheduler, which is nearly all of
    its time: several may wait for that together.
    """
    if len(fds) == 1:
        action(fds[0])
        return [None]
    with ThreadPoolExecutor(min(len(fds), _MOST_TOGETHER), thread_name_prefix="freeze") as threads:
        runs = [threads.submit(action, fd) for fd in fds]
    return [run.exception() for run in runs]


def _raise_first(failures: Sequence[BaseException | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure


def _freeze(fd: int) -> None:
    try:
        online.freeze(fd)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise FrozenAlready(
                f"{syscall.describe(fd)} is frozen by somebody else: thaw it (fsfreeze -u)"
            ) from error
        raise


def _thaw(fds: Sequence[int]) -> bool:
    """Thaw all; False if one was thawed already."""
    good = True
    for fd in reversed(fds):
        try:
            online.thaw(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            good = False
    return good


def thaw_left(fd: int) -> bool:
    """Thaw what a process that died has left frozen, and its watchdog with it; whether it was."""
    return _thaw([fd])


def is_frozen(fd: int) -> bool:
    """Whether the filesystem is frozen now (found out by freezing it for an instant). For tests and tools."""
    try:
        online.freeze(fd)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    online.thaw(fd)
    return False


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that were gathered for a freeze."""
    for fd in fds:
        os.close(fd)
