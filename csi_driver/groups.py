# SPDX-License-Identifier: Apache-2.0
"""Groups of snapshots that show one moment of several volumes: all of them, or none.

Members are snapshots like any other, made before the group's own record. One rename of that makes the group, and with
it its members, exist; members without it are nobody's, and are removed by the next start, try or `sweep`.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress

from csi_driver.catalog import Home
from csi_driver.copies import Copier
from csi_driver.errors import Aborted, AlreadyExists, Error, InvalidArgument, NotFound, Unavailable
from csi_driver.identity import SCHEMA
from csi_driver.locks import Locks
from csi_driver.model import Group, GroupRecord, Segments, Snapshot, lock_key
from csi_driver.ordering import check_parameters, order_for
from csi_driver.pool import CopyOrder, Pool
from csi_driver.pools import Pools

log = logging.getLogger(__name__)


class Groups:
    """CSI GroupController service. `segments` is where all snapshots are."""

    def __init__(self, pools: Pools, locks: Locks, copier: Copier, segments: Segments) -> None:
        self._pools = pools
        self._locks = locks
        self._copier = copier
        self._segments = dict(segments)

    def adopt(self) -> None:
        """Remove the members of groups that were not finished when the driver died."""
        for pool in self._pools.near([]):
            self.sweep(pool)

    def sweep(self, pool: Pool) -> None:
        """Remove those in this pool, but for what somebody is at, here or elsewhere."""
        for home in pool.catalog.snapshots():
            try:
                group = pool.catalog.read_snapshot(home).group
                if group and self._pools.find_group(group) is None:
                    # It may stand in a pool that is not configured now, and its members with it.
                    self._pools.check_foreign(group)
                    self._delete_left(group, [home.id])
            except (Aborted, NotFound) as error:
                log.debug("left: %s", error)
            except Unavailable:
                raise  # so it is for the others
            except (OSError, Error) as error:
                log.error("pool %s: %s: %s", pool.name, home.path, error)

    def create(self, name: str, source_ids: Sequence[str], parameters: Mapping[str, str]) -> Group:
        """Take snapshots of all these volumes at one moment, or find those that an earlier call took.

        Raises:
            NotFound: one of the volumes is not here.
            AlreadyExists: the name is taken by a group of other volumes.
            FailedPrecondition: one of them cannot be copied in a moment.
            ResourceExhausted: no room; nothing is left behind.

        CSI: CreateVolumeGroupSnapshot.
        """
        check_parameters(parameters)
        ids = sorted(set(source_ids))
        meant = self._pools.holding(*ids)
        keys = [lock_key(pool.group_id_of(name)) for pool in self._pools.near(meant)]
        with self._locks.hold(*keys, shared=[lock_key(volume_id) for volume_id in ids]):
            standing = self._standing(name, meant)
            if standing is not None:
                if sorted(standing.record.snapshots) != ids:
                    raise AlreadyExists(
                        f"name {name!r}: a group of this name exists as {standing.record.id}, of the volumes "
                        f"{', '.join(sorted(standing.record.snapshots))}"
                    )
                return standing
            found = [self._pools.get(volume_id) for volume_id in ids]
            return self._create(name, found)

    def delete(self, group_id: str, snapshot_ids: Sequence[str]) -> None:
        """Delete a group and all its snapshots; one that is nowhere is fine.

        Raises:
            InvalidArgument: the snapshots given are not the group's.

        CSI: DeleteVolumeGroupSnapshot.
        """
        found = self._pools.find_group(group_id)
        if found is None:
            self._pools.check_foreign(group_id)
            with self._locks.hold(lock_key(group_id)):
                self._pools.discard_leftover(group_id)
            if snapshot_ids:
                self._delete_left(group_id, snapshot_ids)
            return
        pool, home = found
        record = pool.catalog.read_group(home)
        _check_members(record, snapshot_ids)
        with self._locks.hold(lock_key(group_id), *map(lock_key, record.snapshots.values())):
            # Another call may have done it meanwhile.
            if self._pools.find_group(group_id) is None:
                return
            # Its members follow it: one that is left behind by a crash is removed by a repeat, a start or a sweep.
            pool.delete_group(home)
            self._delete_members(record.snapshots.values())

    def get(self, group_id: str, snapshot_ids: Sequence[str]) -> Group:
        """One group.

        Raises:
            NotFound: there is none.
            InvalidArgument: the snapshots given are not the group's.

        CSI: GetVolumeGroupSnapshot.
        """
        found = self._pools.find_group(group_id)
        if found is None:
            raise NotFound(f"group {group_id!r}: does not exist on this node")
        group = self._read(*found)
        _check_members(group.record, snapshot_ids)
        return group

    def _create(self, name: str, found: Sequence[tuple[Pool, Home]]) -> Group:
        leader = found[0][0]
        group_id = leader.group_id_of(name)
        wanted: list[tuple[Pool, CopyOrder]] = [
            (pool, order_for(self._copier, pool, home, f"{group_id}\n{home.id}", group_id))
            for pool, home in found
        ]
        self._copier.check_together([order for _, order in wanted])
        members = [order.record.id for _, order in wanted]
        # Who sweeps takes members without a group for ones that are left.
        with leader.claim(group_id):
            self._delete_members(members)
            try:
                self._copier.copy_together(wanted)
                record = GroupRecord(
                    schema=SCHEMA,
                    id=group_id,
                    name=name,
                    created_at=time.time(),
                    snapshots={order.source.id: order.record.id for _, order in wanted},
                )
                home = leader.create_group(record, lambda: self._check_complete(record))
            except BaseException:
                # Another driver may be at it by now: who fails to make a home gives its claim back.
                with suppress(Aborted), leader.claim(group_id):
                    if not leader.catalog.has_group(group_id):
                        self._delete_members(members)
                raise
        return self._read(leader, home)

    def _check_complete(self, record: GroupRecord) -> None:
        """A claim ends when its server has not heard of us for long: somebody may have swept meanwhile."""
        members = record.snapshots.values()
        # Listed, not looked for: a client remembers names for a while that are gone.
        standing = {home.id for pool in self._pools.holding(*members) for home in pool.catalog.snapshots()}
        missing = [one for one in members if one not in standing]
        if missing:
            raise Aborted(f"group {record.id!r}: its snapshots {', '.join(missing)} are gone: repeat")

    def _delete_left(self, group_id: str, snapshot_ids: Sequence[str]) -> None:
        """Delete those of the snapshots that a group which does not exist has left behind.

        Raises:
            Aborted: it is being made or deleted.
        """
        leader = self._pools.named_of(group_id)
        claim = leader.claim(group_id) if leader is not None else nullcontext()
        with self._locks.hold(lock_key(group_id), *map(lock_key, snapshot_ids)), claim:
            if self._pools.has_group(group_id):
                raise Aborted(f"group {group_id!r}: was made just now: repeat")
            for snapshot_id in snapshot_ids:
                found = self._pools.find_snapshot(snapshot_id)
                if found is not None and found[0].catalog.read_snapshot(found[1]).group == group_id:
                    found[0].delete_snapshot(found[1])

    def _delete_members(self, snapshot_ids: Iterable[str]) -> None:
        for snapshot_id in snapshot_ids:
            found = self._pools.find_snapshot(snapshot_id)
            if found is not None:
                # Another driver that has the pool may sweep up at this moment.
                with suppress(FileNotFoundError):
                    found[0].delete_snapshot(found[1])

    def _standing(self, name: str, meant: Sequence[Pool]) -> Group | None:
        for pool in self._pools.near(meant):
            found = self._pools.find_group(pool.group_id_of(name))
            if found is not None:
                return self._read(*found)
        return None

    def _read(self, pool: Pool, home: Home) -> Group:
        record = pool.catalog.read_group(home)
        members = []
        for snapshot_id in record.snapshots.values():
            found = self._pools.find_snapshot(snapshot_id)
            if found is None:
                raise Error(f"group {record.id!r}: its snapshot {snapshot_id!r} is missing: delete the group")
            members.append(Snapshot(found[0].catalog.read_snapshot(found[1]), segments=self._segments))
        return Group(record, tuple(members))


def _check_members(record: GroupRecord, snapshot_ids: Sequence[str]) -> None:
    if snapshot_ids and set(snapshot_ids) != set(record.snapshots.values()):
        raise InvalidArgument(
            f"snapshot_ids: not those of group {record.id!r}, which are {', '.join(record.snapshots.values())}"
        )
