# SPDX-License-Identifier: Apache-2.0
"""One volume on this node: attached, its filesystem mounted once, and found there by what is published from it.

A volume whose payload is a directory needs none of it. Locks, idempotency against arguments and targets are `node`'s.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from csi_driver.backends import directories
from csi_driver.backends.base import PAYLOAD_DIRECTORY, Device, Directory
from csi_driver.catalog import Home
from csi_driver.errors import Error, FailedPrecondition, InvalidArgument, NotFound, invalid
from csi_driver.linux import files, filesystem, mount, privileges, unmounted
from csi_driver.model import AccessType, Capability, Parameters, PublishRequest, Record
from csi_driver.pool import Pool
from csi_driver.provision import unsupported
from csi_driver.subpath import PARAMETER, expand_sub_path, in_the_way


@dataclass(frozen=True, slots=True)
class Local:
    """A volume that is here: its pool, its home and what its record says."""

    pool: Pool
    home: Home
    record: Record

    @property
    def is_block(self) -> bool:
        return self.record.access_type is AccessType.BLOCK

    @property
    def parameters(self) -> Parameters:
        return self.pool.parameters(self.record)


def usable(pool: Pool, home: Home, capability: Capability) -> Local:
    """The volume, if it can be used as the capability says.

    Raises:
        FailedPrecondition: it cannot. CSI: "exceeds capabilities".
    """
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
    return Local(pool, home, record)


def stage(volume: Local, staging: Path, capability: Capability) -> None:
    """Attach the volume and mount its filesystem; what stands already is kept, what fails is undone."""
    attributes, options = mount_flags(capability, superblock=volume.pool.backend.features.stages)
    with volume.pool.backend.attach(volume.home, volume.record) as attachment:
        if not isinstance(attachment, Device) or volume.is_block:
            return
        try:
            # Never read-only here: other pods on the node may write; each bind is read-only by itself.
            _mount(volume, attachment, staging, options, replace(attributes, readonly=False))
            _fit(volume, staging)
        except BaseException:
            if mount.find_mounted(staging) is None:
                volume.pool.backend.detach(volume.home)
            raise


def grow(volume: Local, path: Path, staging: Path, size_bytes: int) -> None:
    """Grow the filesystem that is mounted at `path` to the device's new size; nothing to do for directories.

    By way of `staging`, where it is mounted there: `path` may be read-only.

    Raises:
        NotFound: the volume is not mounted there.
        FailedPrecondition: it is not staged, or this process may not.
    """
    attachment = volume.pool.backend.find_attached(volume.home, volume.record)
    if attachment is None:
        raise _not_staged(volume)
    with attachment:
        if not isinstance(attachment, Device):
            return
        if not _is_mounted(attachment, path):
            raise NotFound(f"volume_path {os.fspath(path)!r}: volume {volume.home.id!r} is not mounted there")
        if not privileges.can_grow_mounted(attachment.fs_type):
            if not unmounted.has_room(attachment.path, size_bytes):
                return  # grown when it was staged; kubelet asks until it is told so
            raise FailedPrecondition(
                f"volume {volume.home.id!r}: its device has {size_bytes} bytes now; this process lacks "
                f"CAP_SYS_RESOURCE, so its {attachment.fs_type} filesystem grows when it is next staged: end the "
                "pods that use it"
            )
        with opened(staging if _is_mounted(attachment, staging) else path) as fd:
            filesystem.grow(attachment.fs_type, fd, size_bytes)


@contextmanager
def source(volume: Local, request: PublishRequest, *, readonly: bool) -> Iterator[int]:
    """An fd of what a target is to show: the volume's root, its `subPath` in there, or a device node.

    Raises:
        FailedPrecondition: it is not staged.
    """
    if volume.is_block:
        with opened(_device_path(volume, readonly=readonly), os.O_PATH) as fd:
            yield fd
        return
    with _root(volume, Path(request.staging_target_path)) as root_fd:
        parameters = volume.parameters
        # A PersistentVolume that somebody wrote may say it too, and then means its own.
        template = request.context.get(PARAMETER, parameters.sub_path)
        sub_path = expand_sub_path(template, volume.record, request.context)
        if not sub_path:
            yield root_fd
            return
        with in_the_way(sub_path):
            attached = Directory(_ensure_directory(root_fd, sub_path, parameters))
        with attached as directory:
            yield directory.fd


def shown_at(volume: Local, staging: Path) -> list[mount.Mount]:
    """All mounts that show the volume or a part of it, whichever `subPath` or device they were made from.

    Raises:
        FailedPrecondition: it is not staged.
    """
    if not volume.is_block:
        with _root(volume, staging) as root_fd:
            return mount.mounts_of(root_fd)
    return [
        entry for device in _devices(volume) for entry in mount.mounts_of_device(device.path, device.number)
    ]


def is_shown_at(volume: Local, path: Path) -> bool:
    """Whether the volume or a part of it is mounted at `path`, for a pod or where it is staged."""
    mounted = mount.find_mounted(path)
    if mounted is None:
        return False
    if volume.is_block:
        return any(device.number == mounted.rdev for device in _devices(volume))
    attachment = volume.pool.backend.find_attached(volume.home, volume.record)
    if attachment is None:
        return False
    with attachment:
        if isinstance(attachment, Device):
            return _is_mounted(attachment, path)
        root = os.fstat(attachment.fd)
        if (mounted.device, mounted.inode) == (root.st_dev, root.st_ino):
            return True
        # A `subPath` of it; what is beneath what, only the list of all mounts tells.
        return any(entry.mount_id == mounted.mount_id for entry in mount.mounts_of(attachment.fd))


def mount_flags(capability: Capability, *, superblock: bool) -> tuple[mount.Attributes, list[str]]:
    """The capability's mount_flags as attributes of each mount and, if there is a `superblock` to take them, options.

    Raises:
        InvalidArgument: an option that cannot be given here.
    """
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


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> Iterator[int]:
    """An fd of `path`, never through a symlink at its end."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _mount(
    volume: Local, device: Device, staging: Path, options: list[str], attributes: mount.Attributes
) -> None:
    if mount.find_mounted(staging) is not None:
        if not _is_mounted(device, staging):
            raise FailedPrecondition(
                f"staging_target_path {os.fspath(staging)!r}: something else is mounted there"
            )
        return
    if not privileges.can_grow_mounted(device.fs_type):
        unmounted.grow_ext4(device.path, volume.pool.size_bytes(volume.home))
    try:
        mount.mount_device(
            device.path, staging, device.fs_type, [*device.mount_options, *options], attributes
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        if error.filename != os.fspath(staging):
            raise
        raise FailedPrecondition(
            f"staging_target_path {os.fspath(staging)!r}: is no directory: the caller makes it"
        ) from error
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EUCLEAN):
            raise
        # Without options of the user's, an invalid argument is a filesystem that is not well.
        if error.errno == errno.EINVAL and options:
            raise InvalidArgument(
                f"volume_capability.mount_flags {','.join(options)!r}: {device.fs_type} does not take them: "
                f"{error.strerror}"
            ) from error
        raise Error(
            f"volume {volume.home.id!r}: its {device.fs_type} filesystem cannot be mounted: {error.strerror}: check it "
            "with its own tools (fsck); nothing here ever formats it"
        ) from error


def _fit(volume: Local, staging: Path) -> None:
    """The root that pods see, and a filesystem as large as its device (a crash or a controller grew only that)."""
    with opened(staging) as fd:
        os.close(_ensure_directory(fd, PAYLOAD_DIRECTORY, volume.parameters))
        if privileges.can_grow_mounted(volume.record.fs_type):
            filesystem.grow(volume.record.fs_type, fd, volume.pool.size_bytes(volume.home))


def _devices(volume: Local) -> list[Device]:
    """Those of a block volume that stand now: for writers, and for pods that may only read."""
    find = volume.pool.backend.find_attached
    found = [find(volume.home, volume.record, readonly=readonly) for readonly in (False, True)]
    return [device for device in found if isinstance(device, Device)]


def _ensure_directory(dir_fd: int, path: str, parameters: Parameters) -> int:
    """A directory in the volume, with the owner and mode that its parameters ask for."""
    mode = directories.DEFAULT_MODE if parameters.mode is None else parameters.mode
    uid, gid = parameters.uid or 0, parameters.gid or 0
    # Made again after a crash if need be: the sync of what pods write there keeps it too.
    return files.ensure_directory(dir_fd, path, mode=mode, uid=uid, gid=gid, durable=False)


def _device_path(volume: Local, *, readonly: bool) -> Path:
    staged = volume.pool.backend.find_attached(volume.home, volume.record)
    if not isinstance(staged, Device):
        raise _not_staged(volume)
    if not readonly:
        return staged.path
    # A read-only bind of a device node does not stop writes to the device: it needs a read-only device.
    device = volume.pool.backend.attach(volume.home, volume.record, readonly=True)
    assert isinstance(device, Device), "a backend attaches a volume in one way"
    return device.path


@contextmanager
def _root(volume: Local, staging: Path) -> Iterator[int]:
    """An fd of the volume's root directory."""
    attachment = volume.pool.backend.find_attached(volume.home, volume.record)
    if attachment is None:
        raise _not_staged(volume)
    with attachment:
        if isinstance(attachment, Directory):
            yield attachment.fd
            return
        if not _is_mounted(attachment, staging):
            raise _not_staged(volume)
        with opened(staging) as staging_fd:
            try:
                data_fd = files.open_beneath(staging_fd, PAYLOAD_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError as error:
                # The volume, but not its root: a target, given as the place where it is staged.
                raise _not_staged(volume) from error
            with Directory(data_fd):
                yield data_fd


def _is_mounted(device: Device, path: Path) -> bool:
    """Whether the filesystem mounted at `path` is the one on `device`."""
    mounted = mount.find_mounted(path)
    if mounted is None:
        return False
    if mounted.device == device.number:
        return True
    # btrfs shows a device number of its own: there the mount's source tells.
    if device.fs_type != "btrfs":
        return False
    wanted = os.fspath(device.path)
    return any(entry.mount_id == mounted.mount_id and entry.source == wanted for entry in mount.mounts())


def _not_staged(volume: Local) -> FailedPrecondition:
    return FailedPrecondition(
        f"volume {volume.home.id!r}: is not staged on this node: NodeStageVolume comes first"
    )
