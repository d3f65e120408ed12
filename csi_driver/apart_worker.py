# SPDX-License-Identifier: Apache-2.0
"""The child that `apart` talks to: has one pool open, and does one thing after the other in it. May hang in each of them.

A program of its own, so that it can be killed at any moment; whoever started it says when to begin anew.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from csi_driver import apart, backends, backing
from csi_driver.apart import DONE, FAILED, LATER, STEP, Opened, Opening, Order
from csi_driver.backends.base import Backend
from csi_driver.catalog import Catalog, Home
from csi_driver.config import PoolConfig
from csi_driver.errors import Error
from csi_driver.linux import export, files, mount, remote, worker
from csi_driver.linux.copy import Transfer

SLICE_S = 0.25
"""How long removing may keep others waiting at a time."""
_BEAT_S = 5.0


class _NotYet(Exception):
    """The time that removing may take at once is over."""


class _Told(Transfer):
    """A copy's transfer, whose other end is the caller's: each step is asked for there."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._told_at = time.monotonic()

    def check(self) -> None:
        # Many small things are no steps, and take their time all the same.
        if time.monotonic() - self._told_at > _BEAT_S:
            self.advance(0)

    def advance(self, size: int) -> None:
        remote.send(self._connection, remote.Message(STEP + str(size).encode()))
        remote.receive(self._connection)
        self._told_at = time.monotonic()
        self.done_bytes += size


class _Place:
    """The pool, open."""

    def __init__(self, opening: Opening) -> None:
        self.root = opening.config.root
        self.backend = backends.create(opening.config)
        self.catalog = _open(opening.config, self.backend, opening.tag)
        for home_id in opening.claims:
            # Another driver may have been faster; who is at it here finds out.
            self.catalog.take(home_id)
        self._others: dict[str, int] = {}

    def home(self, home_id: str, name: str, area: str, area_path: str) -> Home:
        """The home that the caller means, as it is reached from here."""
        path = Path(area_path)
        if path.parent == self.root:
            return self.catalog.placed(home_id, name, area)
        if area_path not in self._others:
            # Of another pool: to copy from.
            self._others[area_path] = files.open_directory(path)
        return Home(home_id, name, area, self._others[area_path], path)

    def do(self, order: Order) -> object:
        """The order's result."""
        named = dict(order.named or {})
        if (order.target, order.method) == ("catalog", "remove"):
            named["check"] = _until(time.monotonic() + SLICE_S)
        target = self.catalog if order.target == "catalog" else self.backend
        result = getattr(target, order.method)(*order.arguments, **named)
        return list(result) if isinstance(result, Iterator) else result


def _open(config: PoolConfig, backend: Backend, tag: str) -> Catalog:
    backing.check_mounted(config)
    backend.check()
    try:
        os.stat(config.root)
    except FileNotFoundError:
        pass  # made when it is opened
    except OSError as error:
        if error.errno not in export.GONE:
            raise
        if backend.features.export is None or export.find_source(config.root) is None:
            raise  # others have mounted it, or it is this machine's own
        # Mounted, and of no use any more.
        mount.unmount(config.root, lazy=True)
        backend.check()
    return Catalog.open(config.root, backends.layout(config), exclusive=False, tag=tag)


def _until(end: float) -> Callable[[], None]:
    def check() -> None:
        if time.monotonic() > end:
            raise _NotYet

    return check


def _answer(place: _Place, content: bytes, transfer: Transfer) -> bytes:
    try:
        order: Order = apart.decode(content, place.home, transfer)
        return DONE + apart.encode(place.do(order))
    except _NotYet:
        return LATER
    except (OSError, Error) as error:
        return FAILED + apart.encode(error)


def main() -> None:
    connection = worker.connect()
    requests = worker.requests(connection)
    opening: Opening = apart.decode(next(requests), no_home)
    try:
        place = _Place(opening)
    except (OSError, Error) as error:
        remote.send(connection, remote.Message(FAILED + apart.encode(error)))
        return
    found = Opened(place.catalog.tag, place.backend.features)
    remote.send(connection, remote.Message(DONE + apart.encode(found)))
    for content in requests:
        remote.send(connection, remote.Message(_answer(place, content, _Told(connection))))


def no_home(*words: str) -> Home:
    raise Error(f"a home, {words}, where none can be yet")


if __name__ == "__main__":
    main()
