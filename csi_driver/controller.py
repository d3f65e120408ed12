# SPDX-License-Identifier: Apache-2.0
"""The CSI controller's semantics over the pools: idempotency, placement, listing, capacity.

Requests arrive checked (`rpc.convert`); mounts are `node`'s business, homes and payloads `pool`'s.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

from csi_driver import modify, static
from csi_driver.catalog import Home
from csi_driver.copies import Copier, being_copied
from csi_driver.errors import (
    Aborted,
    Error,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
    invalid,
)
from csi_driver.handover import Handed
from csi_driver.health import Health
from csi_driver.locks import Locks
from csi_driver.model import (
    AccessMode,
    AccessType,
    Capability,
    Capacity,
    CapacityRange,
    HealthEntry,
    Record,
    Segments,
    TopologyRequirement,
    Volume,
    VolumeId,
    VolumeRequest,
    lock_key,
    name_hash,
)
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.provision import Copying, access_type_of, grown_size, parse_parameters, provision, unsupported
from csi_driver.staging import mount_flags

log = logging.getLogger(__name__)


class Controller:
    """CSI Controller service. `segments` is this node's topology, and so that of every volume made here."""

    def __init__(
        self,
        pools: Pools,
        locks: Locks,
        health: Health,
        copier: Copier,
        segments: Segments,
        *,
        expands: bool,
    ) -> None:
        self._copier = copier
        self._pools = pools
        self._locks = locks
        self._health = health
        self._segments = dict(segments)
        self._expands = expands

    def create_volume(self, request: VolumeRequest) -> Volume:
        """Make a volume, or find the one that an earlier call made.

        Raises:
            InvalidArgument, OutOfRange: it can be made nowhere.
            AlreadyExists: the name is taken by a different volume.
            ResourceExhausted: it cannot be made on this node: no room, another topology, region or zone.
            Aborted: a call for the same name is under way.

        CSI: CreateVolume.
        """
        with ExitStack() as held:
            source = [lock_key(request.source.id)] if request.source else []
            self._check_job(request.name)
            held.enter_context(self._locks.hold(name_hash(request.name), shared=source))
            self._check_topology(request.topology)
            self._check_place(request.parameters)
            pool, home = provision(self._pools, request, Copying(self._copier, held))
            return self._volume(pool, home, in_use=False)

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume; one that is nowhere is fine.

        Raises:
            FailedPrecondition: it is in use, or belongs to a pool that this node does not have.

        CSI: DeleteVolume.
        """
        # One that is still being copied will not exist.
        if self._copier.jobs.call_off(volume_id):
            raise Aborted(f"volume {volume_id!r}: a copy into it is being called off: repeat")
        with self._locks.hold(lock_key(volume_id)):
            found = self._pools.find(volume_id)
            if found is None:
                self._pools.check_foreign(volume_id)
                # Where others have the pool too, no start removes what was half made.
                self._pools.discard_leftover(volume_id)
                return
            pool, home = found
            pool.delete(home)

    def validate(
        self,
        volume_id: str,
        capabilities: tuple[Capability, ...],
        parameters: Mapping[str, str],
        context: Mapping[str, str],
        mutable_parameters: Mapping[str, str],
    ) -> str:
        """Why the volume cannot be used so; "" when it can.

        Raises:
            NotFound: there is no such volume.

        CSI: ValidateVolumeCapabilities.
        """
        pool, home = self._pools.get(volume_id)
        record = pool.catalog.read(home)
        if context and dict(context) != (own := _context(pool, home, record)):
            return f"volume_context {dict(context)}: this volume's is {own or 'empty'}"
        if parameters and dict(parameters) != record.parameters:
            return f"parameters {dict(parameters)}: the volume was made with {record.parameters}"
        if mutable_parameters and dict(mutable_parameters) != record.mutable:
            return f"mutable_parameters {dict(mutable_parameters)}: the volume has {record.mutable}"
        for capability in capabilities:
            if capability.access_type is not record.access_type:
                return f"it is a {record.access_type} volume, not {capability.access_type}"
            if capability.fs_type and capability.fs_type != record.fs_type:
                return f"its filesystem is {record.fs_type!r}, not {capability.fs_type!r}"
            try:
                mount_flags(capability, superblock=pool.backend.features.stages)
            except InvalidArgument as error:
                return str(error)
        return unsupported(pool, capabilities)

    def list_volumes(self, max_entries: int, starting_token: str) -> tuple[list[Volume], str]:
        """A page of all volumes in id order, and the token of the next one ("" at the end).

        The token is the last id of the page, so pages stay right while volumes come and go.

        Raises:
            Aborted: the token is none of ours.

        CSI: ListVolumes.
        """
        ids = self._ids_after(starting_token)
        page = ids[:max_entries] if max_entries else ids
        token = page[-1] if len(page) < len(ids) else ""
        volumes: list[Volume] = []
        for pool in self._pools:
            homes = [
                pool.catalog.home(volume_id) for volume_id in page if volume_id.startswith(f"{pool.name}-")
            ]
            volumes.extend(self._listed(pool, homes))
        return sorted(volumes, key=lambda volume: volume.id), token

    def get_volume(self, volume_id: str) -> Volume:
        """One volume as it is.

        CSI: ControllerGetVolume.
        """
        pool, home = self._pools.get(volume_id)
        return self._volume(pool, home, in_use=bool(pool.backend.holders([home])))

    def capacity(
        self, capabilities: tuple[Capability, ...], parameters: Mapping[str, str], segments: Segments | None
    ) -> Capacity:
        """Room for such volumes on this node; all of it 0 where they cannot be made but another node may.

        What is wrong wherever it is asked for (a misspelt pool, a bad option) counts as having room: with none, the
        scheduler would hold its pods back for want of storage. So they come as far as CreateVolume, whose refusal
        their user reads in the claim's events.

        CSI: GetCapacity.
        """
        nothing = Capacity(0, 0, 0)
        if segments is not None and not self._matches(segments):
            return nothing
        try:
            self._check_place(parameters)
            pools = self._pools.candidates(parameters)
        except ResourceExhausted:
            return nothing
        except InvalidArgument:
            pools = list(self._pools)
        rooms = [self._room(pool, capabilities, parameters) for pool in pools]
        # A volume lies in one pool: the largest room, not the sum, is what a scheduler may count on.
        return max((room for room in rooms if room), key=lambda room: room.available_bytes, default=nothing)

    def expand_volume(
        self, volume_id: str, wanted: CapacityRange, capability: Capability | None
    ) -> tuple[int, bool]:
        """Grow a volume's payload; its size, and whether the node still has to grow the filesystem in it.

        CSI: ControllerExpandVolume.
        """
        if not self._expands:
            raise Unimplemented("ControllerExpandVolume: volumes are grown on their node (NodeExpandVolume)")
        with self._locks.hold(lock_key(volume_id)):
            pool, home = self._pools.get(volume_id)
            record = pool.catalog.read(home)
            if capability is not None and capability.access_type is not record.access_type:
                raise invalid(
                    "volume_capability", capability.access_type, f"it is a {record.access_type} volume"
                )
            size_bytes = grown_size(pool, record, wanted, pool.size_bytes(home))
            # Where nothing enforces a size, the claim still has the one that was asked for.
            grown = pool.grow(home, record, size_bytes) or max(size_bytes, wanted.required_bytes)
            has_filesystem = record.fs_type != "" and record.access_type is AccessType.MOUNT
            # A device on another machine has to be told, whatever is on it.
            return grown, has_filesystem or pool.backend.features.one_node

    def modify_volume(self, volume_id: str, mutable_parameters: Mapping[str, str]) -> None:
        """Give a volume what its new VolumeAttributesClass says, at once, also while pods use it.

        Raises:
            NotFound: there is no such volume.
            FailedPrecondition: it belongs to a pool that this node does not have.
            InvalidArgument: the parameters are wrong, or the volume's pool cannot do what they say.

        CSI: ControllerModifyVolume.
        """
        with self._locks.hold(lock_key(volume_id)):
            if self._pools.find(volume_id) is None:
                self._pools.check_elsewhere(volume_id)
            modify.modify(*self._pools.get(volume_id), mutable_parameters)

    def volume_health(self, volume_id: str) -> list[HealthEntry]:
        """What is wrong with a volume; empty when nothing is known to be.

        CSI: ControllerGetVolumeHealth.
        """
        pool, home = self._pools.get(volume_id)
        return self._health.of_volume(pool, home)

    def list_health(
        self, max_entries: int, starting_token: str
    ) -> tuple[list[tuple[str, list[HealthEntry]]], str]:
        """A page of the volumes with something wrong, in id order.

        CSI: ControllerListVolumeHealth.
        """
        sick: list[tuple[str, list[HealthEntry]]] = []
        for volume_id in self._ids_after(starting_token):
            found = self._pools.find(volume_id)
            entries = self._health.of_volume(*found) if found else []
            if entries and max_entries and len(sick) == max_entries:
                return sick, sick[-1][0]
            if entries:
                sick.append((volume_id, entries))
        return sick, ""

    def publish_volume(
        self, volume_id: str, node_id: str, capability: Capability, context: Mapping[str, str]
    ) -> dict[str, str]:
        """Hand the volume to the node, if it is one that one node at a time can have; what the node is told of it.

        Raises:
            NotFound: there is no such volume.
            FailedPrecondition: another node has it.

        CSI: ControllerPublishVolume.
        """
        if (
            self._pools.find(volume_id) is None
            and static.is_static(context)
            and VolumeId.find(volume_id) is None
        ):
            return {}  # by hand: any node can have it
        with self._locks.hold(lock_key(volume_id)):
            pool, home = self._pools.get(volume_id)
            record = pool.catalog.read(home)
            reason = unsupported(pool, (capability,))
            if capability.access_type is not record.access_type:
                reason = f"it is a {record.access_type} volume, not {capability.access_type}"
            if reason:
                raise InvalidArgument(f"volume_capability: {reason}")
            if not pool.backend.features.one_node:
                return {}
            handed = pool.catalog.hand_out(home, node_id)
            return Handed(handed.node, str(handed.generation)).told()

    def unpublish_volume(self, volume_id: str, node_id: str) -> None:
        """Take the volume back from the node ("": any); fine when it has not got it, or is nowhere.

        Raises:
            FailedPrecondition: the node uses it yet.

        CSI: ControllerUnpublishVolume.
        """
        with self._locks.hold(lock_key(volume_id)):
            found = self._pools.find(volume_id)
            if found is not None and found[0].backend.features.one_node:
                pool, home = found
                pool.catalog.take_back(home, pool.backend.features.payload, node_id)

    # Parts

    def _check_job(self, name: str) -> None:
        """Tell how a copy in the background goes that an earlier call began, or in what it has ended."""
        job = self._copier.jobs.find_name(name, Record)
        if job is not None:
            if job.is_running:
                raise being_copied(job)
            self._copier.jobs.take_failure(job.record.id)

    def _volume(self, pool: Pool, home: Home, *, in_use: bool) -> Volume:
        record = pool.catalog.read(home)
        return Volume(
            id=home.id,
            size_bytes=pool.size_bytes(home),
            record=record,
            segments=self._segments,
            context=_context(pool, home, record),
            in_use=in_use,
            holder=_holder(pool, home),
        )

    def _listed(self, pool: Pool, homes: Sequence[Home]) -> Iterable[Volume]:
        holders = pool.backend.holders(homes) if homes else {}
        for home in homes:
            try:
                yield self._volume(pool, home, in_use=home.id in holders)
            except (NotFound, FileNotFoundError):
                continue  # deleted since it was listed
            except (OSError, Error) as error:
                # One volume that cannot be read must not hide the others; the health calls tell of it.
                log.error("not listed: %s", error)

    def _ids_after(self, token: str) -> list[str]:
        if token and self._pools.named_of(token) is None:
            raise Aborted(f"starting_token {token!r}: not one that this driver gave: list from the beginning")
        ids = sorted(volume_id for pool in self._pools for volume_id in pool.catalog.ids())
        return [volume_id for volume_id in ids if volume_id > token] if token else ids

    def _room(
        self, pool: Pool, capabilities: tuple[Capability, ...], parameters: Mapping[str, str]
    ) -> Capacity | None:
        if not pool.is_present():
            return None
        if not capabilities and not parameters:
            return pool.capacity()
        try:
            if unsupported(pool, capabilities):
                return None
            # The provisioner asks with a StorageClass's parameters and no capabilities.
            asked = capabilities or (Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER),)
            return pool.capacity(access_type_of(asked), parse_parameters(pool, parameters, asked))
        except InvalidArgument:
            return pool.capacity()

    def _check_topology(self, topology: TopologyRequirement) -> None:
        if not self._segments:
            return  # every node reaches these volumes
        places = topology.requisite or topology.preferred
        if places and not any(self._matches(segments) for segments in places):
            raise ResourceExhausted(
                f"accessibility_requirements: none of the topologies asked for is this node's, {self._segments}"
            )

    def _matches(self, segments: Segments) -> bool:
        """Whether this node is in the place that `segments` describes (keys we do not have describe another place)."""
        return all(self._segments.get(key) == value for key, value in segments.items())

    def _check_place(self, parameters: Mapping[str, str]) -> None:
        for parameter, label in (("regionId", "region"), ("zoneId", "zone")):
            wanted = parameters.get(parameter, "")
            have = self._segments.get(f"topology.kubernetes.io/{label}", "")
            if wanted and wanted != have:
                raise ResourceExhausted(
                    f"parameters.{parameter} {wanted!r}: this node's {label} is {have or 'not configured'!r}"
                )


def _context(pool: Pool, home: Home, record: Record) -> dict[str, str]:
    """What a node needs to know of a volume that it cannot look up in a pool of its own."""
    payload = home.path.relative_to(pool.catalog.root) / pool.backend.features.payload
    return static.context_of(pool, os.fspath(payload), record)


def _holder(pool: Pool, home: Home) -> str | None:
    """The node that has it, "" for none; None where any node may."""
    if not pool.backend.features.one_node:
        return None
    found = pool.catalog.holder(home)
    return found.node if found else ""
