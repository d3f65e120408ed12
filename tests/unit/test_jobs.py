# SPDX-License-Identifier: Apache-2.0
"""Background copies by themselves, without a driver around them."""

import threading
from contextlib import ExitStack

import msgspec
import pytest

from csi_driver.errors import Aborted
from csi_driver.jobs import Jobs
from csi_driver.linux.copy import Transfer
from csi_driver.locks import Locks
from csi_driver.model import AccessType, SnapshotRecord

RECORD = SnapshotRecord(
    schema=1, id="p-0-1", name="s", source="p-0-2", size_bytes=1, access_type=AccessType.MOUNT, created_at=0.0
)


def held_by(locks: Locks) -> ExitStack:
    held = ExitStack()
    held.enter_context(locks.hold("source"))
    return held


def test_a_job_that_cannot_begin_lets_go_of_its_locks() -> None:
    jobs, locks = Jobs(1), Locks()
    assert jobs.stop(20.0)

    with pytest.raises(Aborted, match="stopping"), held_by(locks):
        jobs.start(RECORD, Transfer(), lambda: None)

    assert jobs.all() == []
    with locks.hold("source"):
        pass


def test_a_job_that_is_called_off_as_it_waits_lets_go_of_its_locks_at_once() -> None:
    jobs, locks, going = Jobs(1), Locks(), threading.Event()
    jobs.start(RECORD, Transfer(), lambda: assert_set(going))
    later = msgspec.structs.replace(RECORD, id="p-0-3")
    jobs.start(later, Transfer(), lambda: None).keep(held_by(locks))

    assert not jobs.call_off(later.id)

    with locks.hold("source"):
        pass
    assert [job.record.id for job in jobs.all()] == [RECORD.id]
    going.set()
    assert jobs.stop(20.0)


def test_locks_that_a_job_is_given_as_it_ends_are_let_go_of() -> None:
    jobs, locks = Jobs(0), Locks()
    job = jobs.start(RECORD, Transfer(), lambda: None)

    job.keep(held_by(locks))

    with locks.hold("source"):
        pass


def test_a_failure_that_nobody_asks_about_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Aborted("no luck")

    jobs = Jobs(0)
    jobs.start(RECORD, Transfer(), fail)
    other = msgspec.structs.replace(RECORD, id="p-0-3")
    jobs.start(other, Transfer(), lambda: None)
    assert jobs.find(RECORD.id) is not None, "kept for a repeat"

    monkeypatch.setattr("csi_driver.jobs.FAILURE_KEPT_S", -1.0)
    jobs.start(other, Transfer(), lambda: None)

    assert jobs.find(RECORD.id) is None
    jobs.take_failure(RECORD.id)


def test_a_job_that_waits_for_its_turn_never_begins_once_it_is_called_off() -> None:
    jobs, locks, going, begun = Jobs(1), Locks(), threading.Event(), threading.Event()
    first = jobs.start(RECORD, Transfer(), lambda: assert_set(going))
    later = SnapshotRecord(
        schema=1,
        id="p-0-3",
        name="t",
        source="p-0-2",
        size_bytes=1,
        access_type=AccessType.MOUNT,
        created_at=0.0,
    )
    second = jobs.start(later, Transfer(), begun.set)
    second.keep(held_by(locks))

    second.transfer.stop()
    going.set()
    assert first.wait(10)
    assert second.wait(10)
    with pytest.raises(Aborted, match="called off"):
        jobs.take_failure(later.id)
    assert jobs.stop(20.0)

    assert not begun.is_set()
    assert jobs.counts().ended["snapshot", "stopped"] == 1
    with locks.hold("source"):
        pass


def assert_set(event: threading.Event) -> None:
    assert event.wait(10)


def test_at_the_end_none_begins_and_all_stop() -> None:
    jobs, begun = Jobs(1), threading.Event()
    transfer = Transfer()

    def copy() -> None:
        begun.set()
        while True:
            transfer.check()

    jobs.start(RECORD, transfer, copy)
    assert begun.wait(20)

    jobs.end()

    with pytest.raises(Aborted, match="stopping"):
        jobs.start(msgspec.structs.replace(RECORD, id="p-0-3"), Transfer(), lambda: None)
    assert jobs.stop(20.0)


def test_one_that_does_not_end_is_told() -> None:
    jobs, going = Jobs(1), threading.Event()
    jobs.start(RECORD, Transfer(), lambda: assert_set(going))

    assert not jobs.stop(0.1)

    going.set()
    assert jobs.stop(20.0)
