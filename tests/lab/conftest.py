# SPDX-License-Identifier: Apache-2.0
"""Tests that run inside the second kernel, and the disks they make there. `make test-lab` runs them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.lab.disks import Disk

MakeDisk = Callable[..., Disk]


@pytest.fixture(autouse=True, scope="session")
def second_kernel() -> None:
    if os.environ.get("LAB") != "1":
        unavailable("runs under a kernel of its own: `make test-lab`")


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """`make_disk("xfs", "prjquota")`: a new filesystem, mounted; gone with the test."""
    made: list[Disk] = []

    def make(kind: str, options: str = "", size: str = "512M") -> Disk:
        disk = Disk.make(kind, tmp_path / f"disk{len(made)}", size)
        made.append(disk)
        disk.mount(options)
        return disk

    yield make
    for disk in reversed(made):
        disk.remove()
