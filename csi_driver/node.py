# SPDX-License-Identifier: Apache-2.0
"""The CSI node's semantics: from a volume in a pool to the path that a pod sees, and back.

Nothing about mounts is remembered: each call asks the kernel what is there. Requests arrive checked (`rpc.convert`).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from csi_driver import inline, staging, static
from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, invalid
from csi_driver.health import Health
from csi_driver.images import Images, is_image
from csi_driver.linux import mount
from csi_driver.linux.exports import Exports
from csi_driver.locks import Locks
from csi_driver.model import (
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    HealthEntry,
    NodeInfo,
    PublishRequest,
    StageRequest,
    Stats,
    StorageEntry,
    lock_key,
)
from csi_driver.pools import Pools
from csi_driver.provision import grown_size, provision
from csi_driver.targets import ensure_bound, ensure_unbound


class Node:
    """CSI Node service of the node that `info` describes."""

    def __init__(
        self, pools: Pools, locks: Locks, health: Health, info: NodeInfo, exports: Exports | None = None
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._health = health
        self._info = info
        self._exports = exports
        """None: this driver serves volumes of this node only, and mounts no file servers."""
        self._images = Images(exports, info.node_id) if exports is not None else None

    def stage(self, request: StageRequest) -> None:
        """Make the volume usable on this node; a filesystem on a device is mounted at the staging path.

        Raises:
            NotFound: it is not on this node.
            FailedPrecondition: it cannot be used as the capability says, or something else is mounted there.

        CSI: NodeStageVolume.
        """
        with self._hold(request.volume_id, "staging_target_path", request.staging_target_path):
            if self._images is not None and is_image(request.context):
                self._images.stage(request)
                return
            if static.is_static(request.context):
                return
            pool, home = self._pools.get(request.volume_id)
            volume = staging.usable(pool, home, request.capability)
            staging.stage(volume, Path(request.staging_target_path), request.capability)

    def unstage(self, volume_id: str, staging_target_path: str) -> None:
        """Undo `stage`; fine for what is unknown or not staged.

        CSI: NodeUnstageVolume.
        """
        with self._hold(volume_id, "staging_target_path", staging_target_path):
            if self._images is not None:
                self._images.unstage(volume_id, staging_target_path)
                return
            mount.unmount(Path(staging_target_path))
            found = self._pools.find(volume_id)
            if found is not None:
                pool, home = found
                pool.backend.detach(home)

    def publish(self, request: PublishRequest) -> None:
        """Make the volume appear at the target path.

        Raises:
            NotFound: it is not on this node.
            AlreadyExists: something else, or the same otherwise, is published there.
            FailedPrecondition: it is not staged, or its access mode allows no other target.

        CSI: NodePublishVolume.
        """
        with self._hold(request.volume_id, "target_path", request.target_path):
            if inline.is_inline(request.context):
                self._check_own_storage("an inline volume")
                self._publish_inline(request)
            elif self._images is not None and is_image(request.context):
                self._images.publish(request)
            elif static.is_static(request.context):
                self._publish_static(request)
            else:
                pool, home = self._pools.get(request.volume_id)
                _publish(staging.usable(pool, home, request.capability), request)

    def unpublish(self, volume_id: str, target_path: str) -> None:
        """Undo `publish`; an inline volume is deleted. Fine for what is unknown or not published.

        CSI: NodeUnpublishVolume.
        """
        with self._hold(volume_id, "target_path", target_path):
            if self._exports is not None:
                self._exports.unmount(Path(target_path))
            ensure_unbound(Path(target_path))
            if self._exports is not None:
                self._exports.release_unused()
            found = inline.find(self._pools, volume_id)
            if found is not None:
                inline.delete(*found)

    def stats(self, volume_id: str, volume_path: str, staging_target_path: str = "") -> Stats:
        """How full the volume is: bytes and inodes; of a device, its size.

        Raises:
            NotFound: no such volume, or it is not at this path.

        CSI: NodeGetVolumeStats.
        """
        path = Path(volume_path)
        remote = self._images.stats(volume_id, path) if self._images is not None else None
        if remote is None and self._exports is not None:
            remote = static.export_stats(self._exports, path)
        if remote is not None:
            return remote
        found = self._pools.find(volume_id) or inline.find(self._pools, volume_id)
        if found is None:
            return static.stats(self._pools, volume_id, path)
        pool, home = found
        volume = staging.Local(pool, home, pool.catalog.read(home))
        if not staging.is_shown_at(volume, path):
            raise NotFound(f"volume_path {volume_path!r}: volume {volume_id!r} is not published there")
        if volume.is_block:
            return Stats(total_bytes=pool.size_bytes(home))
        with staging.opened(path) as fd:
            return pool.backend.stats(home, fd)

    def expand(
        self,
        volume_id: str,
        volume_path: str,
        staging_target_path: str,
        wanted: CapacityRange,
        capability: Capability | None = None,
    ) -> int:
        """Grow the volume while it is used: payload, device, filesystem. Its actual size comes back.

        Raises:
            NotFound: no such volume, or it is not at this path.
            ResourceExhausted: no room for the difference.

        CSI: NodeExpandVolume.
        """
        with self._locks.hold(lock_key(volume_id)):
            if self._images is not None:
                staging_path = Path(staging_target_path or volume_path)
                return self._expand_export(volume_id, Path(volume_path), staging_path, wanted)
            pool, home = self._pools.get(volume_id)
            record = pool.catalog.read(home)
            if capability is not None and capability.access_type is not record.access_type:
                raise invalid(
                    "volume_capability", capability.access_type, f"it is a {record.access_type} volume"
                )
            path = Path(volume_path)
            if not os.path.lexists(path):
                raise NotFound(f"volume_path {volume_path!r}: volume {volume_id!r} is not there")
            size_bytes = grown_size(pool, record, wanted, pool.size_bytes(home))
            actual = pool.grow(home, record, size_bytes)
            if record.access_type is AccessType.MOUNT:
                staging_path = Path(staging_target_path or volume_path)
                staging.grow(staging.Local(pool, home, record), path, staging_path, actual)
            return actual

    def info(self) -> NodeInfo:
        """CSI: NodeGetInfo."""
        return self._info

    def volume_health(self, volume_id: str, volume_path: str = "") -> list[HealthEntry]:
        """What is wrong with a volume, as this node sees it.

        CSI: NodeGetVolumeHealth.
        """
        path = Path(volume_path)
        remote = self._images.health(volume_id) if self._images else None
        if remote is not None:
            return remote
        remote = static.export_health(self._exports, volume_id, volume_path) if self._exports else None
        if remote is not None:
            return remote
        found = self._pools.find(volume_id) or inline.find(self._pools, volume_id)
        if found is not None:
            return self._health.of_volume(*found)
        if not volume_path:
            raise NotFound(f"volume {volume_id!r}: does not exist on this node")
        return static.health(self._pools, volume_id, path)

    def storage_health(self) -> list[StorageEntry]:
        """What is wrong with the pools, as this node sees them.

        CSI: NodeGetStorageHealth.
        """
        return self._health.of_storage()

    @contextmanager
    def _hold(self, volume_id: str, field: str, path: str) -> Iterator[None]:
        """Work on a volume and a path: two volumes that are sent to one must not both find it free.

        Raises:
            InvalidArgument: the path lies in a pool: a caller's mistake there would be a volume's end.
        """
        for pool in self._pools:
            if Path(path).is_relative_to(pool.catalog.root):
                raise invalid(field, path, f"lies in pool {pool.name!r}; kubelet's directory is not a pool's")
        with self._locks.hold(lock_key(volume_id), path):
            yield

    def _publish_static(self, request: PublishRequest) -> None:
        if request.capability.access_type is AccessType.BLOCK:
            raise InvalidArgument("volume_capability: a static volume is a directory, it has no block access")
        if static.is_export(request.context):
            self._publish_export(request)
            return
        attributes, _ = staging.mount_flags(request.capability, superblock=False)
        if request.capability.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
            _check_single(request, static.shown_at(self._pools, request))
        with static.opened(self._pools, request) as fd:
            ensure_bound(fd, Path(request.target_path), _attributes(request, attributes))

    def _publish_export(self, request: PublishRequest) -> None:
        if self._exports is None:
            raise InvalidArgument(
                f'volume_context.{static.SERVER}: this driver serves the node\'s own storage: set scope = "shared" '
                "in the configuration of one that mounts file servers"
            )
        attributes, options = staging.mount_flags(request.capability, superblock=True)
        self._exports.clear_stale(Path(request.target_path))
        with static.export_opened(self._exports, request, options) as fd:
            if request.capability.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
                _check_single(request, self._exports.shown_at(fd))
            ensure_bound(fd, Path(request.target_path), _attributes(request, attributes))

    def _expand_export(self, volume_id: str, path: Path, staging: Path, wanted: CapacityRange) -> int:
        grown = self._images.expand(volume_id, path, staging, wanted) if self._images is not None else None
        if grown is None and (self._exports is None or not self._exports.is_shown(path)):
            raise NotFound(f"volume_path {os.fspath(path)!r}: volume {volume_id!r} is not published there")
        # A directory has no size of its own here; what it may take, its server knows.
        return wanted.required_bytes if grown is None else grown

    def _check_own_storage(self, what: str) -> None:
        if self._exports is not None:
            raise InvalidArgument(
                f"volume_context: {what} is of a driver for the node's own storage, and this one is for file servers"
            )

    def _publish_inline(self, request: PublishRequest) -> None:
        standing = inline.find(self._pools, request.volume_id)
        pool, home = provision(self._pools, inline.volume_request(request))
        try:
            volume = staging.usable(pool, home, request.capability)
            staging_path = inline.staging_path(home)
            staging.stage(volume, staging_path, request.capability)
            _publish(volume, replace(request, staging_target_path=os.fspath(staging_path)))
            # The target's bind keeps the filesystem mounted; this way to it is not needed any more.
            mount.unmount(staging_path)
        except BaseException:
            if standing is None:
                inline.delete(pool, home)
            raise


def _publish(volume: staging.Local, request: PublishRequest) -> None:
    attributes, _ = staging.mount_flags(request.capability, superblock=volume.pool.backend.features.stages)
    attributes = _attributes(request, attributes)
    if request.capability.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
        _check_single(request, staging.shown_at(volume, Path(request.staging_target_path)))
    with staging.source(volume, request, readonly=attributes.readonly) as source_fd:
        ensure_bound(source_fd, Path(request.target_path), attributes)


def _attributes(request: PublishRequest, flags: mount.Attributes) -> mount.Attributes:
    readonly = request.reads_only or flags.readonly
    return replace(flags, readonly=readonly)


def _check_single(request: PublishRequest, shown_at: Iterable[mount.Mount]) -> None:
    """ReadWriteOncePod: no other target may show the volume, or any part of it. CSI: SINGLE_NODE_SINGLE_WRITER."""
    ours = {os.path.realpath(request.target_path), os.path.realpath(request.staging_target_path)}
    others = [entry.target for entry in shown_at if entry.target not in ours]
    if others:
        raise FailedPrecondition(
            f"volume {request.volume_id!r}: is published at {others[0]!r} already, and its access mode "
            "SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) allows one target"
        )
