# SPDX-License-Identifier: Apache-2.0
"""The background thread: what it must get to, whatever else fails."""

import threading

from csi_driver.maintenance import Maintenance
from tests.rig import Rig
from tests.unit.test_pool import BUSY, create, interposed


def test_writes_are_counted_though_the_trash_cannot_be_emptied(rig: Rig) -> None:
    counted = threading.Event()
    create(rig.pool, "kept")
    rig.pool.delete(create(rig.pool, "stuck"))
    maintenance = Maintenance(rig.pools, refresh_s=0.01)

    with interposed(rig.pool, clear=BUSY, written_bytes=lambda _: counted.set()):
        maintenance.start()
        try:
            assert counted.wait(5)
        finally:
            maintenance.stop()
