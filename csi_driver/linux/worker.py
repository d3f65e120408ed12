# SPDX-License-Identifier: Apache-2.0
"""The child's side of `remote`: its end of the stream, and its end when there is nobody to work for any more."""

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator

from csi_driver.linux import remote


def connect() -> socket.socket:
    """The stream to the parent, who is told that this process is there. From here on it ends with it, at once."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(connection.fileno(),), name="parent", daemon=True).start()
    remote.send(connection, remote.Message(b""))
    return connection


def requests(connection: socket.socket) -> Iterator[bytes]:
    """What the parent asks for, until it has no more."""
    while True:
        try:
            content = remote.receive(connection).content
        except (EOFError, ConnectionResetError):
            return
        yield content


def _end_with(fd: int) -> None:
    # Also in the middle of something: a server that comes back must not find somebody who goes on with what another
    # process, the parent's successor, has begun anew.
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    os._exit(1)
