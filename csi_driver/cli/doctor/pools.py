# SPDX-License-Identifier: Apache-2.0
"""Pools as they lie there: their filesystem's abilities, their room, and whether what is in them makes sense.

Nothing is changed and no lock is taken, so a driver may run meanwhile: what is being made or removed at the moment of
the look is not a leftover, and is told as what it may be. (Reflinks are tried with two files that have no name.)
"""

import os
from collections.abc import Iterator
from pathlib import Path

from csi_driver import backends
from csi_driver.cli import records, words
from csi_driver.cli.doctor.finding import Finding, error, ok, warning
from csi_driver.cli.doctor.managed import look_at_backing
from csi_driver.config import PoolConfig
from csi_driver.linux import btrfs, files, mount, quota


def look_at_pool(config: PoolConfig) -> Iterator[Finding]:
    """One configured pool."""
    area = f"pool {config.name}"
    try:
        yield from _look_at_pool(area, config)
    except OSError as failure:
        yield warning(
            area, f"could not be looked at: {failure}", "what is wrong there is not known", "run as root"
        )


def _look_at_pool(area: str, config: PoolConfig) -> Iterator[Finding]:
    if config.backing:
        yield from look_at_backing(area, config, config.backing)
        if mount.find_mounted(config.root) is None:
            return  # what is beneath the mount is no pool
    if not config.root.is_dir():
        yield from _missing_root(area, config)
        return
    if config.mounted and not os.path.ismount(config.root):
        yield error(
            area,
            f"{config.root}: nothing is mounted there",
            "`mounted = true` says that the pool's disk is, and the driver refuses to start without it",
            "mount the disk",
        )
        return
    yield from look_at_directory(area, config.root)
    yield from _look_at_room(area, config)
    yield from _look_at_backend(area, config)
    yield from _look_at_contents(area, config)


def look_at_directory(area: str, root: Path) -> Iterator[Finding]:
    """What the filesystem of a directory can do for a pool."""
    try:
        fd = files.open_directory(root.resolve())
    except OSError as failure:
        yield error(
            area, f"{root}: {failure.strerror}", "a pool there could not be opened", "correct the path"
        )
        return
    try:
        yield from _look_at_filesystem(area, root, fd)
    finally:
        os.close(fd)


def _missing_root(area: str, config: PoolConfig) -> Iterator[Finding]:
    above = next(path for path in config.root.parents if path.is_dir())
    what = f"{config.root} does not exist; it would be made on the filesystem of {above}"
    if config.mounted:
        yield error(
            area, what, "`mounted = true` wants a disk mounted there", "make the directory and mount the disk"
        )
        return
    yield warning(
        area,
        what,
        "if a disk was meant to be mounted there, volumes would land on the disk beneath instead",
        "make the directory, or mount the disk; `mounted = true` keeps the driver from starting without it",
    )


def _look_at_filesystem(area: str, root: Path, fd: int) -> Iterator[Finding]:
    usage, kind = files.usage(fd), files.filesystem_type(fd)
    yield ok(area, f"{root}: {kind}, {words.size(usage.free_bytes)} of {words.size(usage.total_bytes)} free")
    if usage.read_only:
        yield error(
            area,
            f"{root}: the filesystem is read-only",
            "nothing can be made, grown or deleted there",
            "see the kernel's log for why, repair it, mount it writable",
        )
        return
    if kind in ("tmpfs", "overlay", "overlayfs"):
        yield warning(
            area,
            f"{root}: {kind} does not last",
            "volumes there are gone after a reboot, or with the container",
            "put the pool on a disk's filesystem",
        )
    try:
        yield from _look_at_abilities(area, fd, kind)
    except OSError as failure:
        yield warning(
            area, f"{root}: could not be tried out: {failure}", "its abilities are not known", "run as root"
        )


def _look_at_abilities(area: str, fd: int, kind: str) -> Iterator[Finding]:
    reflink = files.supports_reflink(fd)
    yield ok(area, f"copies share their data (reflink): {'yes' if reflink else 'no'}")
    nameless = files.open_beneath(fd, ".", os.O_RDWR | os.O_TMPFILE, 0o600)
    try:
        alignment = files.direct_io_alignment(nameless)
    finally:
        os.close(nameless)
    if alignment is None:
        yield warning(
            area,
            "no direct I/O",
            "what image volumes hold is kept in memory twice, and writes are slower",
            "use ext4, xfs or btrfs beneath an image pool",
        )
    else:
        yield ok(area, f"direct I/O: in units of {alignment} bytes")
    if kind in ("ext4", "xfs"):
        yield ok(area, f"project quotas: {'no: ' + problem if (problem := quota.state(fd)) else 'yes'}")
    if kind == "btrfs":
        yield ok(area, f"btrfs quotas: {btrfs.quota_mode(fd)}")


def _look_at_room(area: str, config: PoolConfig) -> Iterator[Finding]:
    usage = files.usage(config.root)
    reserved = config.reserved.of(usage.total_bytes)
    if usage.free_bytes <= reserved:
        yield warning(
            area,
            f"full: {words.size(usage.free_bytes)} free, {words.size(reserved)} reserved",
            "no volume can be made or grown there",
            "delete what is not needed, add space, or lower `reserved`",
        )
    if usage.total_inodes and usage.free_inodes < 100:
        yield warning(
            area,
            f"{usage.free_inodes} inodes free",
            "no volume can be made there, whatever space there is",
            "delete files, or make the filesystem with more inodes",
        )


def _look_at_backend(area: str, config: PoolConfig) -> Iterator[Finding]:
    fd = files.open_directory(config.root.resolve())
    try:
        kind = files.filesystem_type(fd)
        match config.backend:
            case "directory" if config.options.get("enforce_capacity") is False:
                yield _not_enforced(
                    area, "enforce_capacity = false", "any volume can fill the pool, for all of them"
                )
            case "directory" if problem := quota.state(fd):
                yield error(
                    area,
                    problem,
                    "the sizes of directory volumes are enforced by project quotas: the driver refuses to start",
                    'do that; or use backend = "image"; or set enforce_capacity = false',
                )
            case "btrfs" if kind != "btrfs":
                yield error(
                    area,
                    f"{config.root} is on {kind}",
                    "a btrfs pool needs btrfs",
                    "give another root or backend",
                )
            case "btrfs" if (mode := btrfs.quota_mode(fd)) != "simple":
                yield _btrfs_quota(area, config, mode)
    finally:
        os.close(fd)


def _btrfs_quota(area: str, config: PoolConfig, mode: str) -> Finding:
    if mode == "qgroup":
        return _not_enforced(
            area, "full qgroups are on, not simple quotas", "subvolumes made by pods escape the limit"
        )
    if config.options.get("enable_quota"):
        return ok(area, "quotas are off: the driver turns them on when it starts (enable_quota)")
    return error(
        area,
        "quotas are off",
        "the sizes of volumes could not be enforced: the driver refuses to start",
        f"btrfs quota enable --simple {config.root}; or set enable_quota = true",
    )


def _not_enforced(area: str, what: str, why: str) -> Finding:
    return warning(
        area, what, why, "leave it so if that is what you want; image pools enforce sizes anywhere"
    )


def _look_at_contents(area: str, config: PoolConfig) -> Iterator[Finding]:
    contents = records.read_pool(config)
    if contents.pool is None:
        yield (
            ok(area, contents.problem)
            if "no pool yet" in contents.problem
            else _unreadable(area, contents.problem)
        )
        return
    if contents.problem:
        yield _unreadable(area, contents.problem)
        return
    if contents.pool.backend != backends.layout(config):
        yield error(
            area,
            f"holds a pool of backend {contents.pool.backend}, the configuration says {config.backend}",
            "the driver refuses to start",
            "correct the configuration, or give the new pool another root",
        )
    yield ok(area, f"{len(contents.homes)} volumes, tag {contents.pool.uuid.replace('-', '')[:8]}")
    for home in contents.homes:
        yield from _look_at_home(area, home)
    yield from _look_at_leftovers(area, contents)


def _unreadable(area: str, problem: str) -> Finding:
    return error(area, problem, "the driver cannot use the pool", "run as root; if it is damaged, restore it")


def _look_at_home(area: str, home: records.Home) -> Iterator[Finding]:
    if home.record is None or home.problem:
        yield error(
            area,
            f"volume {home.id}: {home.problem}",
            "the driver does not know what this volume is: it cannot be used",
            f"its data is untouched in {home.path}: restore the record from a backup, or save the data",
        )
        return
    if home.image.exists():
        size_bytes = home.image.stat().st_size
        if size_bytes < home.record.size_bytes:
            yield error(
                area,
                f"volume {home.id}: its image has {size_bytes} of {home.record.size_bytes} bytes",
                "the end of its filesystem is missing",
                "end its pods and restore it from a backup",
            )
    elif not home.data.is_dir():
        yield error(
            area,
            f"volume {home.id}: has neither image nor data",
            "its content is lost",
            "restore it from a backup",
        )


def _look_at_leftovers(area: str, contents: records.Contents) -> Iterator[Finding]:
    if contents.staging:
        yield warning(
            area,
            f"{len(contents.staging)} in staging/: {', '.join(contents.staging[:3])}",
            "volumes being made right now, or left by a driver that was killed: they take space until it starts again",
            "start the driver; if it runs and they stay, see its log",
        )
    if contents.trash:
        yield ok(
            area,
            f"{len(contents.trash)} deleted, still in trash/ (removed in the background, or after `retention`)",
        )
