# SPDX-License-Identifier: Apache-2.0
"""Inline ephemeral volumes: made when a pod's target is published, gone when it is unpublished.

Kubelet names them; a volume of that name in any pool, marked so in its record, is one. Its `volumeAttributes` are a
`size` and the parameters of a StorageClass.
"""

from collections.abc import Mapping
from pathlib import Path

from csi_driver.catalog import Home
from csi_driver.errors import InvalidArgument, invalid
from csi_driver.linux import mount
from csi_driver.model import CapacityRange, PublishRequest, VolumeId, VolumeRequest
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.values import parse_size

EPHEMERAL = "csi.storage.k8s.io/ephemeral"
SIZE = "size"
_METADATA = "csi.storage.k8s.io/"
_MOUNT = "mount"


def is_inline(context: Mapping[str, str]) -> bool:
    """Whether a volume_context is that of an inline volume."""
    return context.get(EPHEMERAL) == "true"


def find(pools: Pools, volume_id: str) -> tuple[Pool, Home] | None:
    """The inline volume that kubelet calls so, or None."""
    if VolumeId.find(volume_id) is not None:
        return None
    found = pools.find_name(volume_id)
    if found is None or not found[0].catalog.read(found[1]).ephemeral:
        return None
    return found


def volume_request(request: PublishRequest) -> VolumeRequest:
    """What to make for a publish request.

    Raises:
        InvalidArgument: no size, or a bad one; or it is called as only volumes with a claim are.
    """
    if VolumeId.find(request.volume_id) is not None:
        raise invalid(
            "volume_id", request.volume_id, "an inline volume cannot be called like an ordinary one"
        )
    try:
        size_bytes = parse_size(request.context.get(SIZE, ""))
    except ValueError as error:
        raise InvalidArgument(
            f"volume_context.{SIZE}: an inline volume needs a size, like 1Gi: {error}"
        ) from error
    parameters = {
        key: value for key, value in request.context.items() if key != SIZE and not key.startswith(_METADATA)
    }
    return VolumeRequest(
        name=request.volume_id,
        capabilities=(request.capability,),
        capacity_range=CapacityRange(required_bytes=size_bytes),
        parameters=parameters,
        pvc_namespace=request.context.get(f"{_METADATA}pod.namespace", ""),
        ephemeral=True,
    )


def staging_path(home: Home) -> Path:
    """Where its filesystem is mounted for the moment of publishing: kubelet gives inline volumes no staging path."""
    path = home.path / _MOUNT
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def delete(pool: Pool, home: Home) -> None:
    """Let the volume go at once, from whatever state a crash has left it in.

    Raises:
        FailedPrecondition: something still uses it.
    """
    mount.unmount(home.path / _MOUNT)
    pool.backend.detach(home)
    pool.delete(home, keep=False)
