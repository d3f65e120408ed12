# SPDX-License-Identifier: Apache-2.0
"""Remove all that a cluster made, whole or half, running or crashed; repeatable."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.cluster.harness import control_plane, layout, node, processes
from tests.cluster.harness.processes import run

# kubelet sets these for the whole machine.
SYSCTLS = tuple(
    Path("/proc/sys") / name for name in ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")
)


def remember_machine() -> None:
    """Note what `remove_all` is to put back: settings, and which places of nodes did not exist."""
    settings = {str(path): path.read_text().strip() for path in SYSCTLS}
    missing = [place for place in layout.PLACES if not Path(place).exists()]
    layout.MACHINE_BEFORE.write_text(json.dumps({"settings": settings, "missing": missing}))


def remove_all() -> None:
    nodes = layout.existing_nodes()
    for one in nodes:
        stop_node(one)
    for device in node.shared_device().split():
        run("losetup", "--detach", device)
    for component in control_plane.COMPONENTS:
        processes.kill(component)
    for one in nodes:
        run("ip", "netns", "delete", one.network_namespace, check=False)
        run("ip", "link", "delete", one.interface, check=False)
    run("ip", "link", "delete", layout.BRIDGE, check=False)
    _restore_machine()
    shutil.rmtree(layout.ETCD_DATA, ignore_errors=True)
    shutil.rmtree(layout.ROOT, ignore_errors=True)


def stop_node(one: layout.Node) -> None:
    """The power cut: every process and mount of the node is gone; its disks stay."""
    processes.kill(f"{one.name}-init")
    processes.kill(one.name)
    detach_loop_devices(one)
    for group in node.cgroup_directories(one):
        _remove_cgroup(group)


def detach_loop_devices(one: layout.Node) -> None:
    """Detach the loop devices over the node's disks, over files on these disks, and so on upwards.

    A volume's loop device outlives its mount when its driver was killed, and keeps the disk below busy; and a pool of the
    driver's own making is a loop device between the two.
    """
    deadline = time.monotonic() + 240
    while remaining := loop_devices(one.directory):
        for device in reversed(remaining):  # upper ones first
            subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)
        if time.monotonic() > deadline:
            raise TimeoutError(f"loop devices of {one.name} cannot be detached: {' '.join(remaining)}")
        time.sleep(0.1)


def loop_devices(directory: Path) -> list[str]:
    """Those over files in the directory, and over files on filesystems on such devices; each comes after what it is on."""
    columns = "NAME,MAJ:MIN,BACK-FILE,BACK-MAJ:MIN,BACK-INO"
    listed = run("losetup", "--list", "--json", "--output", columns)
    rows = json.loads(listed)["loopdevices"] if listed.strip() else []
    found: list[str] = []
    level = [row for row in rows if str(row["back-file"]).startswith(f"{directory}/")]
    # A file that a node had mounted, by itself or with its directory, is named from there, which is gone with the node.
    nameless = [row for row in rows if not os.path.exists(row["back-file"])]
    if nameless:
        inodes = _inodes(directory)
        level += [
            row for row in nameless if (str(row["back-maj:min"]).strip(), int(row["back-ino"])) in inodes
        ]
    while level:
        found += [row["name"] for row in level]
        disks = {row["maj:min"].strip() for row in level}
        level = [
            row for row in rows if str(row["back-maj:min"]).strip() in disks and row["name"] not in found
        ]
    return found


def _inodes(directory: Path) -> set[tuple[str, int]]:
    """Device and number of every file in it, on its own filesystem."""
    device = directory.stat().st_dev
    shown = f"{os.major(device)}:{os.minor(device)}"
    words = ("find", directory, "-xdev", "-type", "f", "-printf", "%i\\n")
    return {(shown, int(line)) for line in run(*words, check=False).split()}


def _remove_cgroup(group: Path) -> None:
    def removed() -> bool:
        for directory in sorted(group.rglob("*/"), reverse=True):
            _try_rmdir(directory)
        _try_rmdir(group)
        _try_rmdir(group.parent)
        return not group.exists()

    processes.wait_until(removed, f"the control group {group} to be empty", timeout_s=240)


def _try_rmdir(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # in use, for a moment after its processes ended, or by others


def _restore_machine() -> None:
    if not layout.MACHINE_BEFORE.exists():
        return
    before = json.loads(layout.MACHINE_BEFORE.read_text())
    for path, value in before["settings"].items():
        Path(path).write_text(value)
    for place in before["missing"]:
        _try_rmdir(Path(place))
