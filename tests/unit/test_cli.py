# SPDX-License-Identifier: Apache-2.0
"""The commands that need neither root nor a kernel's help, run as a user runs them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from csi_driver import __version__
from csi_driver.cli import words
from csi_driver.cli.main import app
from csi_driver.cli.plan import FsType, PoolBackend, plan_for
from tests.conftest import require_tool

IMAGE_POOL = '[pools.fast]\nroot = "/srv/fast"\n'


# What is around the tests must not choose their files and sockets.
runner = CliRunner(env={"ORLOP_CONFIG": None, "CSI_ENDPOINT": None})


def orlop(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return runner.invoke(app, [str(argument) for argument in arguments], prog_name="orlop")


def process(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command as its own process, through the entry point that `orlop` is."""
    argv = [*prefix, sys.executable, "-m", "csi_driver", *arguments]
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_help_names_every_command() -> None:
    done = orlop("--help")

    assert done.exit_code == 0
    for command in (
        "serve",
        "demo",
        "doctor",
        "volumes",
        "snapshots",
        "snapshot",
        "restore",
        "clone",
        "config",
        "version",
    ):
        assert f" {command} " in done.stdout


def test_without_a_command_help_is_shown() -> None:
    assert "Usage: orlop" in process().stdout


@pytest.mark.parametrize(
    "command",
    ["demo", "doctor", "volumes", "snapshots", "snapshot", "restore", "clone", "version", "config check"],
)
def test_every_command_offers_json_and_explains_itself(command: str) -> None:
    done = orlop(*command.split(), "--help")

    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_serve_help_is_that_of_serve() -> None:
    done = process("serve", "--help")

    assert done.returncode == 0
    assert "--endpoint" in done.stdout


def test_version_is_told() -> None:
    assert orlop("version").stdout == f"orlop {__version__}\n"
    assert json.loads(orlop("version", "--json").stdout) == {"version": __version__}


def test_config_check_tells_what_a_configuration_means(tmp_path: Path) -> None:
    file = written(
        tmp_path / "good.toml", IMAGE_POOL + 'classes = ["ssd"]\nretention = "36h"\nreserved = "1Gi"\n'
    )

    done = orlop("config", "check", file)

    assert done.exit_code == 0
    for expected in ("fast *", "image", "/srv/fast", "enforced", "1 GiB", "36 h", "ssd"):
        assert expected in done.stdout


def test_config_check_as_json_says_which_pool_takes_what_names_none(tmp_path: Path) -> None:
    loose = '[pools.loose]\nbackend = "directory"\nroot = "/srv/loose"\nenforce_capacity = false\n'
    file = written(tmp_path / "two.toml", IMAGE_POOL + loose)

    document = json.loads(orlop("config", "check", "--json", file).stdout)

    assert document["ok"] is True
    pools = {pool["name"]: pool for pool in document["pools"]}
    assert (pools["fast"]["is_default"], pools["fast"]["enforces_capacity"]) == (True, True)
    assert (pools["loose"]["is_default"], pools["loose"]["enforces_capacity"]) == (False, False)


def test_config_check_tells_where_a_managed_pools_filesystem_lies(tmp_path: Path) -> None:
    backing = 'backing = { file = "/data/fast.img", size = "50Gi" }\n'
    file = written(tmp_path / "good.toml", IMAGE_POOL + backing)

    document = json.loads(orlop("config", "check", "--json", file).stdout)

    assert "xfs of 50 GiB in" in orlop("config", "check", file).stdout
    assert document["pools"][0]["backing"] == {
        "file": "/data/fast.img",
        "filesystem": "xfs",
        "size_bytes": 50 << 30,
        "preallocate": False,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (IMAGE_POOL + "reservd = 1\n", "unknown key 'reservd'"),
        (IMAGE_POOL + 'backend = "zfs"\n', "backend 'zfs': no such backend"),
        (IMAGE_POOL + "overcommit = 0.5\n", "overcommit 0.5: give a number from 1 to 1000"),
        (IMAGE_POOL + "overcommit = nan\n", "overcommit nan: give a number"),
        (IMAGE_POOL + "overcommit = 1e9\n", "overcommit 1000000000.0: give a number"),
        ('[pools.Fast]\nroot = "/srv/fast"\n', "[pools.Fast]"),
        ("", "no pool is configured"),
    ],
)
def test_config_check_says_the_one_thing_that_is_wrong(tmp_path: Path, text: str, expected: str) -> None:
    file = written(tmp_path / "bad.toml", text)

    done = orlop("config", "check", file)

    assert done.exit_code == 2
    assert expected in done.stderr
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr


def test_config_check_of_a_missing_file_says_so_as_json(tmp_path: Path) -> None:
    done = orlop("config", "check", "--json", tmp_path / "none.toml")

    assert done.exit_code == 2
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert "cannot be read" in document["error"]


def test_volumes_without_driver_and_configuration_fails_with_a_sentence(tmp_path: Path) -> None:
    done = orlop("volumes", "--endpoint", f"unix://{tmp_path}/none.sock")

    assert done.exit_code == 1
    assert "nobody answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_refuses_a_filesystem_that_the_backend_has_not() -> None:
    done = orlop("demo", "--pool-backend", "btrfs", "--fs-type", "xfs")

    assert done.exit_code == 2
    assert "leave --fs-type out" in done.stderr


def test_demo_without_root_says_that_it_needs_it() -> None:
    # In a user namespace without a mapping, root is nobody.
    require_tool("unshare")
    nobody = ["unshare", "--user"] if os.geteuid() == 0 else []

    done = process("demo", prefix=nobody)

    assert done.returncode == 2
    assert "run it as root" in done.stderr


def test_plans_keep_to_what_filesystems_can_be() -> None:
    assert plan_for(PoolBackend.IMAGE, FsType.XFS).size_bytes >= 300 << 20
    assert plan_for(PoolBackend.IMAGE, None).fs_type == "ext4"
    assert not plan_for(PoolBackend.DIRECTORY, None).enforces


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        (5 << 40, "5 TiB"),
    ],
)
def test_sizes_are_told_in_the_unit_that_fits(number: int, text: str) -> None:
    assert words.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (90, "90 s"), (900, "15 min"), (129600, "36 h"), (604800, "7 d")]
)
def test_durations_are_told_in_the_unit_that_says_them_exactly(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_doctor_takes_a_missing_driver_for_an_error_where_one_must_be(tmp_path: Path) -> None:
    nobody = ("--endpoint", tmp_path / "csi.sock", "--kubelet-dir", tmp_path, "--json")
    levels = {}
    for running in ((), ("--running",)):
        findings = json.loads(orlop("doctor", *nobody, *running).stdout)["findings"]
        levels[running] = {one["what"].partition(":")[0]: one["level"] for one in findings}

    registry = str(tmp_path / "plugins_registry")
    assert levels[()][registry] == "warning"
    assert levels["--running",][registry] == "error"
    missing = [one for one in findings if one["area"] == "driver"]
    assert [one["level"] for one in missing] == ["error"]


def test_what_no_command_expected_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    code = "import csi_driver.cli.main as m; m.terminal = None; m.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "version"], capture_output=True, text=True, check=False
    )

    assert done.returncode == os.EX_SOFTWARE
    assert "Traceback" in done.stderr
