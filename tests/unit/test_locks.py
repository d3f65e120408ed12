# SPDX-License-Identifier: Apache-2.0
"""Locks that refuse."""

import threading

import pytest

from csi_driver.errors import Aborted
from csi_driver.locks import Locks


def test_held_key_is_refused_and_named() -> None:
    locks = Locks()

    with locks.hold("a"), pytest.raises(Aborted, match="a"), locks.hold("a"):
        pass


def test_other_keys_are_free() -> None:
    locks = Locks()

    with locks.hold("a"), locks.hold("b"):
        pass


def test_several_keys_are_held_all_or_none() -> None:
    locks = Locks()

    with locks.hold("b"):
        with pytest.raises(Aborted), locks.hold("a", "b", "c"):
            pass
        with locks.hold("a", "c"):
            pass


def test_keys_are_free_after_a_failure() -> None:
    locks = Locks()

    with pytest.raises(ValueError, match="inside"), locks.hold("a", "b"):
        raise ValueError("inside")

    with locks.hold("a", "b"):
        pass


def test_the_same_key_twice_in_one_call_is_one() -> None:
    locks = Locks()

    with locks.hold("a", "a"):
        pass

    with locks.hold("a"):
        pass


def test_one_of_many_threads_gets_the_lock() -> None:
    locks = Locks()
    ready = threading.Barrier(16)
    done = threading.Event()
    got: list[bool] = []

    def contend() -> None:
        ready.wait()
        try:
            with locks.hold("a"):
                got.append(True)
                done.wait(5)
        except Aborted:
            got.append(False)
            if len(got) == 16:
                done.set()

    threads = [threading.Thread(target=contend) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert sorted(got) == [False] * 15 + [True]
