# SPDX-License-Identifier: Apache-2.0
"""Freezes: short, bounded, and never left behind, whatever becomes of who froze."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from csi_driver.linux import freeze, online, syscall
from csi_driver.linux.freeze import FreezeFailed, Freezer

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def freezer(limit_s: float = 5.0, expedited: Path = freeze.EXPEDITED) -> Iterator[Freezer]:
    made = Freezer(limit_s, expedited)
    try:
        yield made
    finally:
        made.close()


def until_thawed(fd: int, timeout_s: float) -> float:
    began = time.monotonic()
    while freeze.is_frozen(fd):
        assert time.monotonic() - began < timeout_s, "still frozen"
        time.sleep(0.02)
    return time.monotonic() - began


def until(true: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < 60
        time.sleep(0.02)


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    """In the place of the kernel's."""
    path = tmp_path / "rcu_expedited"
    path.write_text("0\n")
    return path


def test_nothing_is_written_while_it_lasts(ext4_pool: Path) -> None:
    wrote = threading.Event()

    def write() -> None:
        (ext4_pool / "file").write_text("x")
        wrote.set()

    with freezer() as made, opened(ext4_pool) as fd:
        with made.frozen([fd]) as deadline:
            writer = threading.Thread(target=write)
            writer.start()
            assert not wrote.wait(0.3)
            assert 0 < deadline - time.monotonic() < 5
        assert wrote.wait(60)
        writer.join()
        assert not freeze.is_frozen(fd)
        assert (made.count, made.longest_s > 0.3) == (1, True)


def test_several_are_still_together(ext4_pool: Path, xfs_pool: Path) -> None:
    with freezer() as made, opened(ext4_pool) as one, opened(xfs_pool) as two:
        for _ in range(3):
            with made.frozen([one, two]):
                assert freeze.is_frozen(one)
                assert freeze.is_frozen(two)
            assert not freeze.is_frozen(one)
            assert not freeze.is_frozen(two)


def test_it_ends_at_the_limit_and_the_work_does_not_count(ext4_pool: Path) -> None:
    with freezer(1.0) as made, opened(ext4_pool) as fd:
        with pytest.raises(FreezeFailed, match="longer than freeze_timeout"):
            with made.frozen([fd]):
                until_thawed(fd, 30)
        made.limit_s = 5.0
        with made.frozen([fd]):
            pass


def test_one_that_is_frozen_already_is_left_so(ext4_pool: Path, xfs_pool: Path) -> None:
    with freezer() as made, opened(ext4_pool) as one, opened(xfs_pool) as two:
        online.freeze(two)
        try:
            with pytest.raises(FreezeFailed, match="somebody else"):
                with made.frozen([one, two]):
                    raise AssertionError("not frozen")
            assert not freeze.is_frozen(one)
            assert freeze.is_frozen(two)
        finally:
            online.thaw(two)


def test_a_failing_body_thaws(ext4_pool: Path) -> None:
    with freezer() as made, opened(ext4_pool) as fd:
        with pytest.raises(ZeroDivisionError):
            with made.frozen([fd]):
                raise ZeroDivisionError
        assert not freeze.is_frozen(fd)


PROGRAM = """
import os, sys, time
from pathlib import Path
from csi_driver.linux.freeze import Freezer
fds = [os.open(path, os.O_RDONLY) for path in sys.argv[2:]]
with Freezer(60, Path(sys.argv[1])).frozen(fds):
    print("frozen", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_driver_thaws(ext4_pool: Path, xfs_pool: Path, switch: Path, signal_: int) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(switch), str(ext4_pool), str(xfs_pool)]
    with opened(ext4_pool) as one, opened(xfs_pool) as two:
        driver = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"frozen\n"
        assert freeze.is_frozen(one)
        assert switch.read_text() == "1\n"
        driver.send_signal(signal_)
        driver.wait()
        driver.stdout.close()
        # Its limit is a minute.
        until_thawed(one, 30)
        until_thawed(two, 30)
        until(lambda: switch.read_text() == "0\n")


def test_a_dead_watchdog_is_replaced(ext4_pool: Path) -> None:
    with freezer() as made, opened(ext4_pool) as fd:
        with made.frozen([fd]):
            pass
        assert made._watchdog is not None
        process = made._watchdog._process
        process.kill()
        process.wait()
        with made.frozen([fd]):
            assert freeze.is_frozen(fd)


def test_the_kernel_hurries_while_it_lasts_and_not_after(ext4_pool: Path) -> None:
    if not os.access(freeze.EXPEDITED, os.W_OK):
        pytest.skip("this kernel cannot be told to expedite its grace periods here")
    before = freeze.EXPEDITED.read_text()
    with freezer() as made, opened(ext4_pool) as fd:
        with made.frozen([fd]):
            assert freeze.EXPEDITED.read_text().strip() == "1"
        assert freeze.EXPEDITED.read_text() == before


def test_who_is_late_is_hurried_no_more(ext4_pool: Path, switch: Path) -> None:
    with freezer(0.1, switch) as made, opened(ext4_pool) as fd:
        with pytest.raises(FreezeFailed), made.frozen([fd]):
            time.sleep(0.3)
        assert switch.read_text() == "0\n"


def test_a_kernel_that_somebody_else_has_told_to_hurry_stays_so(ext4_pool: Path, switch: Path) -> None:
    switch.write_text("1\n")
    with freezer(expedited=switch) as made, opened(ext4_pool) as fd, made.frozen([fd]):
        pass
    assert switch.read_text() == "1\n"


def test_two_drivers_do_not_leave_the_kernel_hurried(ext4_pool: Path, xfs_pool: Path, switch: Path) -> None:
    with freezer(expedited=switch) as one, freezer(expedited=switch) as two:
        with opened(ext4_pool) as first, opened(xfs_pool) as second, ExitStack() as later:
            with one.frozen([first]):
                later.enter_context(two.frozen([second]))
                assert switch.read_text() == "1\n"
            later.close()
    assert switch.read_text() == "0\n"


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_kernel_that_cannot_hurry_freezes_all_the_same(ext4_pool: Path, tmp_path: Path, path: str) -> None:
    with freezer(expedited=tmp_path / path) as made, opened(ext4_pool) as fd, made.frozen([fd]):
        assert freeze.is_frozen(fd)


def test_what_nobody_holds_any_more_can_be_thawed(ext4_pool: Path) -> None:
    with opened(ext4_pool) as fd:
        online.freeze(fd)
        assert freeze.thaw_left(fd)
        assert not freeze.is_frozen(fd)
        assert not freeze.thaw_left(fd)


def test_what_was_written_in_a_long_writing_out_is_written_before_the_freeze(
    monkeypatch: pytest.MonkeyPatch, ext4_pool: Path
) -> None:
    """A volume that is written to all the time is never clean: it is frozen all the same, after a few rounds."""
    rounds: list[int] = []

    def slow(fd: int) -> None:
        rounds.append(fd)
        time.sleep(0.25 if len(rounds) != 2 else 0)

    monkeypatch.setattr(freeze, "_QUICK_S", 0.2)
    monkeypatch.setattr(syscall, "syncfs", slow)
    with freezer() as made, opened(ext4_pool) as fd:
        with made.frozen([fd]):
            pass
        assert len(rounds) == 2
        with made.frozen([fd]):
            pass
        assert len(rounds) == 2 + 4


def test_what_cannot_be_written_out_in_time_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would write it with writers held, and let nobody thaw before that has ended."""
    monkeypatch.setattr(syscall, "syncfs", lambda _: time.sleep(0.3))

    freeze._write_out([0], 30)
    with pytest.raises(FreezeFailed, match="to reach the disk"):
        freeze._write_out([0], 0.1)
