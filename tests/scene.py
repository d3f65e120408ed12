# SPDX-License-Identifier: Apache-2.0
"""One backend's pool on a fresh filesystem, the drivers that a test opens over it, and what a pod sees of a volume."""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest

from csi_driver.model import AccessMode
from tests.conftest import require_root, require_tool
from tests.lab.served import export
from tests.rig import Kind, Rig, capability, configure, mounted, open_rig, published, staged, unmount

CLONE_NEWNS = 0x20000
# What a closed device may need until the kernel has tidied up.
SETTLE_S = 60.0
FILESYSTEM_IMAGE = "filesystem.img"


@dataclass
class Scene:
    """One backend's pool directory, and the drivers that a test opens over it."""

    kind: Kind
    place: Path
    """For mount points and other things beside the pool."""
    root: Path
    """The pool's."""
    filesystem: Path | None
    """What the pool lies on, if it is one of its own."""
    current: ExitStack = field(default_factory=ExitStack)

    @property
    def mounted(self) -> Path | None:
        """Where the pool's filesystem is mounted: a managed pool has its own."""
        return self.root if self.root.is_mount() else self.filesystem

    def leave_out_served(self, reason: str) -> None:
        """Give the test up for pools on a server."""
        if self.kind.served:
            pytest.skip(f"on a server: {reason}")

    def leave_out_clients(self, reason: str) -> None:
        """Give the test up for pools on a server that is another machine."""
        if self.kind.filesystem == "nfs":
            self.leave_out_served(reason)

    def open(self, extra: str = 'reserved = "0%"\n') -> Rig:
        """A driver; the one before it is closed first, as by a restart."""
        self.current.close()
        return self.current.enter_context(open_rig(configure(self.kind, self.root, extra=extra)))

    def use(self, change: Kind, extra: str = 'reserved = "0%"\n') -> Rig:
        """A driver configured otherwise."""
        self.kind = change
        return self.open(extra)


@cache
def own_mounts() -> None:
    """Give this process mounts of its own: a container that somebody starts meanwhile would get a copy of ours, and keep
    the devices under them for as long as it lives."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    # What is mounted on the machine later is still seen here.
    subprocess.run(["mount", "--make-rslave", "/"], check=True)


def mounts_beneath(base: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [target for line in lines if Path(target := line.split()[4]).is_relative_to(base)]


def backing_files() -> Iterator[tuple[str, str]]:
    """Each loop device of this machine and its file, a line as the kernel tells it."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            line = path.read_text()
        except OSError:
            continue  # detached meanwhile, by another user of the machine
        yield f"/dev/{path.parent.parent.name}", line


def loops_beneath(base: Path) -> list[str]:
    found = []
    for device, line in backing_files():
        backing = line.strip()
        # Not the scene's own filesystem: a mount namespace that somebody made meanwhile may keep it for a while.
        if Path(backing).is_relative_to(base) and not Path(backing).name.startswith(FILESYSTEM_IMAGE):
            found.append(f"{device} {backing}")
    return found


def descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue  # that of the listing itself
    return found


@contextmanager
def clean_place() -> Iterator[Path]:
    """An empty directory on a disk; nothing may be mounted in it, or attached from it, at the end."""
    if os.geteuid() == 0:
        own_mounts()
    path = Path(tempfile.mkdtemp(prefix="orlop-test-", dir=os.environ.get("ORLOP_TEST_DIR", "/var/tmp")))
    before = descriptors()
    yield path
    deadline = time.monotonic() + SETTLE_S
    while (left := [*mounts_beneath(path), *loops_beneath(path)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    # Those of the place alone: pytest's own come and go.
    left += sorted(one for one in descriptors() - before if os.fspath(path) in one)
    for target in reversed(mounts_beneath(path)):
        subprocess.run(["umount", "--lazy", target], check=False)
    for device in loops_beneath(path):
        subprocess.run(["losetup", "--detach", device.split()[0]], check=False)
    shutil.rmtree(path)
    assert not left, "left behind: " + ", ".join(left)


@contextmanager
def set_up(kind: Kind, place: Path, size_bytes: int = 1 << 30) -> Iterator[Scene]:
    if not kind.needs_root:
        scene = Scene(kind, place, place / "pool", None)
        with scene.current:
            yield scene
        return
    if kind.served:
        with set_up_served(kind, place) as scene:
            yield scene
        return
    require_root()
    require_tool(f"mkfs.{kind.filesystem}", "mount", "umount", "losetup", *kind.tools)
    with mounted(kind.filesystem, place, size_bytes) as filesystem:
        scene = Scene(kind, place, filesystem / "pool", filesystem)
        try:
            with scene.current:
                yield scene
        finally:
            end_managed(scene.root)


@contextmanager
def set_up_served(kind: Kind, place: Path) -> Iterator[Scene]:
    """A directory of its own on the second kernel's file server, and what a driver of this kind finds mounted."""
    served = export()
    options = kind.options.replace("@SERVER@", served.server).replace("@PATH@", served.path)
    root = place / "pool"
    if kind.filesystem != "nfs":
        root = served.directory
    elif kind.backend != "nfs":
        root.mkdir()
        subprocess.run(["mount", "-t", "nfs", f"{served.server}:{served.path}", root], check=True)
    scene = Scene(replace(kind, options=options), place, root, root)
    try:
        with scene.current:
            yield scene
    finally:
        if root.is_mount():
            unmount(root)
        served.remove()


def end_managed(root: Path) -> None:
    """The filesystem of a managed pool is left mounted by its driver."""
    if not root.is_mount():
        return
    unmount(root)
    for device in loops_beneath(root.parent):
        subprocess.run(["losetup", "--detach", device.split()[0]], check=True)


@contextmanager
def in_pod(scene: Scene, rig: Rig, volume_id: str, name: str = "pod") -> Iterator[Path]:
    """The volume as a pod sees it: staged and published, and all of that undone."""
    if scene.kind.used_elsewhere:
        with _mounted_by_hand(scene, rig, volume_id) as path:
            yield path
        return
    staging, target = scene.place / f"{name}-staging", scene.place / f"{name}-target"
    staging.mkdir(exist_ok=True)
    wanted = capability(AccessMode.SINGLE_NODE_WRITER)
    rig.node.stage(staged(volume_id, staging, wanted))
    try:
        rig.node.publish(published(volume_id, target, staging, wanted))
        try:
            yield target
        finally:
            rig.node.unpublish(volume_id, str(target))
    finally:
        rig.node.unstage(volume_id, str(staging))


@contextmanager
def _mounted_by_hand(scene: Scene, rig: Rig, volume_id: str) -> Iterator[Path]:
    target = scene.place / "by-hand"
    target.mkdir()
    image = rig.pool.catalog.home(volume_id).path / "image"
    subprocess.run(["mount", "-o", "loop", "--make-private", image, target], check=True)
    try:
        (target / "data").mkdir(exist_ok=True)
        yield target / "data"
    finally:
        unmount(target)
        target.rmdir()


def fill(path: Path, limit_bytes: int, *, chunk: int = 1 << 20) -> tuple[int, OSError | None]:
    """Write until it is refused, or `limit_bytes` are written; how much was, and the refusal."""
    done = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        while done < limit_bytes:
            # Not zeros: a filesystem may compress.
            done += os.write(fd, os.urandom(min(chunk, limit_bytes - done)))
            os.fdatasync(fd)
    except OSError as error:
        return done, error
    finally:
        os.close(fd)
    return done, None
