# SPDX-License-Identifier: Apache-2.0
"""Room in a pool: how much may still be promised, so that every volume can really grow as large as it says.

`base` is what all volumes together can have: the store's free bytes plus what volumes have taken of it already.
Volumes that write or delete data leave it as it is; only other users of the filesystem change it. So it is sampled
when volumes are counted, and promises are counted against it exactly in between, however many calls run at once. In
quiet moments (nothing being made) it is lowered at once when less is free than it says; who that was, others or
volumes that wrote, only the next count tells. (So it errs by what others have written since the last count, if volumes
have deleted as much meanwhile.) Numbers only: what a promise is, and what a volume has taken, the backend says.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from csi_driver.backends.base import Store
from csi_driver.errors import ResourceExhausted
from csi_driver.values import Reserved


@dataclass(slots=True)
class _Share:
    promised: int
    written: int


class Space:
    """The ledger of one pool, in memory: it is counted anew at every start."""

    def __init__(self, store: Callable[[], Store], reserved: Reserved) -> None:
        self._store = store
        self._reserved = reserved
        self._guard = threading.Lock()
        self._shares: dict[str, _Share] = {}
        self._promised = 0
        self._written = 0
        self._in_flight = 0
        self._making: Counter[str] = Counter()
        self._base = 0
        self._returning = 0
        self._changes = 0

    @property
    def changes(self) -> int:
        """Another number whenever the ledger has changed."""
        return self._changes

    def adopt(self, shares: Mapping[str, tuple[int, int]], since: int | None = None) -> None:
        """Replace the ledger by what is there: name to (promised, written) bytes. Samples the base.

        What is being made now is promised as before: who counted has not seen it.
        Not if it has changed `since` these were counted, or something is being made: what they say is old then.
        """
        with self._guard:
            if since is not None and (self._in_flight or since != self._changes):
                return
            making = {name: share for name, share in self._shares.items() if self._making[name]}
            self._shares = {name: _Share(max(share), share[1]) for name, share in shares.items()} | making
            self._promised = sum(share.promised for share in self._shares.values())
            self._written = sum(share.written for share in self._shares.values())
            self._sample()

    def refresh(self, written: Mapping[str, int]) -> None:
        """Take in what the volumes have taken by now; names that are gone meanwhile are passed over."""
        with self._guard:
            if self._in_flight:
                return
            for name, size in written.items():
                if name in self._shares:
                    self._set(name, self._shares[name].promised, size)
            self._sample()

    @contextmanager
    def reserve(self, name: str, promised: int, needed: int, *, lasting: bool = False) -> Iterator[None]:
        """Promise room to a home that is being made or grown, for the body that makes it; withdrawn if that fails.

        `promised` is the home's whole promise, `needed` what must be free beyond what it holds already (a pool
        that enforces no size promises nothing and still refuses what is not there). While a `lasting` body runs,
        volumes are counted all the same: what it has written so far is missing from the room until it has ended.

        Raises:
            ResourceExhausted: not enough room; the message says how much there is.
        """
        with self._guard:
            self._sample_if_quiet()
            before = self._shares.get(name)
            available = self._available()
            if needed > available:
                raise ResourceExhausted(
                    f"{needed} bytes are needed and {available} are free for volumes here "
                    f"({self._reserved_bytes()} reserved, {self._promised} promised to other volumes)"
                )
            self._in_flight += not lasting
            self._making[name] += 1
            self._set(name, promised, before.written if before else 0)
        try:
            yield
        except BaseException:
            with self._guard:
                self._in_flight -= not lasting
                self._made(name)
                self._set(name, before.promised, before.written) if before else self._drop(name)
            raise
        with self._guard:
            self._in_flight -= not lasting
            self._made(name)

    def settle(self, name: str, written: int) -> None:
        """Say what a home has taken now that it is made (inside the body of `reserve`)."""
        with self._guard:
            self._set(name, self._shares[name].promised, written)

    def add(self, name: str, promised: int, written: int) -> None:
        """Count a home that is there after all, though making it seemed to fail."""
        with self._guard:
            self._set(name, promised, written)

    def written(self, name: str) -> int:
        """What a home had taken when it was counted last."""
        with self._guard:
            share = self._shares.get(name)
            return share.written if share else 0

    def share(self, name: str, promised: int, written: int) -> None:
        """A home has only so much of its own now, and copies have a part in the rest: nothing was written or freed."""
        with self._guard:
            before = self._shares.get(name)
            if before is not None:
                self._base += written - before.written
                self._set(name, promised, written)

    def forget(self, name: str) -> None:
        """The home is nowhere to be seen any more; what it has taken is found at the next count."""
        with self._guard:
            self._drop(name)

    def move(self, name: str, new_name: str) -> None:
        """The home goes by another name now (into the trash): its room stays taken."""
        with self._guard:
            if name in self._shares:
                self._changes += 1
                self._shares[new_name] = self._shares.pop(name)

    @contextmanager
    def release(self, name: str) -> Iterator[None]:
        """Give a home's room back once the body has removed its files."""
        with self._guard:
            self._in_flight += 1
        try:
            free = self._store().free_bytes
            yield
            with self._guard:
                written = self._shares[name].written if name in self._shares else 0
                self._drop(name)
                # btrfs gives the space back a moment later.
                self._returning += max(0, written - max(0, self._store().free_bytes - free))
        finally:
            with self._guard:
                self._in_flight -= 1

    def available(self) -> int:
        """Bytes that may still be promised, at least 0."""
        with self._guard:
            self._sample_if_quiet()
            return self._available()

    def promised(self) -> int:
        """Bytes promised to all homes together."""
        return self._promised

    def count(self) -> int:
        """Homes in the ledger, the trash included."""
        return len(self._shares)

    def _available(self) -> int:
        # The second bound holds when others filled the disk: what is promised but not written is theirs no more.
        store = self._store()
        reserved = self._reserved.of(store.total_bytes)
        return max(0, min(self._base - self._promised, store.free_bytes) - reserved)

    def _made(self, name: str) -> None:
        self._making[name] -= 1
        if not self._making[name]:
            del self._making[name]

    def _sample_if_quiet(self) -> None:
        if not self._in_flight:
            self._base = min(self._base, self._store().free_bytes + self._written + self._returning)

    def _sample(self) -> None:
        self._base = self._store().free_bytes + self._written
        self._returning = 0

    def _reserved_bytes(self) -> int:
        return self._reserved.of(self._store().total_bytes)

    def _set(self, name: str, promised: int, written: int) -> None:
        self._drop(name)
        # A thin volume may have taken more than its promise: what is taken is taken.
        share = _Share(max(promised, written), written)
        self._shares[name] = share
        self._promised += share.promised
        self._written += share.written

    def _drop(self, name: str) -> None:
        self._changes += 1
        share = self._shares.pop(name, None)
        if share is not None:
            self._promised -= share.promised
            self._written -= share.written
