# SPDX-License-Identifier: Apache-2.0
"""csi-sanity against the driver for what every node reaches: pools on an NFS export, and on directories mounted by others."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc as stubs
from tests.conftest import unavailable
from tests.lab.disks import Disk, run
from tests.lab.drivers import patiently
from tests.lab.hosts import KernelServer, wait_for
from tests.sanity.report import judge, parse_report, read_expected_skips
from tests.sanity.run import ROOT, SKIPS, Settings, run_sanity, served, tracebacks
from tests.sanity.scratch import Scratch

NFS = 'backend = "nfs"\nserver = "{address}"\npath = "/share"\n'
IMAGE = NFS + 'provisioning = "image"\n'
DIRECTORY = 'backend = "directory"\nenforce_capacity = false\nmounted = true\n'
CONFIG = 'scope = "shared"\ndriver_name = "sanity.orlop.dev"\nnode_id = "sanity-node"\n[pools.sanity]\nroot = "{root}"\n'


ONE = pb.VolumeCapability(
    mount=pb.VolumeCapability.MountVolume(),
    access_mode=pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
)
KINDS = {
    "nfs": (NFS, Settings("shared")),
    "shared-directory": (DIRECTORY, Settings("shared")),
    "nfs-image": (IMAGE, Settings("attached", left_out="should fail when the node does not exist")),
}


def warm_up(socket: Path) -> None:
    """Have the child for copies start: in this kernel that takes longer than the suite waits for a copy."""
    with grpc.insecure_channel(f"unix://{socket}") as channel:
        controller = stubs.ControllerStub(channel)
        asked = pb.CreateVolumeRequest(
            name="warm", volume_capabilities=[ONE], capacity_range=pb.CapacityRange(required_bytes=1 << 20)
        )
        volume_id = patiently(lambda: controller.CreateVolume(asked, timeout=90)).volume.volume_id
        snapshot = pb.CreateSnapshotRequest(name="warm", source_volume_id=volume_id)

        def taken() -> pb.Snapshot:
            return patiently(lambda: controller.CreateSnapshot(snapshot, timeout=60)).snapshot

        wait_for(lambda: taken().ready_to_use, 180)
        snapshot_id = taken().snapshot_id
        controller.DeleteSnapshot(pb.DeleteSnapshotRequest(snapshot_id=snapshot_id), timeout=60)
        controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume_id), timeout=60)


@pytest.mark.parametrize("kind", KINDS)
def test_csi_sanity_passes(
    kind: str, make_disk: Callable[..., Disk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / "tools/csi-sanity"
    program = Path(
        subprocess.run([script, "--path"], capture_output=True, text=True, check=True).stdout.strip()
    )
    if not program.exists():
        unavailable("csi-sanity is not built: `tools/csi-sanity`")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    # Its volumes are of 10 GiB, and little is written to them; what was is given back, for it is memory.
    disk = make_disk("btrfs", "discard=sync", size="60G")
    (disk.target / "share").mkdir()
    server = KernelServer(disk.target)
    place = Scratch(tmp_path / "sanity")
    place.pool.mkdir(parents=True)
    options, settings = KINDS[kind]
    text = CONFIG.format(root=place.pool) + options.format(address=server.address)
    (place.root / "orlop.toml").write_text(text)
    try:
        server.start()
        if kind == "shared-directory":
            run("mount", "-t", "nfs", f"{server.address}:/share", place.pool)
        socket = place.root / "csi.sock"
        with served(place, place.root / "orlop.toml", socket):
            warm_up(socket)
            specs = parse_report(run_sanity(program, place, socket, settings))
        verdict = judge(f"{kind}/{settings.name}", specs, read_expected_skips(SKIPS))
        print((place.root / "driver.log").read_text())
        print("\n".join(verdict.complaints))
        assert not verdict.complaints and not tracebacks(place.root / "driver.log")
        assert verdict.passed > 70
    finally:
        # Nothing is there if the driver never came to mount it.
        subprocess.run(["umount", "-l", place.pool], check=False)
        server.remove()
