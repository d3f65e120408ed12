# SPDX-License-Identifier: Apache-2.0
"""One pool: its homes, its backend and its room, put together into making, growing and deleting a volume.

Each operation leaves the pool as it was when it fails, and may be repeated after a crash at any point. Callers hold
the volume's lock. What CSI makes of it is `controller`'s and `node`'s business.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Self

import msgspec

from csi_driver.backends.base import Backend, Store
from csi_driver.backing import Backing
from csi_driver.catalog import AREAS, SNAPSHOTS, Catalog, Home
from csi_driver.config import PoolConfig
from csi_driver.errors import (
    Aborted,
    ConfigurationError,
    Error,
    FailedPrecondition,
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
from csi_driver.shares import Shares
from csi_driver.space import Space
from csi_driver.trash import Trash

log = logging.getLogger(__name__)

# Counting is linear in the volumes; calls that are refused one after the other share one count.
_COUNT_AGAIN_S = 1.0


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
        self._shares = Shares()
        # What a volume may write beyond its size is looked up, set and counted by one thread at a time.
        self._allowing = threading.Lock()
        self._counted_at = 0.0
        # Thousands of volumes come from a few classes.
        self._parsed = lru_cache(maxsize=64)(self._parse)
        self._trash = Trash(catalog, config, self._remove, self._rename)
        self.on_trash: Callable[[], None] = lambda: None
        self.adopted = False
        self.damaged: dict[str, str] = {}
        """Volume id to what is wrong with its record, for those found unreadable at the start."""

    def adopt(self) -> None:
        """Take over what is there: volumes are counted, half-made homes discarded.

        Raises:
            ConfigurationError: a record was written by a newer version, or the pool has been given another name.
        """
        self._discard_all()
        self.adopted = True
        self.damaged = {}
        shares: dict[str, tuple[int, int]] = {}
        volumes = [self.catalog.home(volume_id) for volume_id in self.catalog.ids()]
        snapshots = self.catalog.snapshots()
        self._adopt_shares([*volumes, *snapshots, *(home for home, _ in self.catalog.trashed())])
        for home in volumes:
            self._adopt(home, self._share_at_start, shares)
        for home in snapshots:
            self._adopt(home, self._snapshot_share, shares)
        for home, _ in self.catalog.trashed():
            try:
                size = self.backend.written_bytes(home)
            except OSError as error:
                log.error("pool %s: %s: cannot be counted: %s", self.name, home.path, error)
                continue
            shares[home.name] = (size, size)
        self.space.adopt(shares)

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
            self._discard_leftover(record.id)
            self._count_if_short(needed)
            try:
                with self.space.reserve(record.id, promised, needed):
                    home = self._build(spec, record)
                    self.space.settle(record.id, self.backend.written_bytes(home))
            except BaseException:
                standing = self.catalog.find(record.id)
                if standing is not None:
                    self.space.add(record.id, *self._share(standing))
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
        share = self.shares_with(order.origin)
        record = msgspec.structs.replace(order.record, shares=self._shared_by(order) if share else {})
        with self._no_room(record.id):
            self._discard_leftover(record.id)
            promised, from_source = self._charge(order, record, share=share)
            needed = promised + from_source
            self._count_if_short(needed)
            lasting = not self.copies_at_once(order.origin)
            with self.space.reserve(record.id, needed, needed, lasting=lasting):
                self._shares.add(record.id, record.shares)
                try:
                    with self._staged(record.id, lambda: record) as home:
                        self._settle_held(record.shares)
                        yield lambda: self.backend.copy(
                            home, order.source, order.spec, order.transfer, share=share
                        )
                        if share:
                            # Only now is all counted that the source wrote until that moment.
                            record = msgspec.structs.replace(record, shares=self._shared_by(order))
                            self._shares.add(record.id, record.shares)
                            self._settle_held(record.shares)
                        self.backend.finish(home, order.spec)
                except BaseException:
                    self._settle_held(self._shares.drop(record.id))
                    raise
                self._settle_copy(order, record, promised, share=share)

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
        promised += self._held(home.id) if promised else 0
        with self._no_room(home.id):
            try:
                with self.space.reserve(home.id, promised, needed):
                    # Also when it is that large already: a crash may have left what lies above the payload behind.
                    with self._allowing:
                        actual = self.backend.grow(home, wanted)
                    self.space.settle(home.id, self._written(home))
            except BaseException:
                # It may have grown all the same.
                with suppress(OSError, Error):
                    self.space.add(home.id, *self._share(home))
                raise
        if record.size_bytes < max(actual, size_bytes):
            self.catalog.update(home, size_bytes=max(actual, size_bytes))
        return actual

    def delete(self, home: Home, *, keep: bool = True) -> None:
        """Take a volume out of existence; its files go in the background, after the pool's retention if `keep`.

        Raises:
            FailedPrecondition: something on this node uses it.
        """
        holder = self.backend.holders([home]).get(home.id)
        if holder is not None:
            raise FailedPrecondition(
                f"volume {home.id!r}: still in use on this node ({holder}): end the pods that use it; "
                "kubelet then unpublishes and unstages it"
            )
        if self._keep(home):
            return
        self._throw_away(home, keep=keep)

    def create_group(self, record: GroupRecord) -> Home:
        """Make a group, which its snapshots, made before, have waited for."""
        self._discard_leftover(record.id)
        home = self.catalog.stage(record.id)
        try:
            return self.catalog.publish(home, record)
        except BaseException:
            if self.catalog.find_group(record.id) is None:
                self.catalog.remove(home)
            raise

    def delete_group(self, home: Home) -> None:
        """Take a group out of existence; its snapshots are to follow."""
        self._throw_away(home, keep=False)

    def delete_snapshot(self, home: Home) -> None:
        """Take a snapshot out of existence; what was restored from it stays. Its files go as a volume's do."""
        self._throw_away(home, keep=True)

    # Maintenance

    def empty_trash(self, now: float | None = None) -> float | None:
        """Remove what was deleted longer than its retention ago; seconds until the next is due, None for none."""
        return self._trash.empty(time.time() if now is None else now)

    def refresh(self) -> None:
        """Count again what volumes have taken of the filesystem."""
        self._counted_at = time.monotonic()
        written = {}
        for volume_id in self.catalog.ids():
            try:
                written[volume_id] = self._written(self.catalog.home(volume_id))
            except FileNotFoundError:
                continue  # deleted since it was listed
            except OSError as error:
                log.error("pool %s: volume %s: cannot be counted: %s", self.name, volume_id, error)
        self.space.refresh(written)

    def _keep(self, home: Home) -> bool:
        """Keep what a deleted volume's class wants kept; whether that was all of it."""
        if not self.is_apart:
            return False
        record = self.catalog.read(home)
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
                self._shares.drop(home.id)
                self.space.forget(home.id)
                return True

    def _share(self, home: Home) -> tuple[int, int]:
        record = self.catalog.read(home)
        # A crash in `grow` leaves the storage ahead of the record.
        size_bytes = max(record.size_bytes, self.backend.size_bytes(home))
        promised = self.backend.promised_bytes(size_bytes, self.parameters(record))
        return promised + (self._held(home.id) if promised else 0), self._written(home)

    def _share_at_start(self, home: Home) -> tuple[int, int]:
        share = self._share(home)
        if self.backend.features.writer_pays:
            record = self.catalog.read(home)
            self.backend.allow(
                home, max(record.size_bytes, self.backend.size_bytes(home)), self._held(home.id)
            )
        return share

    def _snapshot_share(self, home: Home) -> tuple[int, int]:
        """Nobody writes to it: it is counted for what it has, or, where it shares, with its volume."""
        record = self.catalog.read_snapshot(home)
        written = 0 if record.shares else self.backend.written_bytes(home)
        return written, written

    def _written(self, home: Home) -> int:
        return self.backend.written_bytes(home, shared=self._shares.involve(home.id))

    def _held(self, volume_id: str) -> int:
        return self._shares.held(volume_id) if self.backend.features.writer_pays else 0

    def _adopt(
        self,
        home: Home,
        count: Callable[[Home], tuple[int, int]],
        shares: dict[str, tuple[int, int]],
    ) -> None:
        self._check_name(home.id)
        try:
            shares[home.id] = count(home)
        except ConfigurationError:
            raise
        except (OSError, Error) as error:
            # The others can still be served.
            log.error("pool %s: %s: %s", self.name, home.path, error)
            self.damaged[home.id] = str(error)

    def _adopt_shares(self, homes: list[Home]) -> None:
        self._shares.clear()
        for home in homes:
            try:
                self._shares.add(home.name, self.catalog.shares(home))
            except (OSError, Error, msgspec.ValidationError):
                continue  # told of where the home itself is looked at

    # Copies

    def _shared_by(self, order: CopyOrder) -> dict[str, int]:
        """What a copy that shares its storage may hold of which volumes."""
        if order.source.area == SNAPSHOTS:
            return self.catalog.read_snapshot(order.source).shares
        own = self.backend.written_bytes(order.source) if self.backend.features.writer_pays else 0
        return {**self.catalog.read(order.source).shares, order.source.id: own}

    def _charge(self, order: CopyOrder, record: Record | SnapshotRecord, *, share: bool) -> tuple[int, int]:
        """Bytes that the copy itself may take in the end, and those that its source may have to take anew."""
        if isinstance(record, Record):
            promised = self.backend.promised_bytes(order.spec.size_bytes, order.spec.parameters)
        else:
            promised = 0 if share else self.backend.content_bytes(order.source)
        if not share or order.source.area == SNAPSHOTS:
            return promised, 0
        if self.backend.features.writer_pays:
            return promised, max(0, record.shares[order.source.id] - self._held(order.source.id))
        # Whatever it overwrites from now on takes room once more.
        return promised, self.space.written(order.source.id)

    def _settle_copy(
        self, order: CopyOrder, record: Record | SnapshotRecord, promised: int, *, share: bool
    ) -> None:
        """Turn the room that was promised to the making into what it is for, once it is made."""
        if isinstance(record, SnapshotRecord) and share:
            self.space.forget(record.id)
        else:
            home = (
                self.catalog.get(record.id)
                if isinstance(record, Record)
                else self.catalog.find_snapshot(record.id)
            )
            written = 0 if share or home is None else self.backend.written_bytes(home)
            self.space.add(
                record.id, max(promised, written) if isinstance(record, Record) else written, written
            )
        if not share or order.source.area == SNAPSHOTS:
            return
        size_bytes = self.backend.size_bytes(order.source)
        parameters = self.parameters(self.catalog.read(order.source))
        own = self.backend.promised_bytes(size_bytes, parameters)
        own += self._held(order.source.id) if own else 0
        pays = self.backend.features.writer_pays
        self.space.share(order.source.id, own, self.space.written(order.source.id) if pays else 0)

    def _settle_held(self, volume_ids: Iterable[str]) -> None:
        """Let these volumes write beyond their sizes what copies of them hold now, and count it."""
        if not self.backend.features.writer_pays:
            return
        for volume_id in volume_ids:
            home = self.catalog.find(volume_id)
            if home is None:
                continue
            with self._allowing:
                record = self.catalog.read(home)
                size_bytes = max(record.size_bytes, self.backend.size_bytes(home))
                held = self._held(volume_id)
                self.backend.allow(home, size_bytes, held)
                promised = self.backend.promised_bytes(size_bytes, self.parameters(record))
                if promised:
                    self.space.share(volume_id, promised + held, self.space.written(volume_id))

    def _throw_away(self, home: Home, *, keep: bool) -> None:
        try:
            trashed = self.catalog.trash(home, keep=keep)
        except OSError:
            if not self.catalog.stands(home):
                self.space.forget(home.id)
            raise
        self._rename(home.id, trashed.name)
        self.on_trash()

    def _rename(self, name: str, new_name: str) -> None:
        """A home goes by another name now, in the trash."""
        self._shares.move(name, new_name)
        self.space.move(name, new_name)

    def _remove(self, home: Home) -> None:
        with self.space.release(home.name):
            self._discard(home)
        self._settle_held(self._shares.drop(home.name))

    # Building

    def _build(self, spec: VolumeSpec, record: Record) -> Home:
        with self._staged(record.id, lambda: record) as home:
            self.backend.make(home, spec)
        return self.catalog.home(record.id)

    @contextmanager
    def _staged(self, made_id: str, record: Callable[[], Record | SnapshotRecord]) -> Iterator[Home]:
        """A home in staging for the body to fill; published, with the record then, when that ends well, else removed."""
        home = self.catalog.stage(made_id)
        try:
            yield home
            self.catalog.publish(home, record())
        except BaseException as failure:
            if self._stands(record()):
                # Only the last sync failed: it stands, and a repeat finds it or not.
                raise Aborted(f"{made_id!r}: made, but not surely on disk ({failure}): repeat") from failure
            try:
                self._discard_staged(home)
            except (OSError, Error) as error:
                raise Aborted(
                    f"{made_id!r}: making it failed ({failure}), and so did removing what was made "
                    f"({error}): it is removed at the next try"
                ) from failure
            raise

    def _stands(self, record: Record | SnapshotRecord) -> bool:
        if isinstance(record, Record):
            return self.catalog.find(record.id) is not None
        return self.catalog.find_snapshot(record.id) is not None

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
        if needed > self.space.available() and time.monotonic() - self._counted_at > _COUNT_AGAIN_S:
            self.refresh()

    def _check_name(self, volume_id: str) -> None:
        parsed = VolumeId.find(volume_id)
        if parsed is not None and parsed.pool != self.name:
            raise ConfigurationError(
                f"{self.config.where}: {self.catalog.root} holds volumes of a pool named {parsed.pool!r}, and their ids "
                f"say so: call the pool [pools.{parsed.pool}] again"
            )

    def _discard_all(self) -> None:
        # What is half made in a store that others work in may be theirs; a repeat of the call discards it.
        for home in [] if self.is_apart else list(self.catalog.staged()):
            try:
                self._discard(home)
            except (OSError, Error) as error:
                log.error(
                    "pool %s: %s: half-made, and cannot be removed yet: %s", self.name, home.path, error
                )

    def _discard_leftover(self, volume_id: str) -> None:
        leftover = self.catalog.find_staged(volume_id)
        if leftover is None:
            return
        try:
            self._discard_staged(leftover)
        except (OSError, Error) as error:
            if isinstance(error, OSError) and error.errno == errno.EROFS:
                raise
            raise Aborted(
                f"volume {volume_id!r}: what an earlier try left at {leftover.path} cannot be removed yet: {error}"
            ) from error

    def _discard_staged(self, home: Home) -> None:
        try:
            self._discard(home)
        except BaseException:
            # Another driver that has the pool may try.
            with suppress(Unavailable):
                self.catalog.abandon(home.id)
            raise

    def _discard(self, home: Home) -> None:
        self.backend.clear(home)
        self.catalog.remove(home)
