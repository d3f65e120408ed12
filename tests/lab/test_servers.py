# SPDX-License-Identifier: Apache-2.0
"""The NFS servers that tests stand on: every protocol works, a cut or frozen one is dead, and comes back."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.disks import Disk, run
from tests.lab.hosts import GaneshaServer, Host, KernelServer, serving, wait_for

Server = KernelServer | GaneshaServer


@pytest.fixture(params=[KernelServer, GaneshaServer], ids=["nfsd", "ganesha"])
def server(request: pytest.FixtureRequest, make_disk: Callable[..., Disk]) -> Iterator[Server]:
    with serving(request.param(make_disk("xfs", size="320M").target)) as made:
        yield made


@pytest.fixture
def client() -> Iterator[Host]:
    host = Host()
    yield host
    host.remove()


def mount(server: Server, target: Path, version: str) -> None:
    # NFSv3 knows no root of its own for exports: nfsd wants the path in the server's tree there.
    path = "/export/share" if version == "3" and isinstance(server, KernelServer) else "/share"
    options = f"vers={version}" + (",nolock" if version == "3" else "")
    target.mkdir(exist_ok=True)
    run("mount", "-t", "nfs", "-o", options, f"{server.address}:{path}", target)


def is_dead(target: Path) -> bool:
    # stat(1) with a deadline that SIGKILL keeps: a process that waits for a server obeys no other signal.
    words = ["timeout", "-s", "KILL", "2", "stat", "-f", str(target)]
    return subprocess.run(words, capture_output=True, check=False).returncode != 0


def test_every_protocol_reads_what_it_wrote(server: Server, tmp_path: Path) -> None:
    for version in ("3", "4.0", "4.1", "4.2"):
        mount(server, tmp_path / "m", version)
        (tmp_path / "m/file").write_text(version)
        assert (server.export / "share/file").read_text() == version
        run("umount", tmp_path / "m")


def test_two_machines_see_each_other_s_files(server: Server, client: Host, tmp_path: Path) -> None:
    mount(server, tmp_path / "m", "4.2")
    (tmp_path / "m/file").write_text("hello")

    client.run("mkdir", "-p", "/run/m")
    client.run("mount", "-t", "nfs", f"{server.address}:/share", "/run/m")

    assert client.run("cat", "/run/m/file") == "hello"
    client.run("umount", "/run/m")
    run("umount", tmp_path / "m")


def test_a_cut_server_is_dead_until_its_cable_is_mended(server: Server, tmp_path: Path) -> None:
    mount(server, tmp_path / "m", "4.2")

    server.cut()
    assert is_dead(tmp_path / "m")
    server.mend()
    wait_for(lambda: not is_dead(tmp_path / "m"), 60)
    run("umount", tmp_path / "m")
