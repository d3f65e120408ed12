# SPDX-License-Identifier: Apache-2.0
"""Which homes keep alive what volumes have written: who shares storage with whom in one pool.

Says only who might share, from the records of copies; how much is shared now, the filesystem knows.
"""

import threading
from collections.abc import Iterable, Mapping


class Shares:
    """Homes (by their names, in the trash too) and what each may hold of which volumes, in bytes."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._by_home: dict[str, Mapping[str, int]] = {}
        # The other way round, for it is asked at every count: volume -> homes that hold something of it.
        self._holders: dict[str, set[str]] = {}

    def clear(self) -> None:
        """Forget all."""
        with self._guard:
            self._by_home.clear()
            self._holders.clear()

    def add(self, name: str, shares: Mapping[str, int]) -> None:
        """A home may hold these bytes of these volumes; what was said of it before is forgotten."""
        if not shares:
            return
        self.drop(name)
        with self._guard:
            self._by_home[name] = dict(shares)
            for volume_id in shares:
                self._holders.setdefault(volume_id, set()).add(name)

    def move(self, name: str, new_name: str) -> None:
        """The home goes by another name now (into the trash)."""
        self.add(new_name, self._by_home.get(name, {}))
        self.drop(name)

    def drop(self, name: str) -> Iterable[str]:
        """The home is gone; the volumes that it held something of."""
        with self._guard:
            shares = self._by_home.pop(name, {})
            for volume_id in shares:
                holders = self._holders[volume_id]
                holders.discard(name)
                if not holders:
                    del self._holders[volume_id]
            return list(shares)

    def held(self, volume_id: str) -> int:
        """Bytes written by the volume that others may hold though it has overwritten them.

        The latest copy was made when all that earlier ones hold was still counted: the largest says it.
        """
        with self._guard:
            holders = self._holders.get(volume_id, ())
            return max((self._by_home[name][volume_id] for name in holders), default=0)

    def involve(self, volume_id: str) -> bool:
        """Whether the volume may share anything with anybody."""
        return volume_id in self._holders or volume_id in self._by_home
