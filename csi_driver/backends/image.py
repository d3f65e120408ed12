# SPDX-License-Identifier: Apache-2.0
"""Volumes as files behind loop devices: a filesystem of its own, or a raw device, as large as it says.

Works on any filesystem. Thick by default: every block is allocated in CreateVolume, so neither the pool nor a
neighbour can take it away. Formatted once, there, while nobody else can see it.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from csi_driver import mutable
from csi_driver.backends import directories, images
from csi_driver.backends.base import NODE_MODES, PAYLOAD_IMAGE, Device, Directory, Features, Store
from csi_driver.backends.parameters import MKFS_OPTIONS, PROVISIONING, parse_parameters
from csi_driver.catalog import Home
from csi_driver.config import PoolConfig, read_options
from csi_driver.errors import (
    ConfigurationError,
    FailedPrecondition,
)
from csi_driver.linux import copy, fiemap, files, filesystem, holes, loop, mount, run
from csi_driver.linux.copy import Transfer
from csi_driver.linux.filesystem import FILESYSTEMS
from csi_driver.linux.throttle import ROOT, Throttle, Unlimited
from csi_driver.model import (
    AccessType,
    HealthEntry,
    HealthStatus,
    Parameters,
    Record,
    SizeLimits,
    Stats,
    VolumeSpec,
)

log = logging.getLogger(__name__)


class ImageOptions(msgspec.Struct, frozen=True):
    """The keys of a pool with `backend = "image"`."""

    provisioning: Literal["thick", "thin"] = "thick"
    overcommit: float = 1.0
    """How many times the pool's room thin volumes may promise together; 1 to 1000."""
    preallocate: Literal["allocated", "zeroed"] = "allocated"
    """Whether a thick image's blocks are only its own when it is made, or written too: see docs/benchmarks.md."""
    fs_type: Literal["ext4", "xfs", "btrfs"] = "ext4"
    direct_io: bool = True
    cgroup_root: str = str(ROOT)
    """Where cgroup v2 is mounted, or what in it is above the cgroup of all pods: I/O limits are kept there."""


class ImageBackend:
    """See `base.Backend` for what each method promises."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        self._options = read_options(pool, ImageOptions)
        # Written so that it refuses what is no number, too. The bound keeps GetCapacity's answer in 63 bits.
        if not 1 <= self._options.overcommit <= 1000:
            raise ConfigurationError(
                f"{pool.where} overcommit {self._options.overcommit}: give a number from 1 to 1000"
            )
        self._throttle = Throttle(Path(self._options.cgroup_root))
        self._loops: dict[tuple[str, bool], int] = {}
        self._shares = False

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset(AccessType),
            access_modes=NODE_MODES,
            block_access_modes=NODE_MODES,
            stages=True,
            payload=PAYLOAD_IMAGE,
            shares_copies=self._shares,
            instant_copies=self._shares,
        )

    def check(self) -> None:
        problem = loop.available()
        if problem:
            raise ConfigurationError(f"{self._pool.where}: {problem}")
        tool = FILESYSTEMS[self._options.fs_type].tool
        if shutil.which(tool) is None:
            raise ConfigurationError(f"{self._pool.where}: {run.CommandMissing(tool)}")
        with Directory(directories.open_nearest(self._pool.root)) as directory:
            self._shares = not files.is_read_only(directory.fd) and files.supports_reflink(directory.fd)

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        thin = self._options.provisioning == "thin"
        parsed = parse_parameters(parameters, fs_type, further=(MKFS_OPTIONS, PROVISIONING), thin=thin)
        options = parameters.get(MKFS_OPTIONS, "")
        return images.with_filesystem(parsed, options, access_type, self._options.fs_type, tuple(FILESYSTEMS))

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        return images.size_limits(access_type, parameters.fs_type or self._options.fs_type)

    def make(self, home: Home, spec: VolumeSpec) -> None:
        size_bytes, thin = spec.size_bytes, spec.parameters.thin
        images.build(
            home,
            spec,
            lambda fd: images.extend(fd, 0, size_bytes, thin=thin, name=home.id),
            # Behind mkfs, which spares itself work on an image that is all zeros.
            lambda fd: self._preallocate(fd, 0, size_bytes, thin=thin),
        )

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        fd = home.open(PAYLOAD_IMAGE, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            original = source.open(PAYLOAD_IMAGE)
            try:
                if share:
                    files.clone_file(original, fd)
                    return
                if not spec.snapshot and not spec.parameters.thin:
                    # Before the data, so that it lies in one piece.
                    images.extend(fd, 0, spec.size_bytes, thin=False, name=home.id)
                transfer.total_bytes = holes.data_bytes(original)
                copy.copy_sparse(original, fd, transfer)
            finally:
                os.close(original)
        finally:
            os.close(fd)

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        fd = home.open(PAYLOAD_IMAGE, os.O_RDWR)
        try:
            size = os.fstat(fd).st_size
            if size < spec.size_bytes:
                images.extend(fd, size, spec.size_bytes, thin=spec.parameters.thin, name=home.id)
            if not spec.snapshot and not spec.parameters.thin and images.is_thin(os.fstat(fd)):
                # A clone has holes where its origin has unwritten blocks.
                files.allocate(fd, 0, spec.size_bytes)
            if not spec.snapshot:
                # What is shared with an origin is written already, and stays shared.
                self._preallocate(fd, 0, spec.size_bytes, thin=spec.parameters.thin)
            files.sync(fd)
        finally:
            os.close(fd)

    def allow(self, home: Home, size_bytes: int, held_bytes: int) -> None:
        """Nothing: a loop device ends where its image does."""

    def open_mounted(self, home: Home, record: Record) -> int | None:
        device = self.find_attached(home, record)
        if device is None or record.access_type is AccessType.BLOCK:
            return None
        source = os.fspath(device.path)
        for entry in mount.mounts():
            if entry.device != device.number and entry.source != source:
                continue
            try:
                fd = files.open_directory(Path(entry.target))
            except OSError:
                continue  # unmounted meanwhile, or hidden by another mount
            if files.is_of(fd, entry.device):
                return fd
            os.close(fd)
        return None

    def clear(self, home: Home) -> None:
        """Nothing: the image goes with the home. A loop device still attached to it is a bug to be seen."""

    def size_bytes(self, home: Home) -> int:
        return images.size_bytes(home)

    def grow(self, home: Home, size_bytes: int) -> int:
        fd = images.open_image(home, os.O_RDWR)
        try:
            before = os.fstat(fd).st_size
            if before < size_bytes:
                thin = images.is_thin(os.fstat(fd))
                images.extend(fd, before, size_bytes, thin=thin, name=home.id)
                self._preallocate(fd, before, size_bytes, thin=thin)
                files.sync(fd)
            for attached in loop.find(fd):
                loop.refresh_size(attached)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def store(self) -> Store:
        usage = files.usage(self._pool.root)
        return Store(usage.total_bytes, usage.free_bytes)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        try:
            if shared and self._shares:
                with Directory(home.open(PAYLOAD_IMAGE)) as image:
                    return fiemap.exclusive_bytes(image.fd)
            return images.stat(home).st_blocks * 512
        except FileNotFoundError:
            return 0  # died before its image was made

    def content_bytes(self, home: Home) -> int:
        with Directory(home.open(PAYLOAD_IMAGE)) as image:
            return holes.data_bytes(image.fd)

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        return math.ceil(size_bytes / self._options.overcommit) if parameters.thin else size_bytes

    def attach(self, home: Home, record: Record, *, readonly: bool = False) -> Device:
        limits = mutable.parse(record.mutable).limits
        problem = self.limits_problem() if limits else ""
        if problem:
            # Before there is a device: it would have to be taken away again.
            raise FailedPrecondition(_unlimited(home, problem))
        attached = self._attach(home, record, readonly=readonly)
        self._hold(home, attached, limits)
        return _device(attached, record)

    def _attach(self, home: Home, record: Record, *, readonly: bool) -> loop.Loop:
        fd = images.open_image(home, os.O_RDONLY if readonly else os.O_RDWR)
        try:
            # A discard (a pod's, or fstrim's) would punch holes into a thick image, and its blocks would be anyone's.
            discard = images.is_thin(os.fstat(fd))
            standing = self._find_loop(fd, home.id, readonly=readonly)
            if standing is not None and loop.take_over(standing, discard=discard):
                return standing
            sector_size = images.SECTOR_BYTES
            if record.access_type is AccessType.BLOCK:
                # What programs expect of a raw device, unless direct I/O on this pool needs larger ones.
                sector_size = max(512, files.direct_io_alignment(fd) or 512)
            direct_io = self._options.direct_io
            attached = loop.attach(
                fd, readonly=readonly, direct_io=direct_io, sector_size=sector_size, discard=discard
            )
        finally:
            os.close(fd)
        self._loops[home.id, readonly] = attached.number
        return attached

    def find_attached(self, home: Home, record: Record, *, readonly: bool = False) -> Device | None:
        fd = images.open_image(home, os.O_RDONLY)
        try:
            found = self._find_loop(fd, home.id, readonly=readonly)
        finally:
            os.close(fd)
        return _device(found, record) if found else None

    def detach(self, home: Home) -> None:
        try:
            fd = home.open(PAYLOAD_IMAGE)
        except FileNotFoundError:
            return
        try:
            devices = loop.find(fd)
            _check_not_published(home, devices)
            for attached in devices:
                # Its number is the next volume's.
                self._hold(home, attached, mutable.IoLimits())
                if not loop.release(attached):
                    log.warning("volume %s: %s goes when its last user lets go of it", home.id, attached.path)
        finally:
            os.close(fd)
        self._loops.pop((home.id, False), None)
        self._loops.pop((home.id, True), None)

    def limits_problem(self) -> str:
        return self._throttle.problem()

    def limit(self, home: Home, record: Record) -> None:
        limits = mutable.parse(record.mutable).limits
        with Directory(images.open_image(home, os.O_RDONLY)) as image:
            for attached in loop.find(image.fd):
                self._hold(home, attached, limits)

    def _hold(self, home: Home, attached: loop.Loop, limits: mutable.IoLimits) -> None:
        try:
            self._throttle.limit(attached.device, limits)
        except Unlimited as error:
            raise FailedPrecondition(_unlimited(home, str(error))) from error

    def holders(self, homes: Sequence[Home]) -> dict[str, str]:
        backing = {(one.backing_device, one.backing_inode): one.path for one in loop.all()}
        held = {}
        for home in homes:
            try:
                image = images.stat(home)
            except FileNotFoundError:
                continue
            path = backing.get((image.st_dev, image.st_ino))
            if path is not None:
                held[home.id] = f"attached as {path}"
        return held

    def health(self, home: Home, record: Record) -> list[HealthEntry]:
        entries = images.health(home, record)
        if any(entry.reason == images.MISSING for entry in entries):
            return entries
        device = self.find_attached(home, record)
        if device is not None and record.access_type is AccessType.MOUNT:
            entries.extend(_filesystem_health(home, device))
        return entries

    def stats(self, home: Home, mounted: int) -> Stats:
        return directories.filesystem_stats(mounted)

    def _preallocate(self, fd: int, start: int, end: int, *, thin: bool) -> None:
        if self._options.preallocate == "zeroed" and not thin:
            files.write_zeros(fd, start, end)

    def _find_loop(self, fd: int, volume_id: str, *, readonly: bool) -> loop.Loop | None:
        """The loop device over the image. The number of the last one is a hint, which the kernel confirms."""
        image = os.fstat(fd)
        hint = self._loops.get((volume_id, readonly))
        likely = loop.get(hint) if hint is not None else None
        if likely and (likely.backing_device, likely.backing_inode) == (image.st_dev, image.st_ino):
            return likely
        found = next((one for one in loop.find(fd) if one.readonly == readonly), None)
        if found is not None:
            self._loops[volume_id, readonly] = found.number
        return found


def _unlimited(home: Home, problem: str) -> str:
    return (
        f"volume {home.id!r}: its I/O limits cannot be kept on this node: {problem}; or give its claim a "
        "VolumeAttributesClass without limits"
    )


def _check_not_published(home: Home, devices: Sequence[loop.Loop]) -> None:
    """A pod has a raw device as a node, which holds nothing: once detached, its number is the next volume's."""
    for device in devices:
        for entry in mount.mounts_of_device(device.path, device.device):
            raise FailedPrecondition(
                f"volume {home.id!r}: is still published at {entry.target!r}: NodeUnpublishVolume comes first"
            )


def _device(attached: loop.Loop, record: Record) -> Device:
    return Device(
        attached.path, attached.device, record.fs_type, images.MOUNT_OPTIONS.get(record.fs_type, ())
    )


def _filesystem_health(home: Home, device: Device) -> list[HealthEntry]:
    entries = []
    errors = filesystem.error_count(device.fs_type, device.number)
    if errors:
        message = f"volume {home.id!r}: its {device.fs_type} filesystem has counted {errors} errors: check it"
        entries.append(HealthEntry(HealthStatus.DEGRADED, "FilesystemErrors", message))
    source = os.fspath(device.path)
    mounts = [one for one in mount.mounts() if one.device == device.number or one.source == source]
    if any("ro" in one.super_options for one in mounts):
        message = (
            f"volume {home.id!r}: the kernel made its {device.fs_type} filesystem read-only: see its log"
        )
        entries.append(HealthEntry(HealthStatus.DEGRADED, "FilesystemReadOnly", message))
    return entries
