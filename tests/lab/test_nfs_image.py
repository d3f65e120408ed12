# SPDX-License-Identifier: Apache-2.0
"""Images on an NFS export, as deployed: a controller, and node plugins on two machines of which one at a time has a volume."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from tests.lab.disks import Disk, run
from tests.lab.drivers import Driver
from tests.lab.hosts import GaneshaServer, Host, KernelServer, wait_for

MIB = 1 << 20
CONFIG = """
scope = "shared"
[pools.img]
backend = "nfs"
provisioning = "image"
server = "{server}"
path = "/share"
root = "{root}"
reserved = "0%"
"""
LEASE_S = 10
"""That of both kinds of servers here."""
Mode = pb.VolumeCapability.AccessMode
AnyServer = KernelServer | GaneshaServer


def used(mode: Mode.Mode.ValueType = Mode.SINGLE_NODE_WRITER, *, block: bool = False) -> pb.VolumeCapability:
    if block:
        return pb.VolumeCapability(
            block=pb.VolumeCapability.BlockVolume(), access_mode=Mode(mode=mode)
        )
    return pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(), access_mode=Mode(mode=mode))


ONE = used()
ALONE = used(Mode.SINGLE_NODE_SINGLE_WRITER)
BLOCK = used(block=True)


@dataclass
class Machine:
    """A node: its plugin, and where a volume is on it."""

    name: str
    place: Path
    host: Host
    driver: Driver
    capability: pb.VolumeCapability = field(default_factory=lambda: ONE)

    @property
    def staging(self) -> Path:
        return self.place / f"{self.name}-staging"

    @property
    def target(self) -> Path:
        return self.place / f"{self.name}-target"

    def stage(self, volume: pb.Volume, handed: dict[str, str] | None = None) -> None:
        self.staging.mkdir(exist_ok=True)
        self.driver.node.NodeStageVolume(
            pb.NodeStageVolumeRequest(
                volume_id=volume.volume_id,
                staging_target_path=str(self.staging),
                volume_capability=self.capability,
                volume_context=volume.volume_context,
                publish_context=handed or {},
            ),
            timeout=90,
        )

    def publish(self, volume: pb.Volume, target: Path | None = None, *, readonly: bool = False) -> None:
        self.driver.node.NodePublishVolume(
            pb.NodePublishVolumeRequest(
                volume_id=volume.volume_id,
                staging_target_path=str(self.staging),
                target_path=str(target or self.target),
                volume_capability=self.capability,
                volume_context=volume.volume_context,
                readonly=readonly,
            ),
            timeout=90,
        )

    def unpublish(self, volume: pb.Volume, target: Path | None = None) -> None:
        self.driver.node.NodeUnpublishVolume(
            pb.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=str(target or self.target)),
            timeout=90,
        )

    def unstage(self, volume: pb.Volume) -> None:
        self.driver.node.NodeUnstageVolume(
            pb.NodeUnstageVolumeRequest(volume_id=volume.volume_id, staging_target_path=str(self.staging)),
            timeout=90,
        )

    def use(self, volume: pb.Volume) -> None:
        self.stage(volume)
        self.publish(volume)

    def leave(self, volume: pb.Volume) -> None:
        self.unpublish(volume)
        self.unstage(volume)

    def sh(self, script: str) -> str:
        """A shell command there, with the pod's path as $T."""
        return self.host.run("env", f"T={self.target}", "sh", "-c", script)

    def fails(self, script: str) -> str:
        """What such a command says that must fail."""
        words = self.host.command("env", f"T={self.target}", "sh", "-c", script)
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode != 0, done.stdout
        return done.stderr


@dataclass
class Scene:
    """One export and who works with it."""

    server: AnyServer
    place: Path
    controller: Driver
    one: Machine
    two: Machine

    def create(
        self,
        name: str,
        capability: pb.VolumeCapability = ONE,
        size: int = 64 * MIB,
        source: pb.VolumeContentSource | None = None,
        **parameters: str,
    ) -> pb.Volume:
        asked = pb.CreateVolumeRequest(
            name=name,
            volume_capabilities=[capability],
            capacity_range=pb.CapacityRange(required_bytes=size),
            parameters=parameters,
            volume_content_source=source,
        )
        for _ in range(30):
            try:
                return self.controller.controller.CreateVolume(asked, timeout=90).volume
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise
                time.sleep(0.5)  # it is being copied
        raise AssertionError("a copy takes too long")

    def attach(self, volume: pb.Volume, machine: Machine) -> dict[str, str]:
        asked = pb.ControllerPublishVolumeRequest(
            volume_id=volume.volume_id,
            node_id=machine.name,
            volume_capability=machine.capability,
            volume_context=volume.volume_context,
        )
        return dict(self.controller.controller.ControllerPublishVolume(asked, timeout=60).publish_context)

    def detach(self, volume: pb.Volume, machine: Machine) -> None:
        asked = pb.ControllerUnpublishVolumeRequest(volume_id=volume.volume_id, node_id=machine.name)
        self.controller.controller.ControllerUnpublishVolume(asked, timeout=60)

    def delete(self, volume: pb.Volume) -> None:
        self.controller.controller.DeleteVolume(
            pb.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=60
        )

    def image(self, volume: pb.Volume) -> Path:
        """On the server itself."""
        return self.server.export / "share" / volume.volume_context["image"]

    def log(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text()


@pytest.fixture(params=[KernelServer, GaneshaServer], ids=["nfsd", "ganesha"])
def server(request: pytest.FixtureRequest, make_disk: Callable[..., Disk]) -> Iterator[AnyServer]:
    disk = make_disk("xfs", size="1G")
    (disk.target / "share").mkdir()
    made: AnyServer = request.param(disk.target)
    made.start()
    yield made
    made.remove()


@pytest.fixture
def machines(tmp_path: Path, server: AnyServer) -> Iterator[Callable[[str], Machine]]:
    made: list[Machine] = []

    def make(name: str) -> Machine:
        host = Host()
        config = CONFIG.format(server=server.address, root=tmp_path / "unused")
        made.append(Machine(name, tmp_path, host, Driver(name, tmp_path, config, "node", host)))
        return made[-1]

    yield make
    for machine in made:
        machine.host.mend()
        machine.driver.end()
        machine.host.remove()
    # With the last process of a machine its mounts go, and with them its devices.
    wait_for(lambda: not loops(), 60)


@pytest.fixture
def scene(tmp_path: Path, server: AnyServer, machines: Callable[[str], Machine]) -> Iterator[Scene]:
    config = CONFIG.format(server=server.address, root=tmp_path / "pool")
    controller = Driver("controller", tmp_path, config, "all")
    yield Scene(server, tmp_path, controller, machines("one"), machines("two"))
    controller.end()
    if os.path.ismount(tmp_path / "pool"):
        run("umount", "-l", tmp_path / "pool")


def loops() -> list[str]:
    """The devices that have an image of a volume."""
    found = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return [one for one in found if "/volumes/" in one]


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: grpc.RpcError = caught.value
    return error


def repeated(call: Callable[[], object], seconds: float = 60) -> float:
    """As Kubernetes does: until it works; after how long it did."""
    began = time.monotonic()
    while True:
        try:
            call()
            return time.monotonic() - began
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE), error
            assert time.monotonic() - began < seconds, error
            time.sleep(0.5)


def test_a_volume_goes_from_machine_to_machine(scene: Scene) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1", mode="2770", uid="1000", gid="1000")
    assert volume.capacity_bytes == 64 * MIB

    one.stage(volume, scene.attach(volume, one))
    one.publish(volume)
    one.sh("echo hello >$T/file && sync $T/file")
    assert one.sh("stat -c '%a %u %g' $T") == "2770 1000 1000\n"
    assert int(one.sh("stat -f -c %b $T")) * 4096 < 64 * MIB or True
    assert "No space left" in one.fails("head -c 100000000 /dev/zero >$T/big")
    one.sh("rm $T/big")
    # Again, as kubelet does.
    one.stage(volume, scene.attach(volume, one))
    one.publish(volume)
    usage = one.driver.node.NodeGetVolumeStats(
        pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=str(one.target)), timeout=60
    ).usage
    assert 40 * MIB < usage[0].total < 64 * MIB and usage[1].total > 0
    one.leave(volume)
    one.leave(volume)
    assert not loops()
    scene.detach(volume, one)

    two.stage(volume, scene.attach(volume, two))
    two.publish(volume)
    assert two.sh("cat $T/file") == "hello\n"
    two.leave(volume)
    scene.detach(volume, two)
    scene.delete(volume)
    assert "takes it over" not in scene.log("two") and "taken back" not in scene.log("controller")
    assert not loops()


def test_what_one_machine_has_another_cannot_have(scene: Scene) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1")
    one.stage(volume, scene.attach(volume, one))

    error = refused(lambda: scene.attach(volume, two))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "published to node 'one'" in error.details()
    # Nor without being handed it, where nobody attaches volumes.
    error = refused(lambda: two.stage(volume))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "in use by node 'one'" in error.details()
    error = refused(lambda: scene.detach(volume, one))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "node 'one' uses it yet" in error.details()
    assert refused(lambda: scene.delete(volume)).code() is grpc.StatusCode.FAILED_PRECONDITION
    snapshot = pb.CreateSnapshotRequest(name="s", source_volume_id=volume.volume_id)
    error = refused(lambda: scene.controller.controller.CreateSnapshot(snapshot, timeout=60))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "used by node one" in error.details()

    one.unstage(volume)
    stale = scene.attach(volume, one)
    scene.detach(volume, one)
    two.stage(volume, scene.attach(volume, two))
    two.unstage(volume)
    # What the first one was told is out of date, though nobody uses the volume now.
    error = refused(lambda: one.stage(volume, stale))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "out of date" in error.details()
    assert refused(lambda: scene.delete(volume)).code() is grpc.StatusCode.FAILED_PRECONDITION
    scene.detach(volume, two)
    scene.delete(volume)


def test_a_dead_machine_loses_its_volume_with_its_lease(scene: Scene) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1")
    one.stage(volume, scene.attach(volume, one))
    one.publish(volume)
    one.sh("echo kept >$T/file && sync")
    one.sh("dd if=/dev/zero of=$T/half bs=1M count=8 status=none")

    one.host.cut()
    error = refused(lambda: scene.detach(volume, one))
    assert "node 'one' uses it yet" in error.details()
    took = repeated(lambda: scene.detach(volume, one))
    print(f"taken back after {took:.1f} s")
    assert took > LEASE_S / 2
    assert "taken back from node one, which did not let it go" in scene.log("controller")
    two.stage(volume, scene.attach(volume, two))
    assert "node two takes it over from node one" in scene.log("two")
    two.publish(volume)
    assert two.sh("cat $T/file") == "kept\n"
    two.sh("echo new >$T/file && sync")

    # It lives, and comes back: nothing that it has written since reaches the image.
    pod = subprocess.Popen(
        one.host.command("sh", "-c", f"echo late >{one.target}/late && sync -f {one.target}/late"),
        stderr=subprocess.PIPE,
    )
    time.sleep(1)
    one.host.mend()
    assert pod.wait(120) != 0
    assert pod.stderr is not None
    pod.stderr.close()
    one.fails(f"echo later >$T/later && sync -f $T/later")
    health = one.driver.node.NodeGetVolumeHealth(
        pb.NodeGetVolumeHealthRequest(volume_id=volume.volume_id), timeout=60
    ).volume_health.health_statuses
    assert health
    two.sh("cat $T/file | grep -qx new && ! ls $T/late && ! ls $T/later && sync")
    one.leave(volume)
    two.leave(volume)
    wait_for(lambda: not loops(), 30)
    scene.detach(volume, two)
    run("e2fsck", "-f", "-n", scene.image(volume))
    # And so it can have the volume again.
    one.stage(volume, scene.attach(volume, one))
    one.publish(volume)
    assert one.sh("cat $T/file; ls $T") == "new\nfile\nhalf\n"
    one.leave(volume)


def test_a_driver_that_starts_again_has_let_nothing_go(scene: Scene, tmp_path: Path) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1")
    one.use(volume)
    one.driver.end()

    time.sleep(LEASE_S * 1.5)
    assert refused(lambda: two.stage(volume)).code() is grpc.StatusCode.FAILED_PRECONDITION
    one.sh("echo during >$T/file && sync $T/file")
    config = CONFIG.format(server=scene.server.address, root=tmp_path / "unused")
    one.driver = Driver("one", tmp_path, config, "node", one.host)
    one.use(volume)
    one.leave(volume)
    two.use(volume)
    assert two.sh("cat $T/file") == "during\n"
    two.leave(volume)
