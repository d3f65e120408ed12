# SPDX-License-Identifier: Apache-2.0
"""The CSI services: each call is one conversion, one method of the driver, one answer.

Checks are `convert`'s business, semantics `controller`'s and `node`'s, errors and the log `interceptor`'s. A method
that is not here is answered UNIMPLEMENTED by `interceptor`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver import __version__
from csi_driver.controller import Controller
from csi_driver.errors import Unimplemented
from csi_driver.groups import Groups
from csi_driver.metadata import ChangedBlocks
from csi_driver.model import DriverFeatures
from csi_driver.node import Node
from csi_driver.rpc import answers, convert
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.snapshots import Snapshots

if TYPE_CHECKING:
    from csi_driver.rpc.pb.csi_pb2_grpc import (
        ControllerServicer,
        GroupControllerServicer,
        IdentityServicer,
        NodeServicer,
        SnapshotMetadataServicer,
    )
else:
    # The generated classes say what the types must be. Loading their module costs 2 MB, for clients we are not.
    ControllerServicer = GroupControllerServicer = IdentityServicer = NodeServicer = object
    SnapshotMetadataServicer = object

_Plugin = pb.PluginCapability.Service.Type
_Rpc = pb.ControllerServiceCapability.RPC.Type
_NodeRpc = pb.NodeServiceCapability.RPC.Type


class Identity(IdentityServicer):
    """Who the driver is."""

    def __init__(self, driver_name: str, features: DriverFeatures) -> None:
        self._driver_name = driver_name
        self._features = features

    def GetPluginInfo(
        self, request: pb.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetPluginInfoResponse:
        return pb.GetPluginInfoResponse(name=self._driver_name, vendor_version=__version__)

    def GetPluginCapabilities(
        self, request: pb.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.GetPluginCapabilitiesResponse:
        services = [_Plugin.CONTROLLER_SERVICE]
        if not self._features.shared:
            services.append(_Plugin.VOLUME_ACCESSIBILITY_CONSTRAINTS)
        services.append(_Plugin.GROUP_CONTROLLER_SERVICE)
        if not self._features.shared:
            services.append(_Plugin.SNAPSHOT_ACCESSIBILITY_CONSTRAINTS)
        if self._features.has_blocks:
            services.append(_Plugin.SNAPSHOT_METADATA_SERVICE)
        capabilities = [
            pb.PluginCapability(service=pb.PluginCapability.Service(type=service)) for service in services
        ]
        if self._features.grows_in_controller or self._features.grows_on_node:
            online = pb.PluginCapability.VolumeExpansion(type=pb.PluginCapability.VolumeExpansion.Type.ONLINE)
            capabilities.append(pb.PluginCapability(volume_expansion=online))
        return pb.GetPluginCapabilitiesResponse(capabilities=capabilities)

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        # The socket appears only when the driver can answer, and a missing pool is told by the health calls.
        return pb.ProbeResponse(ready=BoolValue(value=True))


class ControllerService(ControllerServicer):
    """Volumes and snapshots as the pools have them. `node_id` is where all of them are."""

    def __init__(
        self, controller: Controller, snapshots: Snapshots, features: DriverFeatures, node_id: str
    ) -> None:
        self._controller = controller
        self._snapshots = snapshots
        self._features = features
        self._node_id = node_id

    def ControllerGetCapabilities(
        self, request: pb.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.ControllerGetCapabilitiesResponse:
        offered = [
            _Rpc.CREATE_DELETE_VOLUME,
            _Rpc.LIST_VOLUMES,
            _Rpc.LIST_VOLUMES_PUBLISHED_NODES,
            _Rpc.GET_CAPACITY,
            _Rpc.GET_VOLUME,
            _Rpc.SINGLE_NODE_MULTI_WRITER,
            _Rpc.GET_VOLUME_HEALTH,
            _Rpc.LIST_VOLUME_HEALTH,
            _Rpc.CREATE_DELETE_SNAPSHOT,
            _Rpc.LIST_SNAPSHOTS,
            _Rpc.GET_SNAPSHOT,
            _Rpc.CLONE_VOLUME,
            _Rpc.MODIFY_VOLUME,
        ]
        if self._features.grows_in_controller:
            offered.append(_Rpc.EXPAND_VOLUME)
        if self._features.hands_out:
            offered.append(_Rpc.PUBLISH_UNPUBLISH_VOLUME)
            # Not told of directories, which any node may have: the attacher would take them for lost.
            offered.remove(_Rpc.LIST_VOLUMES_PUBLISHED_NODES)
        kind = pb.ControllerServiceCapability
        return pb.ControllerGetCapabilitiesResponse(
            capabilities=[kind(rpc=kind.RPC(type=capability)) for capability in offered]
        )

    def CreateVolume(
        self, request: pb.CreateVolumeRequest, context: grpc.ServicerContext
    ) -> pb.CreateVolumeResponse:
        volume = self._controller.create_volume(convert.volume_request(request))
        return pb.CreateVolumeResponse(volume=answers.volume(volume))

    def DeleteVolume(
        self, request: pb.DeleteVolumeRequest, context: grpc.ServicerContext
    ) -> pb.DeleteVolumeResponse:
        self._controller.delete_volume(convert.volume_id(request))
        return pb.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: pb.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        why_not = self._controller.validate(*convert.validation(request))
        return answers.validation(request, why_not)

    def ListVolumes(
        self, request: pb.ListVolumesRequest, context: grpc.ServicerContext
    ) -> pb.ListVolumesResponse:
        volumes, token = self._controller.list_volumes(*convert.page(request))
        entries = [answers.listed(volume, self._node_id) for volume in volumes]
        return pb.ListVolumesResponse(entries=entries, next_token=token)

    def ControllerGetVolume(
        self, request: pb.ControllerGetVolumeRequest, context: grpc.ServicerContext
    ) -> pb.ControllerGetVolumeResponse:
        volume = self._controller.get_volume(convert.volume_id(request))
        nodes = answers.published_nodes(volume, self._node_id)
        status = pb.ControllerGetVolumeResponse.VolumeStatus(published_node_ids=nodes)
        return pb.ControllerGetVolumeResponse(volume=answers.volume(volume), status=status)

    def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.CreateSnapshotResponse:
        snapshot = self._snapshots.create(*convert.snapshot_request(request))
        return pb.CreateSnapshotResponse(snapshot=answers.snapshot(snapshot))

    def DeleteSnapshot(
        self, request: pb.DeleteSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.DeleteSnapshotResponse:
        self._snapshots.delete(convert.snapshot_id(request))
        return pb.DeleteSnapshotResponse()

    def ListSnapshots(
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> pb.ListSnapshotsResponse:
        found, token = self._snapshots.listed(*convert.snapshot_page(request))
        context.set_trailing_metadata(answers.copying(self._snapshots.copying()))
        entries = [pb.ListSnapshotsResponse.Entry(snapshot=answers.snapshot(one)) for one in found]
        return pb.ListSnapshotsResponse(entries=entries, next_token=token)

    def GetSnapshot(
        self, request: pb.GetSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.GetSnapshotResponse:
        snapshot = self._snapshots.get(convert.snapshot_id(request))
        return pb.GetSnapshotResponse(snapshot=answers.snapshot(snapshot))

    def GetCapacity(
        self, request: pb.GetCapacityRequest, context: grpc.ServicerContext
    ) -> pb.GetCapacityResponse:
        return answers.capacity(self._controller.capacity(*convert.capacity(request)))

    def ControllerExpandVolume(
        self, request: pb.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> pb.ControllerExpandVolumeResponse:
        size_bytes, on_node = self._controller.expand_volume(*convert.controller_expansion(request))
        return pb.ControllerExpandVolumeResponse(capacity_bytes=size_bytes, node_expansion_required=on_node)

    def ControllerPublishVolume(
        self, request: pb.ControllerPublishVolumeRequest, context: grpc.ServicerContext
    ) -> pb.ControllerPublishVolumeResponse:
        self._check_hands_out("ControllerPublishVolume")
        told = self._controller.publish_volume(*convert.attachment(request))
        return pb.ControllerPublishVolumeResponse(publish_context=told)

    def ControllerUnpublishVolume(
        self, request: pb.ControllerUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> pb.ControllerUnpublishVolumeResponse:
        self._check_hands_out("ControllerUnpublishVolume")
        self._controller.unpublish_volume(*convert.detachment(request))
        return pb.ControllerUnpublishVolumeResponse()

    def ControllerModifyVolume(
        self, request: pb.ControllerModifyVolumeRequest, context: grpc.ServicerContext
    ) -> pb.ControllerModifyVolumeResponse:
        self._controller.modify_volume(*convert.modification(request))
        return pb.ControllerModifyVolumeResponse()

    def ControllerGetVolumeHealth(
        self, request: pb.ControllerGetVolumeHealthRequest, context: grpc.ServicerContext
    ) -> pb.ControllerGetVolumeHealthResponse:
        volume_id = convert.volume_id(request)
        health = answers.volume_health(volume_id, self._controller.volume_health(volume_id))
        return pb.ControllerGetVolumeHealthResponse(volume_health=health)

    def ControllerListVolumeHealth(
        self, request: pb.ControllerListVolumeHealthRequest, context: grpc.ServicerContext
    ) -> pb.ControllerListVolumeHealthResponse:
        found, token = self._controller.list_health(*convert.page(request))
        entries = [answers.volume_health(volume_id, health) for volume_id, health in found]
        return pb.ControllerListVolumeHealthResponse(entries=entries, next_token=token)

    def _check_hands_out(self, method: str) -> None:
        if not self._features.hands_out:
            raise Unimplemented(f"{method}: no pool here has volumes that are attached; use them right away")


class GroupService(GroupControllerServicer):
    """Snapshots of several volumes at one moment."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def GroupControllerGetCapabilities(
        self, request: pb.GroupControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.GroupControllerGetCapabilitiesResponse:
        kind = pb.GroupControllerServiceCapability
        offered = kind.RPC(type=kind.RPC.Type.CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT)
        return pb.GroupControllerGetCapabilitiesResponse(capabilities=[kind(rpc=offered)])

    def CreateVolumeGroupSnapshot(
        self, request: pb.CreateVolumeGroupSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.CreateVolumeGroupSnapshotResponse:
        made = self._groups.create(*convert.group_request(request))
        return pb.CreateVolumeGroupSnapshotResponse(group_snapshot=answers.group(made))

    def DeleteVolumeGroupSnapshot(
        self, request: pb.DeleteVolumeGroupSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.DeleteVolumeGroupSnapshotResponse:
        self._groups.delete(*convert.group(request))
        return pb.DeleteVolumeGroupSnapshotResponse()

    def GetVolumeGroupSnapshot(
        self, request: pb.GetVolumeGroupSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.GetVolumeGroupSnapshotResponse:
        found = self._groups.get(*convert.group(request))
        return pb.GetVolumeGroupSnapshotResponse(group_snapshot=answers.group(found))


class MetadataService(SnapshotMetadataServicer):
    """What of a snapshot is data, and what has changed since another one."""

    def __init__(self, blocks: ChangedBlocks) -> None:
        self._blocks = blocks

    def GetMetadataAllocated(
        self, request: pb.GetMetadataAllocatedRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetMetadataAllocatedResponse]:
        for size_bytes, ranges in self._blocks.allocated(*convert.allocated(request)):
            yield pb.GetMetadataAllocatedResponse(
                block_metadata_type=pb.VARIABLE_LENGTH,
                volume_capacity_bytes=size_bytes,
                block_metadata=answers.ranges(ranges),
            )

    def GetMetadataDelta(
        self, request: pb.GetMetadataDeltaRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetMetadataDeltaResponse]:
        for size_bytes, ranges in self._blocks.delta(*convert.delta(request)):
            yield pb.GetMetadataDeltaResponse(
                block_metadata_type=pb.VARIABLE_LENGTH,
                volume_capacity_bytes=size_bytes,
                block_metadata=answers.ranges(ranges),
            )


class NodeService(NodeServicer):
    """Volumes as this node has them."""

    def __init__(self, node: Node, features: DriverFeatures) -> None:
        self._node = node
        self._features = features

    def NodeGetCapabilities(
        self, request: pb.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.NodeGetCapabilitiesResponse:
        offered = [
            _NodeRpc.GET_VOLUME_STATS,
            _NodeRpc.SINGLE_NODE_MULTI_WRITER,
            _NodeRpc.GET_VOLUME_HEALTH,
            _NodeRpc.GET_STORAGE_HEALTH,
        ]
        if self._features.stages:
            offered.append(_NodeRpc.STAGE_UNSTAGE_VOLUME)
        if self._features.grows_on_node:
            offered.append(_NodeRpc.EXPAND_VOLUME)
        kind = pb.NodeServiceCapability
        return pb.NodeGetCapabilitiesResponse(
            capabilities=[kind(rpc=kind.RPC(type=capability)) for capability in offered]
        )

    def NodeGetInfo(
        self, request: pb.NodeGetInfoRequest, context: grpc.ServicerContext
    ) -> pb.NodeGetInfoResponse:
        return answers.node_info(self._node.info())

    def NodeStageVolume(
        self, request: pb.NodeStageVolumeRequest, context: grpc.ServicerContext
    ) -> pb.NodeStageVolumeResponse:
        self._check_stages("NodeStageVolume")
        self._node.stage(convert.stage_request(request))
        return pb.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: pb.NodeUnstageVolumeRequest, context: grpc.ServicerContext
    ) -> pb.NodeUnstageVolumeResponse:
        self._check_stages("NodeUnstageVolume")
        self._node.unstage(*convert.unstage(request))
        return pb.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: pb.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> pb.NodePublishVolumeResponse:
        self._node.publish(convert.publish_request(request))
        return pb.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: pb.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> pb.NodeUnpublishVolumeResponse:
        self._node.unpublish(*convert.unpublish(request))
        return pb.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: pb.NodeGetVolumeStatsRequest, context: grpc.ServicerContext
    ) -> pb.NodeGetVolumeStatsResponse:
        return answers.stats(self._node.stats(*convert.stats(request)))

    def NodeExpandVolume(
        self, request: pb.NodeExpandVolumeRequest, context: grpc.ServicerContext
    ) -> pb.NodeExpandVolumeResponse:
        if not self._features.grows_on_node:
            raise Unimplemented("NodeExpandVolume: no pool here can grow its volumes")
        return pb.NodeExpandVolumeResponse(capacity_bytes=self._node.expand(*convert.node_expansion(request)))

    def NodeGetVolumeHealth(
        self, request: pb.NodeGetVolumeHealthRequest, context: grpc.ServicerContext
    ) -> pb.NodeGetVolumeHealthResponse:
        volume_id, path = convert.volume_health(request)
        health = answers.volume_health(volume_id, self._node.volume_health(volume_id, path))
        return pb.NodeGetVolumeHealthResponse(volume_health=health)

    def NodeGetStorageHealth(
        self, request: pb.NodeGetStorageHealthRequest, context: grpc.ServicerContext
    ) -> pb.NodeGetStorageHealthResponse:
        return answers.storage_health(self._node.storage_health())

    def _check_stages(self, method: str) -> None:
        if not self._features.stages:
            raise Unimplemented(f"{method}: no pool here has volumes that need it; publish them right away")
