# SPDX-License-Identifier: Apache-2.0
"""What drivers that died have left half made in a pool that several have: the others remove it, and nothing else."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.building import Build, Builder
from csi_driver.catalog import Catalog, Home
from csi_driver.errors import Aborted, FailedPrecondition, Unavailable
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


def out_of_reach(*_: object, **__: object) -> object:
    raise Unavailable("server 'files.example.org': did not answer: asked again in 2 s")


def test_what_a_driver_left_while_its_server_did_not_answer_is_swept_up(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a copy was late: the server is left alone, and the child that has the claims lives on."""
    with monkeypatch.context() as patch:
        patch.setattr(one.backend, "make", out_of_reach)
        for method in ("has_committed", "abandon", "remove"):
            patch.setattr(one.pool.catalog, method, out_of_reach)
        with pytest.raises(Unavailable):
            one.controller.create_volume(volume("a", MIB))
    two.settle()
    assert left(two).keys() == {"staging"}
    one.settle()
    assert left(two) == {}
    assert two.controller.create_volume(volume("a", MIB)).id


def test_a_claim_that_could_not_be_given_back_is_given_back_later(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    group_id = one.pool.group_id_of("g")
    with monkeypatch.context() as patch:
        patch.setattr(one.pool.catalog, "abandon", out_of_reach)
        with one.pool.claim(group_id):
            pass
    with pytest.raises(Aborted), two.pool.claim(group_id):
        pass
    with one.pool.claim(group_id), pytest.raises(Aborted), two.pool.claim(group_id):
        pass
    with two.pool.claim(group_id):
        pass


def test_a_claim_that_could_not_be_given_back_is_so_by_a_sweep(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    group_id = one.pool.group_id_of("g")
    with monkeypatch.context() as patch:
        patch.setattr(one.pool.catalog, "abandon", out_of_reach)
        with one.pool.claim(group_id):
            pass
    with one.pool.claim(group_id):
        one.pool.sweep()
        with pytest.raises(Aborted), two.pool.claim(group_id):
            pass
    one.pool.sweep()
    with two.pool.claim(group_id):
        pass


def test_another_driver_s_home_is_not_cleared_by_one_that_failed(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_id = one.pool.id_of("a")
    cleared: list[str] = []

    def late(*_: object) -> None:
        one.pool.catalog.abandon(made_id)  # as by the death of the child that had the claim
        two.pool.discard_leftover(made_id)
        two.pool.catalog.begin(made_id)
        raise OSError(errno.EIO, "late")

    monkeypatch.setattr(one.backend, "make", late)
    monkeypatch.setattr(one.backend, "clear", lambda home: cleared.append(home.id))
    with pytest.raises(Aborted, match="another driver"):
        one.controller.create_volume(volume("a", MIB))
    assert not cleared
    assert left(two)["staging"] == [made_id]


def test_one_home_that_cannot_go_does_not_keep_the_others(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig_over(one.pool.config.root) as dying:
        first, *_ = sorted(dying.pool.catalog.begin(dying.pool.id_of(name)).id for name in ("a", "b"))
    throw = Catalog.throw_staged

    def fails(catalog: Catalog, home: Home) -> bool:
        if home.id == first:
            raise OSError(errno.EIO, "cannot be moved")
        return throw(catalog, home)

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "throw_staged", fails)
        two.settle()
        assert left(two) == {"staging": [first]}
        with rig_over(one.pool.config.root) as later:
            assert later.pool.adopted
    two.settle()
    assert left(two) == {}


def test_a_group_that_is_not_seen_yet_keeps_its_members(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of a file server takes a name that it has looked for in vain for missing, for up to a minute."""
    group = make_group(one)
    standing = Catalog._standing

    def stale(catalog: Catalog, area: str, name: str) -> Home | None:
        return None if area == "groups" else standing(catalog, area, name)

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_standing", stale)
        two.settle()
        with pytest.raises(Aborted, match="repeat"):
            two.groups.delete(group.id, list(group.snapshots.values()))
        with pytest.raises(FailedPrecondition, match="delete the group"):
            two.snapshots.delete(next(iter(group.snapshots.values())))
    assert len(two.groups.get(group.id, []).snapshots) == 2


def test_a_group_that_is_being_made_is_not_swept_by_a_deletion(
    one: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = Builder._building

    @contextmanager
    def while_deleted(builder: Builder, record: GroupRecord) -> Iterator[Build]:
        with building(builder, record) as build:
            if isinstance(record, GroupRecord):
                with pytest.raises(Aborted, match="another call"):
                    one.groups.delete(record.id, [])
            yield build

    monkeypatch.setattr(Builder, "_building", while_deleted)
    assert len(make_group(one).snapshots) == 2


def test_members_that_another_driver_makes_anew_outlive_a_failed_try(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as other:

        def fails(pool: Pool, record: GroupRecord, *_: object) -> object:
            pool.catalog.abandon(record.id)  # as a commit that failed does
            other.enter_context(two.pool.claim(record.id))
            raise OSError(errno.EIO, "late")

        monkeypatch.setattr(Pool, "create_group", fails)
        with pytest.raises(OSError, match="late"):
            make_group(one)
        assert len(left(two)["snapshots"]) == 2
    two.settle()
    assert left(two) == {}


def test_members_that_another_driver_deletes_at_the_same_moment_are_gone(
    one: Rig, two: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(one)
    delete_group = Pool.delete_group

    def swept(pool: Pool, home: Home) -> None:
        delete_group(pool, home)
        find = one.pools.find_snapshot

        def gone(snapshot_id: str) -> object:
            found = find(snapshot_id)
            two.groups.sweep(two.pool)
            return found

        monkeypatch.setattr(one.pools, "find_snapshot", gone)

    monkeypatch.setattr(Pool, "delete_group", swept)
    one.groups.delete(group.id, list(group.snapshots.values()))
    assert left(two).keys() == {"trash"}
