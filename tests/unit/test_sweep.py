# SPDX-License-Identifier: Apache-2.0
"""What drivers that died have left half made in a pool that several have: the others remove it, and nothing else."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.errors import Aborted, FailedPrecondition
from csi_driver.model import MIB, GroupRecord, TopologyRequirement, VolumeSpec
from csi_driver.pool import Pool
from tests.rig import KINDS, Rig, configure, open_rig, volume


def rig_over(root: Path) -> Rig:
    configured = configure(KINDS[0], root, extra='server = "files.example.org"\nreserved = "0%"\n')
    return open_rig(replace(configured, shared=True))


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Rig]:
    with rig_over(tmp_path / "p") as made:
        yield made


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Rig]:
    with rig_over(tmp_path / "p") as made:
        yield made


def left(rig: Rig) -> dict[str, list[str]]:
    areas = ("groups", "snapshots", "staging", "trash")
    return {area: found for area in areas if (found := os.listdir(rig.pool.config.root / area))}


def make_group(rig: Rig) -> GroupRecord:
    ids = [rig.controller.create_volume(volume(name, MIB)).id for name in ("a", "b")]
    return rig.groups.create("g", ids, {}).record


def lose_record(rig: Rig, group: GroupRecord) -> None:
    """As if the driver had died before the group's own rename, or after that of its deletion."""
    home = rig.pool.config.root / "groups" / group.id
    (home / "group.json").unlink()
    home.rmdir()


def test_members_without_their_group_go(one: Rig, two: Rig) -> None:
    lose_record(one, make_group(one))
    two.settle()
    assert left(two) == {}


def test_members_of_a_group_that_is_being_made_stay(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_group = Pool.create_group

    def late(pool: Pool, *arguments: object) -> object:
        for rig in (one, two):
            rig.settle()
        return create_group(pool, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Pool, "create_group", late)
    group = make_group(one)
    assert len(two.groups.get(group.id, []).snapshots) == 2
    assert left(two).keys() == {"groups", "snapshots"}


def test_a_group_whose_members_were_swept_is_not_made(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_group = Pool.create_group

    def late(pool: Pool, record: GroupRecord, *arguments: object) -> object:
        pool.catalog.abandon(record.id)  # as by the death of the child that had the claim
        two.settle()
        return create_group(pool, record, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "create_group", late)
        with pytest.raises(Aborted, match="are gone: repeat"):
            make_group(one)
    assert left(two) == {}
    make_group(one)


def test_a_group_half_deleted_is_deleted_by_a_repeat(one: Rig, two: Rig) -> None:
    group = make_group(one)
    members = list(group.snapshots.values())
    with pytest.raises(FailedPrecondition, match="delete the group"):
        two.snapshots.delete(members[0])
    lose_record(one, group)
    two.groups.delete(group.id, members)
    assert left(two).keys() == {"trash"}


def test_members_of_a_deleted_group_can_be_deleted_alone(one: Rig, two: Rig) -> None:
    group = make_group(one)
    lose_record(one, group)
    for snapshot_id in group.snapshots.values():
        two.snapshots.delete(snapshot_id)
    two.settle()
    assert left(two) == {}


def test_others_snapshots_are_not_deleted_with_a_group(one: Rig) -> None:
    group = make_group(one)
    alone = one.snapshots.create("s", next(iter(group.snapshots)), {}, TopologyRequirement()).record.id
    lose_record(one, group)
    one.groups.delete(group.id, [alone, *group.snapshots.values()])
    assert left(one)["snapshots"] == [alone]


def test_a_half_made_home_goes_with_its_driver(one: Rig, two: Rig) -> None:
    with rig_over(one.pool.config.root) as dying:
        home = dying.pool.catalog.begin(dying.pool.id_of("a"))
        (home.path / "data").mkdir()
        two.settle()
        assert left(two)["staging"] == [home.id]
    two.settle()
    assert left(two) == {}


def test_a_home_that_was_swept_while_it_was_made_is_made_by_a_repeat(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = one.backend.make

    def late(home: object, spec: VolumeSpec) -> None:
        make(home, spec)  # type: ignore[arg-type]
        one.pool.catalog.abandon(one.pool.id_of("a"))  # as by the death of the child that had the claim
        one.settle()
        assert left(one)["staging"]
        two.settle()

    with monkeypatch.context() as patch:
        patch.setattr(one.backend, "make", late)
        with pytest.raises(Aborted, match="repeat"):
            one.controller.create_volume(volume("a", MIB))
    two.settle()
    assert left(two) == {}
    made = one.controller.create_volume(volume("a", MIB))
    one.settle()
    assert two.controller.get_volume(made.id).id == made.id
    assert left(two) == {}
