# SPDX-License-Identifier: Apache-2.0
"""A volume that one node at a time can have: handed out, taken back, and never while somebody has its image locked.

On a directory of this machine in an export's place: what is locked here is locked there.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver import backends
from csi_driver.backends.base import PAYLOAD_IMAGE
from csi_driver.catalog import Catalog
from csi_driver.config import parse
from csi_driver.errors import (
    AlreadyExists,
    ConfigurationError,
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from csi_driver.handover import HOLDER_FILE, USER_FILE
from csi_driver.linux import files
from csi_driver.model import (
    MIB,
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    Source,
    SourceKind,
    TopologyRequirement,
    VolumeRequest,
)
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.rpc import answers
from tests.rig import Rig, capability, volume

CONFIG = """
scope = "shared"
[pools.{name}]
backend = "nfs"
provisioning = "{provisioning}"
server = "files.example.org"
path = "/export/{name}"
root = "{root}"
reserved = "0%"
{options}
"""
RAW = capability(access_type=AccessType.BLOCK)
MANY = capability(AccessMode.MULTI_NODE_MULTI_WRITER)


def open_pool(root: Path, name: str = "img", provisioning: str = "image", options: str = "") -> Pool:
    text = CONFIG.format(name=name, root=root, provisioning=provisioning, options=options)
    configured = parse(text).pools[name]
    backend = backends.create(configured)
    return Pool(configured, Catalog.open(root, backends.layout(configured), exclusive=False), backend)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    pool = open_pool(tmp_path / "img")
    pool.adopt()
    with Rig(Pools({"img": pool})) as made:
        yield made


@pytest.fixture
def volume_id(rig: Rig) -> str:
    return rig.controller.create_volume(volume("a", 8 * MIB, capabilities=(RAW,))).id


@contextmanager
def used(rig: Rig, volume_id: str, node: str = "") -> Iterator[None]:
    """As a node does that has it."""
    home = rig.pool.catalog.get(volume_id)
    fd = home.open(PAYLOAD_IMAGE, os.O_RDWR)
    try:
        assert files.lock_whole(fd)
        if node:
            (home.path / USER_FILE).write_text(f'{{"node": "{node}", "since": 1.0}}')
        yield
    finally:
        os.close(fd)


def hand_out(rig: Rig, volume_id: str, node: str, wanted: Capability = RAW) -> dict[str, str]:
    return rig.controller.publish_volume(volume_id, node, wanted, {})


def test_one_node_at_a_time_is_handed_a_volume(rig: Rig, volume_id: str) -> None:
    told = hand_out(rig, volume_id, "one")

    assert told == {"node": "one", "generation": "1"} == hand_out(rig, volume_id, "one")
    with pytest.raises(FailedPrecondition, match="published to node 'one'"):
        hand_out(rig, volume_id, "two")
    listed = rig.controller.list_volumes(0, "")[0][0]
    assert answers.published_nodes(listed, "controller") == ["one"]

    rig.controller.unpublish_volume(volume_id, "two")  # it never had it
    with pytest.raises(FailedPrecondition):
        hand_out(rig, volume_id, "two")
    rig.controller.unpublish_volume(volume_id, "one")
    rig.controller.unpublish_volume(volume_id, "one")
    assert answers.published_nodes(rig.controller.get_volume(volume_id), "controller") == []
    # No two handings over are alike, those to one node neither.
    assert hand_out(rig, volume_id, "one") == {"node": "one", "generation": "2"}
    rig.controller.unpublish_volume(volume_id, "")
    assert hand_out(rig, volume_id, "two") == {"node": "two", "generation": "3"}


def test_what_a_node_uses_is_not_taken_from_it(
    rig: Rig, volume_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    hand_out(rig, volume_id, "one")
    with used(rig, volume_id, "one"):
        with pytest.raises(FailedPrecondition, match="node 'one' uses it yet"):
            rig.controller.unpublish_volume(volume_id, "one")
        with pytest.raises(FailedPrecondition):
            hand_out(rig, volume_id, "two")
        assert "taken back" not in caplog.text

    # It died: its lock is gone, and what it has signed is there yet.
    with caplog.at_level(logging.WARNING):
        rig.controller.unpublish_volume(volume_id, "one")
    assert "taken back from node one, which did not let it go" in caplog.text
    assert hand_out(rig, volume_id, "two")["node"] == "two"


def test_what_a_node_has_is_neither_deleted_nor_copied(rig: Rig, volume_id: str) -> None:
    hand_out(rig, volume_id, "one")
    check_refused(rig, volume_id, "published to node one")
    with used(rig, volume_id, "one"):
        check_refused(rig, volume_id, "used by node one")
    rig.controller.unpublish_volume(volume_id, "one")

    assert rig.snapshots.create("s", volume_id, {}, TopologyRequirement()).record.source == volume_id
    assert rig.controller.create_volume(clone_of(volume_id)).size_bytes == 8 * MIB
    rig.controller.delete_volume(volume_id)


def clone_of(volume_id: str) -> VolumeRequest:
    asked = volume("b", 8 * MIB, capabilities=(RAW,))
    return replace(asked, source=Source(SourceKind.VOLUME, volume_id))


def check_refused(rig: Rig, volume_id: str, sentence: str) -> None:
    with pytest.raises(FailedPrecondition, match=sentence):
        rig.controller.delete_volume(volume_id)
    with pytest.raises(FailedPrecondition, match=sentence):
        rig.snapshots.create("s", volume_id, {}, TopologyRequirement())
    with pytest.raises(FailedPrecondition, match=sentence):
        rig.controller.create_volume(clone_of(volume_id))


def test_a_copy_keeps_nodes_off_its_source(rig: Rig, volume_id: str) -> None:
    home = rig.pool.catalog.get(volume_id)
    reading = home.open(PAYLOAD_IMAGE)
    try:
        assert files.lock_whole(reading, shared=True)
        fd = home.open(PAYLOAD_IMAGE, os.O_RDWR)
        assert not files.lock_whole(fd)
        os.close(fd)
        assert rig.backend.holders([home]) == {volume_id: "being copied"}
    finally:
        os.close(reading)
    assert rig.backend.holders([home]) == {}


def test_growth_is_for_the_node_to_finish_and_size_is_real(rig: Rig, volume_id: str) -> None:
    hand_out(rig, volume_id, "one")
    with used(rig, volume_id, "one"):
        assert rig.controller.expand_volume(volume_id, CapacityRange(16 * MIB), RAW) == (16 * MIB, True)

    image = (rig.pool.catalog.get(volume_id).path / PAYLOAD_IMAGE).stat()
    assert image.st_size == 16 * MIB == image.st_blocks * 512
    assert rig.pool.space.promised() == 16 * MIB


def test_its_context_says_where_the_image_is(rig: Rig, volume_id: str) -> None:
    made = rig.controller.get_volume(volume_id)

    assert made.context == {
        "server": "files.example.org",
        "path": "/export/img",
        "image": f"volumes/{volume_id}/image",
    }


def test_many_nodes_cannot_have_one(rig: Rig, volume_id: str) -> None:
    many = capability(AccessMode.MULTI_NODE_SINGLE_WRITER, AccessType.BLOCK)
    with pytest.raises(InvalidArgument, match="cannot do access mode MULTI_NODE_SINGLE_WRITER"):
        rig.controller.create_volume(volume("b", 8 * MIB, capabilities=(many,)))
    with pytest.raises(InvalidArgument, match="MULTI_NODE_SINGLE_WRITER"):
        hand_out(rig, volume_id, "one", many)
    with pytest.raises(InvalidArgument, match="it is a block volume"):
        hand_out(rig, volume_id, "one", capability())


def test_what_needs_no_handing_over(rig: Rig, tmp_path: Path) -> None:
    static = {"server": "files.example.org", "path": "/export"}
    assert rig.controller.publish_volume("by-hand", "one", MANY, static) == {}
    rig.controller.unpublish_volume("by-hand", "one")
    with pytest.raises(NotFound):
        hand_out(rig, "nothing", "one")

    directories = open_pool(tmp_path / "team", "team", "directory")
    directories.adopt()
    with Rig(Pools({"team": directories})) as other:
        made = other.controller.create_volume(volume("a", MIB, capabilities=(MANY,)))
        for node in ("one", "two"):
            assert other.controller.publish_volume(made.id, node, MANY, made.context) == {}
        other.controller.unpublish_volume(made.id, "one")


def test_a_damaged_record_hands_nothing_out(rig: Rig, volume_id: str) -> None:
    hand_out(rig, volume_id, "one")
    (rig.pool.catalog.get(volume_id).path / HOLDER_FILE).write_text("{")

    with pytest.raises(Error, match="damaged"):
        hand_out(rig, volume_id, "two")


def test_a_class_may_say_which_kind_it_means(tmp_path: Path) -> None:
    pools = {
        "img": open_pool(tmp_path / "img"),
        "team": open_pool(tmp_path / "team", "team", "directory"),
    }
    for pool in pools.values():
        pool.adopt()
    with Rig(Pools(pools)) as rig:
        for given, name in (("directory", "team"), ("image", "img")):
            asked = volume(given, 8 * MIB, provisioning=given, pool=name)
            assert rig.controller.create_volume(asked).id.startswith(f"{name}-")
        for given, name in (("directory", "img"), ("image", "team")):
            with pytest.raises(InvalidArgument, match=f'one with provisioning = "{given}"'):
                rig.controller.create_volume(volume("c", 8 * MIB, provisioning=given, pool=name))
        with pytest.raises(InvalidArgument, match="provisioning 'thick'"):
            rig.controller.create_volume(volume("d", 8 * MIB, provisioning="thick", pool="img"))


@pytest.mark.parametrize("option", ["nolock", "soft", "nfsvers=3", "vers=3", "local_lock=all", "hard,nolock"])
def test_mounts_that_fence_nothing_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="fenced by locks of NFSv4"):
        open_pool(tmp_path / "img", options=f'mount_options = ["{option}"]')


def test_a_pool_of_directories_is_none_of_images(tmp_path: Path) -> None:
    open_pool(tmp_path / "p", "p", "directory").close()

    with pytest.raises(ConfigurationError, match="holds a pool of backend 'nfs'"):
        open_pool(tmp_path / "p", "p")


def test_the_same_name_again_is_the_same_volume(rig: Rig, volume_id: str) -> None:
    again = volume("a", 8 * MIB, capabilities=(RAW,))
    assert rig.controller.create_volume(again).id == volume_id
    with pytest.raises(AlreadyExists):
        rig.controller.create_volume(volume("a", 16 * MIB, capabilities=(RAW,)))
