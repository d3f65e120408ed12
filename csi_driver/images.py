# SPDX-License-Identifier: Apache-2.0
"""Volumes that are images on a file server's export, on the node that has them: one node at a time, fenced by a lock.

What the volume's context does not say is asked of the kernel: which images are held here, by which device, and where they
are mounted. How an image is held is `linux.fence`'s business; who was handed a volume, the controller's.
"""

import errno
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from csi_driver.backends.base import PAYLOAD_DIRECTORY
from csi_driver.backends.images import MOUNT_OPTIONS
from csi_driver.backends.parameters import FS_TYPE
from csi_driver.errors import (
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    invalid,
    unknown_keys,
)
from csi_driver.handover import HOLDER_FILE, USER_FILE, Handed
from csi_driver.linux import fence, filesystem, mount
from csi_driver.linux.exports import Exports, Wanted
from csi_driver.linux.fence import Held
from csi_driver.model import (
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    HealthEntry,
    HealthStatus,
    PublishRequest,
    StageRequest,
    Stats,
)
from csi_driver.staging import mount_flags, opened
from csi_driver.static import (
    IMAGE,
    METADATA_PREFIXES,
    PATH,
    SERVER,
    owner,
    source_of,
)
from csi_driver.static import (
    MOUNT_OPTIONS as EXPORT_OPTIONS,
)
from csi_driver.subpath import PARAMETER, expand_sub_path, in_the_way
from csi_driver.targets import ensure_bound

log = logging.getLogger(__name__)

_KEYS: Final = (SERVER, PATH, EXPORT_OPTIONS, IMAGE, FS_TYPE, PARAMETER, "mode", "uid", "gid")
_MODES: Final = (
    AccessMode.SINGLE_NODE_WRITER,
    AccessMode.SINGLE_NODE_READER_ONLY,
    AccessMode.SINGLE_NODE_SINGLE_WRITER,
    AccessMode.SINGLE_NODE_MULTI_WRITER,
)
_HOLD_S: Final = 30.0
"""To open, lock and attach an image, or to mount what is in it, its journal replayed."""
_PATIENCE_S: Final = 5.0
"""How long an unmount waits for what is unwritten; then the kernel goes on with it alone."""
_LET_GO_S: Final = 15.0


def is_image(context: Mapping[str, str]) -> bool:
    """Whether a volume_context describes such a volume."""
    return IMAGE in context


class Images:
    """Those that this node has; `node_id` is how others know it."""

    def __init__(self, exports: Exports, node_id: str) -> None:
        self._exports = exports
        self._node_id = node_id

    def stage(self, request: StageRequest) -> None:
        """Take the image for this node, and mount the filesystem in it.

        Raises:
            FailedPrecondition: another node has it, or what handed it to this one is out of date.
            Unavailable: the server does not answer.
        """
        context = _checked(request.context, request.capability)
        is_block = request.capability.access_type is AccessType.BLOCK
        found = self._hold(request.volume_id, context, Handed.of(request.handed), readonly=False)
        if found["new"] and found["before"] not in ("", self._node_id):
            log.warning(
                "volume %s: node %s takes it over from node %s, which did not let it go: its lease on the server has ended",
                request.volume_id, self._node_id, found["before"],
            )  # fmt: skip
        if is_block:
            return
        try:
            self._mount(request, context)
        except BaseException:
            if found["new"] and not _is_mounted(Path(request.staging_target_path)):
                self._undo(request)
            raise

    def unstage(self, volume_id: str, staging_target_path: str) -> None:
        """Unmount it and let the image go. Nothing of it here is fine, and so is a server that does not answer."""
        target = Path(staging_target_path)
        devices = fence.find(volume_id, self._node_id)
        if not devices:
            self._exports.unmount(target)
            self._exports.release_unused()
            return
        self._check_not_published(volume_id, devices)
        try:
            gone = self._exports.keeper_of(devices[0]).call(
                "let_go", _LET_GO_S, always=True,
                volume_id=volume_id, target=os.fspath(target), patience_s=_PATIENCE_S,
                node=self._node_id, user_file=USER_FILE, exports=os.fspath(self._exports.directory),
            )[0]["gone"]  # fmt: skip
        except Unavailable:
            # The mount is gone before its last user waits for the server.
            if _is_mounted(target):
                raise
            gone = not fence.find(volume_id, self._node_id)
        if not gone:
            log.warning("volume %s: unmounted; its image is let go when its server answers", volume_id)
        self._exports.release_unused()

    def publish(self, request: PublishRequest) -> None:
        """Bind the pod's path to what is staged.

        Raises:
            FailedPrecondition: it is not staged, or its access mode allows no other target.
            AlreadyExists: something else is there.
        """
        context = _checked(request.context, request.capability)
        attributes, _ = mount_flags(request.capability, superblock=True)
        readonly = request.reads_only or attributes.readonly
        devices = self._devices(request.volume_id)
        if request.capability.access_mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
            _check_single(request, devices)
        attributes = replace(attributes, readonly=readonly)
        if request.capability.access_type is AccessType.BLOCK:
            path = self._device_path(request.volume_id, context, readonly=readonly)
            with opened(path, os.O_PATH) as fd:
                ensure_bound(fd, Path(request.target_path), attributes)
            return
        with self._opened(request, context, devices[0]) as fd:
            ensure_bound(fd, Path(request.target_path), attributes)

    def stats(self, volume_id: str, path: Path) -> Stats | None:
        """How full it is; None: it is not held here.

        Raises:
            NotFound: it is not at this path.
            Unavailable: the server does not answer.
        """
        devices = fence.find(volume_id, self._node_id)
        if not devices:
            return None
        shown = _get_shown(volume_id, devices, path)
        if shown.is_directory:
            usage = self._exports.keeper_of(devices[0]).call("usage", _LET_GO_S, path=os.fspath(path))[0]
            return Stats(**usage)
        return Stats(total_bytes=devices[0].size_bytes)

    def expand(self, volume_id: str, path: Path, staging: Path, wanted: CapacityRange) -> int | None:
        """Let it be as large as the controller has made its image; None: it is not held here.

        By way of `staging`, where it is mounted there: `path` may be read-only.

        Raises:
            NotFound: it is not at this path.
            FailedPrecondition: the image is not that large, or this process may not grow the filesystem.
        """
        devices = fence.find(volume_id, self._node_id)
        if not devices:
            return None
        shown = _get_shown(volume_id, devices, path)
        grown_at = staging if _shown(devices, staging) is not None else path
        grown = self._exports.keeper_of(devices[0]).call(
            "grow_held",
            _HOLD_S,
            volume_id=volume_id,
            node=self._node_id,
            path=os.fspath(grown_at) if shown.is_directory else "",
            exports=os.fspath(self._exports.directory),
        )[0]
        size_bytes = int(grown["size_bytes"])
        if size_bytes < wanted.required_bytes:
            raise FailedPrecondition(
                f"volume {volume_id!r}: its image has {size_bytes} bytes: ControllerExpandVolume comes first"
            )
        if grown["later"]:
            raise FailedPrecondition(
                f"volume {volume_id!r}: its device has {size_bytes} bytes now; this process lacks CAP_SYS_RESOURCE, so its "
                "filesystem grows when it is next staged: end the pods that use it"
            )
        return size_bytes

    def health(self, volume_id: str) -> list[HealthEntry] | None:
        """What is wrong with it; None: it is not held here."""
        devices = fence.find(volume_id, self._node_id)
        if not devices:
            return None
        known = [one for one in mount.mounts() if any(one.device == held.device for held in devices)]
        entries = []
        try:
            # How full a filesystem on a device is, the kernel knows without its server: the image itself is looked at.
            base = self._exports.base_of(devices[0])
            asked = base.target if base is not None else devices[0].backing.parent
            self._exports.keeper_of(devices[0]).call("usage", _LET_GO_S, path=os.fspath(asked))
        except (Unavailable, OSError) as error:
            message = f"volume {volume_id!r}: its image {devices[0].backing}: {error}"
            entries.append(HealthEntry(HealthStatus.INACCESSIBLE, "ServerUnreachable", message))
        errors = sum(filesystem.error_count(one.fs_type, one.device) for one in known[:1])
        if errors:
            message = (
                f"volume {volume_id!r}: its filesystem has counted {errors} errors: see the kernel's log; end the pods \
that use it, and check it if it does not mount again"
            )
            entries.append(HealthEntry(HealthStatus.DEGRADED, "FilesystemErrors", message))
        if any("ro" in one.super_options for one in known):
            message = (
                f"volume {volume_id!r}: the kernel made its filesystem read-only (the node has lost its lock, perhaps): \
end the pods that use it"
            )
            entries.append(HealthEntry(HealthStatus.DEGRADED, "FilesystemReadOnly", message))
        return entries

    # Parts

    def _undo(self, request: StageRequest) -> None:
        try:
            self.unstage(request.volume_id, request.staging_target_path)
        except (OSError, Error) as error:
            log.error(
                "volume %s: held though it is not mounted, until it is unstaged: %s", request.volume_id, error
            )

    def _hold(
        self, volume_id: str, context: Mapping[str, str], handed: Handed | None, *, readonly: bool
    ) -> dict[str, Any]:
        source, (home, _, image) = source_of(context), context[IMAGE].rpartition("/")
        words: dict[str, Any] = {
            "volume_id": volume_id, "home": home, "image": image, "fs_type": context.get(FS_TYPE, ""),
            "node": self._node_id, "handed": handed.told() if handed else {}, "readonly": readonly,
            "user_file": USER_FILE, "holder_file": HOLDER_FILE,
        }  # fmt: skip
        keeper = self._exports.keeper(source.source)
        try:
            found = self._exports.at_root(
                source, lambda root: keeper.call("hold", _HOLD_S, root=os.fspath(root), **words)[0]
            )
        except FileNotFoundError as error:
            raise NotFound(
                f"volume {volume_id!r}: no image {context[IMAGE]!r} at {source.source!r}"
            ) from error
        if "refused" in found:
            self._exports.release_unused()
            raise FailedPrecondition(f"volume {volume_id!r}: not on this node: {found['refused']}")
        return found

    def _mount(self, request: StageRequest, context: Mapping[str, str]) -> None:
        attributes, options = mount_flags(request.capability, superblock=True)
        fs_type = context[FS_TYPE]
        # Never read-only here: other pods on the node may write; each bind is read-only by itself.
        words: dict[str, Any] = {
            "volume_id": request.volume_id, "node": self._node_id, "target": request.staging_target_path, "fs_type": fs_type,
            "options": [*MOUNT_OPTIONS.get(fs_type, ()), *options], "attributes": asdict(replace(attributes, readonly=False)),
            "directory": PAYLOAD_DIRECTORY, "owner": owner(context),
        }  # fmt: skip
        try:
            found = self._exports.keeper(source_of(context).source).call("mount_held", _HOLD_S, **words)[0]
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise FailedPrecondition(
                    f"staging_target_path {request.staging_target_path!r}: is no directory: the caller makes it"
                ) from error
            if error.errno not in (errno.EINVAL, errno.EUCLEAN):
                raise
            if error.errno == errno.EINVAL and options:
                raise InvalidArgument(
                    f"volume_capability.mount_flags {','.join(options)!r}: {fs_type} does not take them: {error.strerror}"
                ) from error
            raise Error(
                f"volume {request.volume_id!r}: its {fs_type} filesystem cannot be mounted: {error.strerror}: check it with "
                "its own tools (fsck); nothing here ever formats it"
            ) from error
        if "refused" in found:
            raise FailedPrecondition(
                f"staging_target_path {request.staging_target_path!r}: {found['refused']}"
            )

    @contextmanager
    def _opened(self, request: PublishRequest, context: Mapping[str, str], held: Held) -> Iterator[int]:
        """An fd of what the pod is to see of the mounted filesystem."""
        staging = Path(request.staging_target_path)
        mounted = mount.find_mounted(staging) if request.staging_target_path else None
        if mounted is None or mounted.device != held.device:
            raise _not_staged(request.volume_id)
        sub_path = expand_sub_path(context.get(PARAMETER, ""), None, request.context)
        keeper = self._exports.keeper_of(held)
        wanted = Wanted(PAYLOAD_DIRECTORY, sub_path, owner(context) if sub_path else None)
        with in_the_way(sub_path):
            fd = wanted.open(keeper, staging, _LET_GO_S)
        try:
            yield fd
        finally:
            os.close(fd)

    def _device_path(self, volume_id: str, context: Mapping[str, str], *, readonly: bool) -> Path:
        if not readonly:
            return self._devices(volume_id)[0].path
        # A read-only bind of a device node does not stop writes to the device: it needs a read-only device.
        standing = next((held for held in fence.find(volume_id, self._node_id) if held.readonly), None)
        if standing is not None:
            return standing.path
        number = self._hold(volume_id, context, None, readonly=True)["number"]
        return Path(f"/dev/loop{number}")

    def _devices(self, volume_id: str) -> list[Held]:
        """Those of a staged volume, the one that is written to first."""
        devices = sorted(fence.find(volume_id, self._node_id), key=lambda held: held.readonly)
        if not devices or devices[0].readonly:
            raise _not_staged(volume_id)
        return devices

    def _check_not_published(self, volume_id: str, devices: Iterable[Held]) -> None:
        """A pod has a raw device as a node, which holds nothing: once detached, its number is the next volume's."""
        for held in devices:
            for entry in mount.mounts_of_device(held.path, held.device):
                raise FailedPrecondition(
                    f"volume {volume_id!r}: is still published at {entry.target!r}: NodeUnpublishVolume comes first"
                )


def _checked(context: Mapping[str, str], capability: Capability) -> dict[str, str]:
    """The attributes without what Kubernetes adds.

    Raises:
        InvalidArgument: they or the capability are wrong.
        FailedPrecondition: the volume is not of the kind that the capability asks for.
    """
    own = {key: value for key, value in context.items() if not key.startswith(METADATA_PREFIXES)}
    if own.keys() - set(_KEYS):
        raise InvalidArgument(unknown_keys("volume_context", own.keys() - set(_KEYS), _KEYS))
    image = own[IMAGE]
    if (
        SERVER not in own
        or image.startswith("/")
        or ".." in image.split("/")
        or not fence.IMAGE.fullmatch(f"/{image}")
    ):
        raise invalid(
            f"volume_context.{IMAGE}", image, "give server, path and the image's path on the export"
        )
    if capability.access_mode not in _MODES:
        raise invalid(
            "volume_capability.access_mode",
            capability.access_mode,
            "an image is used by one node at a time: ReadWriteOnce or ReadWriteOncePod; for ReadWriteMany take a pool of "
            "directories",
        )
    has_files = FS_TYPE in own
    if has_files is not (capability.access_type is AccessType.MOUNT):
        kind = AccessType.MOUNT if has_files else AccessType.BLOCK
        raise FailedPrecondition(f"volume_capability: it is a {kind} volume, not {capability.access_type}")
    if capability.fs_type and capability.fs_type != own.get(FS_TYPE):
        raise FailedPrecondition(
            f"volume_capability.fs_type {capability.fs_type!r}: it holds {own[FS_TYPE]!r}"
        )
    return own


def _check_single(request: PublishRequest, devices: Iterable[Held]) -> None:
    """ReadWriteOncePod: no other target may show the volume, or any part of it. CSI: SINGLE_NODE_SINGLE_WRITER."""
    ours = {os.path.realpath(request.target_path), os.path.realpath(request.staging_target_path)}
    others = [target for held in devices for target in _targets(held) if target not in ours]
    if others:
        raise FailedPrecondition(
            f"volume {request.volume_id!r}: is published at {others[0]!r} already, and its access mode "
            "SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) allows one target"
        )


def _targets(held: Held) -> list[str]:
    files = [one.target for one in mount.mounts() if one.device == held.device]
    return files + [one.target for one in mount.mounts_of_device(held.path, held.device)]


def _get_shown(volume_id: str, devices: Iterable[Held], path: Path) -> mount.Mounted:
    shown = _shown(devices, path)
    if shown is None:
        raise NotFound(f"volume_path {os.fspath(path)!r}: volume {volume_id!r} is not published there")
    return shown


def _shown(devices: Iterable[Held], path: Path) -> mount.Mounted | None:
    """What is at the path, if that is the volume or a part of it."""
    mounted = mount.find_mounted(path)
    numbers = {held.device for held in devices}
    if mounted is None or not {mounted.device, mounted.rdev} & numbers:
        return None
    return mounted


def _is_mounted(target: Path) -> bool:
    return mount.find_mounted(target) is not None


def _not_staged(volume_id: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"volume {volume_id!r}: is not staged on this node: NodeStageVolume comes first"
    )
