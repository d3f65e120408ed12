# SPDX-License-Identifier: Apache-2.0
"""What to copy for a snapshot, alone or in a group: the record it gets, and what its class may say.

How and when it is copied is `copies`' business.
"""

import time
from collections.abc import Mapping

from csi_driver.catalog import Home
from csi_driver.copies import Copier
from csi_driver.errors import InvalidArgument, unknown_keys
from csi_driver.identity import SCHEMA
from csi_driver.model import SnapshotRecord, VolumeSpec
from csi_driver.pool import CopyOrder, Pool


def order_for(copier: Copier, pool: Pool, home: Home, name: str, group: str = "") -> CopyOrder:
    """What to copy for a snapshot of this name."""
    volume = pool.catalog.read(home)
    size_bytes = pool.size_bytes(home) or volume.size_bytes
    record = SnapshotRecord(
        schema=SCHEMA,
        id=pool.snapshot_id_of(name),
        name=name,
        source=home.id,
        size_bytes=size_bytes,
        access_type=volume.access_type,
        fs_type=volume.fs_type,
        parameters=volume.parameters,
        created_at=time.time(),
        group=group,
        pvc_namespace=volume.pvc_namespace,
        pvc_name=volume.pvc_name,
    )
    spec = VolumeSpec(size_bytes, volume.access_type, pool.parameters(volume), snapshot=True)
    return CopyOrder(pool, home, spec, record, copier.transfer(pool))


def check_parameters(parameters: Mapping[str, str]) -> None:
    """Refuse what a VolumeSnapshotClass says that means nothing here.

    Raises:
        InvalidArgument: names it.
    """
    if parameters:
        raise InvalidArgument(unknown_keys("parameters", parameters, ("none",)))
