# SPDX-License-Identifier: Apache-2.0
"""`orlop demo`: a real driver on a scratch pool, walked through a volume's life, and everything taken away again.

The steps themselves are `walk`'s. This module sees that nothing outlives the command, however it ends.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.markup import escape

from csi_driver.cli import terminal
from csi_driver.cli.client import CallFailed
from csi_driver.cli.driver import Driver, DriverFailed, driver
from csi_driver.cli.plan import Plan
from csi_driver.cli.scratch import Scratch, missing_room, scratch
from csi_driver.cli.steps import Report, Step
from csi_driver.cli.walk import Walk
from csi_driver.linux import loop, namespace
from csi_driver.linux.run import CommandError

HELD, FAILED, IMPOSSIBLE = 0, 1, 2
"""Exit codes: every check held; one did not, or a call failed; it cannot be tried on this machine."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Somebody wants the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def demo(plan: Plan, place: Path, *, keep: bool, as_json: bool) -> int:
    """Run it; returns the exit code."""
    reason = _impossible(place)
    if reason:
        terminal.complain(reason)
        return IMPOSSIBLE
    report = Report(terminal.console(), as_json=as_json)
    exit_code = _walk(report, plan, place, keep=keep)
    if as_json:
        terminal.write_json({"backend": plan.backend, "fs_type": plan.fs_type} | report.document())
    elif report.ok:
        checks = sum(len(step.checks) for step in report.steps)
        report.say(f"\n[bold green]All {checks} checks held.[/]")
    else:
        report.say(f"\n[bold red]{escape(report.failure or 'Not every check held: see FAILED above.')}[/]")
    return exit_code


def _walk(report: Report, plan: Plan, place: Path, *, keep: bool) -> int:
    try:
        # Other namespaces that begin meanwhile (containers) copy the mounts they see, and would hold the pool.
        namespace.own_mounts()
        with _deaf_at_the_end(), scratch(plan.pool_fs_type, place) as pool, driver(pool) as process:
            _introduce(report, plan, pool)
            try:
                Walk(report, pool, plan, process).run(_pause(report, pool) if keep else _no_pause)
            except (CallFailed, DriverFailed, OSError) as error:
                _explain(report, process)
                raise DriverFailed(str(error)) from error
        _see_that_nothing_is_left(report, pool)
    except Interrupted as error:
        report.failure = str(error)
        return error.exit_code
    except (DriverFailed, CommandError, OSError) as error:
        report.failure = str(error)
    return HELD if report.ok else FAILED


def _introduce(report: Report, plan: Plan, pool: Scratch) -> None:
    pool.config.write_text(plan.config(pool.pool))
    report.say(
        "[bold]Orlop demo[/]: a volume's whole life, as a client of the driver sees it, and as the kernel does."
    )
    report.say(
        f"A pool of backend [bold]{plan.backend}[/] on a scratch {plan.pool_fs_type} filesystem, in {pool.root}"
        " (paths below start there); the driver is a child of this command. All of it goes at the end."
    )


def _explain(report: Report, process: Driver) -> None:
    report.log_tail = process.log_tail()
    report.say("\n[bold]The end of the driver's log:[/]")
    for line in report.log_tail:
        report.say(f"  {escape(line)}")


def _see_that_nothing_is_left(report: Report, pool: Scratch) -> None:
    step = Step("The scratch pool is taken away")
    step.check(f"{pool.root} is gone, and nothing of it is mounted or attached", pool.gone())
    report.add(step)


def _no_pause(_target: Path) -> None:
    return None


def _pause(report: Report, pool: Scratch) -> Callable[[Path], None]:
    def pause(target: Path) -> None:
        report.say(
            "\n[bold]Kept for you to look at[/], until you press Enter here. In another terminal, as root:"
        )
        report.say(f"    nsenter --target {os.getpid()} --mount bash    # the demo's mounts are its own")
        report.say(f"    ls -l {target}; findmnt | grep {pool.root.name}; less {pool.log}")
        report.say(f"    orlop volumes --endpoint unix://{pool.socket} --config {pool.config}")
        sys.stdin.readline()

    return pause


@contextmanager
def _deaf_at_the_end() -> Iterator[None]:
    """Signals end the body by an exception, once: nothing interrupts what takes everything down."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _impossible(place: Path) -> str:
    if os.geteuid() != 0:
        return "the demo mounts filesystems and makes loop devices: run it as root (sudo orlop demo)"
    return loop.available() or missing_room(place)
