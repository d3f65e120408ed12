# SPDX-License-Identifier: Apache-2.0
"""`orlop doctor`: looks at all that a driver needs, and says of each thing what is wrong, why it matters, what to do."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from csi_driver.cli import settings, terminal
from csi_driver.cli.doctor.driver import look_at_driver, look_at_kubelet
from csi_driver.cli.doctor.finding import Finding, Level, error, ok, warning
from csi_driver.cli.doctor.machine import look_at_kernel, look_at_loops, look_at_tools
from csi_driver.cli.doctor.pools import look_at_directory, look_at_pool
from csi_driver.config import DRIVER_NAME, Config
from csi_driver.errors import ConfigurationError

CONFIGURATION = "configuration"
EXIT_CODES = {Level.OK: 0, Level.WARNING: 1, Level.ERROR: 2}
_MARKS = {Level.OK: "[green]ok[/]", Level.WARNING: "[yellow]warning[/]", Level.ERROR: "[bold red]error[/]"}


def doctor(
    config_path: Path | None,
    pool_roots: list[Path],
    endpoint: str | None,
    kubelet_dir: Path,
    *,
    running: bool,
    as_json: bool,
) -> int:
    """Look at everything; returns the exit code, which is that of the worst finding. `running`: that a driver must be."""
    findings: list[Finding] = []
    shown = ""
    for finding in _look(config_path, pool_roots, endpoint, kubelet_dir, running=running):
        findings.append(finding)
        if not as_json:
            shown = _show(finding, shown)
    worst = max(findings, key=lambda finding: EXIT_CODES[finding.level]).level
    if as_json:
        terminal.write_json({"verdict": worst, "findings": [asdict(finding) for finding in findings]})
    else:
        _summarise(findings)
    return EXIT_CODES[worst]


def _look(
    config_path: Path | None,
    pool_roots: list[Path],
    endpoint: str | None,
    kubelet_dir: Path,
    *,
    running: bool,
) -> Iterator[Finding]:
    yield from look_at_kernel()
    yield from look_at_loops()
    yield from look_at_tools()
    config, finding = _configuration(config_path, bool(pool_roots))
    yield finding
    for pool in config.pools.values() if config else ():
        yield from look_at_pool(pool)
    for root in pool_roots:
        yield from look_at_directory(f"root {root}", root)
    yield from look_at_driver(settings.endpoint_of(endpoint, config, kubelet_dir), expected=running)
    yield from look_at_kubelet(kubelet_dir, config.driver_name if config else DRIVER_NAME, expected=running)


def _configuration(path: Path | None, has_roots: bool) -> tuple[Config | None, Finding]:
    name = settings.config_path(path)
    try:
        config = settings.find_config(path)
    except ConfigurationError as failure:
        return None, error(CONFIGURATION, str(failure), "the driver does not start with it", "correct it")
    if config is not None:
        return config, ok(
            CONFIGURATION, f"{name}: driver {config.driver_name}, pools {', '.join(config.pools)}"
        )
    if has_roots:
        return None, ok(CONFIGURATION, f"{name}: not there")
    return None, warning(
        CONFIGURATION,
        f"{name}: not there",
        "no pool could be looked at",
        "name it with --config, or a directory with --pool-root",
    )


def _show(finding: Finding, shown: str) -> str:
    """Print it, beneath its area's heading; the area shown last."""
    console = terminal.console()
    if finding.area != shown:
        console.print(f"\n[bold]{escape(finding.area)}[/]" if shown else f"[bold]{escape(finding.area)}[/]")
    console.print(f"  {_MARKS[finding.level]} {escape(finding.what)}")
    for heading, text in (("why it matters", finding.why), ("what to do", finding.remedy)):
        if text:
            console.print(f"      [dim]{heading}:[/] {escape(text)}")
    return finding.area


def _summarise(findings: list[Finding]) -> None:
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    console = terminal.console()
    if not counts[Level.WARNING] and not counts[Level.ERROR]:
        console.print("\n[bold green]All is well.[/]")
        return
    console.print(f"\n[bold]{counts[Level.ERROR]} errors, {counts[Level.WARNING]} warnings.[/]")
