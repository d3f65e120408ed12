# SPDX-License-Identifier: Apache-2.0
"""CSI calls as a plain client makes them, over the driver's socket. When they are made is not its business."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc as services

_TIMEOUT_S = 120.0
_WRITER = pb.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER


@dataclass(frozen=True)
class Kind:
    """What volumes are asked for."""

    pool: str
    size_bytes: int
    block: bool = False
    fs_type: str = ""
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def capability(self) -> pb.VolumeCapability:
        mode = pb.VolumeCapability.AccessMode(mode=_WRITER)
        if self.block:
            return pb.VolumeCapability(access_mode=mode, block=pb.VolumeCapability.BlockVolume())
        mount = pb.VolumeCapability.MountVolume(fs_type=self.fs_type)
        return pb.VolumeCapability(access_mode=mode, mount=mount)


@dataclass(frozen=True)
class Places:
    """Where kubelet would stage and publish one volume."""

    staging: Path
    target: Path

    @classmethod
    def make(cls, folder: Path, name: str) -> "Places":
        """Its directories, made as kubelet makes them: the staging path, and the target's parent."""
        (folder / name / "staging").mkdir(parents=True, exist_ok=True)
        return cls(folder / name / "staging", folder / name / "target")


class Client:
    """One connection."""

    def __init__(self, socket: Path) -> None:
        # A channel of its own: connections to one address would be shared.
        self._channel = grpc.insecure_channel(
            f"unix:{socket}", options=(("grpc.use_local_subchannel_pool", 1),)
        )
        grpc.channel_ready_future(self._channel).result(timeout=10)
        self.identity = services.IdentityStub(self._channel)
        self.controller = services.ControllerStub(self._channel)
        self.node = services.NodeStub(self._channel)
        self.stages = self._stages()
        """Whether this driver wants volumes staged; where it does not, those calls are left out."""

    def _stages(self) -> bool:
        answer = self.node.NodeGetCapabilities(pb.NodeGetCapabilitiesRequest(), timeout=_TIMEOUT_S)
        wanted = pb.NodeServiceCapability.RPC.STAGE_UNSTAGE_VOLUME
        return any(capability.rpc.type == wanted for capability in answer.capabilities)

    def close(self) -> None:
        self._channel.close()

    def probe(self) -> None:
        self.identity.Probe(pb.ProbeRequest(), timeout=_TIMEOUT_S)

    def capacity(self, kind: Kind) -> int:
        request = pb.GetCapacityRequest(
            volume_capabilities=[kind.capability], parameters={"pool": kind.pool, **kind.parameters}
        )
        return int(self.controller.GetCapacity(request, timeout=_TIMEOUT_S).available_capacity)

    def create(self, kind: Kind, name: str) -> str:
        request = pb.CreateVolumeRequest(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=kind.size_bytes),
            volume_capabilities=[kind.capability],
            parameters={"pool": kind.pool, **kind.parameters},
        )
        return str(self.controller.CreateVolume(request, timeout=_TIMEOUT_S).volume.volume_id)

    def delete(self, volume_id: str) -> None:
        self.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume_id), timeout=_TIMEOUT_S)

    def stage(self, kind: Kind, volume_id: str, places: Places) -> None:
        request = pb.NodeStageVolumeRequest(
            volume_id=volume_id,
            staging_target_path=os.fspath(places.staging),
            volume_capability=kind.capability,
        )
        self.node.NodeStageVolume(request, timeout=_TIMEOUT_S)

    def unstage(self, volume_id: str, places: Places) -> None:
        request = pb.NodeUnstageVolumeRequest(
            volume_id=volume_id, staging_target_path=os.fspath(places.staging)
        )
        self.node.NodeUnstageVolume(request, timeout=_TIMEOUT_S)

    def publish(self, kind: Kind, volume_id: str, places: Places) -> None:
        request = pb.NodePublishVolumeRequest(
            volume_id=volume_id,
            staging_target_path=os.fspath(places.staging),
            target_path=os.fspath(places.target),
            volume_capability=kind.capability,
        )
        self.node.NodePublishVolume(request, timeout=_TIMEOUT_S)

    def unpublish(self, volume_id: str, places: Places) -> None:
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=os.fspath(places.target))
        self.node.NodeUnpublishVolume(request, timeout=_TIMEOUT_S)

    def stats(self, volume_id: str, places: Places) -> None:
        request = pb.NodeGetVolumeStatsRequest(
            volume_id=volume_id,
            volume_path=os.fspath(places.target),
            staging_target_path=os.fspath(places.staging),
        )
        self.node.NodeGetVolumeStats(request, timeout=_TIMEOUT_S)

    def lifecycle(self, kind: Kind, name: str, places: Places) -> None:
        """A volume's whole life."""
        volume_id = self.create(kind, name)
        if self.stages:
            self.stage(kind, volume_id, places)
        self.publish(kind, volume_id, places)
        self.stats(volume_id, places)
        self.unpublish(volume_id, places)
        if self.stages:
            self.unstage(volume_id, places)
        self.delete(volume_id)
