# SPDX-License-Identifier: Apache-2.0
"""From the driver's types to the wire. The other way, with all checks, is `convert`'s business."""

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int64Value

from csi_driver.model import (
    Capacity,
    Group,
    HealthEntry,
    NodeInfo,
    Record,
    Snapshot,
    SourceKind,
    Stats,
    StorageEntry,
    Volume,
)
from csi_driver.rpc.pb import csi_pb2 as pb

COPYING = "orlop-copying"
"""Trailing metadata of ListSnapshots, one value a copy under way: what it makes, bytes copied, bytes to copy."""
_MOST_TOLD = 32
# gRPC's clients take 8 KiB of metadata.


def volume(given: Volume) -> pb.Volume:
    """A volume as ListVolumes and CreateVolume tell it."""
    return pb.Volume(
        volume_id=given.id,
        capacity_bytes=given.size_bytes,
        volume_context=given.context,
        accessible_topology=[pb.Topology(segments=given.segments)] if given.segments else None,
        content_source=_source(given.record),
    )


def snapshot(given: Snapshot) -> pb.Snapshot:
    """A snapshot as every call tells it."""
    made = Timestamp()
    made.FromNanoseconds(int(given.record.created_at * 1e9))
    return pb.Snapshot(
        snapshot_id=given.record.id,
        source_volume_id=given.record.source,
        size_bytes=given.record.size_bytes,
        creation_time=made,
        ready_to_use=given.ready,
        group_snapshot_id=given.record.group,
        accessible_topology=[pb.Topology(segments=given.segments)] if given.segments else None,
    )


def copying(given: Iterable[tuple[str, int, int]]) -> tuple[tuple[str, str], ...]:
    """How far copies are: CSI has no field for it, and nobody else minds metadata."""
    told = [f"{made_id} {done} {total}" for made_id, done, total in given]
    return tuple((COPYING, one) for one in told[:_MOST_TOLD])


def group(given: Group) -> pb.VolumeGroupSnapshot:
    """A group of snapshots with all its members."""
    made = Timestamp()
    made.FromNanoseconds(int(given.record.created_at * 1e9))
    return pb.VolumeGroupSnapshot(
        group_snapshot_id=given.record.id,
        snapshots=[snapshot(one) for one in given.snapshots],
        creation_time=made,
        ready_to_use=True,
    )


def ranges(given: Iterable[tuple[int, int]]) -> list[pb.BlockMetadata]:
    """Ranges of bytes, from their starts and ends."""
    return [pb.BlockMetadata(byte_offset=start, size_bytes=end - start) for start, end in given]


def published_nodes(given: Volume, node_id: str) -> list[str]:
    """Where a volume is in use: here, or nowhere that this driver knows of; or who it was handed to."""
    if given.holder is not None:
        return [given.holder] if given.holder else []
    return [node_id] if given.in_use else []


def listed(given: Volume, node_id: str) -> pb.ListVolumesResponse.Entry:
    """One entry of ListVolumes."""
    status = pb.ListVolumesResponse.VolumeStatus(published_node_ids=published_nodes(given, node_id))
    return pb.ListVolumesResponse.Entry(volume=volume(given), status=status)


def validation(
    request: pb.ValidateVolumeCapabilitiesRequest, why_not: str
) -> pb.ValidateVolumeCapabilitiesResponse:
    """CSI: ValidateVolumeCapabilities. What was asked is confirmed as a whole, or not at all."""
    if why_not:
        return pb.ValidateVolumeCapabilitiesResponse(message=why_not)
    confirmed = pb.ValidateVolumeCapabilitiesResponse.Confirmed(
        volume_context=request.volume_context,
        volume_capabilities=request.volume_capabilities,
        parameters=request.parameters,
        mutable_parameters=request.mutable_parameters,
    )
    return pb.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)


def capacity(given: Capacity) -> pb.GetCapacityResponse:
    """CSI: GetCapacity."""
    return pb.GetCapacityResponse(
        available_capacity=given.available_bytes,
        maximum_volume_size=Int64Value(value=given.maximum_volume_bytes),
        minimum_volume_size=Int64Value(value=given.minimum_volume_bytes),
    )


def stats(given: Stats) -> pb.NodeGetVolumeStatsResponse:
    """Bytes always, inodes where they are counted."""
    usage = [
        pb.VolumeUsage(
            unit=pb.VolumeUsage.Unit.BYTES,
            total=given.total_bytes,
            used=given.used_bytes,
            available=given.available_bytes,
        )
    ]
    if given.total_inodes:
        usage.append(
            pb.VolumeUsage(
                unit=pb.VolumeUsage.Unit.INODES,
                total=given.total_inodes,
                used=given.used_inodes,
                available=given.available_inodes,
            )
        )
    return pb.NodeGetVolumeStatsResponse(usage=usage)


def volume_health(volume_id: str, entries: Iterable[HealthEntry]) -> pb.VolumeHealth:
    """What is wrong with one volume; no entries for a healthy one."""
    return pb.VolumeHealth(
        volume_id=volume_id,
        health_statuses=[
            pb.VolumeHealth.VolumeHealthEntry(
                status=pb.VolumeHealthErrorType.Value(entry.status),
                reason=entry.reason,
                message=entry.message,
            )
            for entry in entries
        ],
    )


def storage_health(entries: Iterable[StorageEntry]) -> pb.NodeGetStorageHealthResponse:
    """CSI: NodeGetStorageHealth."""
    return pb.NodeGetStorageHealthResponse(
        backend_health=[
            pb.NodeGetStorageHealthResponse.StorageBackendHealth(
                status=pb.StorageHealthErrorType.Value(entry.status),
                reason=entry.reason,
                message=entry.message,
            )
            for entry in entries
        ]
    )


def node_info(given: NodeInfo) -> pb.NodeGetInfoResponse:
    """CSI: NodeGetInfo."""
    return pb.NodeGetInfoResponse(
        node_id=given.node_id,
        max_volumes_per_node=given.max_volumes,
        accessible_topology=pb.Topology(segments=given.segments),
    )


def _source(record: Record) -> pb.VolumeContentSource | None:
    kind = pb.VolumeContentSource
    match record.source_kind:
        case SourceKind.SNAPSHOT:
            return kind(snapshot=kind.SnapshotSource(snapshot_id=record.source))
        case SourceKind.VOLUME:
            return kind(volume=kind.VolumeSource(volume_id=record.source))
    return None
