# SPDX-License-Identifier: Apache-2.0
"""The CSI semantics of snapshots over the pools: idempotency, listing, what is still being copied.

A snapshot lies in its volume's pool and stands by itself: neither's deletion minds the other. How the copy is made is
`copies`' business.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack

from csi_driver.catalog import Home
from csi_driver.copies import Copier
from csi_driver.errors import (
    Aborted,
    AlreadyExists,
    ConfigurationError,
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from csi_driver.locks import Locks
from csi_driver.model import (
    Record,
    Segments,
    Snapshot,
    SnapshotRecord,
    TopologyRequirement,
    lock_key,
    snapshot_hash,
)
from csi_driver.ordering import check_parameters, order_for
from csi_driver.pool import Pool
from csi_driver.pools import Pools

log = logging.getLogger(__name__)


class Snapshots:
    """The part of the CSI Controller service that is about snapshots. `segments` is where all of them are."""

    def __init__(self, pools: Pools, locks: Locks, copier: Copier, segments: Segments) -> None:
        self._pools = pools
        self._locks = locks
        self._copier = copier
        self._segments = dict(segments)

    def create(
        self, name: str, source_id: str, parameters: Mapping[str, str], topology: TopologyRequirement
    ) -> Snapshot:
        """Take a snapshot of a volume, or find the one that an earlier call took or is taking.

        Raises:
            NotFound: there is no such volume here.
            AlreadyExists: the name is taken by a snapshot of another volume.
            FailedPrecondition: the volume is in use, and its pool cannot copy it so.
            ResourceExhausted: no room.

        CSI: CreateSnapshot.
        """
        check_parameters(parameters)
        running = self._running(name, source_id)
        if running is not None:
            return running
        with ExitStack() as held:
            held.enter_context(self._locks.hold(snapshot_hash(name), shared=[lock_key(source_id)]))
            standing = self._standing(name, source_id)
            if standing is not None:
                return standing
            pool, home = self._pools.get(source_id)
            self._check_place(topology)
            order = order_for(self._copier, pool, home, name)
            job = self._copier.copy(pool, order, held)
            if job is not None:
                return self._shown(order.record, ready=False)
            return self._read(pool, pool.catalog.find_snapshot(order.record.id))

    def delete(self, snapshot_id: str) -> None:
        """Delete a snapshot; one that is nowhere is fine, one that is being taken is called off.

        CSI: DeleteSnapshot.
        """
        if self._copier.jobs.call_off(snapshot_id):
            raise Aborted(f"snapshot {snapshot_id!r}: its copy is being called off: repeat")
        with self._locks.hold(lock_key(snapshot_id)):
            found = self._pools.find_snapshot(snapshot_id)
            if found is None:
                self._pools.check_foreign(snapshot_id)
                # Where others have the pool too, no start removes what was half made.
                self._pools.discard_leftover(snapshot_id)
                return
            pool, home = found
            self._check_single(snapshot_id, _group_of(pool, home))
            pool.delete_snapshot(home)

    def get(self, snapshot_id: str) -> Snapshot:
        """One snapshot.

        Raises:
            NotFound: there is none.

        CSI: GetSnapshot.
        """
        found = self._find(snapshot_id)
        if found is None:
            raise NotFound(f"snapshot {snapshot_id!r}: does not exist on this node")
        return found

    def listed(
        self, max_entries: int, starting_token: str, source_id: str, snapshot_id: str
    ) -> tuple[list[Snapshot], str]:
        """A page of the snapshots in id order, and the token of the next ("" at the end): the page's last id.

        CSI: ListSnapshots.
        """
        if starting_token and self._pools.named_of(starting_token) is None:
            raise Aborted(
                f"starting_token {starting_token!r}: not one that this driver gave: list from the beginning"
            )
        if snapshot_id:
            one = self._find(snapshot_id)
            kept = one is not None and source_id in ("", one.record.source)
            return ([one] if one is not None and kept else []), ""
        return self._page(max_entries, starting_token, source_id)

    def copying(self) -> list[tuple[str, int, int]]:
        """The copies under way: what each makes (a snapshot or a volume), bytes copied, and to copy as far as known."""
        running = [job for job in self._copier.jobs.all() if not job.is_waiting]
        return [(job.record.id, job.transfer.done_bytes, job.transfer.total_bytes) for job in running]

    def _page(self, max_entries: int, after: str, source_id: str) -> tuple[list[Snapshot], str]:
        page: list[Snapshot] = []
        for snapshot_id in self._ids():
            if snapshot_id <= after:
                continue
            found = self._find_readable(snapshot_id)
            if found is None or source_id not in ("", found.record.source):
                continue
            if max_entries and len(page) == max_entries:
                return page, page[-1].record.id
            page.append(found)
        return page, ""

    def _find_readable(self, snapshot_id: str) -> Snapshot | None:
        try:
            return self._find(snapshot_id)
        except (OSError, Error) as error:
            # One snapshot that cannot be read must not hide the others.
            log.error("not listed: %s", error)
            return None

    def _ids(self) -> list[str]:
        standing = {home.id for pool in self._pools for home in pool.catalog.snapshots()}
        making = {job.record.id for job in self._copier.jobs.all() if isinstance(job.record, SnapshotRecord)}
        return sorted(standing | making)

    def _find(self, snapshot_id: str) -> Snapshot | None:
        job = self._copier.jobs.find(snapshot_id)
        if job is not None and job.is_running and isinstance(job.record, SnapshotRecord):
            return self._shown(job.record, ready=False)
        found = self._pools.find_snapshot(snapshot_id)
        try:
            read = self._read(*found) if found else None
            # One of a group that is still being made, or was being made when the driver died.
            made = read and (not read.record.group or self._pools.find_group(read.record.group))
            return read if made else None
        except NotFound:
            return None  # deleted since it was found

    def _running(self, name: str, source_id: str) -> Snapshot | None:
        """What a call before this one has begun; what it has ended in, if that was a failure, is raised."""
        job = self._copier.jobs.find_name(name, SnapshotRecord)
        if job is None or not isinstance(job.record, SnapshotRecord):
            return None
        if job.is_running:
            _check_source(job.record, source_id)
            return self._shown(job.record, ready=False)
        self._copier.jobs.take_failure(job.record.id)
        return None

    def _standing(self, name: str, source_id: str) -> Snapshot | None:
        found = self._pools.find_snapshot_name(name, self._pools.holding(source_id))
        if found is None:
            return None
        snapshot = self._read(*found)
        _check_source(snapshot.record, source_id)
        return snapshot

    def _read(self, pool: Pool, home: Home | None) -> Snapshot:
        if home is None:
            raise Error(f"pool {pool.name!r}: a snapshot has vanished while it was made")
        return self._shown(pool.catalog.read_snapshot(home), ready=True)

    def _shown(self, record: Record | SnapshotRecord, *, ready: bool) -> Snapshot:
        assert isinstance(record, SnapshotRecord), "jobs of snapshots have their records"
        return Snapshot(record, ready, self._segments)

    def _check_single(self, snapshot_id: str, group_id: str) -> None:
        """One that a deleted group has left behind is no group's any more."""
        if not group_id:
            return
        if self._pools.has_group(group_id):
            raise FailedPrecondition(
                f"snapshot {snapshot_id!r}: belongs to group {group_id!r}: delete the group"
            )
        self._pools.check_foreign(group_id)

    def _check_place(self, topology: TopologyRequirement) -> None:
        places = topology.requisite or topology.preferred
        here = [all(self._segments.get(key) == value for key, value in place.items()) for place in places]
        if places and not any(here):
            raise InvalidArgument(
                f"accessibility_requirements: a snapshot is where its volume is, at {self._segments}"
            )


def _group_of(pool: Pool, home: Home) -> str:
    """The group that a snapshot to be deleted belongs to; "" for none, and where its record tells nothing any more."""
    try:
        return pool.catalog.read_snapshot(home).group
    except ConfigurationError:
        raise  # of a newer version: that knows what it says
    except Error as error:
        # As a volume's deletion, that of a snapshot needs no record: it would stay for ever.
        log.error("deleted all the same: %s", error)
        return ""


def _check_source(record: SnapshotRecord, source_id: str) -> None:
    if record.source != source_id:
        raise AlreadyExists(
            f"name {record.name!r}: a snapshot of this name exists as {record.id}, of volume {record.source!r}"
        )
