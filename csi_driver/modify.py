# SPDX-License-Identifier: Apache-2.0
"""Change what of a volume can change, now and while it is used. What the parameters say is `mutable`'s business.

A volume has what its VolumeAttributesClass says, all of it and nothing else: what another class said is gone.
"""

import logging
from collections.abc import Mapping

import msgspec

from csi_driver import mutable
from csi_driver.catalog import Home
from csi_driver.errors import Error, InvalidArgument
from csi_driver.pool import Pool
from csi_driver.pools import Pools

log = logging.getLogger(__name__)


def check(pool: Pool, given: Mapping[str, str]) -> None:
    """Whether volumes of this pool can be so.

    Raises:
        InvalidArgument: names what is wrong, or why the pool cannot.
    """
    limited = [key for key in given if key != mutable.RETENTION]
    if mutable.parse(given).limits:
        problem = pool.backend.limits_problem()
        if problem:
            raise InvalidArgument(
                f"mutable_parameters: {', '.join(sorted(limited))}: no limits in pool {pool.name!r}: {problem}"
            )


def modify(pool: Pool, home: Home, given: Mapping[str, str]) -> None:
    """Make these the volume's mutable parameters; a device that is attached obeys them when this returns.

    Raises:
        InvalidArgument: they cannot be; the volume is as it was.
    """
    check(pool, given)
    record = pool.catalog.read(home)
    # Also when the record says it already: the call that wrote it may have died before, or a machine have been booted.
    pool.backend.limit(home, msgspec.structs.replace(record, mutable=dict(given)))
    if record.mutable == dict(given):
        return
    try:
        pool.catalog.update(home, mutable=dict(given))
    except BaseException:
        pool.backend.limit(home, record)
        raise


def adopt(pools: Pools) -> None:
    """Hold the devices that are attached to the limits of their volumes, after a start."""
    for pool in pools:
        if pool.backend.limits_problem():
            continue
        homes = [pool.catalog.home(volume_id) for volume_id in pool.catalog.ids()]
        held = pool.backend.holders(homes)
        for home in homes:
            if home.id not in held:
                continue
            try:
                pool.backend.limit(home, pool.catalog.read(home))
            except (OSError, Error) as error:
                log.error("volume %s: its limits cannot be set: %s", home.id, error)
