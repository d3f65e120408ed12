# SPDX-License-Identifier: Apache-2.0
"""What a test cluster leaves on the machine when it is torn down in the middle."""

import subprocess
from pathlib import Path

from tests.cluster.harness.cleanup import loop_devices
from tests.conftest import require_tool


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_loop_devices_over_what_a_node_had_mounted_are_found_when_it_is_gone(scratch: Path) -> None:
    require_tool("losetup", "mount", "unshare")
    (scratch / "node1/data").mkdir(parents=True)
    (scratch / "seen").mkdir()
    run("truncate", "--size", "8M", scratch / "node1/data/default.img")
    mounted = f"mount --bind {scratch}/node1/data {scratch}/seen"
    device = run(
        *("unshare", "--mount", "--propagation=private", "sh", "-c"),
        f"{mounted} && losetup --find --show {scratch}/seen/default.img",
    )
    try:
        assert run("losetup", "--noheadings", "--output=BACK-FILE", device) == "/default.img"
        assert loop_devices(scratch / "node1") == [device]
    finally:
        run("losetup", "--detach", device)


def test_loop_devices_are_found_through_every_filesystem_between(scratch: Path) -> None:
    require_tool("losetup", "mkfs.ext4", "mount")
    place, made, targets = scratch / "node1", [], []
    place.mkdir()
    try:
        for number, size in enumerate(("48M", "24M", "8M")):
            image = place / f"disk{number}"
            run("truncate", "--size", size, image)
            made.append(run("losetup", "--find", "--show", image))
            run("mkfs.ext4", "-q", made[-1])
            place = scratch / f"mounted{number}"
            place.mkdir()
            run("mount", "--make-private", made[-1], place)
            targets.append(place)
        for target in reversed(targets):
            run(
                "umount", "--lazy", target
            )  # as the end of a mount namespace does: the names of the files are gone
        assert loop_devices(scratch / "node1") == made
    finally:
        for target in reversed(targets):
            subprocess.run(["umount", "--lazy", target], capture_output=True, check=False)
        for device in reversed(made):
            run("losetup", "--detach", device)
