# SPDX-License-Identifier: Apache-2.0
"""`orlop snapshots`: what snapshots there are, of which volumes, and how far those are that are still being copied.

All of it is asked of the driver; the pools' records only say whose the volumes are.
"""

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.markup import escape

from csi_driver.cli import records, settings, terminal, words
from csi_driver.cli.client import CallFailed, Progress, connected
from csi_driver.config import Config
from csi_driver.errors import ConfigurationError
from csi_driver.model import VolumeId
from csi_driver.rpc.pb import csi_pb2 as pb

LISTED, FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class Row:
    """One snapshot. `copied_bytes` None: it is not being copied, or waits for its turn."""

    id: str
    pool: str
    source: str
    claim: str
    """Namespace and name of the source's claim; "" if it is not known (any more)."""
    size_bytes: int
    created_at: float
    ready: bool
    group: str = ""
    copied_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A volume that is being made by copying."""

    id: str
    copied_bytes: int
    total_bytes: int


def snapshots(endpoint: str | None, config_path: Path | None, *, as_json: bool) -> int:
    """List them; returns the exit code."""
    try:
        config = settings.find_config(config_path)
        with connected(settings.endpoint_of(endpoint, config)) as client:
            found, copying = client.snapshots()
    except (ConfigurationError, CallFailed) as error:
        terminal.complain(str(error))
        return FAILED
    claims = _claims(config)
    rows = [_row(one, copying.get(one.snapshot_id), claims) for one in found]
    listed = {row.id for row in rows}
    copies = [Copy(made, *progress) for made, progress in sorted(copying.items()) if made not in listed]
    if as_json:
        terminal.write_json({"snapshots": list(map(asdict, rows)), "copies": list(map(asdict, copies))})
    else:
        _show(rows, copies)
    return LISTED


def progress_text(progress: Progress | None) -> str:
    """`1.5 GiB of 5 GiB copied`; what waits for its turn has copied nothing."""
    if progress is None:
        return "waits for its turn"
    done, total = progress
    return f"{words.size(done)} of {words.size(total)} copied" if total else f"{words.size(done)} copied"


def _claims(config: Config | None) -> dict[str, str]:
    homes = (
        [home for pool in config.pools.values() for home in records.read_pool(pool).homes] if config else []
    )
    return {
        home.id: f"{home.record.pvc_namespace}/{home.record.pvc_name}"
        for home in homes
        if home.record is not None and home.record.pvc_name
    }


def _row(found: pb.Snapshot, progress: Progress | None, claims: dict[str, str]) -> Row:
    parsed = VolumeId.find(found.snapshot_id)
    done, total = progress or (None, None)
    return Row(
        id=found.snapshot_id,
        pool=parsed.pool if parsed else "",
        source=found.source_volume_id,
        claim=claims.get(found.source_volume_id, ""),
        size_bytes=found.size_bytes,
        created_at=found.creation_time.ToNanoseconds() / 1e9,
        ready=found.ready_to_use,
        group=found.group_snapshot_id,
        copied_bytes=done,
        total_bytes=total,
    )


def _show(rows: list[Row], copies: list[Copy]) -> None:
    console = terminal.console()
    if not rows:
        console.print("There are no snapshots.")
    for row in rows:
        taken = datetime.datetime.fromtimestamp(row.created_at).astimezone()
        progress = (row.copied_bytes, row.total_bytes or 0) if row.copied_bytes is not None else None
        state = "[green]ready[/]" if row.ready else f"[yellow]{progress_text(progress)}[/]"
        console.print(f"[bold]{escape(row.id)}[/]")
        console.print(f"    of {escape(row.claim or row.source)}, {words.size(row.size_bytes)}, {state}")
        console.print(
            f"    taken {taken:%Y-%m-%d %H:%M:%S %Z}{f', in group {escape(row.group)}' if row.group else ''}"
        )
    for copy in copies:
        console.print(f"[bold]{escape(copy.id)}[/]")
        console.print(f"    a volume: [yellow]{progress_text((copy.copied_bytes, copy.total_bytes))}[/]")
