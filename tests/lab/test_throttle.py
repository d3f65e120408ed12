# SPDX-License-Identifier: Apache-2.0
"""I/O limits as a kernel with cgroup v2 keeps them: a pod's direct reads and writes take as long as they must."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver import modify
from csi_driver.linux.throttle import ROOT
from csi_driver.model import MIB, CapacityRange, VolumeRequest
from tests.lab.conftest import MakeDisk
from tests.lab.hosts import wait_for
from tests.rig import Kind, Rig, capability, configure, open_rig, published, staged

pytestmark = pytest.mark.lab
SIZE = 32 * MIB
PODS = ROOT / "kubepods"
POD = PODS / "pod1"
IMAGE = Kind("image", "image")

# Joins a cgroup, moves some MiB past the page cache, and says how long that took.
WORKER = """
import mmap, os, sys, time
cgroup, path, verb, size = sys.argv[1:]
if cgroup:
    open(f"{cgroup}/cgroup.procs", "w").write(str(os.getpid()))
page = mmap.mmap(-1, 1 << 20)
fd = os.open(path, os.O_DIRECT | (os.O_RDWR | os.O_CREAT if verb == "write" else os.O_RDONLY), 0o600)
began = time.monotonic()
for place in range(0, int(size), 1 << 20):
    os.pwritev(fd, [page], place) if verb == "write" else os.preadv(fd, [page], place)
print(time.monotonic() - began)
"""


def removed(cgroup: Path) -> bool:
    """A process that has just ended may keep it for a moment."""
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


@pytest.fixture
def pods() -> Iterator[Path]:
    """The cgroups that kubelet would make: all pods, and one of them."""
    (ROOT / "cgroup.subtree_control").write_text("+io")
    POD.mkdir(parents=True, exist_ok=True)
    yield POD
    wait_for(lambda: removed(POD), 10)
    wait_for(lambda: removed(PODS), 10)


@pytest.fixture
def rig(make_disk: MakeDisk) -> Iterator[Rig]:
    with open_rig(configure(IMAGE, make_disk("xfs", size="1G").target / "pool")) as opened:
        yield opened


def seconds(cgroup: Path | None, path: Path, verb: str, size: int) -> float:
    argv = [sys.executable, "-c", WORKER, str(cgroup or ""), str(path), verb, str(size)]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def fastest(cgroup: Path | None, path: Path, verb: str, size: int) -> float:
    """Of a few: what no limit holds up a busy machine still may, but not each time."""
    return min(seconds(cgroup, path, verb, size) for _ in range(3))


def test_a_pod_reads_and_writes_no_faster_than_its_class_says(pods: Path, rig: Rig, tmp_path: Path) -> None:
    limited = {"writeBps": "1Mi", "readBps": "2Mi"}
    request = VolumeRequest("a", (capability(),), CapacityRange(SIZE), mutable=limited)
    volume = rig.controller.create_volume(request)
    staging, target = tmp_path / "staging", tmp_path / "target"
    staging.mkdir()
    rig.node.stage(staged(volume.id, staging))
    rig.node.publish(published(volume.id, target, staging))
    file = target / "file"

    try:
        written = seconds(pods, file, "write", 4 * MIB)
        read = seconds(pods, file, "read", 4 * MIB)
        outside = fastest(None, file, "write", 4 * MIB)
        # A driver that starts anew finds the device, and the kernel has the limits still.
        modify.adopt(rig.pools)
        again = seconds(pods, file, "write", 3 * MIB)
        rig.controller.modify_volume(volume.id, {"retention": "0"})
        lifted = fastest(pods, file, "write", 4 * MIB)
        io_max = (PODS / "io.max").read_text()
        rig.controller.modify_volume(volume.id, {"writeIops": "10"})
        operations = seconds(pods, file, "write", 4 * MIB)
        set_again = (PODS / "io.max").read_text()
    finally:
        rig.node.unpublish(volume.id, str(target))
        rig.node.unstage(volume.id, str(staging))

    print(
        f"{written=:.2f} {read=:.2f} {outside=:.2f} {again=:.2f} {lifted=:.2f} {operations=:.2f} {io_max=!r}"
    )
    assert written > 2.5 > max(outside, lifted)
    assert read > 1.2 and again > 1.5
    assert io_max == ""
    assert "rbps=max wbps=max riops=max wiops=10" in set_again
    assert (PODS / "io.max").read_text() == ""
