# SPDX-License-Identifier: Apache-2.0
"""What a kind of storage must be able to do, and the values it exchanges with the layers above.

A backend fills and empties homes. It never mounts a target, writes a record, answers a call or takes a lock;
it may assume that no two of its calls for one volume run at once. Every method makes a state so and may be
repeated after a crash at any point.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from csi_driver.catalog import Home
from csi_driver.linux.copy import Transfer
from csi_driver.linux.export import Source
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

PAYLOAD_DIRECTORY = "data"
PAYLOAD_IMAGE = "image"


@dataclass(frozen=True, slots=True)
class Features:
    """What a pool of this backend, configured as it is, can truly do."""

    access_types: frozenset[AccessType]
    access_modes: frozenset[AccessMode]
    block_access_modes: frozenset[AccessMode] = frozenset()
    enforces_capacity: bool = True
    grows: bool = True
    stages: bool = False
    """Volumes are devices that are mounted once per node."""
    payload: str = PAYLOAD_DIRECTORY
    """A payload can be copied into any pool that has the same kind."""
    shares_copies: bool = False
    """A copy within the pool shares the storage of what it was copied from until one of them is written to."""
    instant_copies: bool = False
    """A copy within the pool is made in a moment, however large it is."""
    writer_pays: bool = False
    """What a volume has written stays counted as its own for as long as a copy of it holds it."""
    server: str = ""
    """Whose answers the store waits for, for ever if it is dead; "" for storage of this machine."""
    export: Source | None = None
    """The export that is the pool's root, for volumes that every node mounts for itself."""
    one_node: bool = False
    """One node at a time can have a volume, and has to be handed it: see `handover`."""


NODE_MODES = frozenset(
    {
        AccessMode.SINGLE_NODE_WRITER,
        AccessMode.SINGLE_NODE_READER_ONLY,
        AccessMode.SINGLE_NODE_SINGLE_WRITER,
        AccessMode.SINGLE_NODE_MULTI_WRITER,
        AccessMode.MULTI_NODE_READER_ONLY,
        AccessMode.MULTI_NODE_SINGLE_WRITER,
        AccessMode.MULTI_NODE_MULTI_WRITER,
    }
)
"""What a volume that lives on one node can do: the MULTI_NODE modes too, for Kubernetes says ReadWriteMany for
"several pods", and topology keeps all of them on the volume's node."""


@dataclass(frozen=True, slots=True)
class Store:
    """A pool's filesystem now: its size and what is free in it, in bytes."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Directory:
    """An attachment to bind a pod to: an open directory. Close it (or leave its `with`)."""

    fd: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Device:
    """An attachment that is a block device; `number` is its device number (st_rdev)."""

    path: Path
    number: int
    fs_type: str
    mount_options: tuple[str, ...] = ()
    """Superblock options that this filesystem needs whatever the user asks for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


Attachment = Directory | Device


class Backend(Protocol):
    """One pool's storage. Constructed with the pool's root directory and its part of the configuration."""

    @property
    def features(self) -> Features:
        """What this pool can do; constant after `check`."""

    def check(self) -> None:
        """Look at tools, kernel and filesystem.

        Raises:
            ConfigurationError: this pool cannot work here; says why and what to do.
        """

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        """Understand a StorageClass's parameters (placement keys are already taken out) and the fs_type asked for.

        Raises:
            InvalidArgument: an unknown key (naming the known ones) or a bad value.
        """

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        """The sizes that can be made."""

    def make(self, home: Home, spec: VolumeSpec) -> None:
        """Fill a staging home with a payload of exactly `spec.size_bytes`.

        Raises:
            ResourceExhausted: the store is full.
        """

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        """Bring the source's content into an empty staging home; `finish` makes a volume or snapshot of it.

        To `share` (same pool, and `features.shares_copies`) gives the content of one moment, where it is `instant`.
        The source may be of another pool with the same payload.

        Raises:
            ResourceExhausted: the store is full.
            copy.Stopped: the transfer may not go on.
        """

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        """Make a copied payload as large as `spec` says, with its limit; on disk when this returns."""

    def allow(self, home: Home, size_bytes: int, held_bytes: int) -> None:
        """Let a volume write what its size says though copies hold so much of what it has written already.

        Only where `features.writer_pays` means that these count against its limit.
        """

    def open_mounted(self, home: Home, record: Record) -> int | None:
        """An fd of the filesystem that is mounted from the payload, which must be still for a copy of one moment.

        None where none is mounted, or nothing needs to be still.
        """

    def clear(self, home: Home) -> None:
        """Release what removing the home's files cannot (a subvolume, a quota id). A half-made home is fine."""

    def size_bytes(self, home: Home) -> int:
        """The volume's size as the storage has it; 0 where no size is enforced."""

    def grow(self, home: Home, size_bytes: int) -> int:
        """Make the payload at least so large; never shrinks. The filesystem in a device is not its business.

        Returns: the actual size.
        Raises:
            ResourceExhausted: the store is full; the payload is as it was.
        """

    def store(self) -> Store:
        """The pool's filesystem now. O(1), no subprocess."""

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        """How much of the store's free space this home has taken already.

        Of one that may be `shared` with copies, where it is not the writer who pays, only what it has alone.
        """

    def content_bytes(self, home: Home) -> int:
        """How much of the store a full copy of this home takes; 0 where nothing is counted."""

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        """How much of the store a volume of this size may take in the end."""

    def attach(self, home: Home, record: Record, *, readonly: bool = False) -> Attachment:
        """Make the payload usable on this node. Repeatable: an attachment that stands is found and given back."""

    def find_attached(self, home: Home, record: Record, *, readonly: bool = False) -> Attachment | None:
        """The attachment that stands now, without making one."""

    def detach(self, home: Home) -> None:
        """Undo `attach` (both kinds); fine when there is nothing to undo.

        What another mount namespace still holds goes when that lets go of it; `attach` in between finds it again.

        Raises:
            FailedPrecondition: a target shows the device itself.
        """

    def limits_problem(self) -> str:
        """Why volumes here cannot be held to I/O limits; "" when they can."""

    def limit(self, home: Home, record: Record) -> None:
        """Hold the devices that stand now to the limits of the record. `attach` does so too.

        Raises:
            FailedPrecondition: this node cannot.
        """

    def holders(self, homes: Sequence[Home]) -> dict[str, str]:
        """Volume id to what in the kernel holds it (a loop device, a mount), for those that are in use."""

    def health(self, home: Home, record: Record) -> list[HealthEntry]:
        """What the kernel and the store know to be wrong with the payload."""

    def stats(self, home: Home, mounted: int) -> Stats:
        """Usage of a published filesystem volume; `mounted` is an fd of the directory the pod sees."""
