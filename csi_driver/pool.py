# SPDX-License-Identifier: Apache-2.0
"""One pool: its homes, its backend and its room, put together into making, growing and deleting a volume.

Each operation leaves the pool as it was when it fails, and may be repeated after a crash at any point. Callers hold
the volume's lock. What CSI makes of it is `controller`'s and `node`'s business.
"""

import logging
import time
from collections.abc import Callable

from csi_driver.backends.base import Backend
from csi_driver.catalog import Catalog, Home
from csi_driver.config import PoolConfig
from csi_driver.errors import Aborted, Error, FailedPrecondition, ResourceExhausted
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


class Pool:
    """One `[pools.NAME]`, open."""

    def __init__(self, config: PoolConfig, catalog: Catalog, backend: Backend) -> None:
        self.name = config.name
        self.config = config
        self.catalog = catalog
        self.backend = backend
        self.space = Space(backend.store, config.reserved)
        self.on_trash: Callable[[], None] = lambda: None
        self.damaged: dict[str, str] = {}
        """Volume id to what is wrong with its record, for those found unreadable at the start."""

    def adopt(self) -> None:
        """Take over what is there: volumes are counted, half-made homes discarded.

        Raises:
            ConfigurationError: a record was written by a newer version.
        """
        for home in list(self.catalog.staged()):
            self._discard(home)
        self.damaged = {}
        shares = {}
        for volume_id in self.catalog.ids():
            try:
                shares[volume_id] = self._share(self.catalog.home(volume_id))
            except Error as error:
                log.error("pool %s: %s", self.name, error)
                self.damaged[volume_id] = str(error)
        for home, _ in self.catalog.trashed():
            size = self.backend.written_bytes(home)
            shares[home.name] = (size, size)
        self.space.adopt(shares)

    def close(self) -> None:
        """Let another process have the pool."""
        self.catalog.close()

    # Looking

    def id_of(self, name: str) -> str:
        """The id that a volume of this name has, or would have, in this pool."""
        return str(VolumeId(self.name, self.catalog.tag, name_hash(name)))

    def is_present(self) -> bool:
        """Whether the pool's directory is still the one that was opened."""
        return self.catalog.is_present()

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
        leftover = self.catalog.find_staged(record.id)
        if leftover is not None:
            self._discard(leftover)
        promised = self.backend.promised_bytes(spec.size_bytes, spec.parameters)
        needed = promised or spec.size_bytes
        with self.space.reserve(record.id, promised, needed):
            home = self._build(spec, record)
            self.space.settle(record.id, self.backend.written_bytes(home))
        return home

    def grow(self, home: Home, record: Record, size_bytes: int) -> int:
        """Make the volume's payload at least so large; the actual size comes back. Never shrinks.

        Raises:
            ResourceExhausted: no room for the difference; the volume is as it was.
        """
        parameters = self.parameters(record)
        before = self.backend.size_bytes(home)
        if before < size_bytes:
            promised = self.backend.promised_bytes(size_bytes, parameters)
            needed = promised - self.backend.promised_bytes(before, parameters)
            with self.space.reserve(home.id, promised, needed):
                self.backend.grow(home, size_bytes)
                self.space.settle(home.id, self.backend.written_bytes(home))
        actual = self.backend.size_bytes(home)
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
        trashed = self.catalog.trash(home, keep=keep)
        self.space.move(home.id, trashed.name)
        self.on_trash()

    # Maintenance

    def empty_trash(self, now: float | None = None) -> float | None:
        """Remove what was deleted longer than the retention ago; seconds until the next is due, None for none."""
        now = time.time() if now is None else now
        due: list[float] = []
        for home, when in list(self.catalog.trashed()):
            wait = when + self.config.retention_s - now
            if wait > 0:
                due.append(wait)
                continue
            with self.space.release(home.name):
                self.backend.clear(home)
                self.catalog.remove(home)
        return min(due, default=None)

    def refresh(self) -> None:
        """Count again what volumes have taken of the filesystem."""
        written = {}
        for volume_id in self.catalog.ids():
            try:
                written[volume_id] = self.backend.written_bytes(self.catalog.home(volume_id))
            except FileNotFoundError:
                continue  # deleted since it was listed
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

    def _discard(self, home: Home) -> None:
        self.backend.clear(home)
        self.catalog.remove(home)
