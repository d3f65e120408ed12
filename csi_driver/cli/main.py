# SPDX-License-Identifier: Apache-2.0
"""The command line: what each command is called, takes and says of itself. What it does is a module of its own."""

from pathlib import Path
from typing import Annotated

import typer

from csi_driver import __version__
from csi_driver.cli import terminal
from csi_driver.cli.plan import FsType, PoolBackend

RUN, LOOK, SETTINGS = "Run", "Try and look", "Settings"

app = typer.Typer(
    name="orlop",
    help="Orlop: storage for Kubernetes pods from what a cluster already has.",
    epilog="Start with: [bold]orlop demo[/] (as root), [bold]orlop doctor[/], [bold]orlop COMMAND --help[/]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


@app.command(
    rich_help_panel=RUN,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(context: typer.Context) -> None:
    """Run the driver: answer CSI calls on a unix socket."""
    # `orlop serve` itself never comes here: `__main__` takes it before anything of this package is loaded.
    from csi_driver.app import serve as run

    raise typer.Exit(run(context.args))


@app.command(rich_help_panel=LOOK)
def demo(
    pool_backend: Annotated[
        PoolBackend, typer.Option(help="What the volumes are made of.")
    ] = PoolBackend.IMAGE,
    fs_type: Annotated[
        FsType | None,
        typer.Option(help="The volume's filesystem (image only; ext4 if not given).", show_default=False),
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where the scratch pool is made.")] = Path("/var/tmp"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Wait for Enter before the volume is taken down.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Walk a real volume through its whole life on this machine (as root).

    A driver is started on a scratch pool. Every call, its time and what the kernel shows are printed; a crash of the
    driver is part of it. Nothing is left behind.

    Exit code: 0 every check held, 1 one did not, 2 not possible here.
    """
    from csi_driver.cli.demo import IMPOSSIBLE
    from csi_driver.cli.demo import demo as run
    from csi_driver.cli.plan import plan_for

    try:
        plan = plan_for(pool_backend, fs_type)
    except ValueError as error:
        terminal.complain(str(error))
        raise typer.Exit(IMPOSSIBLE) from error
    raise typer.Exit(run(plan, directory.resolve(), keep=keep, as_json=as_json))


@app.command(rich_help_panel=SETTINGS)
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    if as_json:
        terminal.write_json({"version": __version__})
    else:
        terminal.console().print(f"orlop {__version__}")


def main() -> None:
    """Every command but `serve`."""
    app()
