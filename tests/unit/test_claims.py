# SPDX-License-Identifier: Apache-2.0
"""Who is at which home, where several drivers have one pool."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver import claims
from csi_driver.claims import Claims
from csi_driver.errors import Aborted
from csi_driver.linux import files


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    fd = files.open_directory(tmp_path)
    yield fd
    os.close(fd)


@pytest.fixture
def one(root_fd: int) -> Iterator[Claims]:
    made = Claims(root_fd)
    yield made
    made.close()


@pytest.fixture
def two(root_fd: int) -> Iterator[Claims]:
    made = Claims(root_fd)
    yield made
    made.close()


def test_one_has_an_id_until_it_gives_it_back(one: Claims, two: Claims) -> None:
    one.hold("a")
    one.hold("a")

    assert not one.take("a") and not two.take("a") and two.take("b")
    with pytest.raises(Aborted):
        two.hold("a")
    one.give_back("a")
    one.give_back("a")
    two.hold("a")


def test_a_claim_that_the_server_has_forgotten_is_not_taken_for_ours(
    one: Claims, two: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.hold("a")
    one.hold("b")
    files.unlock_byte(one._fd, claims._place("a"))  # as by the end of a lease
    two.hold("a")

    monkeypatch.setattr(claims, "SURE_S", 0.0)
    one.hold("b")
    with pytest.raises(Aborted):
        one.hold("a")
    one.give_back("a")
    assert not one.take("a") and not two.take("b")
    two.give_back("a")
    one.hold("a")


def test_threads_claim_beside_each_other_and_leave_nothing_open(
    one: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lock_byte = [], files.lock_byte

    def slow(fd: int, offset: int) -> bool:
        opened.append(fd)
        time.sleep(0.001)
        return lock_byte(fd, offset)

    monkeypatch.setattr(files, "lock_byte", slow)

    def claim(number: int) -> None:
        for turn in range(10):
            one.hold(f"{number}-{turn}")
            one.give_back(f"{number}-{turn}")

    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(claim, range(16)))
    assert len(opened) == 160 and len(os.listdir("/proc/self/fd")) == before
