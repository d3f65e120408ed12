# SPDX-License-Identifier: Apache-2.0
"""A node with one pool and a directory for kubelet's paths, for tests that follow a volume to a pod."""

import os
from dataclasses import dataclass
from pathlib import Path

from csi_driver import config
from csi_driver.errors import FailedPrecondition
from csi_driver.linux import privileges
from csi_driver.model import Capability, CapacityRange, PublishRequest, Volume, VolumeRequest
from tests.rig import Rig, capability, open_rig, published, staged


@dataclass
class Scene:
    """A driver over one pool, and what kubelet and a pod do to its volumes."""

    rig: Rig
    text: str
    kubelet: Path

    @classmethod
    def make(cls, place: Path, root: Path, options: str = 'backend = "image"') -> "Scene":
        text = f'[pools.p]\nroot = "{root}"\nreserved = 0\n{options}\n'
        kubelet = place / "kubelet"
        kubelet.mkdir()
        return cls(open_rig(config.parse(text).pools["p"]), text, kubelet)

    def restart(self) -> None:
        """A new process: nothing of the old one's memory is left."""
        self.rig.close()
        self.rig = open_rig(config.parse(self.text).pools["p"])

    def create(
        self, name: str, size_bytes: int, wanted: Capability | None = None, **parameters: str
    ) -> Volume:
        request = VolumeRequest(
            name,
            (wanted or capability(),),
            CapacityRange(size_bytes),
            parameters,
            pvc_namespace="shop",
            pvc_name="data",
            pv_name=f"pvc-{name}",
        )
        return self.rig.controller.create_volume(request)

    def staging(self, volume: Volume) -> Path:
        path = self.kubelet / f"stage-{volume.id[-8:]}"
        path.mkdir(exist_ok=True)
        return path

    def stage(self, volume: Volume, wanted: Capability | None = None) -> None:
        self.rig.node.stage(staged(volume.id, self.staging(volume), wanted))

    def publish(
        self, volume: Volume, name: str = "pod", wanted: Capability | None = None, *, readonly: bool = False
    ) -> Path:
        target = self.kubelet / name
        self.rig.node.publish(published(volume.id, target, self.staging(volume), wanted, readonly=readonly))
        return target

    def run(self, volume: Volume, name: str = "pod", wanted: Capability | None = None) -> Path:
        """Stage and publish."""
        self.stage(volume, wanted)
        return self.publish(volume, name, wanted)

    def end(self, volume: Volume, *names: str) -> None:
        """The pods end: unpublish and unstage."""
        for name in names or ("pod",):
            self.rig.node.unpublish(volume.id, str(self.kubelet / name))
        self.rig.node.unstage(volume.id, str(self.staging(volume)))

    def delete(self, volume: Volume) -> None:
        self.rig.controller.delete_volume(volume.id)
        self.rig.settle()

    def grow(self, volume: Volume, size_bytes: int, name: str = "pod") -> None:
        """Grow it where the pod is; an ext4 that this process may not grow mounted grows at its next stage."""
        target = self.kubelet / name
        wanted = CapacityRange(size_bytes)
        try:
            self.rig.node.expand(volume.id, str(target), str(self.staging(volume)), wanted)
        except FailedPrecondition:
            if privileges.can_grow_mounted(volume.record.fs_type):
                raise
            self.end(volume, name)
            self.run(volume, name)


def inline_request(
    scene: Scene, volume_id: str, wanted: Capability | None = None, **attributes: str
) -> PublishRequest:
    context = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "job"} | attributes
    return PublishRequest(volume_id, str(scene.kubelet / "pod"), wanted or capability(), context=context)


def static_request(scene: Scene, path: Path | str, **attributes: str) -> PublishRequest:
    context = {"pool": "p", "path": os.fspath(path)} | attributes
    return PublishRequest("any/handle at all", str(scene.kubelet / "pod"), capability(), context=context)
