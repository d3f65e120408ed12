# SPDX-License-Identifier: Apache-2.0
"""Volumes on real NFS servers: published by any protocol, and what happens to them and to others when a server dies."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from csi_driver.health import Health
from csi_driver.linux import mount
from csi_driver.linux.exports import Exports
from csi_driver.linux.remote import Servers
from csi_driver.locks import Locks
from csi_driver.model import AccessMode, AccessType, Capability, HealthStatus, NodeInfo, PublishRequest
from csi_driver.node import Node
from csi_driver.pools import Pools
from tests.lab.disks import Disk, run
from tests.lab.hosts import GaneshaServer, Host, KernelServer, processes, wait_for

T = TypeVar("T")
TIMEOUT_S = 12.0
AnyServer = KernelServer | GaneshaServer


@pytest.fixture
def start(make_disk: Callable[..., Disk]) -> Iterator[Callable[[type[AnyServer]], AnyServer]]:
    """Start a server of a kind on a disk of its own, with an export /share; gone with the test."""
    started: list[AnyServer] = []

    def make(kind: type[AnyServer]) -> AnyServer:
        disk = make_disk("xfs", size="320M")
        (disk.target / "share/v1").mkdir(parents=True)
        (disk.target / "share/v2").mkdir()
        server = kind(disk.target)
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.remove()


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[Exports]:
    servers = Servers()
    made = Exports(tmp_path / "exports", servers, TIMEOUT_S)
    yield made
    servers.close()
    for entry in reversed(mount.mounts()):
        if Path(entry.target).is_relative_to(tmp_path) and entry.fs_type.startswith("nfs"):
            run("umount", "-l", entry.target)
    # Children that a dead server held end with it.
    wait_for(lambda: not any(breaker.left_behind() for breaker in servers.all()), 180)


@pytest.fixture
def restarted(exports: Exports) -> Iterator[Exports]:
    """The same, of a driver that knows of nothing yet."""
    servers = Servers()
    yield Exports(exports.directory, servers, TIMEOUT_S)
    servers.close()


@pytest.fixture
def node(exports: Exports) -> Node:
    pools = Pools({})
    return Node(pools, Locks(), Health(pools), NodeInfo("node-1", 0, {}), exports)


def request(
    server: Host,
    target: Path,
    *flags: str,
    path: str = "/share",
    directory: str = "v1",
    mode: AccessMode = AccessMode.MULTI_NODE_MULTI_WRITER,
    readonly: bool = False,
    **attributes: str,
) -> PublishRequest:
    capability = Capability(AccessType.MOUNT, mode, mount_flags=flags)
    context = {"server": server.address, "path": path, "directory": directory, **attributes}
    return PublishRequest(f"pv-{target.name}", str(target), capability, readonly=readonly, context=context)


def timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def bases(exports: Exports) -> list[str]:
    return [entry.target for entry in mount.mounts() if Path(entry.target).parent == exports.directory]


@pytest.mark.parametrize("version", ["3", "4.0", "4.1", "4.2"])
@pytest.mark.parametrize("kind", [KernelServer, GaneshaServer])
def test_a_directory_of_an_export_is_published(
    kind: type[AnyServer], version: str, start: Callable[..., AnyServer], node: Node, tmp_path: Path
) -> None:
    server = start(kind)
    flags = [f"vers={version}", *(["nolock"] if version == "3" else [])]
    # NFSv3 knows no root of its own for exports: nfsd wants the path in the server's tree there.
    path = "/export/share" if version == "3" and kind is KernelServer else "/share"
    asked = request(server, tmp_path / "t", *flags, path=path)

    node.publish(asked)
    node.publish(asked)

    (tmp_path / "t/file").write_text("hello")
    shown = next(entry for entry in mount.mounts() if entry.target == str(tmp_path / "t"))
    assert f"vers={version}" in shown.super_options
    told = node.stats("pv-t", str(tmp_path / "t"))
    assert 0 < told.available_bytes < told.total_bytes
    node.unpublish("pv-t", str(tmp_path / "t"))
    node.unpublish("pv-t", str(tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_volumes_of_an_export_share_its_mount_until_the_last_one_is_gone(
    start: Callable[..., AnyServer], node: Node, exports: Exports, tmp_path: Path
) -> None:
    server = start(KernelServer)

    node.publish(request(server, tmp_path / "one"))
    node.publish(request(server, tmp_path / "two", directory="v2"))
    assert len(bases(exports)) == 1
    (tmp_path / "one/file").write_text("of v1")
    assert not os.listdir(tmp_path / "two")

    node.unpublish("pv-one", str(tmp_path / "one"))
    assert len(bases(exports)) == 1
    node.unpublish("pv-two", str(tmp_path / "two"))
    wait_for(lambda: released(exports, 0), 60)
    assert not any(entry.fs_type.startswith("nfs") for entry in mount.mounts())


def test_what_is_published_is_kept_to(start: Callable[..., AnyServer], node: Node, tmp_path: Path) -> None:
    server = start(KernelServer)
    node.publish(request(server, tmp_path / "ro", readonly=True))
    node.publish(request(server, tmp_path / "rw"))

    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "ro/file").write_text("no")
    (tmp_path / "rw/file").write_text("yes")
    with pytest.raises(AlreadyExists):
        node.publish(request(server, tmp_path / "ro"))
    with pytest.raises(AlreadyExists):
        node.publish(request(server, tmp_path / "rw", directory="v2"))
    with pytest.raises(FailedPrecondition):
        node.publish(request(server, tmp_path / "third", mode=AccessMode.SINGLE_NODE_SINGLE_WRITER))
    node.publish(
        request(server, tmp_path / "alone", directory="v2", mode=AccessMode.SINGLE_NODE_SINGLE_WRITER)
    )
    with pytest.raises(NotFound):
        node.publish(request(server, tmp_path / "none", directory="missing"))
    with pytest.raises(InvalidArgument):
        node.publish(request(server, tmp_path / "bad", path="/share/../etc"))
    node.publish(request(server, tmp_path / "sub", subPath="a/b"))
    assert (tmp_path / "rw/a/b").is_dir()


def test_a_symlink_on_the_export_does_not_lead_out_of_it(
    start: Callable[..., AnyServer], node: Node, tmp_path: Path
) -> None:
    server = start(KernelServer)
    node.publish(request(server, tmp_path / "one"))
    os.symlink("/etc", tmp_path / "one/out")

    with pytest.raises(OSError, match="symbolic"):
        node.publish(request(server, tmp_path / "two", directory="v1/out"))
    with pytest.raises(OSError):
        node.publish(request(server, tmp_path / "two", directory="../.."))


@pytest.mark.parametrize("how", ["frozen", "killed", "cut"])
def test_a_dead_server_harms_only_its_own_volumes(
    how: str,
    start: Callable[..., AnyServer],
    node: Node,
    exports: Exports,
    restarted: Exports,
    tmp_path: Path,
) -> None:
    dead, well = start(GaneshaServer), start(GaneshaServer)
    assert isinstance(dead, GaneshaServer)
    for server, name in ((dead, "dead"), (well, "well")):
        node.publish(request(server, tmp_path / name))
    usual = timed(lambda: node.stats("pv-well", str(tmp_path / "well")))

    {"frozen": dead.freeze, "killed": dead.stop, "cut": dead.cut}[how]()
    with pytest.raises(Unavailable):
        node.stats("pv-dead", str(tmp_path / "dead"))
    before = processes()
    beside: list[float] = []
    threads, began = threading.active_count(), time.monotonic()
    for number in range(200):
        with pytest.raises(Unavailable):
            if number % 3:
                node.stats("pv-dead", str(tmp_path / "dead"))
            else:
                node.publish(request(dead, tmp_path / "new"))
        if number % 20 == 0:
            beside.append(timed(lambda: again(lambda: node.stats("pv-well", str(tmp_path / "well")))))
    # Not each: a busy machine may hold any of them up.
    assert sorted(beside)[len(beside) // 2] < usual + TIMEOUT_S / 2
    # At once but for a few tries in between.
    assert time.monotonic() - began < 40 * TIMEOUT_S
    wait_for(lambda: processes() <= before + 5, 60)
    assert threading.active_count() == threads
    (entry,) = node.volume_health("pv-dead", str(tmp_path / "dead"))
    assert (entry.status, entry.reason) == (HealthStatus.INACCESSIBLE, "ServerUnreachable")
    wait_for(lambda: node.volume_health("pv-well", str(tmp_path / "well")) == [], 120)
    with pytest.raises(Unavailable):
        node.publish(request(dead, tmp_path / "new"))
    published_again(node, request(well, tmp_path / "new"))

    # Its pods can end, the last one included; the driver may have been restarted meanwhile.
    if how == "cut":
        node = Node(Pools({}), Locks(), Health(Pools({})), NodeInfo("node-1", 0, {}), restarted)
    took = timed(lambda: again(lambda: node.unpublish("pv-dead", str(tmp_path / "dead"))))
    assert took < 10 * TIMEOUT_S
    assert not (tmp_path / "dead").exists()
    wait_for(lambda: released(restarted if how == "cut" else exports, 1), 60)

    {"frozen": dead.thaw, "killed": dead.restart, "cut": dead.mend}[how]()
    published_again(node, request(dead, tmp_path / "again"))
    assert os.listdir(tmp_path / "again") == []


def again(call: Callable[[], T]) -> T:
    """As kubelet does: repeat until it works."""
    for _ in range(300):
        try:
            return call()
        except Unavailable:
            time.sleep(1)
    raise AssertionError("the server is back, its volumes are not")


def released(exports: Exports, left: int) -> bool:
    """Whether so many exports are mounted yet. One that could not be let go in time is left to the next call."""
    exports.release_unused()
    return len(bases(exports)) == left


def published_again(node: Node, asked: PublishRequest) -> None:
    again(lambda: node.publish(asked))


def test_a_volume_waits_for_its_server_and_goes_on(
    start: Callable[..., AnyServer], node: Node, tmp_path: Path
) -> None:
    server = start(GaneshaServer)
    assert isinstance(server, GaneshaServer)
    node.publish(request(server, tmp_path / "t"))
    (tmp_path / "t/file").write_text("before")

    server.freeze()
    with pytest.raises(Unavailable):
        node.stats("pv-t", str(tmp_path / "t"))
    server.thaw()

    assert again(lambda: node.stats("pv-t", str(tmp_path / "t"))).total_bytes > 0
    assert (tmp_path / "t/file").read_text() == "before"


def test_a_restarted_server_that_knows_its_files_goes_unnoticed(
    start: Callable[..., AnyServer], node: Node, tmp_path: Path
) -> None:
    server = start(KernelServer)
    assert isinstance(server, KernelServer)
    node.publish(request(server, tmp_path / "t"))
    with open(tmp_path / "t/file", "w") as file:
        file.write("before ")
        file.flush()
        server.stop()
        server.restart()
        file.write("after")

    assert (tmp_path / "t/file").read_text() == "before after"
    node.publish(request(server, tmp_path / "t"))
    published_again(node, request(server, tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == ["file"]


def test_wrong_options_are_the_callers_and_no_server_s_fault(
    start: Callable[..., AnyServer], node: Node, tmp_path: Path
) -> None:
    server = start(KernelServer)

    with pytest.raises(InvalidArgument, match="nosuchoption"):
        node.publish(request(server, tmp_path / "t", "nosuchoption"))
    published_again(node, request(server, tmp_path / "t"))


def test_an_export_whose_handles_changed_is_mounted_anew(
    start: Callable[..., AnyServer], node: Node, make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    server = start(KernelServer)
    assert isinstance(server, KernelServer)
    node.publish(request(server, tmp_path / "old"))
    other = make_disk("xfs", size="320M")
    (other.target / "share/v1").mkdir(parents=True)
    (other.target / "share/v1/new").touch()

    server.replace_export(other.target)
    with pytest.raises(OSError, match="Stale"):
        os.listdir(tmp_path / "old")

    node.publish(request(server, tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == ["new"]
    node.publish(request(server, tmp_path / "old"))
    assert os.listdir(tmp_path / "old") == ["new"]


def test_a_stale_volume_can_be_unpublished(
    start: Callable[..., AnyServer], node: Node, make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    server = start(KernelServer)
    assert isinstance(server, KernelServer)
    node.publish(request(server, tmp_path / "old"))
    server.replace_export(make_disk("xfs", size="320M").target)

    again(lambda: node.unpublish("pv-old", str(tmp_path / "old")))

    assert not (tmp_path / "old").exists()


def test_a_pod_that_a_dead_server_holds_does_not_hold_its_volume(
    start: Callable[..., AnyServer], node: Node, exports: Exports, tmp_path: Path
) -> None:
    server = start(GaneshaServer)
    node.publish(request(server, tmp_path / "t"))
    script = f"exec 3>{tmp_path}/t/file; head -c 1000000 /dev/zero >&3; echo written; exec sleep 1000"
    pod = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    assert pod.stdout is not None
    pod.stdout.readline()

    server.cut()
    pod.kill()
    again(lambda: node.unpublish("pv-t", str(tmp_path / "t")))
    assert not (tmp_path / "t").exists()

    # What it had not written yet is not lost with the mount.
    server.mend()
    pod.wait(400)
    pod.stdout.close()
    published_again(node, request(server, tmp_path / "t"))
    assert (tmp_path / "t/file").stat().st_size == 1_000_000
