# SPDX-License-Identifier: Apache-2.0
"""Homes in staging: filled there, begun and committed by the catalog, and removed again when that fails.

What a home is filled with is the backend's business, what it is charged `charges`'.
"""

import errno
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.backends.base import Backend
from csi_driver.catalog import Catalog, Home
from csi_driver.errors import Aborted, Error, Unavailable
from csi_driver.model import GroupRecord, Record, SnapshotRecord

log = logging.getLogger(__name__)


class Build:
    """A home being made: `home` is for the body to fill; `record` is what it gets, and may still be exchanged."""

    def __init__(self, home: Home, record: Record | SnapshotRecord | GroupRecord) -> None:
        self.home = home
        self.record = record


class Builder:
    """Makes and unmakes the homes of one pool."""

    def __init__(self, pool_name: str, catalog: Catalog, backend: Backend) -> None:
        self._pool_name = pool_name
        self._catalog = catalog
        self._backend = backend
        # A sweep keeps off what calls are at, and they off what it is at.
        self._guard = threading.Lock()
        self._at_work: Counter[str] = Counter()
        self._swept: set[str] = set()
        self._owed: set[str] = set()
        """Claims to give back yet: the server was not asked, and who has them lives on."""

    @contextmanager
    def building(self, record: Record | SnapshotRecord | GroupRecord) -> Iterator[Build]:
        """A home in staging for the body to fill; committed when that ends well, else removed.

        Raises:
            Aborted: it failed, and so did undoing it; or it stands, but perhaps not on the disk yet: repeat.
        """
        with self._working(record.id):
            try:
                with self._building(record) as build:
                    yield build
            except BaseException:
                # Undoing it does so too, if it comes to its end.
                self._give_back(record.id)
                raise

    @contextmanager
    def _building(self, record: Record | SnapshotRecord | GroupRecord) -> Iterator[Build]:
        build = Build(self._catalog.begin(record.id), record)
        try:
            yield build
            self._catalog.commit(build.home, build.record)
        except BaseException as failure:
            if self._catalog.has_committed(record):
                # Only the last sync failed: it stands, and a repeat finds it or not.
                raise Aborted(f"{record.id!r}: made, but not surely on disk ({failure}): repeat") from failure
            if not self._catalog.stands(build.home):
                self._catalog.abandon(build.home.id)
                raise Aborted(
                    f"{record.id!r}: another driver that has this pool took it for given up, and removed it: repeat"
                ) from failure
            try:
                # Our claim may be lost, and what stands there another's, who makes the same.
                self._catalog.claim(build.home.id)
                self._discard_staged(build.home)
            except (OSError, Error) as error:
                raise Aborted(
                    f"{record.id!r}: making it failed ({failure}), and so did removing what was made "
                    f"({error}): it is removed at the next try"
                ) from failure
            raise

    def discard(self, home: Home) -> None:
        """Remove all of a home in staging or in the trash."""
        self._backend.clear(home)
        self._catalog.remove(home)

    def throw_abandoned(self) -> bool:
        """Take to the trash what builds that died have left; whether there was anything.

        Not removed here, for that may take minutes: a driver that starts has none.
        """
        for made_id in sorted(self._owed):
            with self._sweeping(made_id) as is_free:
                if is_free:
                    self._catalog.abandon(made_id)
                    self._owed.discard(made_id)
        thrown = 0
        for home in self._catalog.staged():
            with self._sweeping(home.id) as is_free:
                thrown += is_free and self._throw(home)
        return thrown > 0

    def _throw(self, home: Home) -> bool:
        try:
            return self._catalog.throw_staged(home)
        except Unavailable:
            raise
        except (OSError, Error) as error:
            log.error(
                "pool %s: %s: half-made, and cannot be removed yet: %s", self._pool_name, home.path, error
            )
            return False

    def discard_leftover(self, made_id: str) -> None:
        """Remove what an earlier try of this one has left.

        Raises:
            Aborted: it cannot be removed yet.
        """
        with self._working(made_id):
            leftover = self._catalog.find_staged(made_id)
            if leftover is None:
                return
            try:
                self._discard_staged(leftover)
            except (OSError, Error) as error:
                if isinstance(error, OSError) and error.errno == errno.EROFS:
                    raise
                raise Aborted(
                    f"volume {made_id!r}: what an earlier try left at {leftover.path} cannot be removed yet: {error}"
                ) from error

    @contextmanager
    def claimed(self, made_id: str) -> Iterator[None]:
        """Keep other drivers that have the pool from working with this id while the body runs.

        Raises:
            Aborted: one of them is.
        """
        with self._working(made_id):
            self._catalog.claim(made_id)
            try:
                yield
            finally:
                self._give_back(made_id)

    def _discard_staged(self, home: Home) -> None:
        try:
            self.discard(home)
        except BaseException:
            # Another driver that has the pool may try.
            self._give_back(home.id)
            raise

    def _give_back(self, made_id: str) -> None:
        try:
            self._catalog.abandon(made_id)
        except Unavailable:
            # If the server was only left alone for a while, the claim is still ours.
            self._owed.add(made_id)

    @contextmanager
    def _working(self, made_id: str) -> Iterator[None]:
        with self._guard:
            if made_id in self._swept:
                raise Aborted(f"{made_id!r}: what an earlier try left of it is being removed: repeat")
            self._at_work[made_id] += 1
        try:
            yield
        finally:
            with self._guard:
                self._at_work[made_id] -= 1
                self._at_work += Counter()  # drop what nobody is at any more

    @contextmanager
    def _sweeping(self, made_id: str) -> Iterator[bool]:
        """Keep this driver's calls off for the body, if none is at it: whether that is so."""
        with self._guard:
            is_free = not self._at_work[made_id]
            if is_free:
                self._swept.add(made_id)
        try:
            yield is_free
        finally:
            if is_free:
                with self._guard:
                    self._swept.discard(made_id)
