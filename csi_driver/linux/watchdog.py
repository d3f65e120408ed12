# SPDX-License-Identifier: Apache-2.0
"""The process that thaws filesystems when the driver cannot: it died, or it took too long.

Run by `freeze` as a program of its own, on an inherited socket (SOCK_SEQPACKET); imports nothing of the driver.
A freeze is: a packet with the seconds of its limit and the descriptors -> "armed"; later "done" -> "ended", or "late"
if time was up and the filesystems were thawed here. The end of the socket in between is the driver's death.

Nearly all of a freeze is waiting until every processor has passed through the kernel's scheduler, three times (grace
periods of RCU). While one lasts, this process has the kernel expedite them, by the file that is its second argument:
here, as it is the one that is left to take that back.
"""

import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

FITHAW = 0xC0045878
MOST = 253
"""Descriptors that the kernel passes at once (SCM_MAX_FD)."""


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # It ends with the driver, not with whoever tells a whole group of processes to end.
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    switch = open_switch(sys.argv[2])
    while True:
        limit, fds, _, _ = socket.recv_fds(channel, 64, MOST)
        if not limit:
            return
        with expedited(switch):
            answer = watch(channel, float(limit), fds)
        if not answer:
            return
        channel.send(answer)


def watch(channel: socket.socket, limit_s: float, fds: list[int]) -> bytes:
    """Guard one freeze; what to tell the driver, nothing if it is gone."""
    deadline = time.monotonic() + limit_s
    channel.send(b"armed")
    late = False
    while True:
        wait = None if late else max(0.0, deadline - time.monotonic())
        if select.select([channel], [], [], wait)[0]:
            break
        # The driver may be freezing yet: what is not frozen now is thawed once more at its end.
        thaw(fds)
        late = True
    message = channel.recv(64)
    if late or not message:
        thaw(fds)
    # Unused descriptors from here on would keep the filesystems busy.
    close(fds)
    if not message:
        return b""
    return b"late" if late else b"ended"


def thaw(fds: list[int]) -> None:
    for fd in reversed(fds):
        try:
            fcntl.ioctl(fd, FITHAW, 0)
        except OSError:
            continue  # not frozen


def close(fds: list[int]) -> None:
    for fd in fds:
        socket.close(fd)


def open_switch(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # a container whose /sys is read-only, or a kernel without: it takes longer


@contextmanager
def expedited(switch: int | None) -> Iterator[None]:
    """Grace periods are hurried while the body runs, unless somebody has them so already."""
    mine = switch is not None and take(switch)
    try:
        yield
    finally:
        if switch is not None and mine:
            os.pwrite(switch, b"0\n", 0)
            fcntl.flock(switch, fcntl.LOCK_UN)


def take(switch: int) -> bool:
    # The lock tells other drivers of the node: two that each put back what they found could leave it on for ever.
    try:
        fcntl.flock(switch, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    try:
        if os.pread(switch, 16, 0).strip() == b"0":
            os.pwrite(switch, b"1\n", 0)
            return True
    except OSError:
        pass  # refused: a freeze does without
    fcntl.flock(switch, fcntl.LOCK_UN)
    return False


if __name__ == "__main__":
    main()
