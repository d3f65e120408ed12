# SPDX-License-Identifier: Apache-2.0
"""What each home of one pool is charged: what it was promised, what it has written, what copies hold of it.

The sums are kept in `space`, who may share with whom in `shares`; how much it is now, the backend says. When a home
is made or goes, `pool` says. Callers hold the volume's lock.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.catalog import SNAPSHOTS, Catalog, Home
from csi_driver.errors import ConfigurationError, Error, Unavailable
from csi_driver.model import Parameters, Record, SnapshotRecord, VolumeSpec
from csi_driver.shares import Shares
from csi_driver.space import Space

log = logging.getLogger(__name__)

# Counting is linear in the volumes; calls that are refused one after the other share one count.
_COUNT_AGAIN_S = 1.0


class Charges:
    """The charges of a pool's homes. `parameters` says what those mean that a volume was made with."""

    def __init__(
        self,
        name: str,
        catalog: Catalog,
        backend: Backend,
        space: Space,
        parameters: Callable[[Record], Parameters],
    ) -> None:
        self._name = name
        self._catalog = catalog
        self._backend = backend
        self._space = space
        self._parameters = parameters
        self._shares = Shares()
        # What a volume may write beyond its size is looked up, set and counted by one thread at a time.
        self._allowing = threading.Lock()
        self._counted_at = 0.0

    # All together

    def adopt(self, volumes: list[Home], snapshots: list[Home]) -> dict[str, str]:
        """Charge everything anew for what is there; what cannot be charged, by its id, with the reason.

        Raises:
            ConfigurationError: a record was written by a newer version.
            Unavailable: the pool's server does not answer.
        """
        self._shares.clear()
        charged, damaged = self._count(volumes, snapshots)
        self._space.adopt(charged)
        return damaged

    def _count(
        self, volumes: list[Home], snapshots: list[Home]
    ) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        charged: dict[str, tuple[int, int]] = {}
        damaged: dict[str, str] = {}
        self._adopt_shares([*volumes, *snapshots, *(home for home, _ in self._catalog.trashed())])
        for homes, count in ((volumes, self._at_start), (snapshots, self._of_snapshot)):
            for home in homes:
                try:
                    charged[home.id] = count(home)
                except (ConfigurationError, Unavailable):
                    raise
                except (OSError, Error) as error:
                    if not self._catalog.stands(home):
                        continue  # deleted since it was listed
                    # The others can still be served.
                    log.error("pool %s: %s: %s", self._name, home.path, error)
                    damaged[home.id] = str(error)
        for home, _ in self._catalog.trashed():
            try:
                size = self._backend.written_bytes(home)
            except OSError as error:
                log.error("pool %s: %s: cannot be counted: %s", self._name, home.path, error)
                continue
            charged[home.name] = (size, size)
        return charged, damaged

    def refresh(self) -> None:
        """Count again what volumes have taken of the filesystem."""
        self._counted_at = time.monotonic()
        features = self._backend.features
        if features.server and features.enforces_capacity:
            # Other controllers promise room too, and take it back.
            since = self._space.changes
            volumes = [self._catalog.home(volume_id) for volume_id in self._catalog.ids()]
            self._space.adopt(self._count(volumes, self._catalog.snapshots())[0], since)
            return
        written = {}
        for volume_id in self._catalog.ids():
            try:
                written[volume_id] = self.written(self._catalog.home(volume_id))
            except FileNotFoundError:
                continue  # deleted since it was listed
            except OSError as error:
                log.error("pool %s: volume %s: cannot be counted: %s", self._name, volume_id, error)
        self._space.refresh(written)

    def is_count_old(self) -> bool:
        """Whether counting again may tell anything new."""
        return time.monotonic() - self._counted_at > _COUNT_AGAIN_S

    # One home

    def of(self, home: Home) -> tuple[int, int]:
        """A volume's promise, and what it has written."""
        record = self._catalog.read(home)
        promised = self._promised(home, record)
        return promised + (self.held(home.id) if promised else 0), self.written(home)

    def written(self, home: Home) -> int:
        """What a volume has taken that it does not share."""
        return self._backend.written_bytes(home, shared=self._shares.involve(home.id))

    def held(self, volume_id: str) -> int:
        """What the volume has written and copies hold: it may write so much beyond its size."""
        return self._shares.held(volume_id) if self._backend.features.writer_pays else 0

    def grow(self, home: Home, size_bytes: int) -> int:
        """Have the backend grow the volume, while nobody else says what it may write; its actual size."""
        with self._allowing:
            return self._backend.grow(home, size_bytes)

    def rename(self, name: str, new_name: str) -> None:
        """A home goes by another name now, in the trash."""
        self._shares.move(name, new_name)
        self._space.move(name, new_name)

    def forget(self, name: str) -> None:
        """A home is nowhere to be seen any more, and neither is what it shared."""
        self._shares.drop(name)
        self._space.forget(name)

    def drop(self, name: str) -> None:
        """A home is gone: what it held of volumes is theirs again."""
        self._allow(self._shares.drop(name))

    # Copies

    def shared_by(self, source: Home) -> dict[str, int]:
        """What a copy that shares its storage with this source may hold of which volumes."""
        if source.area == SNAPSHOTS:
            return self._catalog.read_snapshot(source).shares
        own = self._backend.written_bytes(source) if self._backend.features.writer_pays else 0
        return {**self._catalog.read(source).shares, source.id: own}

    def hold(self, record: Record | SnapshotRecord) -> None:
        """A copy holds what its record says, from now on."""
        self._shares.add(record.id, record.shares)
        self._allow(record.shares)

    def of_copy(
        self, source: Home, spec: VolumeSpec, record: Record | SnapshotRecord, *, share: bool
    ) -> tuple[int, int]:
        """Bytes that the copy itself may take in the end, and those that its source may have to take anew."""
        if isinstance(record, Record):
            promised = self._backend.promised_bytes(spec.size_bytes, spec.parameters)
        else:
            promised = 0 if share else self._backend.content_bytes(source)
        if not share or source.area == SNAPSHOTS:
            return promised, 0
        if self._backend.features.writer_pays:
            return promised, max(0, record.shares[source.id] - self.held(source.id))
        # Whatever it overwrites from now on takes room once more.
        return promised, self.written(source)

    def settle_copy(
        self, source: Home, record: Record | SnapshotRecord, promised: int, *, share: bool
    ) -> None:
        """Turn the room that was promised to the making into what it is for, once it is made."""
        if isinstance(record, SnapshotRecord) and share:
            self._space.forget(record.id)
        else:
            home = (
                self._catalog.get(record.id)
                if isinstance(record, Record)
                else self._catalog.find_snapshot(record.id)
            )
            written = 0 if share or home is None else self._backend.written_bytes(home)
            self._space.add(
                record.id, max(promised, written) if isinstance(record, Record) else written, written
            )
        if not share or source.area == SNAPSHOTS:
            return
        size_bytes = self._backend.size_bytes(source)
        parameters = self._parameters(self._catalog.read(source))
        own = self._backend.promised_bytes(size_bytes, parameters)
        own += self.held(source.id) if own else 0
        pays = self._backend.features.writer_pays
        self._space.share(source.id, own, self._space.written(source.id) if pays else 0)

    def _allow(self, volume_ids: Iterable[str]) -> None:
        """Let these volumes write beyond their sizes what copies of them hold now, and count it."""
        if not self._backend.features.writer_pays:
            return
        for volume_id in volume_ids:
            home = self._catalog.find(volume_id)
            if home is None:
                continue
            with self._allowing:
                record = self._catalog.read(home)
                held = self.held(volume_id)
                self._backend.allow(home, self._size_bytes(home, record), held)
                promised = self._promised(home, record)
                if promised:
                    self._space.share(volume_id, promised + held, self._space.written(volume_id))

    def _size_bytes(self, home: Home, record: Record) -> int:
        # A crash in `Pool.grow` leaves the storage ahead of the record.
        return max(record.size_bytes, self._backend.size_bytes(home))

    def _promised(self, home: Home, record: Record) -> int:
        return self._backend.promised_bytes(self._size_bytes(home, record), self._parameters(record))

    def _at_start(self, home: Home) -> tuple[int, int]:
        charged = self.of(home)
        if self._backend.features.writer_pays:
            record = self._catalog.read(home)
            self._backend.allow(home, self._size_bytes(home, record), self.held(home.id))
        return charged

    def _of_snapshot(self, home: Home) -> tuple[int, int]:
        """Nobody writes to it: it is counted for what it has, or, where it shares, with its volume."""
        record = self._catalog.read_snapshot(home)
        written = 0 if record.shares else self._backend.written_bytes(home)
        return written, written

    def _adopt_shares(self, homes: list[Home]) -> None:
        for home in homes:
            try:
                self._shares.add(home.name, self._catalog.shares(home))
            except Unavailable:
                raise
            except (OSError, Error, msgspec.ValidationError):
                continue  # told of where the home itself is looked at
