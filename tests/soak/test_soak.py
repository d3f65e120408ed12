# SPDX-License-Identifier: Apache-2.0
"""Many clients, random lives of volumes, and a driver that is killed every few seconds: nothing wrong, left or lost.

ORLOP_SOAK_SECONDS, ORLOP_SOAK_CLIENTS and ORLOP_SOAK_SEED change the run; a short one is in the kernel tier.
"""

import os
import subprocess
import sys

import pytest

from tests.conftest import require_root, require_tool

# Behind the last kill, all volumes are walked back to nothing. With the minute before it, within the tier's time in CI.
ENDING_S = 480.0


@pytest.mark.soak
def test_nothing_is_wrong_left_or_lost_while_the_driver_is_killed_again_and_again() -> None:
    require_root()
    require_tool("mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "losetup", "unshare")
    seconds = float(os.environ.get("ORLOP_SOAK_SECONDS", "60"))
    argv = [sys.executable, "-m", "tests.soak.run", "--seconds", f"{seconds:g}", "--kill-every", "5"]
    argv += ["--clients", os.environ.get("ORLOP_SOAK_CLIENTS", "16")]
    if "ORLOP_SOAK_SEED" in os.environ:
        argv += ["--seed", os.environ["ORLOP_SOAK_SEED"]]

    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + ENDING_S, check=False)

    sys.stdout.write(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
