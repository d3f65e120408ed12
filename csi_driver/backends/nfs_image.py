# SPDX-License-Identifier: Apache-2.0
"""Volumes as images on a file server's export: as large as they say, and each used by one node at a time.

The controller makes, copies and grows images on the mounted export, in a child (`apart`). The node that uses one locks it
for as long as it has it behind a loop device (`linux.fence`): so a lock on an image is what tells that it is in use.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from csi_driver.backends import directories, exported, images
from csi_driver.backends.base import PAYLOAD_IMAGE, Attachment, Directory, Features, Store
from csi_driver.backends.parameters import MKFS_OPTIONS, ON_DELETE, PROVISIONING, parse_parameters
from csi_driver.catalog import Home
from csi_driver.config import PoolConfig, read_options
from csi_driver.errors import ConfigurationError, Error, FailedPrecondition
from csi_driver.handover import holder, is_used, user
from csi_driver.linux import copy, fence, files, holes
from csi_driver.linux.copy import Transfer
from csi_driver.model import (
    AccessMode,
    AccessType,
    HealthEntry,
    Parameters,
    Record,
    SizeLimits,
    Stats,
    VolumeSpec,
)

FILESYSTEMS = ("ext4", "xfs")
MODES = frozenset(
    {
        AccessMode.SINGLE_NODE_WRITER,
        AccessMode.SINGLE_NODE_READER_ONLY,
        AccessMode.SINGLE_NODE_SINGLE_WRITER,
        AccessMode.SINGLE_NODE_MULTI_WRITER,
    }
)
_OLD = ("nolock", "soft", "softerr", "nfsvers=2", "nfsvers=3", "vers=2", "vers=3", "v3")


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    server: str
    path: str
    provisioning: Literal["image"]
    mount_options: list[str] = []
    """How controllers and nodes mount it."""
    fs_type: Literal["ext4", "xfs"] = "ext4"


class NfsImageBackend:
    """See `base.Backend` for what each method promises."""

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        self._options = options = read_options(pool, _Options)
        given = [one for option in options.mount_options for one in option.split(",")]
        bad = next((one for one in given if one in _OLD or one.startswith("local_lock=")), None)
        if bad is not None:
            raise ConfigurationError(
                f"{pool.where} mount_options {bad!r}: an image is fenced by locks of NFSv4, on a hard mount: leave it out, or "
                'take provisioning = "directory"'
            )
        self._source = exported.source(pool, options.server, options.path, options.mount_options)

    @property
    def features(self) -> Features:
        return Features(
            access_types=frozenset(AccessType),
            access_modes=MODES,
            block_access_modes=MODES,
            stages=True,
            payload=PAYLOAD_IMAGE,
            server=self._source.server,
            export=self._source,
            one_node=True,
        )

    def check(self) -> None:
        exported.ensure_mounted(self._pool, self._source)
        problem = fence.problem(self._pool.root)
        if problem:
            raise ConfigurationError(f"{self._pool.where}: {problem}")

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        own = dict(parameters)
        exported.check_provisioning(self._pool, own.pop(PROVISIONING, ""), self._options.provisioning)
        parsed = parse_parameters(own, fs_type, further=(MKFS_OPTIONS, ON_DELETE))
        options = own.get(MKFS_OPTIONS, "")
        return images.with_filesystem(parsed, options, access_type, self._options.fs_type, FILESYSTEMS)

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        return images.size_limits(access_type, parameters.fs_type or self._options.fs_type)

    def make(self, home: Home, spec: VolumeSpec) -> None:
        images.build(home, spec, lambda fd: _extend(fd, 0, spec.size_bytes, home.id))

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        fd = home.open(PAYLOAD_IMAGE, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with Directory(images.open_image(source, os.O_RDONLY)) as original:
                # No node gets it while it is copied; and nobody freezes a filesystem that another machine has mounted.
                if not files.lock_whole(original.fd, shared=True):
                    raise FailedPrecondition(in_use(source))
                if not spec.snapshot:
                    _extend(fd, 0, spec.size_bytes, home.id)
                transfer.total_bytes = holes.data_bytes(original.fd)
                # Byte by byte: blocks that two images share are in neither's promise.
                copy.copy_sparse(original.fd, fd, transfer)
        finally:
            os.close(fd)

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        with Directory(home.open(PAYLOAD_IMAGE, os.O_RDWR)) as image:
            size = os.fstat(image.fd).st_size
            if size < spec.size_bytes:
                _extend(image.fd, size, spec.size_bytes, home.id)
            files.sync(image.fd)

    def allow(self, home: Home, size_bytes: int, held_bytes: int) -> None:
        """Nothing: a loop device ends where its image does."""

    def open_mounted(self, home: Home, record: Record) -> int | None:
        return None  # it is mounted on another machine, if it is

    def clear(self, home: Home) -> None:
        """Nothing: the image goes with the home."""

    def size_bytes(self, home: Home) -> int:
        return images.size_bytes(home)

    def grow(self, home: Home, size_bytes: int) -> int:
        with Directory(images.open_image(home, os.O_RDWR)) as image:
            before = os.fstat(image.fd).st_size
            if before < size_bytes:
                _extend(image.fd, before, size_bytes, home.id)
                files.sync(image.fd)
            return os.fstat(image.fd).st_size

    def store(self) -> Store:
        usage = files.usage(self._pool.root)
        return Store(usage.total_bytes, usage.free_bytes)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        try:
            return images.stat(home).st_blocks * 512
        except FileNotFoundError:
            return 0  # died before its image was made

    def content_bytes(self, home: Home) -> int:
        with Directory(home.open(PAYLOAD_IMAGE)) as image:
            return holes.data_bytes(image.fd)

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        return size_bytes

    def attach(self, home: Home, record: Record, *, readonly: bool = False) -> Attachment:
        raise Error(f"volume {home.id!r}: a node finds it by its context, not by a pool")

    def find_attached(self, home: Home, record: Record, *, readonly: bool = False) -> Attachment | None:
        return None

    def detach(self, home: Home) -> None:
        return None

    def limits_problem(self) -> str:
        return "its volumes are on a file server: I/O limits are for pools of images on a node's own disks"

    def limit(self, home: Home, record: Record) -> None:
        return None

    def holders(self, homes: Sequence[Home]) -> dict[str, str]:
        held = {}
        for home in homes:
            handed = holder(home.area_fd, home.name)
            if is_used(home.area_fd, home.name, PAYLOAD_IMAGE):
                who = user(home.area_fd, home.name)
                held[home.id] = f"used by node {who.node}" if who else "being copied"
            elif handed is not None and handed.node:
                held[home.id] = f"published to node {handed.node}"
        return held

    def health(self, home: Home, record: Record) -> list[HealthEntry]:
        return images.health(home, record)

    def stats(self, home: Home, mounted: int) -> Stats:
        return directories.filesystem_stats(mounted)


def in_use(home: Home) -> str:
    """The sentence for a volume that cannot be copied, as a node has it."""
    who = user(home.area_fd, home.name)
    return (
        f"volume {home.id!r}: in use{f' by node {who.node!r}' if who else ''}, and nothing here can hold it still while it is "
        "copied: end the pods that use it"
    )


def _extend(fd: int, start: int, end: int, name: str) -> None:
    """Reserve the bytes on the server, where it can (NFSv4.2); elsewhere images are sparse."""
    try:
        images.extend(fd, start, end, thin=False, name=name)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        images.extend(fd, start, end, thin=True, name=name)
