# SPDX-License-Identifier: Apache-2.0
"""Volumes of a server that the controller runs on: their sizes hold for every client, and are what everybody is told."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from csi_driver.model import MIB
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.lab.disks import Disk, run
from tests.lab.drivers import MANY, Driver, create, publish
from tests.lab.hosts import Host, KernelServer, serving, wait_for
from tests.lab.test_quota import AS_USER, AT_THE_LIMIT, WRITER

SIZE = 64 * MIB
CONFIG = """
scope = "shared"
[pools.team]
backend = "nfs"
server = "{server}"
path = "/share"
root = "{root}"
on_server = true
reserved = "0"
"""


@dataclass(frozen=True)
class Place:
    """A server with project quotas, and a machine that is only its client."""

    fs_type: str
    server: KernelServer
    client: Host


@pytest.fixture(params=["xfs", "ext4"])
def place(request: pytest.FixtureRequest, make_disk: Callable[..., Disk]) -> Iterator[Place]:
    fs_type = request.param
    disk = make_disk("ext4-prjquota" if fs_type == "ext4" else fs_type, "prjquota")
    with serving(KernelServer(disk.target)) as server:
        client = Host()
        try:
            yield Place(fs_type, server, client)
        finally:
            client.remove()


@pytest.fixture
def start(place: Place, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    started: list[Driver] = []

    def make(name: str, role: str = "all", host: Host | None = None) -> Driver:
        config = CONFIG.format(server=place.server.address, root=place.server.export / "share")
        started.append(Driver(name, tmp_path, config, role, host))
        return started[-1]

    yield make
    for driver in started:
        driver.end()


def write(host: Host, path: Path, size_bytes: int, user: bool = True) -> tuple[int, str]:
    """As a pod of that machine; how much was taken, and why no more."""
    # From within: the test's own directory is closed to that user.
    words: list[str | os.PathLike[str]] = ["env", "-C", path.parent, *(AS_USER if user else [])]
    words += ["python3", "-c", WRITER, path.name, str(size_bytes)]
    written, _, error = host.run(*words).strip().partition(" ")
    return int(written), error


def unpublish(driver: Driver, volume: pb.Volume, target: Path) -> None:
    request = pb.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=str(target))
    driver.node.NodeUnpublishVolume(request, timeout=60)


def offered(driver: Driver) -> int:
    return driver.controller.GetCapacity(pb.GetCapacityRequest(), timeout=60).available_capacity


def test_a_client_is_stopped_at_the_limit_and_sees_it(
    place: Place, start: Callable[..., Driver], tmp_path: Path
) -> None:
    controller, node = start("controller"), start("node", "node", place.client)
    one, two = create(controller, "one", mode="0777"), create(controller, "two", mode="0777")
    assert one.capacity_bytes == two.capacity_bytes == SIZE
    assert dict(one.volume_context)["server"] == place.server.address
    publish(node, one, tmp_path / "one")
    publish(node, two, tmp_path / "two")

    # The home and its record are counted too, and a client may ask for a little less than is left.
    written, error = write(place.client, tmp_path / "one/file", 4 * SIZE)
    held = (place.server.export / "share/volumes" / one.volume_id / "data/file").stat().st_blocks * 512
    assert error == AT_THE_LIMIT[place.fs_type]
    assert SIZE - 8 * MIB < held <= SIZE, (written, held)
    assert write(place.client, tmp_path / "two/file", MIB) == (MIB, "")

    # A file server tells its clients the limit of the directory they ask about: `df` in the pod, and kubelet's numbers.
    shown = place.client.run("stat", "-f", "-c", "%b %S %a", tmp_path / "one").split()
    assert int(shown[0]) * int(shown[1]) == SIZE and int(shown[2]) * int(shown[1]) < MIB
    asked = pb.NodeGetVolumeStatsRequest(volume_id=one.volume_id, volume_path=str(tmp_path / "one"))
    (found,) = (one for one in node.node.NodeGetVolumeStats(asked, timeout=60).usage if one.unit == 1)
    assert found.total == SIZE

    grown = controller.controller.ControllerExpandVolume(
        pb.ControllerExpandVolumeRequest(
            volume_id=one.volume_id, capacity_range=pb.CapacityRange(required_bytes=2 * SIZE)
        ),
        timeout=60,
    )
    assert grown.capacity_bytes == 2 * SIZE and not grown.node_expansion_required
    assert write(place.client, tmp_path / "one/more", SIZE // 2) == (SIZE // 2, "")
    for volume, name in ((one, "one"), (two, "two")):
        unpublish(node, volume, tmp_path / name)
        controller.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=60)


def test_root_on_a_client_passes_the_limit_of_ext4_only(
    place: Place, start: Callable[..., Driver], tmp_path: Path
) -> None:
    """The kernel's server gives root of its clients CAP_SYS_RESOURCE, and ext4 lets that past."""
    controller, node = start("controller"), start("node", "node", place.client)
    volume = create(controller, "one")
    publish(node, volume, tmp_path / "one")

    written, error = write(place.client, tmp_path / "one/file", SIZE + 16 * MIB, user=False)

    assert (error == "") == (place.fs_type == "ext4"), (written, error)
    unpublish(node, volume, tmp_path / "one")


def test_what_one_controller_promises_the_other_does_not(place: Place, start: Callable[..., Driver]) -> None:
    one, two = start("one"), start("two")
    wait_for(lambda: offered(one) > 0 and offered(two) > 0, 180)
    room = offered(one)

    volume = create(one, "pvc-1")

    wait_for(lambda: offered(two) <= room - SIZE, 180)
    with pytest.raises(grpc.RpcError) as refused:
        two.controller.CreateVolume(
            pb.CreateVolumeRequest(
                name="too-large",
                volume_capabilities=[MANY],
                capacity_range=pb.CapacityRange(required_bytes=room - SIZE // 2),
            ),
            timeout=60,
        )
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    one.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=60)
    wait_for(lambda: offered(two) > room - MIB, 180)


def test_snapshots_and_clones_are_counted(place: Place, start: Callable[..., Driver], tmp_path: Path) -> None:
    controller, node = start("controller"), start("node", "node", place.client)
    volume = create(controller, "one", mode="0777")
    publish(node, volume, tmp_path / "one")
    write(place.client, tmp_path / "one/file", 8 * MIB)
    unpublish(node, volume, tmp_path / "one")

    source = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=volume.volume_id))
    request = pb.CreateVolumeRequest(
        name="clone",
        volume_capabilities=[MANY],
        capacity_range=pb.CapacityRange(required_bytes=SIZE),
        volume_content_source=source,
    )
    made: list[pb.Volume] = []

    def cloned() -> bool:
        try:
            made.append(controller.controller.CreateVolume(request, timeout=60).volume)
        except grpc.RpcError as error:
            again = (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)
            assert error.code() in again, error.details()
        return bool(made)

    wait_for(cloned, 180)
    assert made[0].capacity_bytes == SIZE
    publish(node, made[0], tmp_path / "clone")
    assert place.client.run("stat", "-c", "%s", tmp_path / "clone/file").strip() == str(8 * MIB)
    _, error = write(place.client, tmp_path / "clone/more", 2 * SIZE)
    assert error == AT_THE_LIMIT[place.fs_type]
    unpublish(node, made[0], tmp_path / "clone")


def test_a_filesystem_without_quotas_is_told_at_the_first_call(
    make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    disk = make_disk("xfs")
    (disk.target / "share").mkdir()
    driver = Driver(
        "controller", tmp_path, CONFIG.format(server="10.0.0.1", root=disk.target / "share"), "all"
    )
    try:
        with pytest.raises(grpc.RpcError) as refused:
            create(driver, "one")
        assert "prjquota" in str(refused.value.details())
    finally:
        driver.end()
    assert not os.listdir(disk.target / "share")
    run("ls", disk.target)
