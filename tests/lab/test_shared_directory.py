# SPDX-License-Identifier: Apache-2.0
"""Pools of directories on a filesystem that every machine has mounted at the same path, whatever it is: NFS by hand, here."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from tests.lab.disks import Disk, run
from tests.lab.drivers import MANY, Driver, create, publish
from tests.lab.hosts import GaneshaServer, Host, serving, wait_for

CONFIG = """
scope = "shared"
[pools.team]
backend = "directory"
root = "{root}"
enforce_capacity = false
mounted = true
"""


@pytest.fixture
def server(make_disk: Callable[..., Disk]) -> Iterator[GaneshaServer]:
    disk = make_disk("xfs", size="320M")
    (disk.target / "share").mkdir()
    with serving(GaneshaServer(disk.target)) as made:
        yield made


@pytest.fixture
def other_machine() -> Iterator[Host]:
    host = Host()
    yield host
    host.remove()


@pytest.fixture
def root(server: GaneshaServer, other_machine: Host, tmp_path: Path) -> Iterator[Path]:
    """The filesystem, mounted on both machines."""
    mounted = tmp_path / "team"
    mounted.mkdir()
    for command in (lambda *words: run(*words), other_machine.run):
        command("mount", "-t", "nfs", f"{server.address}:/share", mounted)
    yield mounted
    run("umount", "-l", mounted)


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    started: list[Driver] = []

    def make(name: str, role: str = "all", host: Host | None = None) -> Driver:
        started.append(Driver(name, tmp_path, CONFIG.format(root=root), role, host))
        return started[-1]

    yield make
    for driver in started:
        driver.end()


def test_pods_of_two_machines_share_a_volume(
    start: Callable[..., Driver], other_machine: Host, tmp_path: Path
) -> None:
    controller = start("controller")
    here, there = start("here", "node"), start("there", "node", other_machine)

    volume = create(controller, "pvc-1", uid="7", mode="2770", subPath="x")
    assert volume.capacity_bytes == 0 and volume.volume_context["pool"] == "team"
    publish(here, volume, tmp_path / "a")
    publish(here, volume, tmp_path / "a")
    publish(there, volume, tmp_path / "b")

    (tmp_path / "a/from-here").write_text("hello")
    assert other_machine.run("cat", tmp_path / "b/from-here") == "hello"
    assert oct((tmp_path / "a").stat().st_mode)[-4:] == "2770" and (tmp_path / "a").stat().st_uid == 7
    asked = pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=str(tmp_path / "a"))
    assert here.node.NodeGetVolumeStats(asked, timeout=60).usage[0].total > 0
    for driver, name in ((here, "a"), (there, "b")):
        driver.node.NodeUnpublishVolume(
            pb.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=str(tmp_path / name)),
            timeout=60,
        )
    assert not (tmp_path / "a").exists()
    controller.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=60)


def test_what_another_machine_is_making_is_left_alone(
    start: Callable[..., Driver], other_machine: Host, root: Path
) -> None:
    controller = start("controller")
    volume_id = create(controller, "pvc-1").volume_id
    controller.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume_id), timeout=60)
    script = (
        "import os, sys, time; from csi_driver.claims import Claims; "
        "claims = Claims(os.open(sys.argv[1], os.O_RDONLY)); "
        "print('held' if claims.take(sys.argv[2]) else 'refused', flush=True); time.sleep(1000)"
    )
    words = other_machine.command(sys.executable, "-c", script, root, volume_id)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert other.stdout is not None and other.stdout.readline() == "held\n"

    with pytest.raises(grpc.RpcError) as refused:
        create(controller, "pvc-1")
    assert refused.value.code() is grpc.StatusCode.ABORTED
    assert "another driver" in str(refused.value.details())
    other.kill()
    other.wait()
    other.stdout.close()

    wait_for(lambda: _created(controller, volume_id), 180)
    assert not os.listdir(root / "staging")


def _created(controller: Driver, volume_id: str) -> bool:
    try:
        return create(controller, "pvc-1").volume_id == volume_id
    except grpc.RpcError:
        time.sleep(1)
        return False


def _unpublished(node: Driver, volume_id: str, target: Path) -> bool:
    asked = pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target))
    try:
        node.node.NodeUnpublishVolume(asked, timeout=60)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
        return False
    return True


def test_a_frozen_server_holds_no_call(
    start: Callable[..., Driver], server: GaneshaServer, tmp_path: Path
) -> None:
    controller, node = start("controller"), start("node", "node")
    volume = create(controller, "pvc-1")
    publish(node, volume, tmp_path / "a")
    asked = pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=str(tmp_path / "a"))
    server.freeze()

    for call in (
        lambda: create(controller, "pvc-2", patient=False),
        lambda: node.node.NodeGetVolumeStats(asked, timeout=60),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    wait_for(lambda: _unpublished(node, volume.volume_id, tmp_path / "a"), 120)
    assert not (tmp_path / "a").exists()

    server.thaw()
    wait_for(lambda: _created(controller, volume.volume_id), 180)
    assert MANY.access_mode.mode == pb.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER
