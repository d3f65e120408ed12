# SPDX-License-Identifier: Apache-2.0
"""One pool: its homes, its backend and its room, put together into making, growing and deleting a volume.

Each operation leaves the pool as it was when it fails, and may be repeated after a crash at any point. Callers hold
the volume's lock. What CSI makes of it is `controller`'s and `node`'s business.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from csi_driver.backends.base import Backend
from csi_driver.catalog import AREAS, Catalog, Home
from csi_driver.config import PoolConfig
from csi_driver.errors import Aborted, ConfigurationError, Error, FailedPrecondition, ResourceExhausted
from csi_driver.model import (
    PLACEMENT_KEYS,
    AccessType,
    Capacity,
    Parameters,
    Record,
    SizeLimits,
    VolumeId,
    VolumeSpec,
    name_hash,
)
from csi_driver.space import Space

log = logging.getLogger(__name__)

# Counting is linear in the volumes; calls that are refused one after the other share one count.
_COUNT_AGAIN_S = 1.0
_CLOCK_SLACK_S = 60.0


class Pool:
    """One `[pools.NAME]`, open."""

    def __init__(self, config: PoolConfig, catalog: Catalog, backend: Backend) -> None:
        self.name = config.name
        self.config = config
        self.catalog = catalog
        self.backend = backend
        self.space = Space(backend.store, config.reserved)
        self._counted_at = 0.0
        self.on_trash: Callable[[], None] = lambda: None
        self.damaged: dict[str, str] = {}
        """Volume id to what is wrong with its record, for those found unreadable at the start."""

    def adopt(self) -> None:
        """Take over what is there: volumes are counted, half-made homes discarded.

        Raises:
            ConfigurationError: a record was written by a newer version, or the pool has been given another name.
        """
        self._discard_all()
        self.damaged = {}
        shares = {}
        for volume_id in self.catalog.ids():
            self._check_name(volume_id)
            try:
                shares[volume_id] = self._share(self.catalog.home(volume_id))
            except ConfigurationError:
                raise
            except (OSError, Error) as error:
                # The others can still be served.
                log.error("pool %s: volume %s: %s", self.name, volume_id, error)
                self.damaged[volume_id] = str(error)
        for home, _ in self.catalog.trashed():
            try:
                size = self.backend.written_bytes(home)
            except OSError as error:
                log.error("pool %s: %s: cannot be counted: %s", self.name, home.path, error)
                continue
            shares[home.name] = (size, size)
        self.space.adopt(shares)

    def close(self) -> None:
        """Let another process have the pool."""
        self.catalog.close()

    # Looking

    def id_of(self, name: str) -> str:
        """The id that a volume of this name has, or would have, in this pool."""
        return str(VolumeId(self.name, self.catalog.tag, name_hash(name)))

    def areas(self) -> list[Path]:
        """The directories that homes are kept in."""
        return [self.config.root / area for area in AREAS]

    def is_present(self) -> bool:
        """Whether the pool's directory is still the one that was opened."""
        return self.catalog.is_present()

    def room(self) -> int:
        """Bytes that may still be promised; none where the pool's directory is gone."""
        return self.space.available() if self.is_present() else 0

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
        own = {key: value for key, value in record.parameters.items() if key not in PLACEMENT_KEYS}
        return self.backend.parse(own, record.access_type, record.fs_type)

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
        if not self.is_present():
            raise ResourceExhausted(
                f"pool {self.name!r}: {self.catalog.root} is not there any more: is its disk mounted?"
            )
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
        with self._no_room(home.id):
            try:
                with self.space.reserve(home.id, promised, needed):
                    # Also when it is that large already: a crash may have left what lies above the payload behind.
                    actual = self.backend.grow(home, wanted)
                    self.space.settle(home.id, self.backend.written_bytes(home))
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
        try:
            trashed = self.catalog.trash(home, keep=keep)
        except OSError:
            if self.catalog.find(home.id) is None:
                self.space.forget(home.id)
            raise
        self.space.move(home.id, trashed.name)
        self.on_trash()

    # Maintenance

    def empty_trash(self, now: float | None = None) -> float | None:
        """Remove what was deleted longer than the retention ago; seconds until the next is due, None for none."""
        now = time.time() if now is None else now
        due: list[float] = []
        failures: list[OSError | Error] = []
        for found, when in list(self.catalog.trashed()):
            home, wait = found, when + self.config.retention_s - now
            if when > now + _CLOCK_SLACK_S:
                # Deleted while the clock was ahead: kept from now on, not for so much longer.
                home, wait = self._redate(found), self.config.retention_s
            if wait > 0:
                due.append(wait)
                continue
            try:
                with self.space.release(home.name):
                    self._discard(home)
            except (OSError, Error) as error:
                # One that cannot go yet (something is mounted in it) must not keep the others.
                failures.append(error)
        if failures:
            raise failures[0]
        return min(due, default=None)

    def refresh(self) -> None:
        """Count again what volumes have taken of the filesystem."""
        self._counted_at = time.monotonic()
        written = {}
        for volume_id in self.catalog.ids():
            try:
                written[volume_id] = self.backend.written_bytes(self.catalog.home(volume_id))
            except FileNotFoundError:
                continue  # deleted since it was listed
            except OSError as error:
                log.error("pool %s: volume %s: cannot be counted: %s", self.name, volume_id, error)
        self.space.refresh(written)

    def _share(self, home: Home) -> tuple[int, int]:
        record = self.catalog.read(home)
        # A crash in `grow` leaves the storage ahead of the record.
        size_bytes = max(record.size_bytes, self.backend.size_bytes(home))
        promised = self.backend.promised_bytes(size_bytes, self.parameters(record))
        return promised, self.backend.written_bytes(home)

    def _build(self, spec: VolumeSpec, record: Record) -> Home:
        home = self.catalog.stage(record.id)
        try:
            self.backend.make(home, spec)
            return self.catalog.publish(home, record)
        except BaseException as failure:
            if self.catalog.find(record.id) is not None:
                # Only the last sync failed: the volume stands, and a repeat finds it or not.
                raise Aborted(
                    f"volume {record.id!r}: made, but not surely on disk ({failure}): repeat"
                ) from failure
            try:
                self._discard(home)
            except (OSError, Error) as error:
                raise Aborted(
                    f"volume {record.id!r}: making it failed ({failure}), and so did removing what was made "
                    f"({error}): it is removed at the next try"
                ) from failure
            raise

    @contextmanager
    def _no_room(self, volume_id: str) -> Iterator[None]:
        """What the filesystem refuses for want of room, or as it is read-only: another node should be asked."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise ResourceExhausted(f"volume {volume_id!r}: pool {self.name!r}: {error}") from error

    def _count_if_short(self, needed: int) -> None:
        """What is refused must be refused for what is there now: volumes may have written since they were counted."""
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
        for home in list(self.catalog.staged()):
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
            self._discard(leftover)
        except (OSError, Error) as error:
            if isinstance(error, OSError) and error.errno == errno.EROFS:
                raise
            raise Aborted(
                f"volume {volume_id!r}: what an earlier try left at {leftover.path} cannot be removed yet: {error}"
            ) from error

    def _redate(self, home: Home) -> Home:
        redated = self.catalog.trash(home)
        self.space.move(home.name, redated.name)
        return redated

    def _discard(self, home: Home) -> None:
        self.backend.clear(home)
        self.catalog.remove(home)
