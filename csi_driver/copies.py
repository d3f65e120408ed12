# SPDX-License-Identifier: Apache-2.0
"""Copying a volume or snapshot: at once and of one moment where the pool can, else behind the call, or not at all.

What may be copied into what is decided here and in `provision`; the room it takes and the steps of it are `pool`'s.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

from csi_driver.backends.base import Directory
from csi_driver.catalog import SNAPSHOTS, Home
from csi_driver.errors import Aborted, Error, FailedPrecondition, NotFound, ResourceExhausted
from csi_driver.jobs import Job, Jobs
from csi_driver.linux.copy import Rate, Stopped, Transfer
from csi_driver.linux.freeze import FreezeFailed, Freezer, FrozenAlready, close_all, thaw_left
from csi_driver.model import Source, SourceKind, VolumeId
from csi_driver.pool import CopyOrder, Pool
from csi_driver.pools import Pools

log = logging.getLogger(__name__)

PRESUMED_BYTES_PER_S = 100 << 20
"""What a disk surely copies: a volume in use with more data than fits into a freeze is not even tried."""

CLOSE_S = 30.0

PATIENCE_S = 2.0
"""How long a call waits for a background copy, for most are small."""


class Copier:
    """Makes copies for all who need them."""

    def __init__(self, jobs: Jobs, freezer: Freezer, patience_s: float = PATIENCE_S) -> None:
        self.jobs = jobs
        self.freezer = freezer
        self._patience_s = patience_s
        self._rates: dict[str, Rate] = {}

    def adopt(self, pools: Pools) -> None:
        """Thaw what is frozen yet, where a copy was under way when the driver died; before pools take over what is there.

        Its watchdog has done that, unless it was killed at the same moment, as all processes of a container are when
        the first of them dies.
        """
        near = list(pools.near([]))
        if any(pool.was_interrupted() for pool in near):
            for pool in near:
                _thaw_all(pool)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """End all that goes on; False: a copy in the background has not ended in time."""
        ended = self.jobs.stop(timeout_s)
        if ended:
            self.freezer.close()
        return ended

    def transfer(self, pool: Pool, deadline: float | None = None) -> Transfer:
        """For a copy into this pool, at the speed that its configuration allows."""
        rate = self._rates.setdefault(pool.name, Rate(pool.config.copy_bandwidth))
        return Transfer(rate, deadline)

    def copy(self, pool: Pool, order: CopyOrder, held: ExitStack) -> Job | None:
        """Make the copy, or begin it: then `held` (the locks of source and target) belongs to the job that comes back.

        It stays the caller's if this raises: without room here, another pool is tried.

        Raises:
            FailedPrecondition: the source is in use, and cannot be copied while it is.
            ResourceExhausted: no room.
        """
        if pool.copies_at_once(order.origin) or self._must_freeze(order):
            self.copy_together([(pool, order)])
            return None
        job = self.jobs.start(order.record, order.transfer, lambda: _copy(pool, order))
        if job.wait(self._patience_s):
            self.jobs.take_failure(order.record.id)
            return None
        job.keep(held.pop_all())
        return job

    def copy_together(self, wanted: Sequence[tuple[Pool, CopyOrder]]) -> None:
        """Make copies that all show one moment: every source is still while each is copied."""
        with ExitStack() as making:
            takes = [making.enter_context(pool.copying(order)) for pool, order in wanted]
            fds: list[int] = []
            making_still = ExitStack()
            making_still.callback(lambda: close_all(fds))
            with making_still:
                for _, order in wanted:
                    fd = _open_mounted(order)
                    if fd is not None:
                        fds.append(fd)
                try:
                    if fds:
                        with self.freezer.frozen(fds) as deadline:
                            for take, (_, order) in zip(takes, wanted, strict=True):
                                order.transfer.deadline = deadline
                                take()
                    else:
                        for take in takes:
                            take()
                except FrozenAlready as error:
                    raise FailedPrecondition(f"{wanted[0][1].source.id!r}: not copied: {error}") from error
                except (FreezeFailed, Stopped) as error:
                    raise FailedPrecondition(
                        f"{wanted[0][1].source.id!r}: not copied: {error}: end the pods that use it, or raise freeze_timeout"
                    ) from error
                finally:
                    for _, order in wanted:
                        order.transfer.deadline = None
                        self.jobs.add_copied(order.transfer)

    def check_together(self, orders: Sequence[CopyOrder]) -> None:
        """Whether all of these can be copied as of one moment, and within a call.

        Raises:
            FailedPrecondition: says which one cannot, and the remedy.
        """
        for order in orders:
            origin, home = order.origin, order.source
            holder = origin.backend.holders([home]).get(home.id)
            if holder is not None and len(orders) > 1 and not _can_be_still(order):
                raise FailedPrecondition(
                    f"volume {home.id!r}: in use ({holder}), and nothing can hold it still together with others: end the "
                    "pods that use it, or keep it as a filesystem in a pool of images"
                )
            if origin.copies_at_once(origin) or self._must_freeze(order):
                continue
            if holder is not None or origin.backend.content_bytes(home) > self._most_bytes:
                raise FailedPrecondition(
                    f"volume {home.id!r}: cannot be one of a group: a copy in pool {origin.name!r} is not made in a "
                    "moment: keep it in a pool on xfs or btrfs"
                )

    @property
    def _most_bytes(self) -> float:
        return PRESUMED_BYTES_PER_S * self.freezer.limit_s

    def _must_freeze(self, order: CopyOrder) -> bool:
        """Whether a copy that takes its time must be made under a freeze, as its source is in use.

        Raises:
            FailedPrecondition: and it would not fit into one.
        """
        origin, home = order.origin, order.source
        # What is in a directory is copied file by file; there is no one moment to it, in use or not.
        if home.area == SNAPSHOTS or not origin.backend.features.stages:
            return False
        holder = origin.backend.holders([home]).get(home.id)
        if holder is None:
            return False
        remedy = "end the pods that use it, or keep volumes in a pool on xfs or btrfs, where copies are made in a moment"
        if origin.copies_at_once(origin):
            remedy = (
                "take a snapshot of it, and restore that into the other pool; or end the pods that use it"
            )
        fd = _open_mounted(order)
        if fd is None:
            raise FailedPrecondition(
                f"volume {home.id!r}: in use ({holder}), and nothing can hold it still while it is copied: {remedy}"
            )
        close_all([fd])
        size = origin.backend.content_bytes(home)
        if size > self._most_bytes:
            raise FailedPrecondition(
                f"volume {home.id!r}: in use ({holder}), and its {size} bytes of data are too much to copy within "
                f"freeze_timeout ({self.freezer.limit_s:g} s): {remedy}"
            )
        return True


def find_source(pools: Pools, source: Source) -> tuple[Pool, Home]:
    """Where the source of a new volume is.

    Raises:
        NotFound: it is nowhere.
        ResourceExhausted: it is of a pool that this node does not have: another node may.
    """
    found = pools.find_snapshot(source.id) if source.kind is SourceKind.SNAPSHOT else pools.find(source.id)
    if found is not None:
        return found
    if VolumeId.find(source.id) is not None and pools.named_of(source.id) is None:
        raise ResourceExhausted(
            f"volume_content_source: {source.kind} {source.id!r} is in a pool that this node does not have: "
            "a copy is made where its source is; let the pod say so (nodeSelector), or take a class that binds Immediate"
        )
    raise NotFound(f"volume_content_source: {source.kind} {source.id!r}: does not exist")


def being_copied(job: Job) -> Aborted:
    """What a call is told whose answer must wait for the copy."""
    return Aborted(f"{job.record.id!r}: being copied ({job.progress()}): repeat")


def _copy(pool: Pool, order: CopyOrder) -> None:
    with pool.copying(order) as take:
        take()


def _thaw_all(pool: Pool) -> None:
    for volume_id in pool.catalog.ids():
        home = pool.catalog.home(volume_id)
        try:
            fd = pool.backend.open_mounted(home, pool.catalog.read(home))
            if fd is None:
                continue
            with Directory(fd):
                if thaw_left(fd):
                    log.warning("volume %s: thawed: the driver died while it held it still", volume_id)
        except (OSError, Error) as error:
            log.error("volume %s: cannot be looked at: %s", volume_id, error)


def _can_be_still(order: CopyOrder) -> bool:
    fd = _open_mounted(order)
    if fd is None:
        return False
    close_all([fd])
    return True


def _open_mounted(order: CopyOrder) -> int | None:
    if order.source.area == SNAPSHOTS:
        return None
    record = order.origin.catalog.read(order.source)
    return order.origin.backend.open_mounted(order.source, record)
