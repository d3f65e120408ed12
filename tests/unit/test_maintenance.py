# SPDX-License-Identifier: Apache-2.0
"""The background thread: what it must get to, whatever else fails."""

import threading
import time
from collections.abc import Callable

import pytest

from csi_driver.maintenance import Maintenance
from tests.rig import Rig
from tests.unit.test_pool import BROKEN, BUSY, create, entries, interposed


def test_writes_are_counted_though_the_trash_cannot_be_emptied(rig: Rig) -> None:
    counted = threading.Event()
    create(rig.pool, "kept")
    rig.pool.delete(create(rig.pool, "stuck"))
    maintenance = Maintenance(rig.pools, rig.groups.sweep, refresh_s=0.01)

    with interposed(rig.pool, clear=BUSY, written_bytes=lambda _: counted.set()):
        maintenance.start()
        try:
            assert counted.wait(5)
        finally:
            maintenance.stop()


def test_an_unexpected_failure_is_counted_and_the_thread_goes_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.pool.delete(create(rig.pool, "odd"))
    maintenance = Maintenance(rig.pools, rig.groups.sweep, refresh_s=0.01)

    try:
        with interposed(rig.pool, clear=BROKEN, written_bytes=BROKEN):
            maintenance.start()  # not before: it would have emptied the trash by now
            _until(lambda: maintenance.failures["p"] >= 3)
        _until(lambda: entries(rig.pool, "trash") == [])
    finally:
        maintenance.stop()

    assert "ValueError: broken" in caplog.text
    rig.pool.adopt()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
