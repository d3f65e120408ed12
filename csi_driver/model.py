# SPDX-License-Identifier: Apache-2.0
"""The words of the driver as types: capabilities, sizes, parameters, identifiers, records.

Plain values only. Reading them from the wire is `rpc.convert`'s business, keeping them on disk `catalog`'s.
All sizes are bytes.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

import msgspec

from csi_driver.errors import OutOfRange

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

DEFAULT_SIZE = GIB
"""What a request without a capacity range gets, within the backend's limits."""


class AccessType(StrEnum):
    """How a pod meets a volume: a mounted filesystem, or a raw device."""

    MOUNT = "mount"
    BLOCK = "block"


class AccessMode(StrEnum):
    """CSI access modes, by the names of the specification."""

    SINGLE_NODE_WRITER = "SINGLE_NODE_WRITER"
    SINGLE_NODE_READER_ONLY = "SINGLE_NODE_READER_ONLY"
    SINGLE_NODE_SINGLE_WRITER = "SINGLE_NODE_SINGLE_WRITER"
    SINGLE_NODE_MULTI_WRITER = "SINGLE_NODE_MULTI_WRITER"
    MULTI_NODE_READER_ONLY = "MULTI_NODE_READER_ONLY"
    MULTI_NODE_SINGLE_WRITER = "MULTI_NODE_SINGLE_WRITER"
    MULTI_NODE_MULTI_WRITER = "MULTI_NODE_MULTI_WRITER"

    @property
    def reader_only(self) -> bool:
        """Nobody may write: publishing is read-only whatever else the request says."""
        return self in (AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY)


@dataclass(frozen=True, slots=True)
class Capability:
    """One VolumeCapability of the specification."""

    access_type: AccessType
    access_mode: AccessMode
    fs_type: str = ""
    mount_flags: tuple[str, ...] = ()
    volume_mount_group: str = ""


@dataclass(frozen=True, slots=True)
class CapacityRange:
    """Bytes asked for: at least `required_bytes`, at most `limit_bytes`; 0 leaves a side open."""

    required_bytes: int = 0
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """What sizes a backend can make: between both bounds, in whole multiples of `multiple_bytes`."""

    minimum_bytes: int
    maximum_bytes: int
    multiple_bytes: int = 4 * KIB

    def resolve(self, wanted: CapacityRange) -> int:
        """The size to make for a request: rounded up, never above its limit.

        Raises:
            OutOfRange: no size satisfies both the request and this backend.
        """
        lowest = max(wanted.required_bytes, self.minimum_bytes)
        size = -(-lowest // self.multiple_bytes) * self.multiple_bytes
        if not wanted.required_bytes:
            usual = min(DEFAULT_SIZE, wanted.limit_bytes or DEFAULT_SIZE, self.maximum_bytes)
            size = max(size, usual // self.multiple_bytes * self.multiple_bytes)
        if size > self.maximum_bytes:
            raise OutOfRange(
                f"capacity_range.required_bytes {wanted.required_bytes}: larger than the largest volume "
                f"that can be made here, {self.maximum_bytes} bytes"
            )
        if wanted.limit_bytes and size > wanted.limit_bytes:
            raise OutOfRange(
                f"capacity_range.limit_bytes {wanted.limit_bytes}: the smallest volume that can be made "
                f"for this request is {size} bytes (at least {self.minimum_bytes}, in steps of "
                f"{self.multiple_bytes}); raise the limit"
            )
        return size


class OnDelete(StrEnum):
    """What becomes of a volume's files when it is deleted."""

    DELETE = "delete"
    RETAIN = "retain"
    ARCHIVE = "archive"


@dataclass(frozen=True, slots=True)
class Parameters:
    """A StorageClass's parameters as a backend understood them. `None`: not given."""

    fs_type: str = ""
    mkfs_options: tuple[str, ...] = ()
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    sub_path: str = ""
    thin: bool = False
    on_delete: OnDelete = OnDelete.DELETE


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """What a backend is asked to make."""

    size_bytes: int
    access_type: AccessType
    parameters: Parameters = Parameters()
    snapshot: bool = False
    """Nobody will ever write to it."""


PLACEMENT_KEYS = ("pool", "type", "regionId", "zoneId", "server", "share")
"""The StorageClass parameters that choose a pool; the others are the chosen backend's."""

Segments = Mapping[str, str]
"""One topology: key to value, for example `topology.local.orlop.dev/node` to a node's name."""


@dataclass(frozen=True, slots=True)
class TopologyRequirement:
    """Where a volume may be (`requisite`, any of them) and where it had better be (`preferred`, in order)."""

    requisite: tuple[Segments, ...] = ()
    preferred: tuple[Segments, ...] = ()


POOL_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
_VOLUME_ID = re.compile(r"([a-z][a-z0-9]{0,15})-([0-9a-f]{8})-([0-9a-f]{32})")


def name_hash(name: str) -> str:
    """The part of an id that a volume's name decides; also the key that calls on it are locked by."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def snapshot_hash(name: str) -> str:
    """The same of a snapshot or a group of them: another one than that of a volume which is called so too."""
    return name_hash(f"snapshot\n{name}")


@dataclass(frozen=True, slots=True)
class VolumeId:
    """`<pool>-<tag>-<hash>`: the pool's name, 8 hex digits of its uuid, 32 of sha256(name)."""

    pool: str
    tag: str
    hash: str

    def __str__(self) -> str:
        return f"{self.pool}-{self.tag}-{self.hash}"

    @classmethod
    def find(cls, text: str) -> Self | None:
        """The id written as `text`, or None when it has no such form (nothing of ours is called that)."""
        match = _VOLUME_ID.fullmatch(text)
        return cls(*match.groups()) if match else None


def lock_key(volume_id: str) -> str:
    """One key for every call on a volume, whether it names it by id or (create, inline) by name."""
    parsed = VolumeId.find(volume_id)
    return parsed.hash if parsed else name_hash(volume_id)


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`group.json`: snapshots that show one moment. They exist if and only if this does."""

    schema: int
    id: str
    name: str
    created_at: float
    snapshots: dict[str, str]
    """Volume id to snapshot id."""


class SourceKind(StrEnum):
    """What a volume can be copied from."""

    SNAPSHOT = "snapshot"
    VOLUME = "volume"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`volume.json`: what the storage cannot say of itself, enough to write the PersistentVolume anew.

    `schema` is the layout's version: a newer one is refused, an older one migrated forward. Fields this version
    does not know are kept in the file.
    """

    schema: int
    id: str
    name: str
    size_bytes: int
    access_type: AccessType
    fs_type: str = ""
    parameters: dict[str, str] = {}
    created_at: float = 0.0
    """Seconds since the epoch."""
    pvc_namespace: str = ""
    pvc_name: str = ""
    pv_name: str = ""
    source: str = ""
    """The snapshot or volume that it was copied from, and which of the two that was."""
    source_kind: SourceKind | None = None
    shares: dict[str, int] = {}
    """Volume id to how many bytes that it wrote this one may keep from being freed: what a copy shares."""
    ephemeral: bool = False
    mutable: dict[str, str] = {}
    """What its VolumeAttributesClass says: see `mutable`."""


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`snapshot.json`: a volume at one moment, and enough of its volume to make one like it."""

    schema: int
    id: str
    name: str
    source: str
    """The volume's id; the volume may be gone."""
    size_bytes: int
    """What the volume was provisioned with."""
    access_type: AccessType
    fs_type: str = ""
    parameters: dict[str, str] = {}
    """The volume's."""
    created_at: float = 0.0
    """The moment that it shows, in seconds since the epoch."""
    group: str = ""
    shares: dict[str, int] = {}
    pvc_namespace: str = ""
    pvc_name: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """VolumeContentSource of the specification."""

    kind: SourceKind
    id: str


@dataclass(frozen=True, slots=True)
class VolumeRequest:
    """What a caller wants made: CreateVolume's arguments, or those of an inline volume."""

    name: str
    capabilities: tuple[Capability, ...]
    capacity_range: CapacityRange = CapacityRange()
    parameters: Mapping[str, str] = field(default_factory=dict)
    topology: TopologyRequirement = TopologyRequirement()
    pvc_namespace: str = ""
    pvc_name: str = ""
    pv_name: str = ""
    ephemeral: bool = False
    source: Source | None = None
    mutable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as callers see it."""

    record: SnapshotRecord
    ready: bool = True
    segments: Segments = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """A group of snapshots as callers see it."""

    record: GroupRecord
    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume as callers see it."""

    id: str
    size_bytes: int
    record: Record
    segments: Segments = field(default_factory=dict)
    context: Mapping[str, str] = field(default_factory=dict)
    in_use: bool = False
    holder: str | None = None
    """The node that it was handed to, "" for none; None for volumes that are not handed to one."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Room for new volumes, now. All in bytes."""

    available_bytes: int
    maximum_volume_bytes: int
    minimum_volume_bytes: int


class HealthStatus(StrEnum):
    """How bad a condition of a volume is, by the specification's names."""

    DEGRADED = "DEGRADED"
    INACCESSIBLE = "INACCESSIBLE"
    DATA_LOSS = "DATA_LOSS"


@dataclass(frozen=True, slots=True)
class HealthEntry:
    """One condition: its reason is short, CamelCase and stable; the pair (status, reason) is unique in a volume."""

    status: HealthStatus
    reason: str
    message: str


class StorageStatus(StrEnum):
    """How bad a condition of a pool is, by the specification's names."""

    STORAGE_DEGRADED = "STORAGE_DEGRADED"
    STORAGE_UNREACHABLE = "STORAGE_UNREACHABLE"


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """One condition of a pool as seen from this node."""

    status: StorageStatus
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Stats:
    """What NodeGetVolumeStats tells. Inodes are 0 where the filesystem counts none; a device has only a total."""

    total_bytes: int
    used_bytes: int = 0
    available_bytes: int = 0
    total_inodes: int = 0
    used_inodes: int = 0
    available_inodes: int = 0


@dataclass(frozen=True, slots=True)
class StageRequest:
    """NodeStageVolume's arguments. `handed` is what ControllerPublishVolume answered, if that was asked."""

    volume_id: str
    staging_target_path: str
    capability: Capability
    context: Mapping[str, str] = field(default_factory=dict)
    handed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """NodePublishVolume's arguments. `staging_target_path` is "" for inline volumes."""

    volume_id: str
    target_path: str
    capability: Capability
    staging_target_path: str = ""
    readonly: bool = False
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads_only(self) -> bool:
        """Whether the pod may not write, by what is asked for it or by the access mode."""
        return self.readonly or self.capability.access_mode.reader_only


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """NodeGetInfo's answer. `max_volumes` 0: no limit is known."""

    node_id: str
    max_volumes: int
    segments: Segments


@dataclass(frozen=True, slots=True)
class DriverFeatures:
    """What the configured pools together make the driver able to do: what it advertises."""

    stages: bool
    """Some pool's volumes are mounted once per node before they are published."""
    grows_in_controller: bool
    grows_on_node: bool
    has_blocks: bool = False
    """Some pool's snapshots are images, whose changed blocks can be told."""
    shared: bool = False
    """Every node reaches every volume: there is no topology."""
    hands_out: bool = False
    """Some pool's volumes are handed to one node at a time."""
