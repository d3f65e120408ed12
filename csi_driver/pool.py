# SPDX-License-Identifier: Apache-2.0
"""One pool: its homes, its backend and its room, put together into making, growing and deleting a volume.

Each operation leaves the pool as it was when it fails, and may be repeated after a crash at any point. Callers hold
the volume's lock. What CSI makes of it is `controller`'s and `node`'s business.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Self

import msgspec

from csi_driver.backends.base import Backend, Store
from csi_driver.backing import Backing
from csi_driver.building import Builder
from csi_driver.catalog import AREAS, GROUPS, Catalog, Home
from csi_driver.charges import Charges
from csi_driver.config import PoolConfig
from csi_driver.errors import (
    ConfigurationError,
    Error,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    PLACEMENT_KEYS,
    AccessType,
    Capacity,
    GroupRecord,
    OnDelete,
    Parameters,
    Record,
    SizeLimits,
    SnapshotRecord,
    VolumeId,
    VolumeSpec,
    name_hash,
    snapshot_hash,
)
from csi_driver.space import Space
from csi_driver.trash import Trash

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyOrder:
    """What to copy into what: a volume or snapshot (`source`, in `origin`) into a new home with `record`."""

    origin: "Pool"
    source: Home
    spec: VolumeSpec
    record: Record | SnapshotRecord
    transfer: Transfer = field(default_factory=Transfer)


class Pool:
    """One `[pools.NAME]`, open."""

    def __init__(
        self, config: PoolConfig, catalog: Catalog, backend: Backend, backing: Backing | None = None
    ) -> None:
        self.name = config.name
        self.config = config
        self.catalog = catalog
        self.backend = backend
        self._backing = backing
        self.space = Space(self.store, config.reserved)
        # Thousands of volumes come from a few classes.
        self._parsed = lru_cache(maxsize=64)(self._parse)
        self._charges = Charges(self.name, catalog, backend, self.space, self.parameters)
        self._builder = Builder(self.name, catalog, backend)
        self._trash = Trash(catalog, config, self._remove, self._charges.rename)
        self.on_trash: Callable[[], None] = lambda: None
        self.adopted = False
        self.damaged: dict[str, str] = {}
        """Volume id to what is wrong with its record, for those found unreadable at the start."""

    def adopt(self) -> None:
        """Take over what is there: volumes are counted, half-made homes thrown away.

        Raises:
            ConfigurationError: a record was written by a newer version, or the pool has been given another name.
        """
        self._builder.throw_abandoned()
        volumes = [self.catalog.home(volume_id) for volume_id in self.catalog.ids()]
        snapshots = self.catalog.snapshots()
        for home in (*volumes, *snapshots):
            self._check_name(home.id)
        self.damaged = self._charges.adopt(volumes, snapshots)
        self.adopted = True

    def was_interrupted(self) -> bool:
        """Whether something was being made when its driver died; to be asked before `adopt`."""
        return any(True for _ in self.catalog.staged())

    @property
    def is_apart(self) -> bool:
        """Whether its store is on a server: what asks it may have to wait for that."""
        return self.backend.features.server != ""

    def close(self) -> None:
        """Let another process have the pool."""
        self.catalog.close()

    # Looking

    def id_of(self, name: str) -> str:
        """The id that a volume of this name has, or would have, in this pool."""
        return str(VolumeId(self.name, self.catalog.tag, name_hash(name)))

    def snapshot_id_of(self, name: str) -> str:
        """The id that a snapshot of this name has, or would have, in this pool."""
        return str(VolumeId(self.name, self.catalog.tag, snapshot_hash(name)))

    def group_id_of(self, name: str) -> str:
        """The id that a group of this name has, or would have, whose first volume is in this pool."""
        return self.snapshot_id_of(f"group\n{name}")

    def shares_with(self, origin: Self) -> bool:
        """Whether a copy of what is in `origin`, made here, shares its storage."""
        return origin is self and self.backend.features.shares_copies

    def copies_at_once(self, origin: Self) -> bool:
        """Whether such a copy is made in a moment."""
        return origin is self and self.backend.features.instant_copies

    def areas(self) -> list[Path]:
        """The directories that homes are kept in."""
        return [self.config.root / area for area in AREAS]

    def is_present(self) -> bool:
        """Whether the pool's directory is still the one that was opened."""
        return self.catalog.is_present()

    def store(self) -> Store:
        """The pool's filesystem now, with no more room than what is beneath it can give."""
        store = self.backend.store()
        return self._backing.bound(store) if self._backing else store

    def backing_problems(self) -> dict[str, str]:
        """What is known to be wrong with a managed pool's file: reasons, each with a sentence."""
        return self._backing.problems(self.backend.store()) if self._backing else {}

    def room(self) -> int:
        """Bytes that may still be promised; none where the pool's directory is gone."""
        try:
            return self.space.available() if self.is_present() else 0
        except Unavailable:
            return 0

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        """The sizes that can be made here."""
        return self.backend.size_limits(access_type, parameters)

    def capacity(
        self, access_type: AccessType = AccessType.MOUNT, parameters: Parameters | None = None
    ) -> Capacity:
        """Room for volumes with these parameters. O(1), no subprocess."""
        parameters = parameters or Parameters()
        limits = self.backend.size_limits(access_type, parameters)
        available = self.space.available()
        # A thin volume promises less than its size: turn room for promises into room for volumes.
        share = self.backend.promised_bytes(limits.multiple_bytes * 1024, parameters)
        if share:
            available = available * limits.multiple_bytes * 1024 // share
        largest = min(available, limits.maximum_bytes) // limits.multiple_bytes * limits.multiple_bytes
        return Capacity(
            available_bytes=available,
            maximum_volume_bytes=largest if largest >= limits.minimum_bytes else 0,
            minimum_volume_bytes=limits.minimum_bytes,
        )

    def parameters(self, record: Record) -> Parameters:
        """What the parameters that a volume was made with mean."""
        return self._parsed(tuple(record.parameters.items()), record.access_type, record.fs_type)

    def _parse(self, given: tuple[tuple[str, str], ...], access_type: AccessType, fs_type: str) -> Parameters:
        own = {key: value for key, value in given if key not in PLACEMENT_KEYS}
        return self.backend.parse(own, access_type, fs_type)

    def size_bytes(self, home: Home) -> int:
        """The volume's size as the storage has it; 0 where none is enforced."""
        return self.backend.size_bytes(home)

    # Changing

    def create(self, spec: VolumeSpec, record: Record) -> Home:
        """Make a volume; it exists when this returns and not before.

        Raises:
            ResourceExhausted: no room; nothing is left behind.
            Aborted: it failed, and so did undoing it: repeat.
        """
        self.catalog.check_present()
        promised = self.backend.promised_bytes(spec.size_bytes, spec.parameters)
        needed = promised or spec.size_bytes
        with self._no_room(record.id):
            self._builder.discard_leftover(record.id)
            self._count_if_short(needed)
            try:
                with self.space.reserve(record.id, promised, needed):
                    with self._builder.building(record) as build:
                        self.backend.make(build.home, spec)
                    home = self.catalog.home(record.id)
                    self.space.settle(record.id, self.backend.written_bytes(home))
            except BaseException:
                standing = self.catalog.find(record.id)
                if standing is not None:
                    self.space.add(record.id, *self._charges.of(standing))
                raise
        return home

    @contextmanager
    def copying(self, order: CopyOrder) -> Iterator[Callable[[], None]]:
        """Make a volume or snapshot by copying. The body calls what it gets, which brings the content over.

        Where copies share storage that is a moment, and the body sees to it that the source is still. The copy exists
        when the body has ended well and not before; nothing is left of it otherwise.

        Raises:
            ResourceExhausted: no room; nothing is left behind.
            Aborted: it failed, and so did undoing it: repeat.
        """
        self.catalog.check_present()
        source, share = order.source, self.shares_with(order.origin)
        record = (
            self._sharing(order.record, source) if share else msgspec.structs.replace(order.record, shares={})
        )
        with self._no_room(record.id):
            self._builder.discard_leftover(record.id)
            promised, from_source = self._charges.of_copy(source, order.spec, record, share=share)
            needed = promised + from_source
            self._count_if_short(needed)
            lasting = not self.copies_at_once(order.origin)
            try:
                with self.space.reserve(record.id, needed, needed, lasting=lasting):
                    with self._builder.building(record) as build:
                        self._charges.hold(record)
                        yield lambda: self.backend.copy(
                            build.home, source, order.spec, order.transfer, share=share
                        )
                        if share:
                            # Only now is all counted that the source wrote until that moment.
                            build.record = record = self._sharing(order.record, source)
                            self._charges.hold(record)
                        self.backend.finish(build.home, order.spec)
                    self._charges.settle_copy(source, record, promised, share=share)
            except BaseException:
                if self.catalog.has_committed(record):
                    self._charges.settle_copy(source, record, promised, share=share)
                else:
                    self._charges.drop(record.id)
                raise

    def grow(self, home: Home, record: Record, size_bytes: int) -> int:
        """Make the volume's payload at least so large; the actual size comes back. Never shrinks.

        Raises:
            ResourceExhausted: no room for the difference; the volume is as it was.
        """
        parameters = self.parameters(record)
        before = self.backend.size_bytes(home)
        wanted = max(size_bytes, before)
        promised = self.backend.promised_bytes(wanted, parameters)
        needed = promised - self.backend.promised_bytes(before, parameters)
        self._count_if_short(needed)
        promised += self._charges.held(home.id) if promised else 0
        with self._no_room(home.id):
            try:
                with self.space.reserve(home.id, promised, needed):
                    # Also when it is that large already: a crash may have left what lies above the payload behind.
                    actual = self._charges.grow(home, wanted)
                    self.space.settle(home.id, self._charges.written(home))
            except BaseException:
                # It may have grown all the same.
                with suppress(OSError, Error):
                    self.space.add(home.id, *self._charges.of(home))
                raise
        if record.size_bytes < max(actual, size_bytes):
            self.catalog.update(home, size_bytes=max(actual, size_bytes))
        return actual

    def discard_leftover(self, made_id: str) -> None:
        """Remove what a try of making this volume or snapshot has left, if anything.

        Raises:
            Aborted: it cannot be removed yet, or another driver that has the pool is making it.
        """
        self._builder.discard_leftover(made_id)

    def delete(self, home: Home, *, keep: bool = True) -> None:
        """Take a volume out of existence; its files go in the background, after the pool's retention if `keep`.

        Raises:
            FailedPrecondition: something on this node uses it.
        """
        holder = self.backend.holders([home]).get(home.id)
        if holder is not None:
            raise FailedPrecondition(
                f"volume {home.id!r}: still in use{'' if self.is_apart else ' on this node'} ({holder}): end the pods that use it; "
                "kubelet then unpublishes and unstages it"
            )
        if self._keep(home):
            return
        self._throw_away(home, keep=keep)

    def claim(self, home_id: str) -> AbstractContextManager[None]:
        """Keep other drivers that have the pool from working with this id while the body runs.

        Raises:
            Aborted: one of them is.
        """
        return self._builder.claimed(home_id)

    def create_group(self, record: GroupRecord, check: Callable[[], None]) -> Home:
        """Make a group, which its snapshots, made before, have waited for, if the `check` does not raise at the last moment."""
        self._builder.discard_leftover(record.id)
        with self._builder.building(record):
            check()  # a group is its record
        return self.catalog.placed(record.id, record.id, GROUPS)

    def delete_group(self, home: Home) -> None:
        """Take a group out of existence; its snapshots are to follow."""
        self._throw_away(home, keep=False)

    def delete_snapshot(self, home: Home) -> None:
        """Take a snapshot out of existence; what was restored from it stays. Its files go as a volume's do."""
        self._throw_away(home, keep=True)

    # Maintenance

    def sweep(self) -> None:
        """Remove what other drivers that have the pool, or earlier runs of this one, have left half made."""
        if self.is_apart and self._builder.throw_abandoned():
            self.on_trash()

    def empty_trash(self, now: float | None = None) -> float | None:
        """Remove what was deleted longer than its retention ago; seconds until the next is due, None for none."""
        return self._trash.empty(time.time() if now is None else now)

    def refresh(self) -> None:
        """Count again what volumes have taken of the filesystem."""
        self._charges.refresh()

    def _keep(self, home: Home) -> bool:
        """Keep what a deleted volume's class wants kept; whether that was all of it."""
        if not self.is_apart:
            return False
        try:
            record = self.catalog.read(home)
        except (NotFound, Unavailable, ConfigurationError):
            raise
        except Error as error:
            # What its class wants nobody knows any more, and what is kept can be removed later.
            log.error("volume %s: kept at %s: %s", home.id, self.catalog.keep(home), error)
            self._charges.forget(home.id)
            return True
        match self.parameters(record).on_delete:
            case OnDelete.DELETE:
                return False
            case OnDelete.ARCHIVE:
                when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
                claim = f"{record.pvc_namespace}-{record.pvc_name}" if record.pvc_name else record.name
                name = f"{claim.replace('/', '_')[:180]}-{when}-{home.id[-8:]}"
                kept = self.catalog.archive(home, self.backend.features.payload, name)
                log.info("volume %s: its content is kept at %s", home.id, kept)
                return False
            case OnDelete.RETAIN:
                kept = self.catalog.keep(home)
                log.info("volume %s: kept at %s", home.id, kept)
                self._charges.forget(home.id)
                return True

    def _throw_away(self, home: Home, *, keep: bool) -> None:
        try:
            trashed = self.catalog.trash(home, keep=keep)
        except OSError:
            if not self.catalog.stands(home):
                self.space.forget(home.id)
            raise
        self._charges.rename(home.id, trashed.name)
        self.on_trash()

    def _remove(self, home: Home) -> None:
        with self.space.release(home.name):
            self._builder.discard(home)
        self._charges.drop(home.name)

    @contextmanager
    def _no_room(self, volume_id: str) -> Iterator[None]:
        """What the filesystem refuses for want of room, or as it is read-only: another node should be asked."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise ResourceExhausted(f"{volume_id!r}: pool {self.name!r}: {error}") from error

    def _count_if_short(self, needed: int) -> None:
        """What is refused must be refused for what is there now: volumes may have written since they were counted."""
        if needed <= self.space.available():
            return
        self._trash.empty_due()
        if needed > self.space.available() and self._charges.is_count_old():
            self.refresh()

    def _check_name(self, volume_id: str) -> None:
        parsed = VolumeId.find(volume_id)
        if parsed is not None and parsed.pool != self.name:
            raise ConfigurationError(
                f"{self.config.where}: {self.catalog.root} holds volumes of a pool named {parsed.pool!r}, and their ids "
                f"say so: call the pool [pools.{parsed.pool}] again"
            )

    def _sharing(self, record: Record | SnapshotRecord, source: Home) -> Record | SnapshotRecord:
        return msgspec.structs.replace(record, shares=self._charges.shared_by(source))
