# SPDX-License-Identifier: Apache-2.0
"""One volume of the soak: where it is in its life, what was written to it, and the next thing to do with it.

Each step asks the driver for something, sees that it is so, and now and then asks for what must be refused. A volume
belongs to one client at a time, so it always knows what must be true.
"""

import hashlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from csi_driver.rpc.pb import csi_pb2 as pb
from tests.soak.caller import Caller

MIB = 1 << 20
_WRITER = pb.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER
_REFUSED, _TAKEN, _UNKNOWN = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND,
)

_CAP_SYS_RESOURCE = 24


def _has_capability(number: int) -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> number & 1)


_MAY_GROW_EXT4 = _has_capability(_CAP_SYS_RESOURCE)


@dataclass(frozen=True)
class Kind:
    """A kind of volume, and how many of 200 are of it."""

    name: str
    pool: str
    size_bytes: int
    share: int
    fs_type: str = ""
    block: bool = False
    inline: bool = False
    parameters: tuple[tuple[str, str], ...] = ()

    @property
    def stages(self) -> bool:
        return self.pool == "image" and not self.inline

    @property
    def capability(self) -> pb.VolumeCapability:
        mode = pb.VolumeCapability.AccessMode(mode=_WRITER)
        if self.block:
            return pb.VolumeCapability(access_mode=mode, block=pb.VolumeCapability.BlockVolume())
        mount = pb.VolumeCapability.MountVolume(fs_type=self.fs_type)
        return pb.VolumeCapability(access_mode=mode, mount=mount)


_THIN = (("provisioning", "thin"),)
KINDS = (
    Kind("directory", "directory", 4 * MIB, 48),
    Kind("btrfs", "btrfs", 16 * MIB, 36),
    Kind("ext4", "image", 16 * MIB, 48, fs_type="ext4"),
    Kind("thin", "image", 16 * MIB, 16, fs_type="ext4", parameters=_THIN),
    Kind("block", "image", 4 * MIB, 28, block=True),
    Kind("xfs", "image", 300 * MIB, 8, fs_type="xfs"),
    Kind("inline", "image", 16 * MIB, 16, inline=True),
)


@dataclass
class Volume:
    """Its life so far. `content` is what every later publish must show."""

    kind: Kind
    name: str
    staging: Path
    targets: tuple[Path, Path]
    size_bytes: int
    id: str = ""
    staged: bool = False
    published: list[Path] = field(default_factory=list)
    content: bytes = b""
    lives: int = 0
    verified: int = 0

    # Requests

    def _create(self, size_bytes: int) -> pb.CreateVolumeRequest:
        return pb.CreateVolumeRequest(
            name=self.name,
            capacity_range=pb.CapacityRange(required_bytes=size_bytes, limit_bytes=2 * size_bytes),
            volume_capabilities=[self.kind.capability],
            parameters={"pool": self.kind.pool, **dict(self.kind.parameters)},
        )

    def _stage(self) -> pb.NodeStageVolumeRequest:
        return pb.NodeStageVolumeRequest(
            volume_id=self.id,
            staging_target_path=os.fspath(self.staging),
            volume_capability=self.kind.capability,
        )

    def _publish(self, target: Path, *, readonly: bool = False) -> pb.NodePublishVolumeRequest:
        context = {}
        if self.kind.inline:
            context = {
                "csi.storage.k8s.io/ephemeral": "true",
                "size": str(self.kind.size_bytes),
                "pool": self.kind.pool,
            }
        return pb.NodePublishVolumeRequest(
            volume_id=self.id,
            staging_target_path="" if self.kind.inline else os.fspath(self.staging),
            target_path=os.fspath(target),
            volume_capability=self.kind.capability,
            readonly=readonly,
            volume_context=context,
        )

    # Life

    def step(self, caller: Caller, dice: random.Random) -> None:
        """One step onward, or back, or in place; sometimes with a twin, or a wrong call before it."""
        twin = dice.random() < 0.08
        if dice.random() < 0.08:
            self._ask_wrongly(caller)
        if not self.id and not self.kind.inline:
            self.create(caller, twin=twin)
        elif self.kind.stages and not self.staged:
            self.stage(caller, twin=twin) if dice.random() < 0.7 else self.delete(caller, twin=twin)
        elif not self.published:
            if dice.random() < 0.7:
                self.publish(caller, self.targets[0], twin=twin)
            else:
                self.step_back(caller, twin=twin)
        else:
            self._step_published(caller, dice, twin=twin)

    def _step_published(self, caller: Caller, dice: random.Random, *, twin: bool) -> None:
        choice = dice.random()
        if choice < 0.35:
            self.write(dice)
        elif choice < 0.5:
            self.stats(caller)
        elif choice < 0.6 and len(self.published) == 1 and not self.kind.inline:
            self.publish(caller, self.targets[1], twin=twin)
        elif choice < 0.65 and not self.kind.inline and self.size_bytes == self.kind.size_bytes:
            self.expand(caller, twin=twin)
        else:
            self.unpublish(caller, self.published[-1], twin=twin)

    def step_back(self, caller: Caller, *, twin: bool = False) -> None:
        """Undo the last step of its life that still stands."""
        if self.published:
            self.unpublish(caller, self.published[-1], twin=twin)
        elif self.staged:
            self.unstage(caller, twin=twin)
        elif self.id and not self.kind.inline:
            self.delete(caller, twin=twin)

    @property
    def is_gone(self) -> bool:
        return not self.id and not self.published

    def create(self, caller: Caller, *, twin: bool) -> None:
        answer = caller.call("CreateVolume", self._create(self.size_bytes), twin=twin)
        if answer is not None:
            self.id = answer.volume.volume_id

    def delete(self, caller: Caller, *, twin: bool) -> None:
        caller.call("DeleteVolume", pb.DeleteVolumeRequest(volume_id=self.id), twin=twin)
        self.id, self.content, self.size_bytes = "", b"", self.kind.size_bytes
        self.lives += 1

    def stage(self, caller: Caller, *, twin: bool) -> None:
        caller.call("NodeStageVolume", self._stage(), twin=twin)
        self.staged = True

    def unstage(self, caller: Caller, *, twin: bool) -> None:
        request = pb.NodeUnstageVolumeRequest(volume_id=self.id, staging_target_path=os.fspath(self.staging))
        caller.call("NodeUnstageVolume", request, twin=twin)
        self.staged = False
        if os.path.ismount(self.staging):
            caller.journal.fault(f"{self.name}: unstaged, and still mounted at {self.staging}")

    def publish(self, caller: Caller, target: Path, *, twin: bool) -> None:
        if self.kind.inline:
            self.id = f"csi-{hashlib.sha256(self.name.encode()).hexdigest()}"
        caller.call("NodePublishVolume", self._publish(target), twin=twin)
        self.published.append(target)
        self.verify(caller, target)

    def unpublish(self, caller: Caller, target: Path, *, twin: bool) -> None:
        self.verify(caller, target)
        request = pb.NodeUnpublishVolumeRequest(volume_id=self.id, target_path=os.fspath(target))
        caller.call("NodeUnpublishVolume", request, twin=twin)
        self.published.remove(target)
        if target.exists():
            caller.journal.fault(f"{self.name}: unpublished, and {target} is still there")
        if self.kind.inline:
            self.id, self.content = "", b""
            self.lives += 1

    def expand(self, caller: Caller, *, twin: bool) -> None:
        wanted = self.size_bytes + 4 * MIB
        request = pb.NodeExpandVolumeRequest(
            volume_id=self.id,
            volume_path=os.fspath(
                self.staging if self.kind.stages and not self.kind.block else self.published[0]
            ),
            staging_target_path=os.fspath(self.staging) if self.kind.stages else "",
            capacity_range=pb.CapacityRange(required_bytes=wanted),
            volume_capability=self.kind.capability,
        )
        # The kernel lets only CAP_SYS_RESOURCE grow an ext4 that is mounted; elsewhere it grows when it is next staged.
        held = self.kind.fs_type == "ext4" and not _MAY_GROW_EXT4
        answer = caller.call("NodeExpandVolume", request, _REFUSED if held else grpc.StatusCode.OK, twin=twin)
        self.size_bytes = wanted
        if answer is not None and 0 < answer.capacity_bytes < wanted:
            caller.journal.fault(f"{self.name}: grown to {answer.capacity_bytes} instead of {wanted}")

    def stats(self, caller: Caller) -> None:
        request = pb.NodeGetVolumeStatsRequest(volume_id=self.id, volume_path=os.fspath(self.published[0]))
        answer = caller.call("NodeGetVolumeStats", request)
        if answer is not None and self.kind.block and answer.usage[0].total != self.size_bytes:
            caller.journal.fault(f"{self.name}: has {answer.usage[0].total} bytes, not {self.size_bytes}")

    # Content

    def write(self, dice: random.Random) -> None:
        """New content, all of it on the disk when this returns."""
        self.content = dice.randbytes(dice.choice((1, 4096, 65536, 300_000)))
        fd = os.open(self._file(self.published[0]), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not self.kind.block:
                os.ftruncate(fd, 0)
            os.pwrite(fd, self.content, 0)
            os.fsync(fd)
        finally:
            os.close(fd)

    def verify(self, caller: Caller, target: Path) -> None:
        """The content is there, by its checksum."""
        try:
            with self._file(target).open("rb") as file:
                found = file.read(len(self.content)) if self.kind.block else file.read()
        except FileNotFoundError:
            found = b""
        except OSError as error:
            caller.journal.fault(f"{self.name}: cannot be read at {target}: {error}")
            return
        if hashlib.sha256(found).digest() != hashlib.sha256(self.content).digest():
            caller.journal.fault(
                f"{self.name}: {len(found)} bytes at {target} are not the {len(self.content)} that were written"
            )
        self.verified += 1

    def _file(self, target: Path) -> Path:
        return target if self.kind.block else target / "content"

    # What must be refused

    def _ask_wrongly(self, caller: Caller) -> None:
        if self.kind.inline:
            return
        if not self.id:
            request = pb.NodePublishVolumeRequest(
                volume_id=f"{self.kind.pool}-00000000-{'0' * 32}",
                staging_target_path=os.fspath(self.staging),
                target_path=os.fspath(self.targets[0]),
                volume_capability=self.kind.capability,
            )
            caller.call("NodePublishVolume", request, _UNKNOWN)
        elif self.published:
            caller.call("DeleteVolume", pb.DeleteVolumeRequest(volume_id=self.id), _REFUSED)
            caller.call("NodePublishVolume", self._publish(self.published[0], readonly=True), _TAKEN)
        elif self.staged:
            caller.call("DeleteVolume", pb.DeleteVolumeRequest(volume_id=self.id), _REFUSED)
        else:
            # A size whose limit the volume exceeds, except where none is enforced.
            if self.kind.pool != "directory":
                caller.call("CreateVolume", self._create(MIB), _TAKEN)
            if self.kind.stages:
                caller.call("NodePublishVolume", self._publish(self.targets[0]), _REFUSED)
