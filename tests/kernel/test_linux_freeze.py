# SPDX-License-Identifier: Apache-2.0
"""Freezes: short, bounded, and never left behind, whatever becomes of who froze."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.linux import freeze, online
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
def freezer(limit_s: float = 5.0) -> Iterator[Freezer]:
    made = Freezer(limit_s)
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
            assert 4 < deadline - time.monotonic() < 5
        assert wrote.wait(5)
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
    with freezer(0.3) as made, opened(ext4_pool) as fd:
        with pytest.raises(FreezeFailed, match="longer than freeze_timeout"):
            with made.frozen([fd]):
                time.sleep(1.0)
                assert not freeze.is_frozen(fd)
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
from csi_driver.linux.freeze import Freezer
fds = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
with Freezer(60).frozen(fds):
    print("frozen", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_driver_thaws(ext4_pool: Path, xfs_pool: Path, signal_: int) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(ext4_pool), str(xfs_pool)]
    with opened(ext4_pool) as one, opened(xfs_pool) as two:
        driver = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"frozen\n"
        assert freeze.is_frozen(one)
        driver.send_signal(signal_)
        driver.wait()
        driver.stdout.close()
        assert until_thawed(one, 5) < 1
        until_thawed(two, 5)


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
