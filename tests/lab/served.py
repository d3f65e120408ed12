# SPDX-License-Identifier: Apache-2.0
"""Directories of one NFS server of the second kernel, for suites that want a fresh pool on one for each test.

The server is started once, and ends with the kernel. What is made of its directories is the tests' business.
"""

import itertools
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.lab.disks import Disk, run
from tests.lab.hosts import KernelServer

NUMBERS = itertools.count(1)
PLACE = Path("/run/served")


@dataclass(frozen=True)
class Export:
    """A new directory: `path` of `server` for clients, `directory` on the server's own filesystem."""

    server: str
    path: str
    directory: Path

    def remove(self) -> None:
        """Give its room back, to the memory that the server's disk lies in too."""
        shutil.rmtree(self.directory)
        run("fstrim", PLACE)


@cache
def _server(_process: int) -> KernelServer:
    disk = Disk.make("xfs", PLACE, "900M")
    disk.mount("prjquota")
    made = KernelServer(disk.target)
    made.start()
    return made


def export() -> Export:
    """Another directory of the server."""
    server = _server(os.getpid())
    name = f"share/{next(NUMBERS)}"
    directory = server.export / name
    directory.mkdir(mode=0o755)
    return Export(server.address, f"/{name}", directory)
