# SPDX-License-Identifier: Apache-2.0
"""`orlop snapshot`, `orlop restore`, `orlop clone`: copies by hand, as a sidecar would ask the driver for them.

What takes longer than a call goes on in the driver: the call is repeated until it is done. Kubernetes knows nothing of
what is made so.
"""

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from rich.markup import escape

from csi_driver.cli import records, settings, terminal, words
from csi_driver.cli.client import TIMEOUT_S, CallFailed, Client, connected, refusals
from csi_driver.cli.snapshots import progress_text
from csi_driver.config import Config
from csi_driver.errors import ConfigurationError
from csi_driver.model import VolumeId, snapshot_hash
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.values import parse_size

T = TypeVar("T")

MADE, FAILED = 0, 1
PAUSE_S = 0.5


class Unusable(Exception):
    """What was asked for cannot be understood; says why."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The volume to make from a snapshot or from another volume."""

    name: str
    size: str = ""
    """As in a claim; "" is as large as its source."""
    pool: str = ""
    """"" is its source's."""
    block: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Whom to ask, and how to answer."""

    endpoint: str | None
    config_path: Path | None
    as_json: bool


def snapshot(place: Place, volume: str, name: str) -> int:
    """Take a snapshot, and wait until it is ready; returns the exit code."""

    def make(client: Client, config: Config | None) -> None:
        source = _volume_id(volume, config)
        called = name or f"{source[-8:]}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        taken = _until_ready(client, pb.CreateSnapshotRequest(name=called, source_volume_id=source))
        if place.as_json:
            terminal.write_json(
                {"snapshot": taken.snapshot_id, "name": called, "size_bytes": taken.size_bytes}
            )
            return
        terminal.console().print(
            f"[green]ready[/] {escape(taken.snapshot_id)} ({words.size(taken.size_bytes)})"
        )

    return _ask(place, make)


def restore(place: Place, snapshot: str, wanted: Wanted) -> int:
    """Make a volume of a snapshot; returns the exit code."""

    def make(client: Client, _: Config | None) -> None:
        snapshot_id = _snapshot_id(snapshot, client)
        source = pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot_id)
        _create(place, client, wanted, snapshot_id, pb.VolumeContentSource(snapshot=source))

    return _ask(place, make)


def clone(place: Place, volume: str, wanted: Wanted) -> int:
    """Make a volume like another one; returns the exit code."""

    def make(client: Client, config: Config | None) -> None:
        volume_id = _volume_id(volume, config)
        source = pb.VolumeContentSource.VolumeSource(volume_id=volume_id)
        _create(place, client, wanted, volume_id, pb.VolumeContentSource(volume=source))

    return _ask(place, make)


def _ask(place: Place, make: Callable[[Client, Config | None], None]) -> int:
    try:
        config = settings.find_config(place.config_path)
        with connected(settings.endpoint_of(place.endpoint, config)) as client:
            make(client, config)
    except (ConfigurationError, CallFailed, Unusable) as error:
        terminal.complain(str(error))
        return FAILED
    return MADE


def _volume_id(text: str, config: Config | None) -> str:
    """The volume called so: by its id, by its claim (namespace/name), or by its name."""
    if VolumeId.find(text):
        return text
    homes = (
        [home for pool in config.pools.values() for home in records.read_pool(pool).homes] if config else []
    )
    found = [
        home.id
        for home in homes
        if home.record is not None
        and text in (home.record.name, f"{home.record.pvc_namespace}/{home.record.pvc_name}")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise Unusable(f"{text!r}: several volumes are called so: {', '.join(found)}: give one of these")
    where = "" if config else "; without the driver's configuration (--config), only ids are known"
    raise Unusable(
        f"{text!r}: no volume of this id, claim (namespace/name) or name: see `orlop volumes`{where}"
    )


def _snapshot_id(text: str, client: Client) -> str:
    """The snapshot called so: by its id, or by the name that it was given, whose hash is in the id."""
    if VolumeId.find(text):
        return text
    wanted = snapshot_hash(text)
    for one in client.snapshots()[0]:
        parsed = VolumeId.find(one.snapshot_id)
        if parsed is not None and parsed.hash == wanted:
            return one.snapshot_id
    raise Unusable(f"{text!r}: no snapshot of this id or name: see `orlop snapshots`")


def _until_ready(client: Client, request: pb.CreateSnapshotRequest) -> pb.Snapshot:
    made_id = ""

    def ask() -> pb.Snapshot | None:
        nonlocal made_id
        with refusals("CreateSnapshot"):
            taken = client.controller.CreateSnapshot(request, timeout=TIMEOUT_S).snapshot
        made_id = taken.snapshot_id
        return taken if taken.ready_to_use else None

    return _repeated(ask, lambda: progress_text(client.snapshots()[1].get(made_id)))


def _create(
    place: Place, client: Client, wanted: Wanted, source_id: str, source: pb.VolumeContentSource
) -> None:
    request = _request(wanted, source_id, source)
    said = "being copied"

    def ask() -> pb.Volume | None:
        nonlocal said
        try:
            with refusals("CreateVolume"):
                return client.controller.CreateVolume(request, timeout=TIMEOUT_S).volume
        except CallFailed as error:
            if error.code is not grpc.StatusCode.ABORTED:
                raise
            said = error.message
            return None

    made = _repeated(ask, lambda: said)
    if place.as_json:
        terminal.write_json(
            {"volume": made.volume_id, "name": wanted.name, "size_bytes": made.capacity_bytes}
        )
        return
    console = terminal.console()
    console.print(f"[green]made[/] {escape(made.volume_id)} ({words.size(made.capacity_bytes)})")
    console.print("To give it to a pod, write a PersistentVolume with this id as its volumeHandle.")


def _request(wanted: Wanted, source_id: str, source: pb.VolumeContentSource) -> pb.CreateVolumeRequest:
    try:
        size_bytes = parse_size(wanted.size) if wanted.size else 0
    except ValueError as error:
        raise Unusable(f"--size: {error}") from error
    parsed = VolumeId.find(source_id)
    pool = wanted.pool or (parsed.pool if parsed else "")
    mode = pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    capability = pb.VolumeCapability(access_mode=mode)
    if wanted.block:
        capability.block.SetInParent()
    else:
        capability.mount.SetInParent()
    return pb.CreateVolumeRequest(
        name=wanted.name,
        capacity_range=pb.CapacityRange(required_bytes=size_bytes) if size_bytes else None,
        volume_capabilities=[capability],
        parameters={**({"pool": pool} if pool else {}), **wanted.parameters},
        volume_content_source=source,
    )


def _repeated(ask: Callable[[], T | None], progress: Callable[[], str]) -> T:
    """What the driver answers in the end. Ctrl-C ends the asking, not the copy."""
    answer = ask()
    if answer is not None:
        return answer
    with terminal.status("…") as tell:
        while answer is None:
            tell(progress())
            time.sleep(PAUSE_S)
            answer = ask()
    return answer
