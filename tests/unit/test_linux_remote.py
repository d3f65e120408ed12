# SPDX-License-Identifier: Apache-2.0
"""The children that ask servers: how they start and end. No server is asked."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import Unavailable
from csi_driver.linux import remote
from csi_driver.linux.remote import Breaker, Server

LATE = "tests.unit.late_worker"


@pytest.fixture
def breaker() -> Breaker:
    return Breaker("server")


@pytest.fixture
def server(breaker: Breaker) -> Iterator[Server]:
    made = Server(breaker, LATE)
    yield made
    made.close()


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_what_a_child_takes_to_start_is_not_the_servers_time(server: Server, breaker: Breaker) -> None:
    """Else on a busy machine each call would kill its child, start another, and never come to its end."""
    found, _ = server.call("usage", 0.5, path="/")

    assert found["total_bytes"] > 0
    assert breaker.problem() == ""


def test_a_child_that_does_not_start_is_ended_and_nobody_s_fault(
    server: Server, breaker: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_START_S", 0.2)
    before = children()

    with pytest.raises(Unavailable, match="does not start"):
        server.call("usage", 5, path="/")

    assert children() == before
    assert breaker.problem() == ""
