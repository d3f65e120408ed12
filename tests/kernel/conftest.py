# SPDX-License-Identifier: Apache-2.0
"""Real directories, disks and pools for kernel tests, and the check that no test leaves anything behind.

All of a session happens beneath one private directory, so that only what is there, or is backed by a file there, is
looked at and cleaned: other users of the machine are left alone. The tools of util-linux set the scene, not the code
that is being tested.
"""

import gc
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require_root, require_tool

MIB = 1 << 20
DEFAULT_SIZES = {"ext4": 256 * MIB, "xfs": 320 * MIB, "btrfs": 512 * MIB}
# What a closed device or an ended child may need until the kernel has tidied up.
SETTLE_S = 20.0


@dataclass(frozen=True)
class Leftovers:
    """What tests can leave behind, as sets of readable lines."""

    mounts: frozenset[str]
    loops: frozenset[str]
    children: frozenset[str]
    descriptors: frozenset[str]
    entries: frozenset[str]

    def beyond(self, before: "Leftovers") -> list[str]:
        return [
            f"{kind}: {line}"
            for kind in ("mounts", "loops", "children", "descriptors", "entries")
            for line in sorted(getattr(self, kind) - getattr(before, kind))
        ]


def _mounts(base: Path) -> list[str]:
    """Targets beneath `base`, the latest first."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    targets = [os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")) for line in lines]
    return [target for target in reversed(targets) if Path(target).is_relative_to(base)]


def _loops(base: Path) -> dict[str, str]:
    """Device -> backing file, of those backed by a file beneath `base` (removed or not)."""
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = os.fsdecode(path.read_bytes().rstrip(b"\n"))
        except OSError:
            continue  # Detached meanwhile, by another user of the machine.
        if Path(backing).is_relative_to(base):
            found[f"/dev/{path.parent.parent.name}"] = backing
    return found


def _children() -> frozenset[str]:
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = status.read_text(errors="replace").partition(" ")
        except OSError:
            continue
        if int(rest.rpartition(")")[2].split()[1]) == os.getpid():
            found.add(f"{pid} {rest.rpartition(')')[0]})")
    return frozenset(found)


def _descriptors() -> frozenset[str]:
    gc.collect()
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue  # That of the listing itself.
    return frozenset(found)


def look(base: Path) -> Leftovers:
    return Leftovers(
        mounts=frozenset(_mounts(base)),
        loops=frozenset(f"{device} {backing}" for device, backing in _loops(base).items()),
        children=_children(),
        descriptors=_descriptors(),
        entries=frozenset(os.fspath(path) for path in base.iterdir()),
    )


def sweep(base: Path) -> None:
    """Unmount and detach all that is left beneath `base`; delete nothing that could still be mounted."""
    for target in _mounts(base):
        subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
    for device in _loops(base):
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
    if not _mounts(base):
        for path in base.iterdir():
            subprocess.run(["chattr", "-R", "-f", "-ia", path], check=False, capture_output=True)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def kernel_base() -> Iterator[Path]:
    """The private directory of this session, on a disk (ORLOP_TEST_DIR, else /var/tmp)."""
    require_root()
    require_tool("mkfs.ext4", "losetup", "mount", "umount")
    base = Path(tempfile.mkdtemp(prefix="orlop-kernel-", dir=os.environ.get("ORLOP_TEST_DIR", "/var/tmp")))
    yield base.resolve()
    sweep(base.resolve())
    base.rmdir()


@pytest.fixture(autouse=True)
def leak_check(kernel_base: Path) -> Iterator[None]:
    """Fail the test that leaves a mount, a loop device, a child, a descriptor or a file behind; then clean up."""
    before = look(kernel_base)
    yield
    deadline = time.monotonic() + SETTLE_S
    while (leaked := look(kernel_base).beyond(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if leaked:
        sweep(kernel_base)
        pytest.fail("left behind:\n  " + "\n  ".join(leaked), pytrace=False)


@pytest.fixture
def workshop(kernel_base: Path, leak_check: None) -> Iterator[Path]:
    """An empty directory of this test's own on whatever filesystem the machine has; for images and mount points."""
    path = Path(tempfile.mkdtemp(prefix="test-", dir=kernel_base))
    path.chmod(0o755)
    yield path
    for target in _mounts(path):
        subprocess.run(["umount", target], check=False, capture_output=True)
    # What is still mounted (or undeletable) now is a leak, and must not be deleted through.
    if not _mounts(path):
        subprocess.run(["chattr", "-R", "-f", "-ia", path], check=False, capture_output=True)
        shutil.rmtree(path, ignore_errors=True)


MakePool = Callable[..., Path]


@pytest.fixture
def make_pool(workshop: Path) -> MakePool:
    """Make and mount a fresh filesystem: `make_pool("xfs", size_bytes, "-m", "reflink=0", mount="discard")`.

    A sparse file behind a loop device, gone with the test. Returns the mount point.
    """

    def make(fs_type: str, size_bytes: int = 0, *options: str, mount: str = "") -> Path:
        require_tool(f"mkfs.{fs_type}")
        number = len(list(workshop.glob("pool*.img")))
        image, target = workshop / f"pool{number}.img", workshop / f"pool{number}"
        with open(image, "wb") as file:
            file.truncate(size_bytes or DEFAULT_SIZES[fs_type])
        force = "-F" if fs_type == "ext4" else "-f"
        subprocess.run([f"mkfs.{fs_type}", "-q", force, *options, image], check=True, capture_output=True)
        target.mkdir()
        chosen = ["loop", mount] if mount else ["loop"]
        subprocess.run(["mount", "-t", fs_type, "-o", ",".join(chosen), image, target], check=True)
        return target

    return make


@pytest.fixture
def ext4_pool(make_pool: MakePool) -> Path:
    return make_pool("ext4")


@pytest.fixture
def xfs_pool(make_pool: MakePool) -> Path:
    return make_pool("xfs")


@pytest.fixture
def btrfs_pool(make_pool: MakePool) -> Path:
    return make_pool("btrfs")


@pytest.fixture
def scratch(workshop: Path, make_pool: MakePool) -> Path:
    """An empty directory on a real ext4: the machine's own where it has that, else a loop-mounted one."""
    said = subprocess.run(["stat", "-f", "-c", "%T", workshop], check=True, capture_output=True, text=True)
    place = workshop
    if said.stdout.strip() != "ext2/ext3":
        place = make_pool("ext4", 8192 * MIB)
    path = place / "scratch"
    path.mkdir()
    return path
