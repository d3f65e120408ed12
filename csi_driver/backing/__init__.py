# SPDX-License-Identifier: Apache-2.0
"""Managed pools: the filesystem that a pool's configuration asks for is made, mounted and grown before it is opened.

`ensure` makes it so from whatever state it finds, and may be killed and repeated at any point. It never formats what
could hold data, and refuses with a sentence. What a pool does on its filesystem is not this package's business.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from csi_driver.backing import making, mounted
from csi_driver.backing.identity import Content, State, look
from csi_driver.backing.mounted import Backing as Backing
from csi_driver.backing.mounted import BackingRecord
from csi_driver.config import BackingConfig, PoolConfig
from csi_driver.errors import ConfigurationError
from csi_driver.linux import features, loop, mount, run
from csi_driver.linux.turn import turn

_TURN_S = 60.0


def ensure(pool: PoolConfig) -> Backing | None:
    """See that a managed pool's filesystem is mounted at its root; None for pools that are not managed.

    Raises:
        ConfigurationError: it cannot be; says what was found and what to do.
    """
    backing = pool.backing
    if backing is None:
        _check_unmanaged(pool)
        return None
    problem = unable(backing)
    if problem:
        raise ConfigurationError(f"{backing.where}: {problem}")
    try:
        pool.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with turn(pool.root.parent, _TURN_S):
            return _ensure(pool, backing)
    except (OSError, run.CommandError) as error:
        raise ConfigurationError(f"{backing.where}: {error}") from error


def check_mounted(pool: PoolConfig) -> None:
    """Refuse a pool whose disk others should have mounted, and have not.

    Raises:
        ConfigurationError: nothing is mounted there.
    """
    if pool.mounted and not os.path.ismount(pool.root):
        raise ConfigurationError(
            f"{pool.where} root {str(pool.root)!r}: nothing is mounted there, and `mounted = true` demands it: "
            "mount the pool's disk first"
        )


def unable(backing: BackingConfig) -> str:
    """Why this machine cannot do it, with the remedy; "" if it can."""
    problem = "" if backing.is_device else loop.available()
    if problem:
        return problem
    try:
        features.filesystem(backing.fs_type)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return (
                f"this kernel has no {backing.fs_type}: load the module (modprobe {backing.fs_type}), choose the other of "
                "xfs and btrfs, or leave the backing out"
            )
        if error.errno != errno.ENOSYS:
            return (
                f"{backing.fs_type} cannot be tried: {error.strerror}: run as root, in a container privileged"
            )
    return ""


def inspect(pool: PoolConfig, backing: BackingConfig) -> Content | None:
    """What is in the backing now; None if there is no such file. Changes nothing.

    Raises:
        ConfigurationError: it is neither a file nor a device, as it should be.
    """
    try:
        with _opened(backing, os.O_RDONLY) as fd:
            return look(fd, pool.name)
    except FileNotFoundError:
        if backing.is_device:
            raise
        return None


def _ensure(pool: PoolConfig, backing: BackingConfig) -> Backing:
    is_mounted = mount.find_mounted(pool.root) is not None
    record = None
    if not is_mounted:
        mounted.check_empty(pool)
        record = mounted.read_record(pool.root)
        making.sweep(pool.root, "backing")
    if not backing.is_device and not os.path.lexists(backing.target):
        if is_mounted or record:
            raise _gone(pool, backing, record, "is missing", is_mounted=is_mounted)
        making.make_file(pool.name, backing)
    with _opened(backing, os.O_RDONLY if backing.is_device else os.O_RDWR) as fd:
        if not is_mounted:
            mounted.check_nowhere_else(pool, backing, fd)
        uuid = _filesystem(pool, backing, fd, record, is_mounted=is_mounted)
        if not is_mounted and record is None:
            target = str(backing.target)
            mounted.write_record(pool.root, BackingRecord(pool=pool.name, uuid=str(uuid), target=target))
        mounted.ensure_mounted(pool, backing, fd, uuid)
        mounted.grow(pool, backing, fd)
        found = os.fstat(fd)
        return Backing(pool.name, backing, None if backing.is_device else (found.st_dev, found.st_ino))


def _filesystem(
    pool: PoolConfig, backing: BackingConfig, fd: int, record: BackingRecord | None, *, is_mounted: bool
) -> UUID:
    """The uuid of the pool's own filesystem there; made if there was provably nothing."""
    content = look(fd, pool.name)
    if content.state is State.FOREIGN:
        raise ConfigurationError(_foreign(backing, content))
    if content.missing_bytes:
        # To lengthen a file that was cut would bring it the zeros that the kernel mounts, and not what was in its end.
        raise ConfigurationError(
            f"{backing.where}: {backing.target} has been cut: its {content.what} needs {content.missing_bytes} bytes more: "
            "bring them back, or restore it from a backup"
        )
    if not backing.is_device:
        making.sweep(backing.target.parent, backing.target.name)
        _check_size(backing, fd)
        making.size(fd, backing)
    if content.state is State.OURS and content.uuid is not None:
        if content.what != backing.fs_type:
            raise ConfigurationError(
                f"{backing.where} filesystem {backing.fs_type!r}: {backing.target} holds the pool as {content.what}: say so, "
                "or give a new pool another name and backing"
            )
        if record and record.uuid != str(content.uuid):
            raise _gone(pool, backing, record, f"holds another one, {content.uuid}", is_mounted=False)
        return content.uuid
    if is_mounted or record:
        raise _gone(pool, backing, record, f"holds {content.what}", is_mounted=is_mounted)
    for attached in () if backing.is_device else loop.find(fd):
        raise ConfigurationError(
            f"{backing.where} file {str(backing.target)!r}: is attached as {attached.path}, so somebody else may be about to "
            f"write to it: give another, or `losetup --detach {attached.path}`"
        )
    with _opened(backing, os.O_RDWR | (os.O_EXCL if backing.is_device else 0)) as writable:
        return making.fill(writable, pool.name, backing, pool.root)


@contextmanager
def _opened(backing: BackingConfig, flags: int) -> Iterator[int]:
    target = Path(os.path.realpath(backing.target)) if backing.is_device else backing.target
    try:
        fd = os.open(target, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ConfigurationError(
                f"{backing.where} device {str(backing.target)!r}: is in use (mounted, or a part of RAID or LVM): give another"
            ) from error
        if error.errno == errno.ELOOP:
            raise ConfigurationError(
                f"{backing.where} file {str(backing.target)!r}: is a symbolic link: say where the file itself is"
            ) from error
        raise
    try:
        is_right = stat.S_ISBLK if backing.is_device else stat.S_ISREG
        if not is_right(os.fstat(fd).st_mode):
            kind = "a block device" if backing.is_device else "a regular file"
            raise ConfigurationError(f"{backing.where}: {backing.target} is not {kind}: correct the path")
        yield fd
    finally:
        os.close(fd)


def _check_size(backing: BackingConfig, fd: int) -> None:
    size_bytes = os.fstat(fd).st_size
    if size_bytes > backing.size_bytes:
        raise ConfigurationError(
            f"{backing.where} size {backing.size_bytes}: the pool has {size_bytes} bytes already, and its filesystem "
            f"cannot shrink: say size = {size_bytes}, or move the volumes to a smaller pool"
        )


def _check_unmanaged(pool: PoolConfig) -> None:
    """Without its filesystem a managed pool's root is an empty directory, in which a new pool would begin."""
    record = mounted.read_record(pool.root)
    if record is not None:
        raise ConfigurationError(
            f"{pool.where} root {str(pool.root)!r}: is where the filesystem of the managed pool {record.pool!r} (in "
            f"{record.target}) belongs, which is not mounted: configure its backing again; or, to begin a new pool, "
            f"remove {pool.root / mounted.RECORD_FILE}"
        )


def _gone(
    pool: PoolConfig, backing: BackingConfig, record: BackingRecord | None, what: str, *, is_mounted: bool
) -> ConfigurationError:
    if is_mounted:
        return ConfigurationError(
            f"{backing.where}: {backing.target} {what}, and yet something is mounted at {pool.root}: copy away what you need, "
            "and unmount it"
        )
    uuid = f" (uuid {record.uuid})" if record else ""
    return ConfigurationError(
        f"{backing.where}: {backing.target} {what}, though the filesystem of the pool{uuid} was made: bring it back; or, "
        f"to begin a new pool, remove {pool.root / mounted.RECORD_FILE}"
    )


def _foreign(backing: BackingConfig, content: Content) -> str:
    remedy = f"give another; or, if that may be lost, write zeros: `blkdiscard --zeroout {backing.target}`"
    if not backing.is_device:
        remedy = "give another name; or remove it, if that may be lost"
    key = "device" if backing.is_device else "file"
    return f"{backing.where} {key} {str(backing.target)!r}: holds {content.what}, which Orlop has not made for this pool: {remedy}"
