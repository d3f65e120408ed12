# SPDX-License-Identifier: Apache-2.0
"""The shared driver as it is deployed: two controllers and a node plugin on each of two machines, over one NFS export."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from tests.lab.disks import Disk, run
from tests.lab.drivers import Driver, create, publish
from tests.lab.hosts import Host, KernelServer, serving

CONFIG = """
scope = "shared"
[pools.team]
backend = "nfs"
server = "{server}"
path = "/share"
root = "{root}"
"""


@pytest.fixture
def server(make_disk: Callable[..., Disk]) -> Iterator[KernelServer]:
    with serving(KernelServer(make_disk("xfs", size="320M").target)) as made:
        yield made


@pytest.fixture
def other_machine() -> Iterator[Host]:
    host = Host()
    yield host
    host.remove()


@pytest.fixture
def start(tmp_path: Path, server: KernelServer) -> Iterator[Callable[..., Driver]]:
    started: list[Driver] = []

    def make(name: str, role: str = "all", host: Host | None = None) -> Driver:
        config = CONFIG.format(server=server.address, root=tmp_path / f"{name}-pool")
        started.append(Driver(name, tmp_path, config, role, host))
        return started[-1]

    yield make
    for driver in started:
        driver.end()
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split()[2].startswith("nfs"):
            run("umount", "-l", line.split()[1])


def test_pods_of_two_machines_share_a_volume(
    start: Callable[..., Driver], other_machine: Host, server: KernelServer, tmp_path: Path
) -> None:
    controller = start("controller")
    here, there = start("here", "node"), start("there", "node", other_machine)
    volume = create(controller, "pvc-1", uid="1000", mode="2770")
    assert volume.capacity_bytes == 0 and not volume.accessible_topology
    assert dict(volume.volume_context)["server"] == server.address

    publish(here, volume, tmp_path / "a")
    publish(there, volume, tmp_path / "b")
    publish(there, volume, tmp_path / "c", readonly=True)

    (tmp_path / "a/from-here").write_text("hello")
    assert other_machine.run("cat", tmp_path / "b/from-here") == "hello"
    other_machine.run("sh", "-c", f"echo back >{tmp_path}/b/from-there")
    assert (tmp_path / "a/from-there").read_text() == "back\n"
    assert oct((tmp_path / "a").stat().st_mode)[-4:] == "2770" and (tmp_path / "a").stat().st_uid == 1000
    assert "ro" in other_machine.run("findmnt", "-n", "-o", "VFS-OPTIONS", tmp_path / "c").split(",")
    # A lock that one machine holds is seen by the other.
    with open(tmp_path / "a/lock", "w") as file:
        os.lockf(file.fileno(), os.F_LOCK, 0)
        refused = subprocess.run(
            other_machine.command(
                *(sys.executable, "-c", "import os,sys; os.lockf(os.open(sys.argv[1], 2), os.F_TLOCK, 0)"),
                tmp_path / "b/lock",
            ),
            capture_output=True,
            text=True,
            check=False,
        )
        assert "BlockingIOError" in refused.stderr

    used = here.node.NodeGetVolumeStats(
        pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=str(tmp_path / "a")), timeout=60
    )
    assert used.usage[0].total > 0
    for driver, names in ((here, "a"), (there, "bc")):
        for name in names:
            driver.node.NodeUnpublishVolume(
                pb.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=str(tmp_path / name)),
                timeout=60,
            )


def test_either_controller_knows_every_volume(start: Callable[..., Driver]) -> None:
    one = start("one")
    volume = create(one, "pvc-1")
    two = start("two")

    assert create(two, "pvc-1") == volume
    other = create(two, "pvc-2", subPath="x")
    assert dict(other.volume_context)["subPath"] == "x"
    listed = one.controller.ListVolumes(pb.ListVolumesRequest(), timeout=60).entries
    assert {entry.volume.volume_id for entry in listed} == {volume.volume_id, other.volume_id}
    two.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=60)
    one.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=60)
    listed = one.controller.ListVolumes(pb.ListVolumesRequest(), timeout=60).entries
    assert [entry.volume.volume_id for entry in listed] == [other.volume_id]


def test_a_controller_knows_at_once_what_another_machine_s_has_made(
    start: Callable[..., Driver], other_machine: Host
) -> None:
    one, two = start("one"), start("two", "all", other_machine)
    volume = create(one, "pvc-1")
    deletion = pb.DeleteVolumeRequest(volume_id=volume.volume_id)
    one.controller.DeleteVolume(deletion, timeout=60)
    # It is nowhere: the client of that machine may remember that.
    two.controller.DeleteVolume(deletion, timeout=60)

    assert create(one, "pvc-1") == volume
    two.controller.DeleteVolume(deletion, timeout=60)
    assert not one.controller.ListVolumes(pb.ListVolumesRequest(), timeout=60).entries


def test_the_driver_promises_no_topology(start: Callable[..., Driver]) -> None:
    driver = start("node", "node")

    assert driver.identity.GetPluginInfo(pb.GetPluginInfoRequest(), timeout=60).name == "shared.orlop.dev"
    told = driver.identity.GetPluginCapabilities(pb.GetPluginCapabilitiesRequest(), timeout=60)
    constraints = pb.PluginCapability.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS
    assert constraints not in [capability.service.type for capability in told.capabilities]
    info = driver.node.NodeGetInfo(pb.NodeGetInfoRequest(), timeout=60)
    assert not info.accessible_topology.segments
