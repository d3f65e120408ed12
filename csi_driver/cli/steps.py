# SPDX-License-Identifier: Apache-2.0
"""What a demo did, step by step, and how that looks on a terminal or as JSON. What is done is `demo`'s business."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from csi_driver.cli import words


@dataclass(frozen=True, slots=True)
class Call:
    """One call to the driver: its name, what was asked, how long the answer took."""

    method: str
    asked: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must be true, and whether it is."""

    claim: str
    held: bool


@dataclass(slots=True)
class Step:
    """A title, the calls made, what they answered, what the kernel shows, what was checked."""

    title: str
    calls: list[Call] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    kernel: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def check(self, claim: str, held: bool) -> None:
        """Note that something must be true, and whether it is."""
        self.checks.append(Check(claim, held))


class Report:
    """The steps so far; each is shown as it ends, unless JSON is wanted, which comes at the end."""

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console = console
        self._as_json = as_json
        self.steps: list[Step] = []
        self.failure = ""
        self.log_tail: list[str] = []

    @property
    def ok(self) -> bool:
        """Whether every check held, and nothing else went wrong."""
        return not self.failure and all(check.held for step in self.steps for check in step.checks)

    def say(self, text: str) -> None:
        """A line between the steps; not part of the JSON."""
        if not self._as_json:
            self._console.print(text, soft_wrap=True)

    def add(self, step: Step) -> None:
        """A step has ended."""
        self.steps.append(step)
        if not self._as_json:
            self._show(step)

    def document(self) -> dict[str, Any]:
        """All of it, for machines. Times are in milliseconds."""
        return {
            "ok": self.ok,
            "failure": self.failure,
            "log_tail": self.log_tail,
            "steps": [
                asdict(step)
                | {
                    "calls": [
                        {"method": call.method, "asked": call.asked, "ms": round(call.seconds * 1000, 3)}
                        for call in step.calls
                    ]
                }
                for step in self.steps
            ],
        }

    def _show(self, step: Step) -> None:
        self.say(f"\n[bold]{len(self.steps):2}  {escape(step.title)}[/]")
        for call in step.calls:
            what = f"{call.method}  {call.asked}" if call.asked else call.method
            self.say(f"    [cyan]{escape(what):<72}[/] [bold cyan]{words.milliseconds(call.seconds):>9}[/]")
        for line in step.answers:
            self.say(f"      {escape(line)}")
        for line in step.kernel:
            self.say(f"      [dim]kernel[/] {escape(line)}")
        for check in step.checks:
            mark = "[green]ok[/]" if check.held else "[bold red]FAILED[/]"
            self.say(f"      {mark} {escape(check.claim)}")
