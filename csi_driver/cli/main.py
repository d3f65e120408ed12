# SPDX-License-Identifier: Apache-2.0
"""The command line: what each command is called, takes and says of itself. What it does is a module of its own."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from csi_driver import __version__
from csi_driver.cli import terminal
from csi_driver.cli.plan import FsType, PoolBackend

RUN, LOOK, COPY, SETTINGS = "Run", "Try and look", "Copy", "Settings"

app = typer.Typer(
    name="orlop",
    help="Orlop: storage for Kubernetes pods from what a cluster already has.",
    epilog=(
        "[bold]sudo orlop demo[/]               see it work, in seconds, on this machine\n\n"
        "[bold]orlop config check my.toml[/]    what a configuration means\n\n"
        "[bold]orlop COMMAND --help[/]          every command explains itself"
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    help="Look at a configuration before a driver does.", no_args_is_help=True, rich_markup_mode="rich"
)

Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="SOCKET",
        help="The driver's socket, like unix:///run/orlop/csi.sock (CSI_ENDPOINT, else where kubelet has it).",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The driver's configuration (ORLOP_CONFIG, else /etc/orlop/config.toml).",
        show_default=False,
    ),
]
KubeletDir = Annotated[Path, typer.Option(metavar="DIR", help="Where kubelet keeps its files.")]
Name = Annotated[str, typer.Argument(help="What the new volume is called; again, it is found.")]
Size = Annotated[str, typer.Option(metavar="SIZE", help="Like 20Gi; as its source if not given.")]
PoolName = Annotated[str, typer.Option(metavar="POOL", help="Another pool of the node than its source's.")]
Block = Annotated[bool, typer.Option("--block", help="The source is a raw block volume.")]
Parameter = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A parameter as in a StorageClass; may be repeated."),
]
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


@app.command(rich_help_panel=LOOK, epilog="Example: [bold]orlop demo --pool-backend btrfs[/]")
def demo(
    pool_backend: Annotated[
        PoolBackend, typer.Option(help="What the volumes are made of.")
    ] = PoolBackend.IMAGE,
    fs_type: Annotated[
        FsType | None,
        typer.Option(help="The volume's filesystem (image only; now ext4).", show_default=False),
    ] = None,
    directory: Annotated[Path, typer.Option(metavar="DIR", help="Where the scratch pool is made.")] = Path(
        "/var/tmp"
    ),
    keep: Annotated[
        bool, typer.Option("--keep", help="Wait for Enter before the volume is taken down.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Walk a real volume through its whole life (as root).

    A driver is started on a scratch pool. Every call, its time and what
    the kernel shows are printed; a crash of the driver is part of it.
    Nothing is left behind.

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


@app.command(rich_help_panel=LOOK, epilog="Example: [bold]orlop doctor --pool-root /data[/]")
def doctor(
    config: ConfigFile = None,
    pool_root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Look at a directory as a pool's root; may be repeated."),
    ] = None,
    endpoint: Endpoint = None,
    kubelet_dir: KubeletDir = Path("/var/lib/kubelet"),
    running: Annotated[
        bool, typer.Option("--running", help="A driver must be running here, and kubelet know it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine lacks, why it matters, what to do.

    Kernel, tools, kubelet's directory, the pools and what is in them, the
    driver's socket and its registration. No pool is changed or locked.

    Exit code: 0 all is well, 1 there are warnings, 2 something does not work.
    """
    from csi_driver.cli.doctor import doctor as run

    code = run(config, pool_root or [], endpoint, kubelet_dir, running=running, as_json=as_json)
    raise typer.Exit(code)


@app.command(rich_help_panel=LOOK, epilog="Example: [bold]orlop volumes --json | jq .volumes[].id[/]")
def volumes(endpoint: Endpoint = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the volumes: whose they are, how full, where mounted.

    The driver is asked; claims and names come from the records in its
    pools, which are read as they lie there. Without a driver, those are all.
    """
    from csi_driver.cli.volumes import volumes as run

    raise typer.Exit(run(endpoint, config, as_json=as_json))


@app.command(rich_help_panel=LOOK, epilog="Example: [bold]orlop snapshots --json | jq .snapshots[].id[/]")
def snapshots(endpoint: Endpoint = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the snapshots: of what, from when, and how far copies are.

    The driver is asked; whose the volumes are comes from the records in
    its pools.
    """
    from csi_driver.cli.snapshots import snapshots as run

    raise typer.Exit(run(endpoint, config, as_json=as_json))


@app.command(rich_help_panel=COPY, epilog="Example: [bold]orlop snapshot shop/database before-upgrade[/]")
def snapshot(
    volume: Annotated[str, typer.Argument(help="Its id, its claim (namespace/name) or its name.")],
    name: Annotated[str, typer.Argument(help="What to call it (its volume and the time).")] = "",
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a snapshot of a volume, and wait until it is ready.

    Kubernetes knows nothing of it: for a VolumeSnapshot, write one.
    The same name again finds the same snapshot.
    """
    from csi_driver.cli.copies import Place
    from csi_driver.cli.copies import snapshot as run

    raise typer.Exit(run(Place(endpoint, config, as_json), volume, name))


@app.command(rich_help_panel=COPY, epilog="Example: [bold]orlop restore before-upgrade yesterday[/]")
def restore(
    snapshot: Annotated[str, typer.Argument(help="Its name, or its id: `orlop snapshots` tells that.")],
    name: Name,
    size: Size = "",
    pool: PoolName = "",
    block: Block = False,
    parameter: Parameter = None,
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a volume of a snapshot, and wait until it is there.

    Kubernetes knows nothing of it until a PersistentVolume names its id.
    """
    from csi_driver.cli.copies import Place, Wanted
    from csi_driver.cli.copies import restore as run

    wanted = Wanted(name, size, pool, block, _parameters(parameter))
    raise typer.Exit(run(Place(endpoint, config, as_json), snapshot, wanted))


@app.command(rich_help_panel=COPY, epilog="Example: [bold]orlop clone shop/database try-it --size 20Gi[/]")
def clone(
    volume: Annotated[str, typer.Argument(help="Its id, its claim (namespace/name) or its name.")],
    name: Name,
    size: Size = "",
    pool: PoolName = "",
    block: Block = False,
    parameter: Parameter = None,
    endpoint: Endpoint = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a volume like another one, and wait until it is there.

    Kubernetes knows nothing of it until a PersistentVolume names its id.
    """
    from csi_driver.cli.copies import Place, Wanted
    from csi_driver.cli.copies import clone as run

    wanted = Wanted(name, size, pool, block, _parameters(parameter))
    raise typer.Exit(run(Place(endpoint, config, as_json), volume, wanted))


def _parameters(given: list[str] | None) -> dict[str, str]:
    wrong = next((one for one in given or () if "=" not in one), None)
    if wrong is not None:
        terminal.complain(f"--parameter {wrong!r}: write KEY=VALUE, like mode=0770")
        raise typer.Exit(1)
    return dict(one.split("=", 1) for one in given or ())


@config_app.command(epilog="Example: [bold]orlop config check orlop.toml[/]")
def check(
    file: Annotated[
        Path | None,
        typer.Argument(help="The file (ORLOP_CONFIG, else /etc/orlop/config.toml).", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a configuration as serve would; tell what it means, or what is wrong.

    Exit code: 0 good, 2 wrong.
    """
    from csi_driver.cli.settings import check as run
    from csi_driver.cli.settings import config_path

    raise typer.Exit(run(config_path(file), as_json=as_json))


@config_app.callback()
def _config() -> None:
    """Look at a configuration before a driver does."""


app.add_typer(config_app, name="config", rich_help_panel=SETTINGS)


@app.command(rich_help_panel=SETTINGS)
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    if as_json:
        terminal.write_json({"version": __version__})
    else:
        terminal.console().print(f"orlop {__version__}")


def main() -> None:
    """Every command but `serve`."""
    try:
        app(prog_name="orlop")
    except Exception:  # noqa: BLE001 - the last one there is
        # Python would say 1, which commands have a meaning for.
        traceback.print_exc()
        sys.exit(os.EX_SOFTWARE)
