# SPDX-License-Identifier: Apache-2.0
"""A filesystem that every node mounts by itself, whose program has died: volumes on it say so, and come back with it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import Unavailable
from csi_driver.health import Health
from csi_driver.linux import syscall
from csi_driver.linux.exports import Exports
from csi_driver.linux.remote import Servers
from csi_driver.locks import Locks
from csi_driver.model import AccessMode, AccessType, Capability, HealthStatus, NodeInfo, PublishRequest
from csi_driver.node import Node
from csi_driver.pools import Pools
from tests.conftest import require_root
from tests.scene import clean_place

MS_BIND = 4096


@pytest.fixture
def place() -> Iterator[Path]:
    require_root()
    with clean_place() as path:
        yield path


@pytest.fixture
def node(place: Path) -> Iterator[Node]:
    servers = Servers()
    (place / "team").mkdir()
    exports = Exports(place / "exports", servers, roots={"team": place / "team"})
    yield Node(Pools({}), Locks(), Health(Pools({})), NodeInfo("node-1", 0, {}), exports)
    servers.close()
    for name in ("team", "pod", "other"):
        subprocess.run(["umount", "--lazy", place / name], capture_output=True, check=False)


def mount_dead(target: Path) -> None:
    """FUSE, as it is when the program behind it has ended: ENOTCONN for whoever looks."""
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel has no FUSE")
    fd = os.open("/dev/fuse", os.O_RDWR)
    syscall.mount("dead", os.fspath(target), "fuse", 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0")
    os.close(fd)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(target)


def mount_alive(target: Path) -> None:
    syscall.mount("alive", os.fspath(target), "tmpfs", 0, None)
    (target / "volumes/v/data").mkdir(parents=True)
    (target / "volumes/v/data/file").touch()


def request(target: Path) -> PublishRequest:
    capability = Capability(AccessType.MOUNT, AccessMode.MULTI_NODE_MULTI_WRITER)
    return PublishRequest(
        "v", str(target), capability, context={"pool": "team", "directory": "volumes/v/data"}
    )


def test_a_volume_on_it_is_refused_until_it_is_mounted_anew(node: Node, place: Path) -> None:
    mount_dead(place / "team")

    with pytest.raises(Unavailable, match="not connected"):
        node.publish(request(place / "pod"))
    assert not (place / "pod").exists()

    subprocess.run(["umount", place / "team"], check=True)
    mount_alive(place / "team")
    node.publish(request(place / "pod"))
    assert os.listdir(place / "pod") == ["file"]
    node.unpublish("v", str(place / "pod"))


def test_what_is_published_from_it_is_replaced_or_taken_away(node: Node, place: Path) -> None:
    (place / "pod").mkdir()
    (place / "other").mkdir()
    mount_dead(place / "team")
    for name in ("pod", "other"):
        syscall.mount(os.fspath(place / "team"), os.fspath(place / name), None, MS_BIND, None)
    (entry,) = node.volume_health("v", str(place / "pod"))
    assert entry.status is HealthStatus.INACCESSIBLE
    subprocess.run(["umount", place / "team"], check=True)
    mount_alive(place / "team")

    node.publish(request(place / "pod"))
    assert os.listdir(place / "pod") == ["file"]
    node.unpublish("v", str(place / "other"))
    assert not (place / "other").exists()
    node.unpublish("v", str(place / "pod"))
