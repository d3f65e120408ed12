# SPDX-License-Identifier: Apache-2.0
"""Images on an NFS export, as deployed: a controller, and node plugins on two machines of which one at a time has a volume."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from tests.lab.disks import Disk, run
from tests.lab.drivers import Driver, patiently
from tests.lab.hosts import GaneshaServer, Host, KernelServer, serving, wait_for
from tests.scene import backing_files

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
        return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=Mode(mode=mode))
    return pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(), access_mode=Mode(mode=mode))


ONE = used()
ALONE = used(Mode.SINGLE_NODE_SINGLE_WRITER)
BLOCK = used(block=True)


def created(driver: Driver, asked: pb.CreateVolumeRequest) -> pb.Volume:
    """As the provisioner does: until it is made, or cannot be."""
    return patiently(lambda: driver.controller.CreateVolume(asked, timeout=90)).volume


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
        asked = pb.NodeStageVolumeRequest(
            volume_id=volume.volume_id,
            staging_target_path=str(self.staging),
            volume_capability=self.capability,
            volume_context=volume.volume_context,
            publish_context=handed or {},
        )
        patiently(lambda: self.driver.node.NodeStageVolume(asked, timeout=90))

    def publish(self, volume: pb.Volume, target: Path | None = None, *, readonly: bool = False) -> None:
        asked = pb.NodePublishVolumeRequest(
            volume_id=volume.volume_id,
            staging_target_path=str(self.staging),
            target_path=str(target or self.target),
            volume_capability=self.capability,
            volume_context=volume.volume_context,
            readonly=readonly,
        )
        patiently(lambda: self.driver.node.NodePublishVolume(asked, timeout=90))

    def unpublish(self, volume: pb.Volume, target: Path | None = None) -> None:
        asked = pb.NodeUnpublishVolumeRequest(
            volume_id=volume.volume_id, target_path=str(target or self.target)
        )
        patiently(lambda: self.driver.node.NodeUnpublishVolume(asked, timeout=90))

    def unstage(self, volume: pb.Volume) -> None:
        asked = pb.NodeUnstageVolumeRequest(volume_id=volume.volume_id, staging_target_path=str(self.staging))
        patiently(lambda: self.driver.node.NodeUnstageVolume(asked, timeout=90))

    def expansion(self, volume: pb.Volume, wanted: pb.CapacityRange) -> pb.NodeExpandVolumeRequest:
        return pb.NodeExpandVolumeRequest(
            volume_id=volume.volume_id,
            volume_path=str(self.target),
            staging_target_path=str(self.staging),
            capacity_range=wanted,
        )

    def use(self, volume: pb.Volume) -> None:
        self.stage(volume)
        self.publish(volume)

    def leave(self, volume: pb.Volume) -> None:
        self.unpublish(volume)
        self.unstage(volume)

    def end(self) -> None:
        self.host.mend()
        self.driver.end()
        # Before its network is gone, which what is unwritten still needs: only of a test that failed.
        for line in reversed(self.host.run("cat", "/proc/self/mounts").splitlines()):
            where = line.split()[1]
            if line.startswith("/dev/loop") and where in (str(self.staging), str(self.target)):
                subprocess.run(self.host.command("umount", "-l", "-d", where), check=False)

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
        return created(self.controller, asked)

    def attach(self, volume: pb.Volume, machine: Machine) -> dict[str, str]:
        asked = pb.ControllerPublishVolumeRequest(
            volume_id=volume.volume_id,
            node_id=machine.name,
            volume_capability=machine.capability,
            volume_context=volume.volume_context,
        )
        controller = self.controller.controller
        handed = patiently(lambda: controller.ControllerPublishVolume(asked, timeout=60))
        return dict(handed.publish_context)

    def detach(self, volume: pb.Volume, machine: Machine) -> None:
        asked = pb.ControllerUnpublishVolumeRequest(volume_id=volume.volume_id, node_id=machine.name)
        patiently(lambda: self.controller.controller.ControllerUnpublishVolume(asked, timeout=60))

    def delete(self, volume: pb.Volume) -> None:
        asked = pb.DeleteVolumeRequest(volume_id=volume.volume_id)
        patiently(lambda: self.controller.controller.DeleteVolume(asked, timeout=60))

    def image(self, volume: pb.Volume) -> Path:
        """On the server itself."""
        return self.server.export / "share" / volume.volume_context["image"]

    def log(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text()


@dataclass
class Pair:
    """Two servers, and a machine that is controller and node to both."""

    dead: AnyServer
    well: AnyServer
    place: Path
    host: Host
    driver: Driver

    def create(self, pool: str) -> pb.Volume:
        asked = pb.CreateVolumeRequest(
            name=f"pvc-{pool}",
            volume_capabilities=[ONE],
            capacity_range=pb.CapacityRange(required_bytes=64 * MIB),
            parameters={"pool": pool},
        )
        return created(self.driver, asked)


BOTH = pytest.mark.parametrize(
    "server", [KernelServer, GaneshaServer], ids=["nfsd", "ganesha"], indirect=True
)


@pytest.fixture
def server(request: pytest.FixtureRequest, make_disk: Callable[..., Disk]) -> Iterator[AnyServer]:
    disk = make_disk("xfs", size="1G")
    (disk.target / "share").mkdir()
    with serving(getattr(request, "param", KernelServer)(disk.target)) as made:
        yield made


@pytest.fixture
def machines(tmp_path: Path, server: AnyServer) -> Iterator[Callable[[str], Machine]]:
    # Each is ended whatever becomes of the others: what is left of one is in the way of every later test.
    with contextlib.ExitStack() as ends:

        def make(name: str) -> Machine:
            host = new_host()
            ends.callback(host.remove)
            config = CONFIG.format(server=server.address, root=tmp_path / "unused")
            machine = Machine(name, tmp_path, host, Driver(name, tmp_path, config, "node", host))
            ends.callback(machine.end)
            return machine

        yield make
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


def new_host() -> Host:
    host = Host()
    # Of its own: a mount point's directory that one machine removes is gone for all who have it.
    host.run("mkdir", "-p", "/run/orlop")
    host.run("mount", "-t", "tmpfs", "tmpfs", "/run/orlop")
    return host


def loops() -> list[str]:
    """The devices that have an image of a volume."""
    return [line for _, line in backing_files() if "/volumes/" in line]


class Refusal(NamedTuple):
    """How a call failed."""

    code: grpc.StatusCode
    sentence: str


def refused(call: Callable[[], object]) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return Refusal(caught.value.code(), caught.value.details() or "")


def repeated(call: Callable[[], object], seconds: float = 240) -> float:
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


@BOTH
def test_a_volume_goes_from_machine_to_machine(scene: Scene) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1", mode="2770", uid="1000", gid="1000")
    assert volume.capacity_bytes == 64 * MIB

    one.stage(volume, scene.attach(volume, one))
    one.publish(volume)
    one.sh("echo hello >$T/file && sync $T/file")
    assert one.sh("stat -c '%a %u %g' $T") == "2770 1000 1000\n"
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
    wait_for(lambda: not loops(), 60)
    scene.detach(volume, one)

    two.stage(volume, scene.attach(volume, two))
    two.publish(volume)
    assert two.sh("cat $T/file") == "hello\n"
    two.leave(volume)
    wait_for(lambda: not loops(), 60)
    scene.detach(volume, two)
    scene.delete(volume)
    assert "takes it over" not in scene.log("two") and "taken back" not in scene.log("controller")
    wait_for(lambda: not loops(), 60)


@BOTH
def test_what_one_machine_has_another_cannot_have(scene: Scene) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1")
    one.stage(volume, scene.attach(volume, one))

    error = refused(lambda: scene.attach(volume, two))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "published to node 'one'" in error.sentence
    # Nor without being handed it, where nobody attaches volumes.
    error = refused(lambda: two.stage(volume))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "in use by node 'one'" in error.sentence
    error = refused(lambda: scene.detach(volume, one))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "node 'one' uses it yet" in error.sentence
    assert refused(lambda: scene.delete(volume)).code is grpc.StatusCode.FAILED_PRECONDITION
    snapshot = pb.CreateSnapshotRequest(name="s", source_volume_id=volume.volume_id)
    error = refused(lambda: scene.controller.controller.CreateSnapshot(snapshot, timeout=60))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "used by node one" in error.sentence

    one.unstage(volume)
    wait_for(lambda: not loops(), 60)
    stale = scene.attach(volume, one)
    scene.detach(volume, one)
    two.stage(volume, scene.attach(volume, two))
    two.unstage(volume)
    wait_for(lambda: not loops(), 60)
    # What the first one was told is out of date, though nobody uses the volume now.
    error = refused(lambda: one.stage(volume, stale))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "out of date" in error.sentence
    assert refused(lambda: scene.delete(volume)).code is grpc.StatusCode.FAILED_PRECONDITION
    scene.detach(volume, two)
    scene.delete(volume)


@BOTH
def test_a_dead_machine_loses_its_volume_with_its_lease(scene: Scene) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1")
    one.stage(volume, scene.attach(volume, one))
    one.publish(volume)
    one.sh("echo kept >$T/file && sync -f $T")
    one.sh("dd if=/dev/zero of=$T/half bs=1M count=8 status=none")
    # This asks the server, and so the lease begins anew: not before now.
    began = time.monotonic()
    one.driver.node.NodeGetVolumeHealth(pb.NodeGetVolumeHealthRequest(volume_id=volume.volume_id), timeout=60)

    one.host.cut()
    error = refused(lambda: scene.detach(volume, one))
    assert "node 'one' uses it yet" in error.sentence
    repeated(lambda: scene.detach(volume, one))
    took = time.monotonic() - began
    print(f"taken back after {took:.1f} s")
    assert took > LEASE_S / 2
    assert "taken back from node one, which did not let it go" in scene.log("controller")
    two.stage(volume, scene.attach(volume, two))
    assert "node two takes it over from node one" in scene.log("two")
    two.publish(volume)
    assert two.sh("cat $T/file") == "kept\n"
    two.sh("echo new >$T/file && sync -f $T")

    # It lives, and comes back: nothing that it has written since reaches the image.
    pod = subprocess.Popen(
        one.host.command("sh", "-c", f"echo late >{one.target}/late && sync -f {one.target}/late"),
        stderr=subprocess.PIPE,
    )
    time.sleep(1)
    one.host.mend()
    assert pod.wait(400) != 0
    assert pod.stderr is not None
    pod.stderr.close()
    one.fails("echo later >$T/later && sync -f $T/later")
    error = refused(lambda: one.stage(volume))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "node 'two' has taken" in error.sentence
    health = one.driver.node.NodeGetVolumeHealth(
        pb.NodeGetVolumeHealthRequest(volume_id=volume.volume_id), timeout=60
    ).volume_health.health_statuses
    assert health
    two.sh("cat $T/file | grep -qx new && ! ls $T/late && ! ls $T/later && sync -f $T")
    one.leave(volume)
    two.leave(volume)
    wait_for(lambda: not loops(), 120)
    scene.detach(volume, two)
    run("e2fsck", "-f", "-n", scene.image(volume))
    # And so it can have the volume again.
    one.stage(volume, scene.attach(volume, one))
    one.publish(volume)
    assert one.sh("cat $T/file") == "new\n"
    one.leave(volume)


def test_a_driver_that_starts_again_has_let_nothing_go(scene: Scene, tmp_path: Path) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1")
    one.use(volume)
    one.driver.end()

    time.sleep(LEASE_S * 1.5)
    assert refused(lambda: two.stage(volume)).code is grpc.StatusCode.FAILED_PRECONDITION
    one.sh("echo during >$T/file && sync $T/file")
    config = CONFIG.format(server=scene.server.address, root=tmp_path / "unused")
    one.driver = Driver("one", tmp_path, config, "node", one.host)
    one.use(volume)
    one.leave(volume)
    wait_for(lambda: not loops(), 60)
    two.use(volume)
    assert two.sh("cat $T/file") == "during\n"
    two.leave(volume)


def test_a_node_plugin_that_is_replaced_knows_what_the_old_one_held(scene: Scene, tmp_path: Path) -> None:
    """The loop device keeps the old container's mount of the export, which is nowhere to be seen any more."""
    one, two = scene.one, scene.two
    config = CONFIG.format(server=scene.server.address, root=tmp_path / "unused")
    one.host.run("mount", "--make-rshared", "/")
    one.driver.end()
    one.driver = Driver("one", tmp_path, config, "node", one.host, in_pod=True)
    volume = scene.create("pvc-1")
    one.use(volume)
    one.driver.end()
    # Its namespace goes with the last of the driver's children, which end a little after it.
    wait_for(lambda: loops() == [f"/{volume.volume_context['image']}\n"], 60)

    one.driver = Driver("one", tmp_path, config, "node", one.host, in_pod=True)
    one.use(volume)
    asked = pb.NodeGetVolumeHealthRequest(volume_id=volume.volume_id)
    assert not one.driver.node.NodeGetVolumeHealth(asked, timeout=60).volume_health.health_statuses
    wanted = pb.CapacityRange(required_bytes=128 * MIB)
    scene.controller.controller.ControllerExpandVolume(
        pb.ControllerExpandVolumeRequest(volume_id=volume.volume_id, capacity_range=wanted), timeout=60
    )
    on_node = one.expansion(volume, wanted)
    assert one.driver.node.NodeExpandVolume(on_node, timeout=60).capacity_bytes == 128 * MIB
    # Another volume's end takes no export away that an image lies on.
    one.driver.node.NodeUnpublishVolume(
        pb.NodeUnpublishVolumeRequest(volume_id="other", target_path=str(tmp_path / "nothing")), timeout=60
    )
    one.sh("echo kept >$T/file && sync -f $T")
    one.leave(volume)
    wait_for(lambda: not loops(), 60)

    two.use(volume)
    assert two.sh("cat $T/file") == "kept\n"
    assert "takes it over" not in scene.log("two")
    two.leave(volume)


def test_a_raw_device_goes_from_machine_to_machine(scene: Scene) -> None:
    one, two = scene.one, scene.two
    volume = scene.create("pvc-1", BLOCK)
    one.capability = two.capability = BLOCK
    one.use(volume)
    assert one.sh("blockdev --getsize64 $T") == f"{64 * MIB}\n"
    one.sh("printf hello | dd of=$T bs=512 conv=sync,fsync status=none")
    # To one pod it may be read-only, and then it is.
    one.publish(volume, scene.place / "readonly", readonly=True)
    one.sh(f"head -c 5 {scene.place}/readonly | grep -qx hello")
    one.fails(f"printf no | dd of={scene.place}/readonly bs=512 conv=sync,fsync")
    assert "still published" in refused(lambda: one.unstage(volume)).sentence
    assert refused(lambda: two.stage(volume)).code is grpc.StatusCode.FAILED_PRECONDITION
    one.unpublish(volume, scene.place / "readonly")
    usage = one.driver.node.NodeGetVolumeStats(
        pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=str(one.target)), timeout=60
    ).usage
    assert usage[0].total == 64 * MIB
    one.leave(volume)
    wait_for(lambda: not loops(), 60)
    two.use(volume)
    assert two.sh("head -c 5 $T") == "hello"
    two.leave(volume)
    wait_for(lambda: not loops(), 60)
    scene.delete(volume)


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", ""])
def test_a_volume_grows_while_it_is_used(fs_type: str, scene: Scene) -> None:
    one = scene.one
    before, after = (320 * MIB, 400 * MIB) if fs_type == "xfs" else (64 * MIB, 128 * MIB)
    one.capability = ONE if fs_type else BLOCK
    fs_types = {"fsType": fs_type} if fs_type else {}
    volume = scene.create("pvc-1", one.capability, before, None, **fs_types)
    one.use(volume)
    wanted = pb.CapacityRange(required_bytes=after)
    on_node = one.expansion(volume, wanted)
    error = refused(lambda: one.driver.node.NodeExpandVolume(on_node, timeout=60))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "comes first" in error.sentence

    asked = pb.ControllerExpandVolumeRequest(volume_id=volume.volume_id, capacity_range=wanted)
    grown = scene.controller.controller.ControllerExpandVolume(asked, timeout=60)
    assert (grown.capacity_bytes, grown.node_expansion_required) == (after, True)
    assert one.driver.node.NodeExpandVolume(on_node, timeout=60).capacity_bytes == after

    if fs_type:
        blocks, size = map(int, one.sh("stat -f -c '%b %S' $T").split())
        assert blocks * size > before
    else:
        assert one.sh("blockdev --getsize64 $T") == f"{after}\n"
    one.leave(volume)


def test_a_pod_alone_and_its_sub_directory(scene: Scene) -> None:
    one = scene.one
    one.capability = ALONE
    volume = scene.create("pvc-1", ALONE, subPath="a/b", mode="0750")
    one.use(volume)

    error = refused(lambda: one.publish(volume, scene.place / "second"))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "ReadWriteOncePod" in error.sentence
    one.sh("echo x >$T/file")
    assert one.sh(f"cat {one.staging}/data/a/b/file; stat -c %a $T") == "x\n750\n"
    one.leave(volume)
    many = used(Mode.MULTI_NODE_MULTI_WRITER)
    error = refused(lambda: scene.create("pvc-2", many))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT and "MULTI_NODE_MULTI_WRITER" in error.sentence


def test_what_nobody_uses_is_copied(scene: Scene) -> None:
    one, controller = scene.one, scene.controller.controller
    volume = scene.create("pvc-1")
    one.use(volume)
    one.sh("echo then >$T/file && sync -f $T")
    one.leave(volume)
    asked = pb.CreateSnapshotRequest(name="s", source_volume_id=volume.volume_id)
    wait_for(lambda: not loops(), 60)

    def taken() -> pb.Snapshot:
        return patiently(lambda: controller.CreateSnapshot(asked, timeout=60)).snapshot

    wait_for(lambda: taken().ready_to_use, 180)
    snapshot = taken()
    one.use(volume)
    one.sh("echo now >$T/file && sync -f $T")
    one.leave(volume)
    wait_for(lambda: not loops(), 60)
    kind = pb.VolumeContentSource
    restored = scene.create(
        "pvc-2", size=96 * MIB, source=kind(snapshot=kind.SnapshotSource(snapshot_id=snapshot.snapshot_id))
    )
    clone = scene.create("pvc-3", source=kind(volume=kind.VolumeSource(volume_id=volume.volume_id)))

    for made, content in ((restored, "then\n"), (clone, "now\n")):
        one.use(made)
        assert one.sh("cat $T/file") == content
        one.leave(made)
    wait_for(lambda: not loops(), 60)
    # Room was reserved on the server, and is free again once all is deleted.
    before = os.statvfs(scene.server.export)
    for made in (volume, restored, clone):
        scene.delete(made)
    controller.DeleteSnapshot(pb.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id), timeout=60)
    wait_for(lambda: (now := os.statvfs(scene.server.export)).f_bfree * now.f_frsize
             > before.f_bfree * before.f_frsize + 200 * MIB, 60)  # fmt: skip


def test_an_export_is_not_promised_twice(scene: Scene) -> None:
    free = os.statvfs(scene.server.export)
    size = free.f_bavail * free.f_frsize * 2 // 3
    scene.create("pvc-1", size=size)
    error = refused(lambda: scene.create("pvc-2", size=size))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    told = scene.controller.controller.GetCapacity(pb.GetCapacityRequest(), timeout=60)
    assert told.available_capacity < size


POOL = """
[pools.{name}]
backend = "nfs"
provisioning = "image"
server = "{server}"
path = "/share"
root = "{root}"
"""


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path, make_disk: Callable[..., Disk]) -> Iterator[Pair]:
    servers: dict[str, AnyServer] = {}
    with contextlib.ExitStack() as ends:
        for name in ("dead", "well"):
            disk = make_disk("xfs", size="512M")
            (disk.target / "share").mkdir()
            kind: type[AnyServer] = request.param if name == "dead" else GaneshaServer
            servers[name] = ends.enter_context(serving(kind(disk.target)))
        pools = (
            POOL.format(name=name, server=one.address, root=tmp_path / name) for name, one in servers.items()
        )
        host = new_host()
        driver = Driver("both", tmp_path, 'scope = "shared"\n' + "".join(pools), "all", host)
        yield Pair(servers["dead"], servers["well"], tmp_path, host, driver)
        driver.end()
        host.remove()
        wait_for(lambda: not loops(), 60)


@pytest.mark.parametrize(
    ("how", "pair"),
    [("frozen", GaneshaServer), ("killed", GaneshaServer), ("cut", GaneshaServer), ("cut", KernelServer)],
    ids=["frozen", "killed", "cut", "cut-nfsd"],
    indirect=["pair"],
)
def test_a_dead_server_harms_only_its_own_volumes(how: str, pair: Pair) -> None:
    volumes = {name: pair.create(name) for name in ("dead", "well")}
    ends = {name: Machine(name, pair.place, pair.host, pair.driver) for name in volumes}
    for name, volume in volumes.items():
        ends[name].use(volume)
    ends["dead"].sh("echo kept >$T/file && sync -f $T")
    ends["dead"].sh("echo unwritten >$T/late")
    asked = {
        name: pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=str(ends[name].target))
        for name, volume in volumes.items()
    }

    def round_trip() -> float:
        began = time.monotonic()
        repeated(lambda: pair.driver.node.NodeGetVolumeStats(asked["well"], timeout=60))
        repeated(lambda: ends["well"].leave(volumes["well"]))
        repeated(lambda: ends["well"].use(volumes["well"]))
        return time.monotonic() - began

    usual = round_trip()
    dead = pair.dead
    if how == "frozen" and isinstance(dead, GaneshaServer):
        dead.freeze()
    else:
        {"killed": dead.stop, "cut": dead.cut}[how]()
    health = pb.NodeGetVolumeHealthRequest(volume_id=volumes["dead"].volume_id)
    found = pair.driver.node.NodeGetVolumeHealth(health, timeout=60).volume_health.health_statuses
    assert [entry.reason for entry in found] == ["ServerUnreachable"]
    # Whatever waited for the dead one would wait 15 s and more, each time.
    assert any(round_trip() < 4 * usual + 15 for _ in range(3))
    # Its pods can end, though what they wrote last is on no disk yet.
    repeated(lambda: ends["dead"].leave(volumes["dead"]), 120)
    assert str(ends["dead"].staging) not in pair.host.run("cat", "/proc/self/mounts")
    pair.driver.node.NodeGetVolumeStats(asked["well"], timeout=60)

    if how == "frozen" and isinstance(dead, GaneshaServer):
        dead.thaw()
    else:
        {"killed": dead.restart, "cut": dead.mend}[how]()
    wait_for(lambda: len(loops()) == 1, 300)
    repeated(lambda: ends["dead"].use(volumes["dead"]), 300)
    assert ends["dead"].sh("cat $T/file") == "kept\n"
    if isinstance(dead, KernelServer):
        # Which keeps a lock past its lease until another wants it. Ganesha forgets it, and what was unwritten is refused.
        assert ends["dead"].sh("cat $T/late") == "unwritten\n"
    for name, volume in volumes.items():
        ends[name].leave(volume)


def test_locks_that_fence_nothing_are_refused(scene: Scene, tmp_path: Path) -> None:
    volume = scene.create("pvc-1")
    context = dict(volume.volume_context)
    one = scene.one
    volume.volume_context["mountOptions"] = "soft"
    error = refused(lambda: one.stage(volume))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION and "mounted soft" in error.sentence
    volume.volume_context["mountOptions"] = context.get("mountOptions", "")
    one.use(volume)
    one.leave(volume)
