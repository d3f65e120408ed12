# SPDX-License-Identifier: Apache-2.0
"""`orlop volumes`: what there is, for whom, how full, and where. The driver is asked first; the pools' own records
add what it does not tell, or stand in for it while it does not run.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.markup import escape

from csi_driver.cli import places, records, settings, terminal, words
from csi_driver.cli.client import TIMEOUT_S, CallFailed, Client, connected, refusals
from csi_driver.cli.places import Places
from csi_driver.config import Config
from csi_driver.errors import ConfigurationError
from csi_driver.model import VolumeId
from csi_driver.rpc.pb import csi_pb2 as pb

LISTED, FAILED = 0, 1


@dataclass(slots=True)
class Row:
    """One volume. Empty strings, None and empty lists: not known, or nowhere."""

    id: str
    name: str = ""
    pvc: str = ""
    pool: str = ""
    size_bytes: int | None = None
    used_bytes: int | None = None
    fs_type: str = ""
    published: list[str] = field(default_factory=list)
    staged: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    in_use: bool = False
    mutable: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def volumes(endpoint: str | None, config_path: Path | None, *, as_json: bool) -> int:
    """List them; returns the exit code."""
    try:
        config = settings.find_config(config_path)
    except ConfigurationError as error:
        terminal.complain(str(error))
        return FAILED
    homes = _homes(config)
    where = places.find(homes)
    rows = {home.id: _row(home, where[home.id]) for home in homes}
    silence = _ask_driver(settings.endpoint_of(endpoint, config), rows)
    if silence and (config is None or endpoint is not None):
        terminal.complain(silence)
        return FAILED
    ordered = sorted(rows.values(), key=lambda row: row.id)
    if as_json:
        terminal.write_json({"driver": silence or "answers", "volumes": [asdict(row) for row in ordered]})
    else:
        _show(ordered, silence)
    return LISTED


def _homes(config: Config | None) -> list[records.Home]:
    return (
        [home for pool in config.pools.values() for home in records.read_pool(pool).homes] if config else []
    )


def _row(home: records.Home, found: Places) -> Row:
    row = Row(home.id, pool=home.pool, problem=home.problem)
    row.published, row.staged, row.devices = found.published, found.staged, found.devices
    if home.record is not None:
        record = home.record
        row.name, row.size_bytes, row.fs_type = record.name, record.size_bytes, record.fs_type
        row.mutable = record.mutable
        row.pvc = f"{record.pvc_namespace}/{record.pvc_name}" if record.pvc_name else ""
    return row


def _ask_driver(endpoint: str, rows: dict[str, Row]) -> str:
    """Add what the driver tells; why it does not, or ""."""
    try:
        with connected(endpoint) as client:
            for entry in client.volumes():
                parsed = VolumeId.find(entry.volume.volume_id)
                row = rows.setdefault(entry.volume.volume_id, Row(entry.volume.volume_id))
                row.pool = row.pool or (parsed.pool if parsed else "")
                row.size_bytes = entry.volume.capacity_bytes
                row.in_use = bool(entry.status.published_node_ids)
                row.used_bytes = _used(client, row)
    except CallFailed as error:
        return str(error)
    return ""


def _used(client: Client, row: Row) -> int | None:
    """Of a published filesystem; a device has no such thing, and what is not mounted cannot be asked."""
    if not row.published:
        return None
    request = pb.NodeGetVolumeStatsRequest(volume_id=row.id, volume_path=row.published[0])
    try:
        with refusals("NodeGetVolumeStats"):
            answer = client.node.NodeGetVolumeStats(request, timeout=TIMEOUT_S)
    except CallFailed:
        return None  # unpublished since the mounts were read
    inodes = any(one.unit == pb.VolumeUsage.Unit.INODES for one in answer.usage)
    used = next((one.used for one in answer.usage if one.unit == pb.VolumeUsage.Unit.BYTES), None)
    return used if used or inodes else None


def _show(rows: list[Row], silence: str) -> None:
    console = terminal.console()
    if silence:
        console.print(f"[yellow]The driver does not answer[/]; this is what its pools hold. ({silence})")
    if not rows:
        console.print("There are no volumes.")
        return
    columns = [("CLAIM OR NAME", "POOL", "SIZE", "USED")]
    columns += [
        (row.pvc or row.name or "?", row.pool, _size(row.size_bytes), _used_text(row.used_bytes))
        for row in rows
    ]
    first, second, *_ = (max(map(len, column)) for column in zip(*columns, strict=True))
    for line, row in zip(columns, [None, *rows], strict=True):
        text = f"{line[0]:<{first}}  {line[1]:<{second}}  {line[2]:>9}  {line[3]:>9}"
        console.print(f"[bold]{escape(text)}[/]" if row is None else escape(text))
        for detail in _details(row) if row else ():
            console.print(f"    {detail}")


def _details(row: Row) -> list[str]:
    if row.problem:
        return [row.id, f"[bold red]{escape(row.problem)}[/]"]
    where = [f"at {escape(path)}" for path in row.published]
    if not where and (row.staged or row.devices):
        where = [f"staged, in no pod ({', '.join(row.devices)})"]
    changed = [escape(" ".join(f"{key}={value}" for key, value in sorted(row.mutable.items())))]
    return [
        row.id,
        *(changed if row.mutable else ()),
        *(where or ["in use" if row.in_use else "[dim]not mounted[/]"]),
    ]


def _size(number: int | None) -> str:
    return "?" if number is None else words.size(number) if number else "no limit"


def _used_text(number: int | None) -> str:
    return "" if number is None else words.size(number)
