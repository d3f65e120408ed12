# SPDX-License-Identifier: Apache-2.0
"""Which capabilities this process has, where the kernel's refusal would come too late. capabilities(7)."""

from functools import cache
from pathlib import Path
from typing import Final

CAP_SYS_RESOURCE: Final = 24


@cache
def has(capability: int) -> bool:
    """Whether the capability is in the effective set. It does not change while the driver runs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def can_grow_mounted(fs_type: str) -> bool:
    """Whether a mounted filesystem of this kind may be grown by this process: ext4 asks for CAP_SYS_RESOURCE."""
    return fs_type != "ext4" or has(CAP_SYS_RESOURCE)
