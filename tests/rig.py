# SPDX-License-Identifier: Apache-2.0
"""A driver without its wire: pools, Controller and Node in this process, over any backend.

For tests that hold every backend to the same promises. The scene (loop-mounted filesystems) is set by the tools of
util-linux, not by the code under test. What is promised is the tests' business.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver import backends, backing, config
from csi_driver.backends.base import Backend
from csi_driver.catalog import Catalog
from csi_driver.config import PoolConfig
from csi_driver.controller import Controller
from csi_driver.copies import Copier
from csi_driver.groups import Groups
from csi_driver.health import Health
from csi_driver.jobs import Jobs
from csi_driver.linux.freeze import Freezer
from csi_driver.locks import Locks
from csi_driver.model import (
    GIB,
    MIB,
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    NodeInfo,
    PublishRequest,
    StageRequest,
    VolumeRequest,
)
from csi_driver.node import Node
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.snapshots import Snapshots

NODE_SEGMENTS = {"topology.local.orlop.dev/node": "node-1"}
FILESYSTEM_BYTES = GIB


@dataclass(frozen=True)
class Kind:
    """A backend, configured in one way, and what it needs beneath it."""

    name: str
    backend: str
    filesystem: str = ""
    """What its pool is put on, mounted for the test; "" for any directory, without root."""
    options: str = ""
    """Further lines of its configuration; @ROOT@ is where the pool is."""
    tools: tuple[str, ...] = field(default=())
    """Programs it runs."""
    size_bytes: int = 16 * MIB
    """A small volume that is quickly made."""
    written_at_once: bool = False
    """All of a volume's room is taken when it is made."""
    served: bool = False
    """Its pool is on a file server of the second kernel's; @SERVER@ and @PATH@ in `options` say where."""
    used_elsewhere: bool = False
    """What has the pool cannot publish its volumes: nodes find them by their context."""

    @property
    def needs_root(self) -> bool:
        return self.filesystem != ""


KINDS = (
    Kind("memory", "memory", options='total = "1Gi"\n', written_at_once=True),
    Kind("directory", "directory", "ext4", "enforce_capacity = false\n"),
    Kind("btrfs", "btrfs", "btrfs", "enable_quota = true\n"),
    Kind("image", "image", "ext4", tools=("mkfs.ext4",), written_at_once=True),
)
# Simple quotas where the kernel has them; this is what older ones get.
FULL_QGROUPS = Kind("btrfs-full", "btrfs", "btrfs", "full_qgroups = true\n")
# Copies that share blocks: what a pool's filesystem can makes backends differ.
SHARING = (
    Kind("image-xfs", "image", "xfs", tools=("mkfs.ext4",), written_at_once=True),
    Kind("image-btrfs", "image", "btrfs", tools=("mkfs.ext4",), written_at_once=True),
    Kind("directory-xfs", "directory", "xfs", "enforce_capacity = false\n"),
)
# A filesystem of the pool's own, in a file on an ext4 that cannot share.
MANAGED = Kind(
    "image-managed",
    "image",
    "ext4",
    'backing = { file = "@ROOT@.img", size = "960Mi" }\n',
    tools=("mkfs.ext4", "mkfs.xfs"),
    written_at_once=True,
)
_EXPORT = 'server = "@SERVER@"\npath = "@PATH@"\n'
# Pools on a file server, which the second kernel alone has (tests/lab): there these suites run over them as well.
SERVED = (
    Kind("served-nfs", "nfs", "nfs", _EXPORT, served=True),
    Kind("served-quota", "nfs", "xfs", f"{_EXPORT}on_server = true\n", served=True),
    Kind("served-directory", "directory", "nfs", "enforce_capacity = false\nmounted = true\n", served=True),
)
SERVED_IMAGE = Kind(
    "served-image",
    "nfs",
    "nfs",
    f'{_EXPORT}provisioning = "image"\n',
    tools=("mkfs.ext4",),
    written_at_once=True,
    served=True,
    used_elsewhere=True,
)
LAB = os.environ.get("LAB") == "1"
IN_LAB = SERVED if LAB else ()
THIN = Kind("image-thin", "image", "ext4", 'provisioning = "thin"\novercommit = 2.0\n', tools=("mkfs.ext4",))


class Rig:
    """A driver over one pool, named `p`. Use `with`, or `close` it before another one opens the same pool."""

    def __init__(self, pools: Pools, *, expands: bool = True) -> None:
        self.pools = pools
        self.locks = Locks()
        self.health = Health(pools)
        self.copier = Copier(Jobs(0), Freezer())
        self.snapshots = Snapshots(pools, self.locks, self.copier, NODE_SEGMENTS)
        self.groups = Groups(pools, self.locks, self.copier, NODE_SEGMENTS)
        self.groups.adopt()
        self.controller = Controller(
            pools, self.locks, self.health, self.copier, NODE_SEGMENTS, expands=expands
        )
        self.node = Node(pools, self.locks, self.health, NodeInfo("node-1", 0, NODE_SEGMENTS))

    @property
    def pool(self) -> Pool:
        """The first pool."""
        return next(iter(self.pools))

    @property
    def backend(self) -> Backend:
        return self.pool.backend

    def close(self) -> None:
        self.copier.close()
        for pool in self.pools:
            pool.close()

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def settle(self) -> None:
        """What maintenance does in the background: remove the deleted and the half made, count anew."""
        for pool in self.pools:
            if pool.is_apart:
                pool.sweep()
                self.groups.sweep(pool)
            pool.empty_trash()
            pool.refresh()


def configure(kind: Kind, root: Path, *, name: str = "p", extra: str = 'reserved = "0%"\n') -> PoolConfig:
    text = f'[pools.{name}]\nbackend = "{kind.backend}"\nroot = "{root}"\n{kind.options}{extra}'
    if kind.served:
        text = f'scope = "shared"\n{text}'
    text = text.replace("@ROOT@", str(root))
    return config.parse(text).pools[name]


def open_pool(pool_config: PoolConfig) -> Pool:
    mounted = backing.ensure(pool_config)
    backend = backends.create(pool_config)
    backend.check()
    layout = backends.layout(pool_config)
    catalog = Catalog.open(pool_config.root, layout, exclusive=not pool_config.shared)
    try:
        pool = Pool(pool_config, catalog, backend, mounted)
        pool.adopt()
    except BaseException:
        catalog.close()
        raise
    return pool


def open_rig(
    *pool_configs: PoolConfig, default_pool: str = "", elsewhere: frozenset[str] = frozenset()
) -> Rig:
    opened: dict[str, Pool] = {}
    try:
        for pool_config in pool_configs:
            opened[pool_config.name] = open_pool(pool_config)
    except BaseException:
        for pool in opened.values():
            pool.close()
        raise
    return Rig(Pools(opened, default_pool, elsewhere=elsewhere))


@contextmanager
def mounted(filesystem: str, place: Path, size_bytes: int = FILESYSTEM_BYTES) -> Iterator[Path]:
    """A fresh filesystem on a sparse file in `place`, mounted while the body runs."""
    image, target = place / "filesystem.img", place / "filesystem"
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    force = "-F" if filesystem == "ext4" else "-f"
    subprocess.run([f"mkfs.{filesystem}", "-q", force, image], check=True, capture_output=True)
    target.mkdir()
    # Private: other mount namespaces that are made meanwhile must not keep it.
    subprocess.run(["mount", "-o", "loop", "--make-private", image, target], check=True)
    try:
        yield target
    finally:
        unmount(target)
        image.unlink()


def unmount(target: Path) -> None:
    """Unmount, with patience: the kernel's own work on a filesystem keeps it for a moment."""
    for _ in range(300):
        done = subprocess.run(["umount", target], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"umount {target}: {done.stderr.strip()}")


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Whether it comes to be so: what goes on in the background takes the time that the machine has for it."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Requests


def capability(
    mode: AccessMode = AccessMode.SINGLE_NODE_WRITER,
    access_type: AccessType = AccessType.MOUNT,
    fs_type: str = "",
) -> Capability:
    return Capability(access_type, mode, fs_type)


def volume(
    name: str,
    size_bytes: int = 0,
    limit_bytes: int = 0,
    *,
    capabilities: tuple[Capability, ...] = (),
    **parameters: str,
) -> VolumeRequest:
    """A CreateVolume of `size_bytes`, a plain mount if nothing else is said."""
    wanted = CapacityRange(size_bytes, limit_bytes)
    return VolumeRequest(name, capabilities or (capability(),), wanted, parameters)


def staged(volume_id: str, path: Path, wanted: Capability | None = None) -> StageRequest:
    return StageRequest(volume_id, str(path), wanted or capability())


def published(
    volume_id: str,
    target: Path,
    staging: Path | None,
    wanted: Capability | None = None,
    *,
    readonly: bool = False,
) -> PublishRequest:
    return PublishRequest(
        volume_id, str(target), wanted or capability(), str(staging or ""), readonly=readonly
    )


def inline(volume_id: str, target: Path, size_bytes: int) -> PublishRequest:
    context = {"csi.storage.k8s.io/ephemeral": "true", "size": str(size_bytes)}
    return PublishRequest(volume_id, str(target), capability(), context=context)
