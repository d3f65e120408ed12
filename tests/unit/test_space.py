# SPDX-License-Identifier: Apache-2.0
"""The ledger of a pool's room: promises against what a filesystem has, while others write to it too."""

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from csi_driver.backends.base import Store
from csi_driver.errors import ResourceExhausted
from csi_driver.space import Space
from csi_driver.values import Reserved

TOTAL = 10_000


@dataclass
class Disk:
    """A pretended filesystem: what each home and everybody else has taken of it."""

    total: int = TOTAL
    others: int = 0
    homes: dict[str, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return self.total - self.others - sum(self.homes.values())

    def store(self) -> Store:
        return Store(self.total, self.free)


NOTHING = Reserved()


def make_space(disk: Disk, reserved: Reserved = NOTHING) -> Space:
    space = Space(disk.store, reserved)
    space.adopt({name: (size, size) for name, size in disk.homes.items()})
    return space


def create(space: Space, disk: Disk, name: str, size: int) -> None:
    with space.reserve(name, size, size):
        disk.homes[name] = size
        space.settle(name, size)


def test_empty_pool_offers_all_but_what_is_reserved() -> None:
    assert make_space(Disk(), Reserved(bytes=100)).available() == TOTAL - 100
    assert make_space(Disk(), Reserved(share=0.1)).available() == TOTAL - 1000


def test_disk_that_cannot_be_asked_for_a_moment_is_asked_again() -> None:
    disk = Disk()
    sick: list[OSError] = []

    def store() -> Store:
        if sick:
            raise sick.pop()
        return disk.store()

    space = Space(store, NOTHING)
    space.adopt({"a": (3000, 0)})
    sick.append(OSError(5, "I/O error"))
    with pytest.raises(OSError, match="I/O error"), space.release("a"):
        pass

    disk.others = 5000

    assert space.available() == TOTAL - 5000 - 3000


def test_thick_volume_takes_its_size_once() -> None:
    disk = Disk()
    space = make_space(disk)

    create(space, disk, "a", 1000)

    assert space.available() == 9000
    assert (space.promised(), space.count()) == (1000, 1)


def test_promise_not_yet_written_is_kept_free() -> None:
    disk = Disk()
    space = make_space(disk)

    with space.reserve("a", 1000, 1000):
        space.settle("a", 0)

    assert space.available() == 9000


def test_writing_what_was_promised_changes_nothing_once_it_is_counted() -> None:
    disk = Disk()
    space = make_space(disk)
    with space.reserve("a", 1000, 1000):
        space.settle("a", 0)

    disk.homes["a"] = 600

    # It could have been anybody.
    assert space.available() == 8400
    space.refresh({"a": 600})
    assert space.available() == 9000


def test_others_who_fill_the_disk_lower_what_is_offered_at_once() -> None:
    disk = Disk()
    space = make_space(disk)
    with space.reserve("a", 1000, 1000):
        space.settle("a", 0)

    disk.others = 9500

    assert space.available() <= 500
    space.refresh({"a": 0})
    assert space.available() == 0


def test_what_is_not_there_is_refused_and_the_message_says_what_is() -> None:
    disk = Disk()
    space = make_space(disk, Reserved(bytes=1000))
    create(space, disk, "a", 5000)

    with pytest.raises(
        ResourceExhausted, match=r"5000 bytes .* 4000 are free .*1000 reserved, 5000 promised"
    ):
        create(space, disk, "b", 5000)

    assert space.available() == 4000


def test_failed_making_gives_the_room_back() -> None:
    disk = Disk()
    space = make_space(disk)

    with pytest.raises(OSError, match="died"), space.reserve("a", 1000, 1000):
        raise OSError("died")

    assert space.available() == TOTAL
    assert space.count() == 0


def test_failed_growing_leaves_the_old_promise() -> None:
    disk = Disk()
    space = make_space(disk)
    create(space, disk, "a", 1000)

    with pytest.raises(OSError, match="died"), space.reserve("a", 3000, 2000):
        raise OSError("died")

    assert space.available() == 9000
    assert space.promised() == 1000


def test_growing_needs_only_the_difference() -> None:
    disk = Disk()
    space = make_space(disk)
    create(space, disk, "a", 6000)

    with space.reserve("a", 9000, 3000):
        disk.homes["a"] = 9000
        space.settle("a", 9000)

    assert space.available() == 1000


def test_trash_keeps_its_room_until_it_is_removed() -> None:
    disk = Disk()
    space = make_space(disk)
    create(space, disk, "a", 1000)

    space.move("a", "a.1")
    assert space.available() == 9000
    with space.release("a.1"):
        del disk.homes["a"]

    assert space.available() == TOTAL


def test_failed_removal_keeps_the_room() -> None:
    disk = Disk()
    space = make_space(disk)
    create(space, disk, "a", 1000)

    with pytest.raises(OSError, match="busy"), space.release("a"):
        raise OSError("busy")

    assert space.available() == 9000


def test_room_freed_late_by_the_filesystem_is_not_offered_early() -> None:
    disk = Disk()
    space = make_space(disk)
    create(space, disk, "a", 9000)

    with space.release("a"):
        pass  # btrfs gives the space back half a minute later

    assert space.available() == 1000
    del disk.homes["a"]
    assert space.available() == TOTAL


def test_unenforced_pool_promises_nothing_and_still_refuses_what_is_not_there() -> None:
    disk = Disk()
    space = make_space(disk)

    with space.reserve("a", 0, 8000):
        space.settle("a", 0)
    assert space.available() == TOTAL
    with pytest.raises(ResourceExhausted), space.reserve("b", 0, TOTAL + 1):
        pass


def test_adoption_counts_what_is_there() -> None:
    disk = Disk(homes={"a": 1000, "b": 200})
    space = Space(disk.store, NOTHING)

    space.adopt({"a": (1000, 1000), "b": (2000, 200)})

    assert space.available() == 7000
    assert space.count() == 2


@pytest.mark.parametrize("lasting", [False, True])
def test_adoption_takes_nothing_from_what_is_being_made(lasting: bool) -> None:
    # A pool on a server is adopted behind the first calls.
    disk = Disk(homes={"a": 1000, "c": 500})
    space = make_space(disk)

    with space.reserve("b", 4000, 4000, lasting=lasting), space.reserve("c", 1500, 1000):
        disk.homes["b"] = 3000
        space.adopt({"a": (1000, 1000), "c": (500, 500)})
        assert space.promised() == 1000 + 4000 + 1500
        space.settle("b", 4000)
    disk.homes["b"] = 4000
    space.refresh(disk.homes)
    assert space.promised() == 6500 and space.available() == TOTAL - 6500


def test_exactly_those_that_fit_get_room_when_all_come_at_once() -> None:
    disk = Disk()
    space = make_space(disk)
    guard = threading.Lock()
    start = threading.Barrier(32)
    got: list[bool] = []

    def work(first: int) -> None:
        start.wait()
        for number in range(first, first + 8):
            try:
                with space.reserve(f"v{number}", 100, 100):
                    with guard:
                        disk.homes[f"v{number}"] = 100
                    space.settle(f"v{number}", 100)
                got.append(True)
            except ResourceExhausted:
                got.append(False)

    threads = [threading.Thread(target=work, args=(8 * index,)) for index in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert got.count(True) == 100
    assert got.count(False) == 156
    assert space.available() == 0


class Life(RuleBasedStateMachine):
    """Thin and thick volumes made, written, grown, deleted: no promise is ever made twice.

    The promises stand in `promises`; what must hold is that every volume could be written full at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.promises: dict[str, int] = {}
        self.trash: set[str] = set()
        self.kept: dict[str, int] = {}
        self.number = 0

    @initialize(reserved=st.integers(0, 2000))
    def start(self, reserved: int) -> None:
        self.reserved = reserved
        self.space = make_space(self.disk, Reserved(bytes=reserved))

    @rule(size=st.integers(1, 4000), thick=st.booleans(), fails=st.booleans())
    def make(self, size: int, thick: bool, fails: bool) -> None:
        self.number += 1
        name = f"v{self.number}"
        room = self.space.available()
        try:
            with self.space.reserve(name, size, size):
                assert size <= room
                self.disk.homes[name] = size if thick else 0
                if fails:
                    raise OSError("died")
                self.space.settle(name, self.disk.homes[name])
        except ResourceExhausted:
            assert size > room
        except OSError:
            del self.disk.homes[name]
        else:
            self.promises[name] = size

    @precondition(lambda self: self.promises)
    @rule(data=st.data(), more=st.integers(1, 2000))
    def grow(self, data: st.DataObject, more: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.promises)))
        size = self.promises[name] + more
        try:
            with self.space.reserve(name, size, more):
                self.space.settle(name, self.disk.homes[name])
        except ResourceExhausted:
            return
        self.promises[name] = size

    @precondition(lambda self: self.promises)
    @rule(data=st.data(), share=st.sampled_from([0.3, 1.0]))
    def write(self, data: st.DataObject, share: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.promises)))
        self.disk.homes[name] = max(self.disk.homes[name], int(self.promises[name] * share))

    @precondition(lambda self: self.promises)
    @rule(data=st.data())
    def erase_and_count(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.promises)))
        self.disk.homes[name] = 0
        self.count()

    @precondition(lambda self: self.promises)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.promises)))
        self.space.move(name, f"{name}.t")
        self.disk.homes[f"{name}.t"] = self.disk.homes.pop(name)
        self.kept[f"{name}.t"] = self.promises.pop(name)
        self.trash.add(f"{name}.t")

    @precondition(lambda self: self.trash)
    @rule()
    def empty_trash(self) -> None:
        for name in sorted(self.trash):
            with self.space.release(name):
                del self.disk.homes[name]
        self.trash.clear()

    @rule()
    def count(self) -> None:
        self.space.refresh(dict(self.disk.homes))

        # What trash was promised and never took stays kept until it is removed.
        kept = sum(self.kept[name] - self.disk.homes[name] for name in self.trash)
        assert self.space.available() == max(0, self.disk.free - self._unwritten() - kept - self.reserved)

    @rule(size=st.integers(0, 3000))
    def others_write(self, size: int) -> None:
        # Never what is promised: that breach is not this ledger's to prevent.
        self.disk.others = min(size, self.disk.others + self.disk.free - self._unwritten())

    @invariant()
    def every_volume_can_be_written_full(self) -> None:
        assert self._unwritten() <= self.disk.free

    def _unwritten(self) -> int:
        return sum(size - self.disk.homes[name] for name, size in self.promises.items())


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase
