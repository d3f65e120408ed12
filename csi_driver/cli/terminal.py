# SPDX-License-Identifier: Apache-2.0
"""Where commands write: results to stdout, for people or as JSON; what went wrong to stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_WIDE = 1000


def console() -> Console:
    """For results. Lines are wrapped by the terminal, so that paths can be copied whole."""
    return Console(highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Within the terminal's width; into a file or a pipe, as wide as it needs to be."""
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Something that takes its time, told on stderr while it does; only to people who watch."""
    with Console(stderr=True, highlight=False).status(escape(text)) as shown:
        yield lambda now: shown.update(escape(now))


def complain(message: str) -> None:
    """Say on stderr why a command cannot do its work."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]orlop:[/] {escape(message)}")


def write_json(document: Any) -> None:
    """One JSON document, indented, on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")
