# SPDX-License-Identifier: Apache-2.0
"""Volumes as btrfs subvolumes, each limited by a quota group of its own.

The limit is on a group of a level of our own, `100/<subvolume>`, and the subvolume is a member of it: subvolumes that
a pod makes inside its volume (any user may) become members too, with simple quotas. With full qgroups they do not, and
a snapshot made in there even makes the filesystem lose count: such pools are refused unless they ask for it.
"""

import errno
import logging
import os
import time
from collections.abc import Mapping, Sequence

import msgspec

from csi_driver.backends import directories
from csi_driver.backends.base import NODE_MODES, PAYLOAD_DIRECTORY, Directory, Features, Store
from csi_driver.backends.parameters import check_fs_type, parse_parameters
from csi_driver.catalog import Home
from csi_driver.config import PoolConfig, read_options
from csi_driver.errors import ConfigurationError
from csi_driver.linux import btrfs, files, tree
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    KIB,
    MIB,
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

LEVEL = 100
"""Of our quota groups. People and snapper use level 1."""

# Metadata counts, in nodes of 16 KiB.
_LIMITS = SizeLimits(minimum_bytes=MIB, maximum_bytes=2**62, multiple_bytes=4 * KIB)
_SWEEP_S = 5.0

_SIZE = "trusted.orlop.size"
"""Attribute of a home: the volume's size, where its limit is higher for what copies hold."""


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    enable_quota: bool = False
    full_qgroups: bool = False


class BtrfsBackend:
    """See `base.Backend` for what each method promises."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        self._options = read_options(pool, _Options)
        self._enforces = True
        # Subvolumes that were deleted, but whose groups the kernel has still to let go; lost groups are found
        # again at the next start.
        self._stale: set[int] = set()
        self._swept_at = 0.0

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset({AccessType.MOUNT}),
            access_modes=NODE_MODES,
            enforces_capacity=self._enforces,
            shares_copies=True,
            instant_copies=True,
            # With full qgroups shared blocks count for each that refers to them.
            writer_pays=True,
        )

    def check(self) -> None:
        with Directory(directories.open_nearest(self._pool.root)) as directory:
            fs_type = files.filesystem_type(directory.fd)
            if fs_type != "btrfs":
                raise ConfigurationError(
                    f"{self._pool.where}: {self._pool.root} is on {fs_type}: give a root on btrfs, or use another backend"
                )
            if btrfs.quota_mode(directory.fd) == "off":
                self._enable_quota(directory.fd)
            self._enforces = btrfs.quota_mode(directory.fd) == "simple"
            if not self._enforces:
                self._check_full_qgroups()
            for number in btrfs.qgroup_numbers(directory.fd, LEVEL):
                if not btrfs.subvolume_exists(directory.fd, number):
                    self._stale.add(number)
            self._sweep(directory.fd)

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        parsed = parse_parameters(parameters, fs_type)
        check_fs_type(parsed.fs_type, "btrfs")
        return parsed

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        return _LIMITS

    def make(self, home: Home, spec: VolumeSpec) -> None:
        with Directory(home.open_directory()) as opened:
            btrfs.create_subvolume(opened.fd, PAYLOAD_DIRECTORY)
        with directories.attach(home) as data:
            directories.set_owner(data.fd, spec.parameters)
        _limit(home, spec.size_bytes)

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        with Directory(home.open_directory()) as opened:
            if share:
                with directories.attach(source) as original:
                    btrfs.snapshot(original.fd, opened.fd, PAYLOAD_DIRECTORY, readonly=spec.snapshot)
                return
            btrfs.create_subvolume(opened.fd, PAYLOAD_DIRECTORY)
        if not spec.snapshot:
            _limit(home, spec.size_bytes)
        with directories.attach(home) as data:
            directories.copy(home, source, data.fd, transfer, share=False)

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        if not spec.snapshot:
            _limit(home, spec.size_bytes)
            return
        with Directory(home.open_directory()) as opened:
            btrfs.commit(opened.fd)

    def allow(self, home: Home, size_bytes: int, held_bytes: int) -> None:
        if btrfs.quota_mode(home.area_fd) != "simple":
            return
        if not held_bytes and _nominal(home) is None:
            return
        limit = size_bytes + held_bytes
        if self._usage(home)[1] == limit and self.size_bytes(home) == size_bytes:
            return
        with Directory(home.open_directory()) as opened:
            # First: the size must never seem to be what the limit is.
            os.setxattr(opened.fd, _SIZE, b"%d" % size_bytes)
        _limit(home, limit)

    def open_mounted(self, home: Home, record: Record) -> int | None:
        return None

    def clear(self, home: Home) -> None:
        """Delete the subvolume, with what a pod made in it, and its quota group."""
        with Directory(home.open_directory()) as opened:
            data_fd = directories.open_data(home)
            if data_fd is not None:
                with Directory(data_fd) as data:
                    if not btrfs.is_subvolume(data.fd):
                        return
                    number = btrfs.subvolume_id(data.fd)
                _lift_limit(opened.fd, number)
                tree.remove_tree(opened.fd, PAYLOAD_DIRECTORY)
                self._stale.add(number)
                # Else the kernel waits up to half a minute before it gives the space back.
                btrfs.start_commit(opened.fd)
            if time.monotonic() - self._swept_at >= _SWEEP_S:
                self._sweep(opened.fd)

    def size_bytes(self, home: Home) -> int:
        size_bytes = _nominal(home)
        return self._usage(home)[1] if size_bytes is None else size_bytes

    def grow(self, home: Home, size_bytes: int) -> int:
        before = self.size_bytes(home)
        if before < size_bytes:
            if _nominal(home) is None:
                _limit(home, size_bytes)
            else:
                self.allow(home, size_bytes, max(0, self._usage(home)[1] - before))
        return self.size_bytes(home)

    def store(self) -> Store:
        usage = files.usage(self._pool.root)
        return Store(usage.total_bytes, usage.free_bytes)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        return self._usage(home)[0]

    def content_bytes(self, home: Home) -> int:
        return self.written_bytes(home)

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        return size_bytes

    def attach(self, home: Home, record: Record, *, readonly: bool = False) -> Directory:
        return directories.attach(home)

    def find_attached(self, home: Home, record: Record, *, readonly: bool = False) -> Directory | None:
        return directories.find_attached(home)

    def detach(self, home: Home) -> None:
        return None

    def limits_problem(self) -> str:
        return directories.NO_DEVICE

    def limit(self, home: Home, record: Record) -> None:
        return None

    def holders(self, homes: Sequence[Home]) -> dict[str, str]:
        return directories.holders(homes)

    def health(self, home: Home, record: Record) -> list[HealthEntry]:
        entries = list(directories.payload_health(home))
        size_bytes = self.size_bytes(home)
        if size_bytes < record.size_bytes:
            message = (
                f"volume {home.id!r}: its quota is {size_bytes} bytes (0: none), not {record.size_bytes}: quotas "
                "were switched off for a while, or somebody changed them"
            )
            entries.append(HealthEntry(HealthStatus.DEGRADED, "SizeNotEnforced", message))
        if btrfs.is_inconsistent(home.area_fd):
            message = f"the quota groups of {self._pool.root} have lost count: run btrfs quota rescan {self._pool.root}"
            entries.append(HealthEntry(HealthStatus.DEGRADED, "QuotaInconsistent", message))
        return entries

    def stats(self, home: Home, mounted: int) -> Stats:
        # statvfs in a subvolume tells of the whole pool; btrfs counts no inodes.
        below = directories.filesystem_stats(mounted)
        used, limit = self._usage(home)
        if not limit:
            return below
        available = max(0, min(limit - used, below.available_bytes))
        total = self.size_bytes(home)
        # What copies hold counts as used, for nothing tells it from what the volume refers to itself.
        return Stats(total_bytes=total, used_bytes=min(used, total), available_bytes=min(available, total))

    def _usage(self, home: Home) -> tuple[int, int]:
        """Bytes used and the limit, 0 for none."""
        data_fd = directories.open_data(home)
        if data_fd is None:
            return 0, 0
        with Directory(data_fd) as data:
            try:
                used, _, limit = btrfs.usage(data.fd, btrfs.qgroup_id(LEVEL, btrfs.subvolume_id(data.fd)))
            except FileNotFoundError:
                return 0, 0
        return used, limit or 0

    def _enable_quota(self, root_fd: int) -> None:
        root = self._pool.root
        if not (self._options.enable_quota or self._pool.backing):
            # Not done unasked: it changes the whole filesystem, and for good.
            raise ConfigurationError(
                f"{self._pool.where}: quotas are off on the btrfs filesystem of {root}, so no size could be enforced: "
                f"run `btrfs quota enable --simple {root}`, or set enable_quota = true (kernels before 6.7 cannot mount "
                "the filesystem any more then)"
            )
        try:
            btrfs.enable_quota(root_fd, "simple")
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._check_full_qgroups()
            btrfs.enable_quota(root_fd, "qgroup")

    def _check_full_qgroups(self) -> None:
        root = self._pool.root
        if not self._options.full_qgroups:
            raise ConfigurationError(
                f"{self._pool.where}: only full qgroups, not simple quotas (kernel 6.7), at {root}: a pod could write past "
                "its volume's size in a subvolume of its own. Where the kernel has them, run `btrfs quota disable "
                f"{root} && btrfs quota enable --simple {root}`; or accept that with full_qgroups = true"
            )
        log.warning(
            "pool %s: full qgroups: pods can write past their sizes in subvolumes of their own",
            self._pool.name,
        )

    def _sweep(self, root_fd: int) -> None:
        """Remove the groups of deleted subvolumes that the kernel lets go by now."""
        self._swept_at = time.monotonic()
        for number in list(self._stale):
            try:
                btrfs.remove_qgroup(root_fd, number)
                btrfs.remove_qgroup(root_fd, btrfs.qgroup_id(LEVEL, number))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                self._stale.discard(number)


def _nominal(home: Home) -> int | None:
    """A volume's size where its limit is another."""
    with Directory(home.open_directory()) as opened:
        try:
            return int(os.getxattr(opened.fd, _SIZE))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return None


def _lift_limit(home_fd: int, number: int) -> None:
    """Subvolumes cannot be deleted from a volume that is full."""
    try:
        btrfs.set_limit(home_fd, btrfs.qgroup_id(LEVEL, number), 0)
    except OSError as error:
        # No such group, or somebody has switched quotas off: what is not limited is not full.
        if error.errno not in (errno.ENOENT, errno.ENOTCONN):
            raise


def _limit(home: Home, size_bytes: int) -> None:
    """Limit the subvolume and what will be in it; on disk when this returns."""
    with directories.attach(home) as data:
        number = btrfs.subvolume_id(data.fd)
    qgroup = btrfs.qgroup_id(LEVEL, number)
    # Not by way of the subvolume: when it is full, that is refused.
    with Directory(home.open_directory()) as opened:
        btrfs.ensure_qgroup(opened.fd, qgroup)
        btrfs.set_limit(opened.fd, qgroup, size_bytes)
        btrfs.ensure_member(opened.fd, number, qgroup)
        btrfs.commit(opened.fd)
