# SPDX-License-Identifier: Apache-2.0
"""The CSI node's semantics: from a volume in a pool to the path that a pod sees, and back.

Nothing about mounts is remembered: each call asks the kernel what is there. Requests arrive checked (`rpc.convert`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from csi_driver import static
from csi_driver.backends.base import PAYLOAD_DIRECTORY, Device, Directory
from csi_driver.catalog import Home
from csi_driver.config import parse_size
from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, invalid
from csi_driver.health import Health
from csi_driver.linux import files, filesystem, mount, privileges, unmounted
from csi_driver.locks import Locks
from csi_driver.model import (
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    HealthEntry,
    NodeInfo,
    Parameters,
    PublishRequest,
    Record,
    StageRequest,
    Stats,
    StorageEntry,
    VolumeId,
    VolumeRequest,
    lock_key,
)
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.provision import grown_size, provision, unsupported
from csi_driver.subpath import expand_sub_path
from csi_driver.targets import ensure_bound, ensure_unbound

EPHEMERAL = "csi.storage.k8s.io/ephemeral"
SIZE = "size"
METADATA_PREFIX = "csi.storage.k8s.io/"
INLINE_MOUNT = "mount"
"""In an inline volume's home: where its filesystem is mounted while it is being published."""


class Node:
    """CSI Node service of the node that `info` describes."""

    def __init__(self, pools: Pools, locks: Locks, health: Health, info: NodeInfo) -> None:
        self._pools = pools
        self._locks = locks
        self._health = health
        self._info = info

    def stage(self, request: StageRequest) -> None:
        """Make the volume usable on this node; a filesystem on a device is mounted at the staging path.

        Raises:
            NotFound: it is not on this node.
            FailedPrecondition: it cannot be used as the capability says, or something else is mounted there.

        CSI: NodeStageVolume.
        """
        with self._locks.hold(lock_key(request.volume_id)):
            if static.is_static(request.context):
                return
            pool, home = self._pools.get(request.volume_id)
            record = self._usable(pool, home, request.capability)
            self._stage(pool, home, record, Path(request.staging_target_path), request.capability)

    def unstage(self, volume_id: str, staging_target_path: str) -> None:
        """Undo `stage`; fine for what is unknown or not staged.

        CSI: NodeUnstageVolume.
        """
        with self._locks.hold(lock_key(volume_id)):
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
        with self._locks.hold(lock_key(request.volume_id)):
            if request.context.get(EPHEMERAL) == "true":
                self._publish_inline(request)
            elif static.is_static(request.context):
                self._publish_static(request)
            else:
                pool, home = self._pools.get(request.volume_id)
                self._publish(pool, home, self._usable(pool, home, request.capability), request)

    def unpublish(self, volume_id: str, target_path: str) -> None:
        """Undo `publish`; an inline volume is deleted. Fine for what is unknown or not published.

        CSI: NodeUnpublishVolume.
        """
        with self._locks.hold(lock_key(volume_id)):
            ensure_unbound(Path(target_path))
            inline = self._find_inline(volume_id)
            if inline is not None:
                self._delete_inline(*inline)

    def stats(self, volume_id: str, volume_path: str, staging_target_path: str = "") -> Stats:
        """How full the volume is: bytes and inodes; of a device, its size.

        Raises:
            NotFound: no such volume, or it is not at this path.

        CSI: NodeGetVolumeStats.
        """
        path = Path(volume_path)
        found = self._pools.find(volume_id) or self._find_inline(volume_id)
        if found is None:
            return static.stats(self._pools, volume_id, path)
        pool, home = found
        record = pool.catalog.read(home)
        if record.access_type is AccessType.BLOCK:
            if not os.path.lexists(path):
                raise NotFound(f"volume_path {volume_path!r}: volume {volume_id!r} is not there")
            return Stats(total_bytes=pool.size_bytes(home))
        if mount.find_mounted(path) is None:
            raise NotFound(f"volume_path {volume_path!r}: volume {volume_id!r} is not published there")
        with _opened(path) as fd:
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
                self._grow_filesystem(pool, home, record, path, actual)
            return actual

    def info(self) -> NodeInfo:
        """CSI: NodeGetInfo."""
        return self._info

    def volume_health(self, volume_id: str, volume_path: str = "") -> list[HealthEntry]:
        """What is wrong with a volume, as this node sees it.

        CSI: NodeGetVolumeHealth.
        """
        found = self._pools.find(volume_id) or self._find_inline(volume_id)
        if found is None:
            raise NotFound(f"volume {volume_id!r}: does not exist on this node")
        return self._health.of_volume(*found)

    def storage_health(self) -> list[StorageEntry]:
        """What is wrong with the pools, as this node sees them.

        CSI: NodeGetStorageHealth.
        """
        return self._health.of_storage()

    # Staging

    def _usable(self, pool: Pool, home: Home, capability: Capability) -> Record:
        """The record, if the volume can be used so."""
        record = pool.catalog.read(home)
        if capability.access_type is not record.access_type:
            raise FailedPrecondition(
                f"volume_capability: volume {home.id!r} is a {record.access_type} volume, not {capability.access_type}"
            )
        if capability.fs_type and capability.fs_type != record.fs_type:
            raise FailedPrecondition(
                f"volume_capability.fs_type {capability.fs_type!r}: volume {home.id!r} holds {record.fs_type!r}"
            )
        reason = unsupported(pool, (capability,))
        if reason:
            raise FailedPrecondition(f"volume_capability: {reason}")
        return record

    def _stage(self, pool: Pool, home: Home, record: Record, staging: Path, capability: Capability) -> None:
        attributes, options = _mount_flags(capability, superblock=pool.backend.features.stages)
        attachment = pool.backend.attach(home, record)
        with attachment:
            if not isinstance(attachment, Device) or record.access_type is AccessType.BLOCK:
                return
            try:
                # Never read-only here: other pods on the node may write; each bind is read-only by itself.
                size_bytes = pool.size_bytes(home)
                _mount_staged(attachment, size_bytes, staging, options, replace(attributes, readonly=False))
                self._fit_filesystem(pool, home, record, staging)
            except BaseException:
                if mount.find_mounted(staging) is None:
                    _try_detach(pool, home)
                raise

    def _fit_filesystem(self, pool: Pool, home: Home, record: Record, staging: Path) -> None:
        """The root that pods see, and a filesystem as large as its device (a crash or a controller grew only that)."""
        with _opened(staging) as fd:
            os.close(_ensure_directory(fd, PAYLOAD_DIRECTORY, pool.parameters(record)))
            if privileges.can_grow_mounted(record.fs_type):
                filesystem.grow(record.fs_type, fd, pool.size_bytes(home))

    def _grow_filesystem(self, pool: Pool, home: Home, record: Record, path: Path, size_bytes: int) -> None:
        attachment = pool.backend.find_attached(home, record)
        if attachment is None:
            raise FailedPrecondition(f"volume {home.id!r}: is not staged on this node")
        with attachment:
            if not isinstance(attachment, Device):
                return
            if not _is_staged(attachment, path):
                raise NotFound(f"volume_path {os.fspath(path)!r}: volume {home.id!r} is not mounted there")
            if not privileges.can_grow_mounted(record.fs_type):
                raise FailedPrecondition(
                    f"volume {home.id!r}: its device has {size_bytes} bytes now; this process lacks CAP_SYS_RESOURCE, "
                    f"so its {record.fs_type} filesystem grows when it is next staged: end the pods that use it"
                )
            with _opened(path) as fd:
                filesystem.grow(record.fs_type, fd, size_bytes)

    # Publishing

    def _publish(self, pool: Pool, home: Home, record: Record, request: PublishRequest) -> None:
        readonly = request.readonly or request.capability.access_mode.reader_only
        attributes, _ = _mount_flags(request.capability, superblock=pool.backend.features.stages)
        attributes = replace(attributes, readonly=readonly or attributes.readonly)
        with self._source(pool, home, record, request, readonly=attributes.readonly) as source_fd:
            if request.capability.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
                _check_single(home, request, source_fd)
            ensure_bound(source_fd, Path(request.target_path), attributes)

    @contextmanager
    def _source(
        self, pool: Pool, home: Home, record: Record, request: PublishRequest, *, readonly: bool
    ) -> Iterator[int]:
        """An fd of what the target is to show."""
        if record.access_type is AccessType.BLOCK:
            with _opened(self._device_path(pool, home, record, readonly=readonly), os.O_PATH) as fd:
                yield fd
            return
        with self._root(pool, home, record, Path(request.staging_target_path)) as root_fd:
            parameters = pool.parameters(record)
            sub_path = expand_sub_path(parameters.sub_path, record, request.context)
            if not sub_path:
                yield root_fd
                return
            fd = _ensure_directory(root_fd, sub_path, parameters)
            try:
                yield fd
            finally:
                os.close(fd)

    def _device_path(self, pool: Pool, home: Home, record: Record, *, readonly: bool) -> Path:
        staged = pool.backend.find_attached(home, record)
        if not isinstance(staged, Device):
            raise _not_staged(home)
        if not readonly:
            return staged.path
        # A read-only bind of a device node does not stop writes to the device: it needs a read-only device.
        device = pool.backend.attach(home, record, readonly=True)
        assert isinstance(device, Device), "a backend attaches a volume in one way"
        return device.path

    @contextmanager
    def _root(self, pool: Pool, home: Home, record: Record, staging: Path) -> Iterator[int]:
        """An fd of the volume's root directory."""
        attachment = pool.backend.find_attached(home, record)
        if attachment is None:
            raise _not_staged(home)
        with attachment:
            if isinstance(attachment, Directory):
                yield attachment.fd
                return
            if not _is_staged(attachment, staging):
                raise _not_staged(home)
            with _opened(staging) as staging_fd:
                fd = files.open_beneath(staging_fd, PAYLOAD_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    yield fd
                finally:
                    os.close(fd)

    def _publish_static(self, request: PublishRequest) -> None:
        if request.capability.access_type is AccessType.BLOCK:
            raise InvalidArgument("volume_capability: a static volume is a directory, it has no block access")
        attributes, options = mount.parse_flags(request.capability.mount_flags)
        if options:
            raise invalid(
                "volume_capability.mount_flags", ",".join(options), "a directory takes only bind options"
            )
        readonly = request.readonly or request.capability.access_mode.reader_only or attributes.readonly
        with static.opened(self._pools, request) as fd:
            ensure_bound(fd, Path(request.target_path), replace(attributes, readonly=readonly))

    # Inline volumes

    def _publish_inline(self, request: PublishRequest) -> None:
        standing = self._find_inline(request.volume_id)
        pool, home = provision(self._pools, _inline_request(request))
        record = self._usable(pool, home, request.capability)
        staging = home.path / INLINE_MOUNT
        try:
            if pool.backend.features.stages:
                staging.mkdir(mode=0o700, exist_ok=True)
            self._stage(pool, home, record, staging, request.capability)
            self._publish(pool, home, record, replace(request, staging_target_path=os.fspath(staging)))
            # The target's bind keeps the filesystem mounted; this way to it is not needed any more.
            mount.unmount(staging)
        except BaseException:
            if standing is None:
                self._delete_inline(pool, home)
            raise

    def _find_inline(self, volume_id: str) -> tuple[Pool, Home] | None:
        if VolumeId.find(volume_id) is not None:
            return None
        found = self._pools.find_name(volume_id)
        if found is None or not found[0].catalog.read(found[1]).ephemeral:
            return None
        return found

    def _delete_inline(self, pool: Pool, home: Home) -> None:
        mount.unmount(home.path / INLINE_MOUNT)
        pool.backend.detach(home)
        pool.delete(home, keep=False)


def _ensure_directory(dir_fd: int, path: str, parameters: Parameters) -> int:
    """A directory in the volume, with the owner and mode that its parameters ask for."""
    mode = 0o755 if parameters.mode is None else parameters.mode
    uid, gid = parameters.uid or 0, parameters.gid or 0
    # Made again after a crash if need be: the sync of what pods write there keeps it too.
    return files.ensure_directory(dir_fd, path, mode=mode, uid=uid, gid=gid, durable=False)


def _try_detach(pool: Pool, home: Home) -> None:
    """After a failure: undo the attachment, unless something else uses it."""
    with suppress(FailedPrecondition):
        pool.backend.detach(home)


def _mount_staged(
    device: Device, size_bytes: int, staging: Path, options: list[str], attributes: mount.Attributes
) -> None:
    if mount.find_mounted(staging) is None:
        if not privileges.can_grow_mounted(device.fs_type):
            unmounted.grow_ext4(device.path, size_bytes)
        all_options = [*device.mount_options, *options]
        mount.mount_device(device.path, staging, device.fs_type, all_options, attributes)
    elif not _is_staged(device, staging):
        raise FailedPrecondition(
            f"staging_target_path {os.fspath(staging)!r}: something else is mounted there"
        )


def _is_staged(device: Device, path: Path) -> bool:
    """Whether the filesystem mounted at `path` is the one on `device`."""
    mounted = mount.find_mounted(path)
    if mounted is None:
        return False
    if mounted.device == device.number:
        return True
    # btrfs shows a device number of its own: there the mount's source tells.
    if device.fs_type != "btrfs":
        return False
    source = os.fspath(device.path)
    return any(entry.mount_id == mounted.mount_id and entry.source == source for entry in mount.mounts())


def _check_single(home: Home, request: PublishRequest, source_fd: int) -> None:
    """ReadWriteOncePod: no other target may show the volume. CSI: SINGLE_NODE_SINGLE_WRITER."""
    ours = {os.path.realpath(request.target_path), os.path.realpath(request.staging_target_path)}
    others = [entry.target for entry in mount.mounts_of(source_fd) if entry.target not in ours]
    if others:
        raise FailedPrecondition(
            f"volume {home.id!r}: is published at {others[0]!r} already, and its access mode "
            "SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) allows one target"
        )


def _mount_flags(capability: Capability, *, superblock: bool) -> tuple[mount.Attributes, list[str]]:
    try:
        attributes, options = mount.parse_flags(capability.mount_flags)
    except ValueError as error:
        raise InvalidArgument(f"volume_capability.mount_flags: {error}") from error
    if options and not superblock:
        raise invalid(
            "volume_capability.mount_flags",
            ",".join(options),
            "a directory takes only bind options (noexec, nosuid, nodev, noatime, …)",
        )
    return attributes, options


def _not_staged(home: Home) -> FailedPrecondition:
    return FailedPrecondition(f"volume {home.id!r}: is not staged on this node: NodeStageVolume comes first")


def _inline_request(request: PublishRequest) -> VolumeRequest:
    size = request.context.get(SIZE, "")
    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise InvalidArgument(
            f"volume_context.{SIZE}: an inline volume needs a size, like 1Gi: {error}"
        ) from error
    parameters = {
        key: value
        for key, value in request.context.items()
        if key != SIZE and not key.startswith(METADATA_PREFIX)
    }
    return VolumeRequest(
        name=request.volume_id,
        capabilities=(request.capability,),
        capacity_range=CapacityRange(required_bytes=size_bytes),
        parameters=parameters,
        pvc_namespace=request.context.get(f"{METADATA_PREFIX}pod.namespace", ""),
        ephemeral=True,
    )


@contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
