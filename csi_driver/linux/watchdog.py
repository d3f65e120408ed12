# SPDX-License-Identifier: Apache-2.0
"""The process that thaws filesystems when the driver cannot: it died, or it took too long.

Run by `freeze` as a program of its own, on an inherited socket (SOCK_SEQPACKET); imports nothing of the driver.
A freeze is: a packet with the seconds of its limit and the descriptors -> "armed"; later "done" -> "ended", or "late"
if time was up and the filesystems were thawed here. The end of the socket in between is the driver's death.
"""

import fcntl
import select
import signal
import socket
import sys
import time

FITHAW = 0xC0045878
MOST = 253
"""Descriptors that the kernel passes at once (SCM_MAX_FD)."""


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # It ends with the driver, not with whoever tells a whole group of processes to end.
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    while True:
        limit, fds, _, _ = socket.recv_fds(channel, 64, MOST)
        if not limit:
            return
        # Unused descriptors from here on would keep the filesystems busy: closed at the end of each freeze.
        if not watch(channel, float(limit), fds):
            return


def watch(channel: socket.socket, limit_s: float, fds: list[int]) -> bool:
    """Guard one freeze; False when the driver is gone."""
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
    close(fds)
    if message:
        channel.send(b"late" if late else b"ended")
    return bool(message)


def thaw(fds: list[int]) -> None:
    for fd in reversed(fds):
        try:
            fcntl.ioctl(fd, FITHAW, 0)
        except OSError:
            continue  # not frozen


def close(fds: list[int]) -> None:
    for fd in fds:
        socket.close(fd)


if __name__ == "__main__":
    main()
