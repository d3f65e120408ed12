# SPDX-License-Identifier: Apache-2.0
"""The calls that the sidecars and kubelet make about a volume, each noted in the demo's step with its time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from csi_driver.cli import kernel, words
from csi_driver.cli.client import TIMEOUT_S, CallFailed, refusals
from csi_driver.cli.driver import Driver
from csi_driver.cli.plan import POOL, Plan
from csi_driver.cli.steps import Call, Step
from csi_driver.rpc.pb import csi_pb2 as pb

Request = TypeVar("Request")
Response = TypeVar("Response")

_STAGES = pb.NodeServiceCapability.RPC.Type.STAGE_UNSTAGE_VOLUME


@dataclass(slots=True)
class Volume:
    """One volume of the demo, and where kubelet would put it."""

    name: str
    root: Path
    id: str = ""

    @property
    def staging(self) -> Path:
        return self.root / "kubelet" / self.name

    @property
    def target(self) -> Path:
        return self.root / "pods" / self.name

    @property
    def second_target(self) -> Path:
        return self.root / "pods" / f"{self.name}-reader"

    @property
    def file(self) -> Path:
        return self.target / "data.bin"


class Calls:
    """Makes calls to the driver that runs now. Volumes are staged if `stages`, which `identify` finds out."""

    def __init__(self, driver: Driver, plan: Plan, root: Path) -> None:
        self._driver = driver
        self._plan = plan
        self._root = root
        self.stages = False

    def identify(self, step: Step) -> tuple[pb.GetPluginInfoResponse, bool]:
        """Who it is, and whether it is ready."""
        identity, node = self._driver.client.identity, self._driver.client.node
        info = self._call(step, "GetPluginInfo", identity.GetPluginInfo, pb.GetPluginInfoRequest())
        probe = self._call(step, "Probe", identity.Probe, pb.ProbeRequest())
        request = pb.NodeGetCapabilitiesRequest()
        able = self._call(step, "NodeGetCapabilities", node.NodeGetCapabilities, request)
        self.stages = any(one.rpc.type == _STAGES for one in able.capabilities)
        return info, probe.ready.value

    def capacity(self, step: Step) -> pb.GetCapacityResponse:
        request = pb.GetCapacityRequest(volume_capabilities=[self._capability()], parameters={"pool": POOL})
        stub = self._driver.client.controller.GetCapacity
        return self._call(step, "GetCapacity", stub, request, f"of pool {POOL}")

    def create(self, step: Step, volume: Volume) -> pb.Volume:
        """Make it, and the directories that kubelet would make."""
        for folder in (volume.staging, volume.target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        request = pb.CreateVolumeRequest(
            name=f"demo-{volume.name}",
            capacity_range=pb.CapacityRange(required_bytes=self._plan.size_bytes),
            volume_capabilities=[self._capability()],
            parameters={"pool": POOL},
        )
        asked = f"{request.name}, {words.size(self._plan.size_bytes)} {self._plan.fs_type}".rstrip()
        stub = self._driver.client.controller.CreateVolume
        answer = self._call(step, "CreateVolume", stub, request, asked)
        volume.id = answer.volume.volume_id
        return answer.volume

    def delete(self, step: Step, volume: Volume) -> None:
        request = pb.DeleteVolumeRequest(volume_id=volume.id)
        self._call(step, "DeleteVolume", self._driver.client.controller.DeleteVolume, request, volume.name)

    def stage(self, step: Step, volume: Volume) -> None:
        """Nothing where the driver has no such call: kubelet does not make it then."""
        if not self.stages:
            return
        request = pb.NodeStageVolumeRequest(
            volume_id=volume.id,
            staging_target_path=self._staging(volume),
            volume_capability=self._capability(),
        )
        self._call(step, "NodeStageVolume", self._driver.client.node.NodeStageVolume, request, volume.name)

    def unstage(self, step: Step, volume: Volume) -> None:
        """As `stage`."""
        if not self.stages:
            return
        stub = self._driver.client.node.NodeUnstageVolume
        request = pb.NodeUnstageVolumeRequest(volume_id=volume.id, staging_target_path=self._staging(volume))
        self._call(step, "NodeUnstageVolume", stub, request, volume.name)

    def publish(self, step: Step, volume: Volume, target: Path, *, readonly: bool = False) -> None:
        request = pb.NodePublishVolumeRequest(
            volume_id=volume.id,
            staging_target_path=self._staging(volume),
            target_path=str(target),
            volume_capability=self._capability(),
            readonly=readonly,
        )
        asked = f"at {kernel.shorter(target, self._root)}{', read-only' if readonly else ''}"
        self._call(step, "NodePublishVolume", self._driver.client.node.NodePublishVolume, request, asked)

    def unpublish(self, step: Step, volume: Volume, target: Path) -> None:
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume.id, target_path=str(target))
        asked = f"from {kernel.shorter(target, self._root)}"
        self._call(step, "NodeUnpublishVolume", self._driver.client.node.NodeUnpublishVolume, request, asked)

    def expand(self, step: Step, volume: Volume) -> int:
        """Grow it to the plan's second size; the size it says that it has."""
        request = pb.NodeExpandVolumeRequest(
            volume_id=volume.id,
            volume_path=str(volume.target),
            staging_target_path=self._staging(volume),
            capacity_range=pb.CapacityRange(required_bytes=self._plan.grown_bytes),
            volume_capability=self._capability(),
        )
        stub, asked = self._driver.client.node.NodeExpandVolume, f"to {words.size(self._plan.grown_bytes)}"
        return self._call(step, "NodeExpandVolume", stub, request, asked).capacity_bytes

    def usage(self, step: Step, volume: Volume) -> pb.VolumeUsage:
        """Its bytes, in all and used."""
        request = pb.NodeGetVolumeStatsRequest(
            volume_id=volume.id, volume_path=str(volume.target), staging_target_path=self._staging(volume)
        )
        stub = self._driver.client.node.NodeGetVolumeStats
        answer = self._call(step, "NodeGetVolumeStats", stub, request)
        return next(one for one in answer.usage if one.unit == pb.VolumeUsage.Unit.BYTES)

    def refused(self, step: Step, method: str, call: Callable[[], object]) -> str:
        """The code with which a call is refused; "" if it is not."""
        try:
            call()
        except CallFailed as error:
            step.answers.append(f"{method}: {error.code.name}: {kernel.shorter(error.message, self._root)}")
            return error.code.name
        return ""

    def _call(
        self,
        step: Step,
        method: str,
        stub: "grpc.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        asked: str = "",
    ) -> Response:
        began = time.perf_counter()
        try:
            with refusals(method):
                return stub(request, timeout=TIMEOUT_S)
        finally:
            step.calls.append(Call(method, asked, time.perf_counter() - began))

    def _staging(self, volume: Volume) -> str:
        return str(volume.staging) if self.stages else ""

    def _capability(self) -> pb.VolumeCapability:
        mode = pb.VolumeCapability.AccessMode.Mode.SINGLE_NODE_MULTI_WRITER
        return pb.VolumeCapability(
            mount=pb.VolumeCapability.MountVolume(fs_type=self._plan.fs_type),
            access_mode=pb.VolumeCapability.AccessMode(mode=mode),
        )
