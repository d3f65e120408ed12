# SPDX-License-Identifier: Apache-2.0
"""Static volumes on servers, over the wire: an administrator's own PersistentVolumes, of which nothing is made or changed."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from tests.lab.disks import Disk, run
from tests.lab.drivers import Driver
from tests.lab.hosts import Host, KernelServer, serving

Mode = pb.VolumeCapability.AccessMode.Mode
SHARE = {"path": "/share"}
PHOTOS = {"path": "/share/photos"}
CONFIG = 'scope = "shared"\n'


@pytest.fixture
def server(make_disk: Callable[..., Disk]) -> Iterator[KernelServer]:
    made = KernelServer(make_disk("xfs", size="320M").target)
    photos = made.export / "share/photos"
    (photos / "2026").mkdir(parents=True)
    os.chown(photos, 33, 44)
    os.chmod(photos, 0o2750)
    (photos / "2026/one.jpg").write_text("one")
    os.chmod(photos / "2026/one.jpg", 0o640)
    with serving(made):
        yield made


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver("here", tmp_path, CONFIG, "node")
    yield driver
    driver.end()
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split()[2].startswith("nfs"):
            run("umount", "-l", line.split()[1])


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Host]:
    host = Host()
    yield host
    host.remove()


def request(
    server: KernelServer | str,
    target: Path,
    attributes: Mapping[str, str],
    *flags: str,
    handle: str = "team-photos",
    mode: "Mode.ValueType" = Mode.MULTI_NODE_MULTI_WRITER,
    readonly: bool = False,
) -> pb.NodePublishVolumeRequest:
    capability = pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(mount_flags=flags),
        access_mode=pb.VolumeCapability.AccessMode(mode=mode),
    )
    address = server if isinstance(server, str) else server.address
    return pb.NodePublishVolumeRequest(
        volume_id=handle,
        target_path=str(target),
        volume_capability=capability,
        readonly=readonly,
        volume_context={"server": address, **attributes},
    )


def publish(driver: Driver, asked: pb.NodePublishVolumeRequest) -> None:
    driver.node.NodePublishVolume(asked, timeout=60)


def unpublish(driver: Driver, asked: pb.NodePublishVolumeRequest) -> None:
    driver.node.NodeUnpublishVolume(
        pb.NodeUnpublishVolumeRequest(volume_id=asked.volume_id, target_path=asked.target_path), timeout=60
    )


def tree(directory: Path) -> dict[str, tuple[int, ...]]:
    """All that is on the server, with what a chmod, chown or write would change."""
    found: dict[str, tuple[int, ...]] = {}
    for path in (directory, *sorted(directory.rglob("*"))):
        known = path.lstat()
        changed = 0 if stat.S_ISREG(known.st_mode) else known.st_mtime_ns
        found[os.fspath(path)] = (
            known.st_mode,
            known.st_uid,
            known.st_gid,
            known.st_size,
            changed,
            known.st_ctime_ns,
        )
    return found


def test_any_handle_and_either_name_of_the_path_lead_there_and_nothing_is_changed(
    server: KernelServer, here: Driver, tmp_path: Path
) -> None:
    before = tree(server.export)
    long = "Ünïcode handle, as long as they get " + "x" * 90
    asked = [
        request(server, tmp_path / "a", PHOTOS, handle="server#/export/share##"),
        request(server, tmp_path / "b", {"share": "/share/photos"}, handle=long),
        request(
            server,
            tmp_path / "c",
            {"path": "/share", "directory": "photos"},
            *("nfsvers=4.1", "noatime"),
            handle="c",
        ),
        request(server, tmp_path / "d", {**PHOTOS, "subPath": "2026"}, handle="d"),
        request(server, tmp_path / "e", PHOTOS, handle="e", readonly=True),
        request(server, tmp_path / "f", PHOTOS, handle="f", mode=Mode.MULTI_NODE_READER_ONLY),
    ]
    for one in asked:
        publish(here, one)
        publish(here, one)

    for name in "abcef":
        assert (tmp_path / name / "2026/one.jpg").read_text() == "one"
    assert (tmp_path / "d/one.jpg").read_text() == "one"
    options = run("findmnt", "-n", "-o", "OPTIONS", tmp_path / "c").split(",")
    assert "noatime" in options and any(one.strip() == "vers=4.1" for one in options)
    for one in asked:
        unpublish(here, one)
        unpublish(here, one)
        assert not Path(one.target_path).exists()
    assert tree(server.export) == before


@pytest.mark.parametrize("how", ["mode", "flag", "option"])
def test_read_only_is_really_read_only_and_others_may_write(
    how: str, server: KernelServer, here: Driver, tmp_path: Path
) -> None:
    asked = {
        "mode": request(server, tmp_path / "ro", SHARE, mode=Mode.MULTI_NODE_READER_ONLY),
        "flag": request(server, tmp_path / "ro", SHARE, readonly=True),
        "option": request(server, tmp_path / "ro", SHARE, "ro"),
    }[how]
    publish(here, asked)
    publish(here, request(server, tmp_path / "rw", SHARE, handle="rw"))

    for attempt in (
        lambda: (tmp_path / "ro/new").write_text("no"),
        lambda: (tmp_path / "ro/photos/2026/one.jpg").unlink(),
        lambda: os.chmod(tmp_path / "ro/photos", 0o777),
        lambda: os.utime(tmp_path / "ro/photos"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            attempt()
    (tmp_path / "rw/photos/2026/two.jpg").write_text("two")
    assert (tmp_path / "ro/photos/2026/two.jpg").read_text() == "two"


def test_machines_share_it_and_a_retained_one_s_data_is_the_next_one_s(
    server: KernelServer, here: Driver, machine: Host, tmp_path: Path
) -> None:
    there = Driver("there", tmp_path, CONFIG, "node", machine)
    try:
        first = request(server, tmp_path / "first", PHOTOS)
        publish(here, first)
        (tmp_path / "first/kept").write_text("data")
        unpublish(here, first)

        # Another volume, of another name, on another machine.
        second = request(server, tmp_path / "second", {"share": "/share/photos"}, handle="another")
        publish(there, second)
        assert machine.run("cat", tmp_path / "second/kept") == "data"
        unpublish(there, second)
    finally:
        there.end()


def test_a_directory_that_is_there_keeps_its_owner_and_mode(
    server: KernelServer, here: Driver, tmp_path: Path
) -> None:
    """`mode`, `uid` and `gid` are of what `subPath` makes, and of nothing else."""
    before = tree(server.export / "share/photos")
    owner = {"mode": "0777", "uid": "5", "gid": "6"}
    publish(here, request(server, tmp_path / "a", {**SHARE, "subPath": "photos/2026", **owner}))
    assert tree(server.export / "share/photos") == before

    publish(here, request(server, tmp_path / "b", {**SHARE, "subPath": "made/deep", **owner}, handle="b"))
    made = (server.export / "share/made/deep").stat()
    assert (stat.S_IMODE(made.st_mode), made.st_uid, made.st_gid) == (0o777, 5, 6)
    assert (server.export / "share").stat().st_uid == 0


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"path": "/share", "share": "/other"}, "same thing"),
        ({"path": "share"}, "absolute"),
        ({"path": "/share/../etc"}, "'..'"),
        ({"path": "/share", "servr": "x"}, "servr"),
        ({"path": "/share", "subPath": "../out"}, "relative path"),
        ({"server": "a b", "path": "/share"}, "server's name"),
    ],
)
def test_wrong_attributes_are_told_with_the_remedy(
    attributes: dict[str, str], said: str, here: Driver, tmp_path: Path
) -> None:
    """Before any server is asked: there is none."""
    asked = request("192.0.2.1", tmp_path / "t", attributes)

    with pytest.raises(grpc.RpcError) as refused:
        publish(here, asked)

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in str(refused.value.details())
    assert not (tmp_path / "t").exists()


def test_what_the_server_does_not_export_is_told(server: KernelServer, here: Driver, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        publish(here, request(server, tmp_path / "t", {"path": "/share/missing"}))

    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert not (tmp_path / "t").exists()
