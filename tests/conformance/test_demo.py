# SPDX-License-Identifier: Apache-2.0
"""`orlop demo` over every backend and filesystem: every check holds, and the machine is left as it was found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import require_root, require_tool
from tests.scene import backing_files

pytestmark = pytest.mark.kernel

TIMEOUT_S = 120


@pytest.fixture(autouse=True)
def possible() -> None:
    require_root()
    require_tool("mkfs.ext4")


def argv(place: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "csi_driver", "demo", "--directory", str(place), *options]


def traces(place: Path, pid: int | str = "self") -> list[str]:
    """What of a demo there is on this machine, as this process sees it."""
    mounts = [line for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines() if str(place) in line]
    backing = [line for _, line in backing_files() if str(place) in line]
    return [*mounts, *backing, *os.listdir(place)]


@pytest.mark.parametrize(
    ("options", "tool"),
    [
        (["--pool-backend", "image"], "mkfs.ext4"),
        (["--pool-backend", "image", "--fs-type", "xfs"], "mkfs.xfs"),
        (["--pool-backend", "image", "--fs-type", "btrfs"], "mkfs.btrfs"),
        (["--pool-backend", "directory"], "mkfs.ext4"),
        (["--pool-backend", "btrfs"], "mkfs.btrfs"),
    ],
    ids=lambda value: "-".join(value[1::2]) if isinstance(value, list) else "",
)
def test_every_check_of_the_demo_holds(tmp_path: Path, options: list[str], tool: str) -> None:
    require_tool(tool)

    done = subprocess.run(
        argv(tmp_path, *options, "--json"), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )

    document = json.loads(done.stdout)
    checks = [check for step in document["steps"] for check in step["checks"]]
    assert [check["claim"] for check in checks if not check["held"]] == []
    assert (done.returncode, document["failure"]) == (0, "")
    assert len(checks) > 15
    assert traces(tmp_path) == []


def test_the_demo_shows_its_steps_to_people(tmp_path: Path) -> None:
    done = subprocess.run(argv(tmp_path), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    assert done.returncode == 0, done.stdout
    for call in ("CreateVolume", "NodePublishVolume", "NodeExpandVolume", "DeleteVolume"):
        assert call in done.stdout
    assert "checks held" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_takes_everything_down(tmp_path: Path, number: signal.Signals) -> None:
    # `--keep` waits with everything mounted, for a line that never comes.
    with subprocess.Popen(
        argv(tmp_path, "--keep"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        _read_until(demo, "Kept for you to look at")
        assert len(traces(tmp_path, demo.pid)) > 3
        demo.send_signal(number)
        demo.stdout.read()
        code = demo.wait(TIMEOUT_S)

    assert code == 128 + number
    assert traces(tmp_path) == []


def test_a_demo_that_cannot_go_on_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        argv(tmp_path, "--keep"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as demo:
        _read_until(demo, "Kept for you to look at")
        _kill_driver_of(demo.pid)
        assert demo.stdin is not None
        demo.stdin.write("\n")
        demo.stdin.close()
        assert demo.stdout is not None
        said = demo.stdout.read()
        code = demo.wait(TIMEOUT_S)

    assert code == 1
    assert "UNAVAILABLE" in said
    assert traces(tmp_path) == []


def _read_until(demo: "subprocess.Popen[str]", text: str) -> None:
    assert demo.stdout is not None
    for line in demo.stdout:
        if text in line:
            return
    pytest.fail(f"the demo ended before it said {text!r}")


def _kill_driver_of(demo_pid: int) -> None:
    """SIGKILL to the demo's child, found as such."""
    children = Path(f"/proc/{demo_pid}/task/{demo_pid}/children").read_text().split()
    (driver,) = [int(pid) for pid in children if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(driver, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while "State:\tZ" not in Path(f"/proc/{driver}/status").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
