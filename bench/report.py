# SPDX-License-Identifier: Apache-2.0
"""What a run found: rows with a target and whether it was met, as a table for people and a file for programs.

A row that misses its target is no failure: a machine can be slow, and a target wrong (docs/benchmarks.md says which).
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured figure. `target` is a bound: at most, or with `at_least` at least; None for a plain fact."""

    subject: str
    what: str
    measured: float
    unit: str
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


@dataclass
class Report:
    """The rows of a run in sections, and the samples behind them."""

    sections: dict[str, list[Row]] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)

    def add(self, section: str, rows: list[Row], details: object = None) -> None:
        self.sections.setdefault(section, []).extend(rows)
        if details is not None:
            self.details[section] = details
        _print_section(section, rows)

    def write(self, path: Path) -> None:
        """The machine-readable file."""
        content = {
            "machine": machine(),
            "sections": {
                title: [asdict(row) | {"met": row.met} for row in rows]
                for title, rows in self.sections.items()
            },
            "details": self.details,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def print_end(self, path: Path) -> None:
        judged = [row for rows in self.sections.values() for row in rows if row.met is not None]
        print(f"\n{sum(row.met is True for row in judged)} of {len(judged)} targets met. All of it: {path}")


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def _print_section(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    subject = max((len(row.subject) for row in rows), default=0)
    what = max((len(row.what) for row in rows), default=0)
    for row in rows:
        bound = "" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:g}"
        verdict = {None: "", True: "met", False: "NOT MET"}[row.met]
        figure = f"{row.measured:>9.2f} {row.unit}"
        print(
            f"  {row.subject:<{subject}}  {row.what:<{what}}  {figure:<22} {bound:<8} {verdict:<8} {row.note}".rstrip()
        )
