# SPDX-License-Identifier: Apache-2.0
"""From the wire to the driver's types: every request is checked here, and nowhere else.

What a request asks for, and whether it can be had, is the layers' below; `answers` goes the other way.
"""

from collections.abc import Iterable, Mapping

from csi_driver.errors import InvalidArgument, invalid
from csi_driver.model import (
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    PublishRequest,
    Segments,
    Source,
    SourceKind,
    StageRequest,
    TopologyRequirement,
    VolumeRequest,
)
from csi_driver.rpc import check
from csi_driver.rpc.pb import csi_pb2 as pb

METADATA = "csi.storage.k8s.io/"
"""Keys that Kubernetes' own programs add to maps; none is a user's parameter."""
FS_TYPE = f"{METADATA}fstype"
PVC_NAME = f"{METADATA}pvc/name"
PVC_NAMESPACE = f"{METADATA}pvc/namespace"
PV_NAME = f"{METADATA}pv/name"
TOKENS = f"{METADATA}serviceAccount.tokens"
"""Credentials of the pod. Nothing here needs them, and what is not kept cannot leak."""

_MODES = {
    number: AccessMode(name)
    for name, number in pb.VolumeCapability.AccessMode.Mode.items()
    if name in AccessMode.__members__
}


# Controller


def volume_request(request: pb.CreateVolumeRequest) -> VolumeRequest:
    """CSI: CreateVolume."""
    name = check.name("name", request.name)
    wanted = _capacity_range(request.capacity_range)
    given = check.mapping("parameters", request.parameters)
    capabilities = tuple(
        _with_fs_type(capability, given.get(FS_TYPE, ""))
        for capability in required_capabilities(request.volume_capabilities)
    )
    return VolumeRequest(
        name=name,
        capabilities=capabilities,
        capacity_range=wanted,
        parameters=_own(given),
        topology=_topology(request.accessibility_requirements),
        pvc_namespace=given.get(PVC_NAMESPACE, ""),
        pvc_name=given.get(PVC_NAME, ""),
        pv_name=given.get(PV_NAME, ""),
        source=_source(request.volume_content_source) if request.HasField("volume_content_source") else None,
        mutable=_mutable(request.mutable_parameters),
    )


def snapshot_request(
    request: pb.CreateSnapshotRequest,
) -> tuple[str, str, dict[str, str], TopologyRequirement]:
    """CSI: CreateSnapshot. The name, the volume, the class's parameters, where it shall be."""
    return (
        check.name("name", request.name),
        check.required("source_volume_id", request.source_volume_id),
        _own(check.mapping("parameters", request.parameters)),
        _topology(request.accessibility_requirements),
    )


def group_request(
    request: pb.CreateVolumeGroupSnapshotRequest,
) -> tuple[str, list[str], dict[str, str]]:
    """CSI: CreateVolumeGroupSnapshot. The name, the volumes, the class's parameters."""
    name = check.name("name", request.name)
    if not request.source_volume_ids:
        raise InvalidArgument("source_volume_ids: missing: name at least one volume")
    sources = [check.required("source_volume_ids", one) for one in request.source_volume_ids]
    return name, sources, _own(check.mapping("parameters", request.parameters))


def group(
    request: pb.DeleteVolumeGroupSnapshotRequest | pb.GetVolumeGroupSnapshotRequest,
) -> tuple[str, list[str]]:
    """CSI: DeleteVolumeGroupSnapshot, GetVolumeGroupSnapshot. The group and the snapshots that it is said to have."""
    return check.required("group_snapshot_id", request.group_snapshot_id), list(request.snapshot_ids)


def allocated(request: pb.GetMetadataAllocatedRequest) -> tuple[str, int, int]:
    """CSI: GetMetadataAllocated. The snapshot, from where on, and the most ranges in a message (0: any)."""
    return (
        check.required("snapshot_id", request.snapshot_id),
        check.not_negative("starting_offset", request.starting_offset),
        check.not_negative("max_results", request.max_results),
    )


def delta(request: pb.GetMetadataDeltaRequest) -> tuple[str, str, int, int]:
    """CSI: GetMetadataDelta. Both snapshots, from where on, and the most ranges in a message (0: any)."""
    return (
        check.required("base_snapshot_id", request.base_snapshot_id),
        check.required("target_snapshot_id", request.target_snapshot_id),
        check.not_negative("starting_offset", request.starting_offset),
        check.not_negative("max_results", request.max_results),
    )


def snapshot_page(request: pb.ListSnapshotsRequest) -> tuple[int, str, str, str]:
    """CSI: ListSnapshots. The most entries wanted, the token, and the volume and snapshot asked for ("": any)."""
    return (
        *page(request),
        # An id of any length is one that nothing has.
        request.source_volume_id,
        request.snapshot_id,
    )


def snapshot_id(request: pb.DeleteSnapshotRequest | pb.GetSnapshotRequest) -> str:
    """Of a call that needs nothing else."""
    return check.required("snapshot_id", request.snapshot_id)


def validation(
    request: pb.ValidateVolumeCapabilitiesRequest,
) -> tuple[str, tuple[Capability, ...], dict[str, str], dict[str, str], dict[str, str]]:
    """CSI: ValidateVolumeCapabilities. The volume's id, capabilities, parameters, context and mutable parameters."""
    volume_id = check.required("volume_id", request.volume_id)
    capabilities = required_capabilities(request.volume_capabilities)
    parameters = _own(check.mapping("parameters", request.parameters))
    mutable = _mutable(request.mutable_parameters)
    return volume_id, capabilities, parameters, context(request.volume_context), mutable


def modification(request: pb.ControllerModifyVolumeRequest) -> tuple[str, dict[str, str]]:
    """CSI: ControllerModifyVolume."""
    volume_id = check.required("volume_id", request.volume_id)
    given = _mutable(request.mutable_parameters)
    if not given:
        raise InvalidArgument("mutable_parameters: missing: say what shall be changed")
    return volume_id, given


def page(
    request: pb.ListVolumesRequest | pb.ControllerListVolumeHealthRequest | pb.ListSnapshotsRequest,
) -> tuple[int, str]:
    """CSI: ListVolumes and the like. The most entries wanted (0: all) and the token."""
    return (
        check.not_negative("max_entries", request.max_entries),
        check.optional("starting_token", request.starting_token),
    )


def capacity(
    request: pb.GetCapacityRequest,
) -> tuple[tuple[Capability, ...], dict[str, str], Segments | None]:
    """CSI: GetCapacity. Capabilities, parameters, and the place asked about (None: anywhere)."""
    given = check.mapping("parameters", request.parameters)
    capabilities = tuple(
        _with_fs_type(_capability_of_capacity(capability), given.get(FS_TYPE, ""))
        for capability in request.volume_capabilities
    )
    place = request.accessible_topology if request.HasField("accessible_topology") else None
    segments = check.mapping("accessible_topology.segments", place.segments) if place is not None else None
    return capabilities, _own(given), segments


def controller_expansion(
    request: pb.ControllerExpandVolumeRequest,
) -> tuple[str, CapacityRange, Capability | None]:
    """CSI: ControllerExpandVolume."""
    volume_id = check.required("volume_id", request.volume_id)
    wanted = _capacity_range(request.capacity_range)
    if wanted == CapacityRange():
        raise InvalidArgument(
            "capacity_range: missing: say with required_bytes how large the volume shall be"
        )
    return volume_id, wanted, _optional_capability(request)


def attachment(
    request: pb.ControllerPublishVolumeRequest,
) -> tuple[str, str, Capability, dict[str, str]]:
    """CSI: ControllerPublishVolume. The volume's id, the node's, how it is used, its context."""
    return (
        check.required("volume_id", request.volume_id),
        check.required("node_id", request.node_id, check.NODE_ID_BYTES),
        _required_capability(request),
        context(request.volume_context),
    )


def detachment(request: pb.ControllerUnpublishVolumeRequest) -> tuple[str, str]:
    """CSI: ControllerUnpublishVolume. The volume's id and the node's ("": all nodes)."""
    return (
        check.required("volume_id", request.volume_id),
        check.optional("node_id", request.node_id, check.NODE_ID_BYTES),
    )


# Node


def stage_request(request: pb.NodeStageVolumeRequest) -> StageRequest:
    """CSI: NodeStageVolume."""
    return StageRequest(
        volume_id=check.required("volume_id", request.volume_id),
        staging_target_path=check.path("staging_target_path", request.staging_target_path),
        capability=_required_capability(request),
        context=context(request.volume_context),
        handed=check.mapping("publish_context", request.publish_context),
    )


def publish_request(request: pb.NodePublishVolumeRequest) -> PublishRequest:
    """CSI: NodePublishVolume."""
    return PublishRequest(
        volume_id=check.required("volume_id", request.volume_id),
        target_path=check.path("target_path", request.target_path),
        capability=_required_capability(request),
        # Kubernetes stages no inline volumes.
        staging_target_path=check.optional_path("staging_target_path", request.staging_target_path),
        readonly=request.readonly,
        context=context(request.volume_context),
    )


def unstage(request: pb.NodeUnstageVolumeRequest) -> tuple[str, str]:
    """CSI: NodeUnstageVolume. The volume's id and the staging path."""
    return (
        check.required("volume_id", request.volume_id),
        check.path("staging_target_path", request.staging_target_path),
    )


def unpublish(request: pb.NodeUnpublishVolumeRequest) -> tuple[str, str]:
    """CSI: NodeUnpublishVolume. The volume's id and the target path."""
    return (
        check.required("volume_id", request.volume_id),
        check.path("target_path", request.target_path),
    )


def stats(request: pb.NodeGetVolumeStatsRequest) -> tuple[str, str, str]:
    """CSI: NodeGetVolumeStats. The volume's id, the path, and where it is staged."""
    return (
        check.required("volume_id", request.volume_id),
        check.published_path("volume_path", request.volume_path),
        check.optional_path("staging_target_path", request.staging_target_path),
    )


def node_expansion(
    request: pb.NodeExpandVolumeRequest,
) -> tuple[str, str, str, CapacityRange, Capability | None]:
    """CSI: NodeExpandVolume. The volume's id, the path, where it is staged, the size, how it is used."""
    return (
        check.required("volume_id", request.volume_id),
        check.published_path("volume_path", request.volume_path),
        check.optional_path("staging_target_path", request.staging_target_path),
        _capacity_range(request.capacity_range),
        _optional_capability(request),
    )


def volume_health(request: pb.NodeGetVolumeHealthRequest) -> tuple[str, str]:
    """CSI: NodeGetVolumeHealth. The volume's id, and where it is published or staged ("": neither)."""
    volume_id = check.required("volume_id", request.volume_id)
    published = check.optional_path("volume_publish_path", request.volume_publish_path)
    return volume_id, published or check.optional_path("staging_target_path", request.staging_target_path)


# Parts


def volume_id(
    request: pb.DeleteVolumeRequest | pb.ControllerGetVolumeRequest | pb.ControllerGetVolumeHealthRequest,
) -> str:
    """Of a call that needs nothing else."""
    return check.required("volume_id", request.volume_id)


def required_capabilities(given: Iterable[pb.VolumeCapability]) -> tuple[Capability, ...]:
    """At least one capability."""
    capabilities = tuple(
        _capability(f"volume_capabilities[{number}]", capability) for number, capability in enumerate(given)
    )
    if not capabilities:
        raise InvalidArgument(
            "volume_capabilities: missing: say at least one way in which the volume is to be used"
        )
    return capabilities


def context(given: Mapping[str, str]) -> dict[str, str]:
    """A volume_context, without the pod's tokens."""
    # Tokens are longer than CSI allows a map to be, and Kubernetes sends them all the same.
    return check.mapping("volume_context", {key: value for key, value in given.items() if key != TOKENS})


def _required_capability(
    request: pb.NodeStageVolumeRequest | pb.NodePublishVolumeRequest | pb.ControllerPublishVolumeRequest,
) -> Capability:
    if not request.HasField("volume_capability"):
        raise InvalidArgument("volume_capability: missing: say how the volume is to be used")
    return _capability("volume_capability", request.volume_capability)


def _optional_capability(
    request: pb.ControllerExpandVolumeRequest | pb.NodeExpandVolumeRequest,
) -> Capability | None:
    if not request.HasField("volume_capability"):
        return None
    return _capability("volume_capability", request.volume_capability)


def _capability(field: str, given: pb.VolumeCapability) -> Capability:
    kind = given.WhichOneof("access_type")
    if kind is None:
        raise InvalidArgument(f"{field}.access_type: missing: set block or mount")
    mode = _MODES.get(given.access_mode.mode)
    if mode is None:
        known = ", ".join(AccessMode)
        raise invalid(f"{field}.access_mode.mode", given.access_mode.mode, f"give one of {known}")
    return _used_so(field, given, kind, mode)


def _capability_of_capacity(given: pb.VolumeCapability) -> Capability:
    # The provisioner asks about capacity with an access mode UNKNOWN, and means any.
    mode = _MODES.get(given.access_mode.mode, AccessMode.SINGLE_NODE_WRITER)
    return _used_so("volume_capabilities", given, given.WhichOneof("access_type") or "mount", mode)


def _used_so(field: str, given: pb.VolumeCapability, kind: str, mode: AccessMode) -> Capability:
    if kind == "block":
        return Capability(AccessType.BLOCK, mode)
    flags = tuple(given.mount.mount_flags)
    if sum(map(check.size_bytes, flags)) > check.MAP_BYTES:
        # Flags may hold sensitive text: they are not quoted.
        raise InvalidArgument(f"{field}.mount.mount_flags: longer than {check.MAP_BYTES} bytes together")
    return Capability(
        AccessType.MOUNT,
        mode,
        fs_type=check.optional(f"{field}.mount.fs_type", given.mount.fs_type),
        mount_flags=flags,
        volume_mount_group=check.optional(
            f"{field}.mount.volume_mount_group", given.mount.volume_mount_group
        ),
    )


def _with_fs_type(capability: Capability, fs_type: str) -> Capability:
    if capability.access_type is AccessType.BLOCK or not fs_type or capability.fs_type == fs_type:
        return capability
    if capability.fs_type:
        raise invalid(
            f"parameters.{FS_TYPE}",
            check.quoted(fs_type),
            f"the volume capability says {check.quoted(capability.fs_type)!r}: leave one of the two out",
        )
    return Capability(
        capability.access_type,
        capability.access_mode,
        fs_type,
        capability.mount_flags,
        capability.volume_mount_group,
    )


def _capacity_range(given: pb.CapacityRange) -> CapacityRange:
    required = check.not_negative("capacity_range.required_bytes", given.required_bytes)
    limit = check.not_negative("capacity_range.limit_bytes", given.limit_bytes)
    if limit and limit < required:
        raise invalid(
            "capacity_range.limit_bytes", limit, f"is less than required_bytes, {required}: raise it"
        )
    return CapacityRange(required, limit)


def _topology(given: pb.TopologyRequirement) -> TopologyRequirement:
    return TopologyRequirement(
        requisite=_places("accessibility_requirements.requisite", given.requisite),
        preferred=_places("accessibility_requirements.preferred", given.preferred),
    )


def _places(field: str, given: Iterable[pb.Topology]) -> tuple[Segments, ...]:
    return tuple(check.mapping(f"{field}.segments", place.segments) for place in given)


def _source(given: pb.VolumeContentSource) -> Source:
    match given.WhichOneof("type"):
        case "snapshot":
            field, made_id = "snapshot.snapshot_id", given.snapshot.snapshot_id
            return Source(SourceKind.SNAPSHOT, check.required(f"volume_content_source.{field}", made_id))
        case "volume":
            field, made_id = "volume.volume_id", given.volume.volume_id
            return Source(SourceKind.VOLUME, check.required(f"volume_content_source.{field}", made_id))
    raise InvalidArgument("volume_content_source: empty: name a snapshot or a volume, or leave it out")


def _own(parameters: Mapping[str, str]) -> dict[str, str]:
    """The parameters that a user wrote."""
    return {key: value for key, value in parameters.items() if not key.startswith(METADATA)}


def _mutable(given: Mapping[str, str]) -> dict[str, str]:
    return _own(check.mapping("mutable_parameters", given))
