# SPDX-License-Identifier: Apache-2.0
"""The CSI semantics of changed blocks: which bytes of a snapshot hold data, which differ from an earlier one.

Of snapshots whose payload is an image; a directory has no blocks. How extents are compared is `linux.changes`'.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

from csi_driver.backends.base import PAYLOAD_IMAGE
from csi_driver.catalog import Home
from csi_driver.errors import InvalidArgument, NotFound, OutOfRange, Unavailable
from csi_driver.linux import changes
from csi_driver.locks import Locks
from csi_driver.model import SnapshotRecord, lock_key
from csi_driver.pool import Pool
from csi_driver.pools import Pools

USUAL_RESULTS = 1024
"""Ranges in a message where the caller does not say."""

Message = tuple[int, list[changes.Range]]
"""The volume's size, and some ranges of it."""


class ChangedBlocks:
    """CSI SnapshotMetadata service; `most` answers are given at one time, as each keeps a worker while it is read."""

    def __init__(self, pools: Pools, locks: Locks, most: int) -> None:
        self._pools = pools
        self._locks = locks
        self._most = most
        self._free = threading.Semaphore(most)

    def allocated(self, snapshot_id: str, starting_offset: int, max_results: int) -> Iterator[Message]:
        """The ranges of a snapshot that hold data, some at a time.

        Raises:
            NotFound: there is no such snapshot.
            OutOfRange: the offset is beyond its end.
            Unavailable: too many others are being answered.

        CSI: GetMetadataAllocated.
        """
        with ExitStack() as held:
            self._take_turn(held)
            held.enter_context(self._locks.hold(shared=[lock_key(snapshot_id)]))
            pool, home, record = self._get(snapshot_id)
            _check_offset(starting_offset, record)
            fd = _open(pool, home, held)
            yield from _messages(changes.allocated(fd, starting_offset), record, max_results)

    def delta(
        self, base_id: str, target_id: str, starting_offset: int, max_results: int
    ) -> Iterator[Message]:
        """The ranges of the target that differ from the base, some at a time.

        Raises:
            NotFound: there is no such snapshot.
            InvalidArgument: they are of two volumes.
            OutOfRange: the offset is beyond the target's end.
            Unavailable: too many others are being answered.

        CSI: GetMetadataDelta.
        """
        with ExitStack() as held:
            self._take_turn(held)
            held.enter_context(self._locks.hold(shared=[lock_key(base_id), lock_key(target_id)]))
            base_pool, base_home, base = self._get(base_id)
            pool, home, record = self._get(target_id)
            if base.source != record.source:
                raise InvalidArgument(
                    f"base_snapshot_id {base_id!r}: of volume {base.source!r}, and the target of {record.source!r}: "
                    "compare two snapshots of one volume"
                )
            if base.size_bytes > record.size_bytes:
                raise InvalidArgument(
                    f"base_snapshot_id {base_id!r}: larger than the target, so it is the later one: exchange them"
                )
            _check_offset(starting_offset, record)
            base_fd, fd = _open(base_pool, base_home, held), _open(pool, home, held)
            share = bool(base.shares and record.shares)
            # Known by no name here: it ends with the messages, before the files are closed that it may be reading.
            yield from _messages(
                changes.changed(base_fd, fd, starting_offset, share=share), record, max_results
            )

    def _take_turn(self, held: ExitStack) -> None:
        # Who reads an answer may be a program of a user's that is slow, or has stopped: pods must not wait for it.
        if not self._free.acquire(blocking=False):
            raise Unavailable(
                f"changed blocks: {self._most} answers are being read already, and each keeps one of the driver's workers: "
                "repeat when one has been read, or raise `workers`"
            )
        held.callback(self._free.release)

    def _get(self, snapshot_id: str) -> tuple[Pool, Home, SnapshotRecord]:
        found = self._pools.find_snapshot(snapshot_id)
        if found is None:
            raise NotFound(f"snapshot {snapshot_id!r}: does not exist on this node")
        pool, home = found
        if pool.backend.features.payload != PAYLOAD_IMAGE:
            raise InvalidArgument(
                f"snapshot {snapshot_id!r}: is a directory in pool {pool.name!r} ({pool.config.backend}), which has no "
                "blocks: compare its files"
            )
        return pool, home, pool.catalog.read_snapshot(home)


def _open(pool: Pool, home: Home, held: ExitStack) -> int:
    fd = home.open(PAYLOAD_IMAGE)
    held.callback(os.close, fd)
    return fd


def _check_offset(starting_offset: int, record: SnapshotRecord) -> None:
    if starting_offset > record.size_bytes:
        raise OutOfRange(
            f"starting_offset {starting_offset}: snapshot {record.id!r} has {record.size_bytes} bytes"
        )


def _messages(found: Iterator[changes.Range], record: SnapshotRecord, max_results: int) -> Iterator[Message]:
    size = min(max_results or USUAL_RESULTS, USUAL_RESULTS)
    while some := list(islice(found, size)):
        yield record.size_bytes, some
