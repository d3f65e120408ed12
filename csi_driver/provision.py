# SPDX-License-Identifier: Apache-2.0
"""From a request to a volume: what exists already, which pool, which size. For CreateVolume and inline volumes.

Callers hold the lock of the volume's name and have checked the topology.
"""

import time
from collections.abc import Mapping

from csi_driver.catalog import SCHEMA, Home
from csi_driver.errors import AlreadyExists, Error, InvalidArgument, OutOfRange, ResourceExhausted, invalid
from csi_driver.model import (
    PLACEMENT_KEYS,
    AccessType,
    Capability,
    CapacityRange,
    Parameters,
    Record,
    VolumeRequest,
    VolumeSpec,
)
from csi_driver.pool import Pool
from csi_driver.pools import Pools


def provision(pools: Pools, request: VolumeRequest) -> tuple[Pool, Home]:
    """The volume that the request describes: the one that exists by its name, or a new one.

    Raises:
        InvalidArgument, OutOfRange: the request cannot be met anywhere.
        AlreadyExists: the name is taken by a volume made with other arguments.
        ResourceExhausted: no pool here has the room; nothing is left behind.
    """
    candidates = pools.candidates(request.parameters)
    existing = pools.find_name(request.name)
    if existing is not None:
        _check_same(existing[0], existing[1], request, candidates)
        return existing
    failures: list[Error] = []
    for pool in candidates:
        try:
            return pool, _create(pool, request)
        except (InvalidArgument, OutOfRange, ResourceExhausted) as error:
            failures.append(error)
    # What this node has no room for, another one may have: that is the answer, whatever the other pools cannot do.
    raise next((failure for failure in failures if not isinstance(failure, InvalidArgument)), failures[0])


def parse_parameters(
    pool: Pool, request_parameters: Mapping[str, str], capabilities: tuple[Capability, ...]
) -> Parameters:
    """The parameters and capabilities as the pool's backend understands them.

    Raises:
        InvalidArgument: one of them cannot be.
    """
    access_type = access_type_of(capabilities)
    own = {key: value for key, value in request_parameters.items() if key not in PLACEMENT_KEYS}
    fs_types = {capability.fs_type for capability in capabilities if capability.fs_type}
    if len(fs_types) > 1:
        raise invalid(
            "volume_capabilities.fs_type", ", ".join(sorted(fs_types)), "a volume has one filesystem"
        )
    return pool.backend.parse(own, access_type, fs_types.pop() if fs_types else "")


def access_type_of(capabilities: tuple[Capability, ...]) -> AccessType:
    """The one access type that all capabilities agree on.

    Raises:
        InvalidArgument: both kinds are asked of one volume.
    """
    kinds = {capability.access_type for capability in capabilities}
    if len(kinds) != 1:
        raise InvalidArgument(
            "volume_capabilities: both block and mount are asked for: a volume is one of them"
        )
    return kinds.pop()


def unsupported(pool: Pool, capabilities: tuple[Capability, ...]) -> str:
    """Why the pool cannot make a volume with these capabilities, or ""."""
    features = pool.backend.features
    for capability in capabilities:
        if capability.access_type not in features.access_types:
            return f"pool {pool.name!r} ({pool.config.backend}) has no {capability.access_type} volumes"
        block = capability.access_type is AccessType.BLOCK
        modes = features.block_access_modes if block else features.access_modes
        if capability.access_mode not in modes:
            return (
                f"pool {pool.name!r} ({pool.config.backend}) cannot do access mode {capability.access_mode}"
            )
    return ""


def fits(size_bytes: int, wanted: CapacityRange) -> bool:
    """Whether a volume of this size satisfies the request (0: it enforces none, and satisfies any)."""
    if not size_bytes:
        return True
    return wanted.required_bytes <= size_bytes and (
        not wanted.limit_bytes or size_bytes <= wanted.limit_bytes
    )


def grown_size(pool: Pool, record: Record, wanted: CapacityRange, now: int) -> int:
    """The size to grow a volume to, never smaller than it is.

    Raises:
        OutOfRange: it is larger than the limit already, or than can be made.
    """
    if fits(now, wanted) and (now or not wanted.required_bytes):
        return now
    if wanted.limit_bytes and now > wanted.limit_bytes:
        raise OutOfRange(
            f"capacity_range.limit_bytes {wanted.limit_bytes}: the volume has {now} bytes, and volumes never shrink"
        )
    return pool.size_limits(record.access_type, pool.parameters(record)).resolve(wanted)


def _create(pool: Pool, request: VolumeRequest) -> Home:
    reason = unsupported(pool, request.capabilities)
    if reason:
        raise InvalidArgument(f"volume_capabilities: {reason}")
    parameters = parse_parameters(pool, request.parameters, request.capabilities)
    access_type = access_type_of(request.capabilities)
    size_bytes = pool.size_limits(access_type, parameters).resolve(request.capacity_range)
    record = Record(
        schema=SCHEMA,
        id=pool.id_of(request.name),
        name=request.name,
        size_bytes=size_bytes,
        access_type=access_type,
        fs_type=parameters.fs_type,
        parameters=dict(request.parameters),
        created_at=time.time(),
        pvc_namespace=request.pvc_namespace,
        pvc_name=request.pvc_name,
        pv_name=request.pv_name,
        ephemeral=request.ephemeral,
    )
    return pool.create(VolumeSpec(size_bytes, access_type, parameters), record)


def _check_same(pool: Pool, home: Home, request: VolumeRequest, candidates: list[Pool]) -> None:
    record = pool.catalog.read(home)
    taken = f"name {request.name!r}: a volume of this name exists as {home.id}"
    if pool not in candidates or record.parameters != dict(request.parameters):
        raise AlreadyExists(f"{taken}, made in pool {pool.name!r} with parameters {record.parameters}")
    if record.access_type is not access_type_of(request.capabilities) or unsupported(
        pool, request.capabilities
    ):
        raise AlreadyExists(f"{taken}, as a {record.access_type} volume: it cannot be used as asked")
    fs_type = parse_parameters(pool, request.parameters, request.capabilities).fs_type
    if record.fs_type != fs_type:
        raise AlreadyExists(f"{taken}, with filesystem {record.fs_type!r}, not {fs_type!r}")
    size_bytes = pool.size_bytes(home) or record.size_bytes
    if not fits(size_bytes, request.capacity_range):
        raise AlreadyExists(
            f"{taken}, with {size_bytes} bytes: not in the range of required_bytes "
            f"{request.capacity_range.required_bytes} and limit_bytes {request.capacity_range.limit_bytes}"
        )
    if record.ephemeral != request.ephemeral:
        raise AlreadyExists(f"{taken}, as an {'inline' if record.ephemeral else 'ordinary'} volume")
