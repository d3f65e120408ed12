# SPDX-License-Identifier: Apache-2.0
"""From a request to a volume: what exists already, which pool, which size. For CreateVolume and inline volumes.

Callers hold the lock of the volume's name and have checked the topology.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from csi_driver import modify
from csi_driver.backends.base import PAYLOAD_IMAGE
from csi_driver.catalog import Home
from csi_driver.copies import Copier, being_copied, find_source
from csi_driver.errors import AlreadyExists, Error, InvalidArgument, OutOfRange, ResourceExhausted, invalid
from csi_driver.identity import SCHEMA
from csi_driver.model import (
    PLACEMENT_KEYS,
    AccessType,
    Capability,
    CapacityRange,
    Parameters,
    Record,
    SnapshotRecord,
    Source,
    SourceKind,
    VolumeRequest,
    VolumeSpec,
)
from csi_driver.pool import CopyOrder, Pool
from csi_driver.pools import Pools


@dataclass(frozen=True, slots=True)
class Copying:
    """How to copy for a request that has a source: with whom, and what is locked meanwhile."""

    copier: Copier
    held: ExitStack


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a request's source is."""

    pool: Pool
    home: Home
    record: Record | SnapshotRecord
    size_bytes: int


def provision(pools: Pools, request: VolumeRequest, copying: Copying | None = None) -> tuple[Pool, Home]:
    """The volume that the request describes: the one that exists by its name, or a new one.

    Raises:
        NotFound: the source is nowhere.
        Aborted: it is being copied: repeat.
        InvalidArgument, OutOfRange: the request cannot be met anywhere.
        AlreadyExists: the name is taken by a volume made with other arguments.
        ResourceExhausted: no pool here has the room; nothing is left behind.
    """
    candidates = pools.candidates(request.parameters)
    existing = pools.find_name(request.name, candidates)
    if existing is not None:
        _check_same(existing[0], existing[1], request, candidates)
        return existing
    origin = _origin(pools, request.source) if request.source else None
    if origin is not None:
        # Where it is, a copy is cheapest; the sort is stable.
        candidates.sort(key=lambda pool: pool is not origin.pool)
    failures: list[Error] = []
    for pool in candidates:
        try:
            if origin is not None and copying is not None:
                return pool, _copy(pool, request, origin, copying)
            return pool, _create(pool, request)
        except (InvalidArgument, OutOfRange, ResourceExhausted) as error:
            failures.append(error)
    # What this node has no room for, another one may have: that is the answer, whatever the other pools cannot do.
    raise next((failure for failure in failures if not isinstance(failure, InvalidArgument)), failures[0])


def parse_parameters(
    pool: Pool,
    request_parameters: Mapping[str, str],
    capabilities: tuple[Capability, ...],
    usual_fs_type: str = "",
) -> Parameters:
    """The parameters and capabilities as the pool's backend understands them.

    `usual_fs_type` is what holds where none is asked for (a copy has its source's filesystem).

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
    asked = fs_types.pop() if fs_types else ""
    if usual_fs_type and not own.get("fsType"):
        asked = asked or usual_fs_type
    return pool.backend.parse(own, access_type, asked)


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
    _check_supported(pool, request)
    parameters = parse_parameters(pool, request.parameters, request.capabilities)
    access_type = access_type_of(request.capabilities)
    size_bytes = pool.size_limits(access_type, parameters).resolve(request.capacity_range)
    modify.check(pool, request.mutable)
    spec = VolumeSpec(size_bytes, access_type, parameters)
    return pool.create(spec, _record(pool, request, spec))


def _copy(pool: Pool, request: VolumeRequest, origin: _Origin, copying: Copying) -> Home:
    _check_supported(pool, request)
    access_type = access_type_of(request.capabilities)
    parameters = parse_parameters(
        pool, request.parameters, request.capabilities, _fs_type_of(pool, origin.record)
    )
    _check_copyable(pool, origin, access_type, parameters)
    modify.check(pool, request.mutable)
    wanted = request.capacity_range
    if wanted.required_bytes and wanted.required_bytes < origin.size_bytes:
        raise OutOfRange(
            f"capacity_range.required_bytes {wanted.required_bytes}: the source has {origin.size_bytes} bytes, and a "
            "copy is never smaller"
        )
    wanted = CapacityRange(wanted.required_bytes or origin.size_bytes, wanted.limit_bytes)
    spec = VolumeSpec(pool.size_limits(access_type, parameters).resolve(wanted), access_type, parameters)
    record = _record(pool, request, spec)
    order = CopyOrder(origin.pool, origin.home, spec, record, copying.copier.transfer(pool))
    job = copying.copier.copy(pool, order, copying.held)
    if job is not None:
        # Also if it has ended this moment: the locks are gone, and a repeat finds what came of it.
        raise being_copied(job)
    return pool.catalog.get(record.id)


def _origin(pools: Pools, source: Source) -> _Origin:
    pool, home = find_source(pools, source)
    if source.kind is SourceKind.SNAPSHOT:
        snapshot = pool.catalog.read_snapshot(home)
        return _Origin(pool, home, snapshot, snapshot.size_bytes)
    record = pool.catalog.read(home)
    return _Origin(pool, home, record, pool.size_bytes(home) or record.size_bytes)


def _check_supported(pool: Pool, request: VolumeRequest) -> None:
    reason = unsupported(pool, request.capabilities)
    if reason:
        raise InvalidArgument(f"volume_capabilities: {reason}")


def _check_copyable(pool: Pool, origin: _Origin, access_type: AccessType, parameters: Parameters) -> None:
    if origin.record.access_type is not access_type:
        raise InvalidArgument(
            f"volume_content_source: it is a {origin.record.access_type} volume, not {access_type}: ask for the same"
        )
    kind = pool.backend.features.payload
    if origin.pool.backend.features.payload != kind:
        raise InvalidArgument(
            f"volume_content_source: pool {origin.pool.name!r} ({origin.pool.config.backend}) holds other things than "
            f"pool {pool.name!r} ({pool.config.backend}): copy into a pool of the same backend"
        )
    if kind == PAYLOAD_IMAGE and origin.record.fs_type != parameters.fs_type:
        raise InvalidArgument(
            f"fsType {parameters.fs_type!r}: the source's filesystem is {origin.record.fs_type!r}, and so is a copy's"
        )


def _fs_type_of(pool: Pool, record: Record | SnapshotRecord) -> str:
    return record.fs_type if pool.backend.features.payload == PAYLOAD_IMAGE else ""


def _record(pool: Pool, request: VolumeRequest, spec: VolumeSpec) -> Record:
    return Record(
        schema=SCHEMA,
        id=pool.id_of(request.name),
        name=request.name,
        size_bytes=spec.size_bytes,
        access_type=spec.access_type,
        fs_type=spec.parameters.fs_type,
        parameters=dict(request.parameters),
        created_at=time.time(),
        pvc_namespace=request.pvc_namespace,
        pvc_name=request.pvc_name,
        pv_name=request.pv_name,
        ephemeral=request.ephemeral,
        mutable=dict(request.mutable),
        source=request.source.id if request.source else "",
        source_kind=request.source.kind if request.source else None,
    )


def _check_same(pool: Pool, home: Home, request: VolumeRequest, candidates: list[Pool]) -> None:
    record = pool.catalog.read(home)
    taken = f"name {request.name!r}: a volume of this name exists as {home.id}"
    if pool not in candidates or record.parameters != dict(request.parameters):
        raise AlreadyExists(f"{taken}, made in pool {pool.name!r} with parameters {record.parameters}")
    if record.access_type is not access_type_of(request.capabilities) or unsupported(
        pool, request.capabilities
    ):
        raise AlreadyExists(f"{taken}, as a {record.access_type} volume: it cannot be used as asked")
    if record.source != (request.source.id if request.source else ""):
        raise AlreadyExists(f"{taken}, made from {record.source or 'nothing'!r}")
    usual = _fs_type_of(pool, record) if record.source else ""
    fs_type = parse_parameters(pool, request.parameters, request.capabilities, usual).fs_type
    if record.fs_type != fs_type:
        raise AlreadyExists(f"{taken}, with filesystem {record.fs_type!r}, not {fs_type!r}")
    size_bytes = pool.size_bytes(home) or record.size_bytes
    if not fits(size_bytes, request.capacity_range):
        raise AlreadyExists(
            f"{taken}, with {size_bytes} bytes: not in the range of required_bytes "
            f"{request.capacity_range.required_bytes} and limit_bytes {request.capacity_range.limit_bytes}"
        )
    if record.mutable != dict(request.mutable):
        raise AlreadyExists(f"{taken}, with mutable_parameters {record.mutable}")
    if record.ephemeral != request.ephemeral:
        raise AlreadyExists(f"{taken}, as an {'inline' if record.ephemeral else 'ordinary'} volume")
