# SPDX-License-Identifier: Apache-2.0
"""Ten seconds of the soak (`tests/soak`), with two kills: what it finds at all it often finds at once."""

import subprocess
import sys

from tests.conftest import require_tool


def test_a_short_soak_with_two_kills_finds_nothing() -> None:
    require_tool("mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "losetup", "unshare")
    argv = [sys.executable, "-m", "tests.soak.run", "--seconds", "10", "--kill-every", "4", "--clients", "8"]

    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
