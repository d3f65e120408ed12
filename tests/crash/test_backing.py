# SPDX-License-Identifier: Apache-2.0
"""A managed pool's making, mounting and growing die after every step; the next start ends as if nothing had happened."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from csi_driver import backing, config
from csi_driver.config import PoolConfig
from csi_driver.linux import mount
from csi_driver.model import MIB
from tests.conftest import require_root, require_tool
from tests.crash.tracer import run_until
from tests.rig import unmount
from tests.scene import clean_place, loops_beneath

pytestmark = pytest.mark.crash

SIZE = 320 * MIB
CONTENT = b"kept\n" * 1000


@pytest.fixture
def place() -> Iterator[Path]:
    require_root()
    require_tool("mkfs.xfs", "mkfs.btrfs", "losetup")
    with clean_place() as path:
        (path / "host").mkdir()
        yield path


def pool(place: Path, target: str, fs_type: str) -> PoolConfig:
    text = f'[pools.p]\nroot = "{place}/mounts/p"\nbacking = {{ {target}, filesystem = "{fs_type}" }}\n'
    return config.parse(text).pools["p"]


def in_file(place: Path, size: int = SIZE) -> str:
    return f'file = "{place}/host/p.img", size = {size}'


def reboot(place: Path, keep: str = "") -> None:
    root = place / "mounts" / "p"
    while mount.find_mounted(root):
        unmount(root)
    for line in loops_beneath(place):
        device = line.split()[0]
        if device != keep:
            subprocess.run(["losetup", "--detach", device], check=True)


def start_over(place: Path, device: str = "") -> None:
    """As if the pool had never been."""
    reboot(place, keep=device)
    for path in (
        *(place / "host").iterdir(),
        *(place / "mounts" / "p").glob("*"),
        *(place / "mounts" / "p").glob(".*"),
    ):
        path.unlink()
    if device:
        os.truncate(place / "disk.img", 0)
        os.truncate(place / "disk.img", SIZE)
        subprocess.run(["blockdev", "--flushbufs", device], check=True)


def steps(action: Callable[[], object], begin: Callable[[], None], check: Callable[[str], None]) -> int:
    """Kill `action` after its first step, its second, …; each time from `begin`, and `check` afterwards."""
    step = 0
    while True:
        step += 1
        begin()
        outcome = run_until(lambda: action, step)
        check(f"killed after step {step}, {outcome.killed_after}")
        if outcome.finished:
            return step


def holds(place: Path, wanted: PoolConfig, when: str, total: int) -> None:
    """The next start makes it good, over a reboot too, and nothing is left beside it."""
    backing.ensure(wanted)
    (wanted.root / "kept").write_bytes(CONTENT)
    found = os.statvfs(wanted.root)
    assert total * 0.6 < found.f_blocks * found.f_frsize <= total, when
    assert len([one for one in mount.mounts() if one.target == str(wanted.root)]) == 1, when
    device = "" if wanted.backing is None or not wanted.backing.is_device else str(wanted.backing.target)
    own = [line for line in loops_beneath(place) if line.split()[0] != device]
    assert len(own) == (0 if device else 1), (when, own)
    reboot(place, keep=device)
    assert sorted(os.listdir(wanted.root)) == ["backing.json"], when
    assert os.listdir(place / "host") == ([] if device else ["p.img"]), when
    backing.ensure(wanted)
    assert (wanted.root / "kept").read_bytes() == CONTENT, when


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_death_while_a_file_is_made(place: Path, fs_type: str) -> None:
    wanted = pool(place, in_file(place), fs_type)

    made = steps(
        lambda: backing.ensure(wanted),
        lambda: start_over(place),
        lambda when: holds(place, wanted, when, SIZE),
    )

    reboot(place)
    assert made > 10


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_death_while_a_device_is_made(place: Path, fs_type: str) -> None:
    with open(place / "disk.img", "wb") as file:
        file.truncate(SIZE)
    command = ["losetup", "--find", "--show", str(place / "disk.img")]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        wanted = pool(place, f'device = "{device}"', fs_type)
        made = steps(
            lambda: backing.ensure(wanted),
            lambda: start_over(place, device),
            lambda when: holds(place, wanted, when, SIZE),
        )
        assert made > 10
    finally:
        with suppress(RuntimeError):
            reboot(place, keep=device)
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_death_while_it_grows_and_while_it_is_mounted(place: Path, fs_type: str) -> None:
    small, large = (pool(place, in_file(place, size), fs_type) for size in (SIZE, 2 * SIZE))

    def begin() -> None:
        start_over(place)
        backing.ensure(small)
        (small.root / "before").write_bytes(CONTENT)

    def check(when: str) -> None:
        backing.ensure(large)
        assert (large.root / "before").read_bytes() == CONTENT, when
        (large.root / "before").unlink()
        holds(place, large, when, 2 * SIZE)

    grown = steps(lambda: backing.ensure(large), begin, check)
    assert grown > 2

    def begin_anew() -> None:
        begin()
        reboot(place)

    mounted = steps(lambda: backing.ensure(large), begin_anew, check)
    assert mounted > grown
    reboot(place)
