# SPDX-License-Identifier: Apache-2.0
"""The controller's semantics, over the memory backend."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.catalog import Home
from csi_driver.errors import (
    Aborted,
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unimplemented,
)
from csi_driver.model import (
    GIB,
    MIB,
    AccessMode,
    AccessType,
    Capacity,
    CapacityRange,
    HealthStatus,
    Segments,
    TopologyRequirement,
    VolumeId,
    VolumeRequest,
    name_hash,
)
from tests.rig import NODE_SEGMENTS, Kind, Rig, capability, configure, open_rig, volume
from tests.unit.conftest import MEMORY, OpenRig
from tests.unit.test_pool import interposed

SIZE = 16 * MIB
NOTHING = Capacity(0, 0, 0)
ELSEWHERE: Segments = {"topology.local.orlop.dev/node": "node-2"}


def placed(name: str, *requisite: Segments, preferred: tuple[Segments, ...] = ()) -> VolumeRequest:
    topology = TopologyRequirement(requisite, preferred)
    return VolumeRequest(name, (capability(),), CapacityRange(SIZE), topology=topology)


# CreateVolume


def test_created_volume_says_size_and_place(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE))

    assert made.size_bytes == SIZE
    assert made.segments == NODE_SEGMENTS
    assert not made.in_use


def test_second_call_for_a_name_under_way_is_aborted(rig: Rig) -> None:
    with rig.locks.hold(name_hash("a")), pytest.raises(Aborted):
        rig.controller.create_volume(volume("a", SIZE))


@pytest.mark.parametrize(
    "request_",
    [
        placed("a"),
        placed("a", NODE_SEGMENTS),
        placed("a", ELSEWHERE, NODE_SEGMENTS),
        placed("a", {}),
        placed("a", preferred=(ELSEWHERE, NODE_SEGMENTS)),
        placed("a", NODE_SEGMENTS, preferred=(NODE_SEGMENTS,)),
    ],
)
def test_topology_that_holds_this_node(rig: Rig, request_: VolumeRequest) -> None:
    assert rig.controller.create_volume(request_).segments == NODE_SEGMENTS


@pytest.mark.parametrize(
    "request_",
    [
        placed("a", ELSEWHERE),
        placed("a", {**NODE_SEGMENTS, "topology.kubernetes.io/zone": "z"}),
        placed("a", {"strange": "key"}),
        volume("a", SIZE, regionId="r1"),
        volume("a", SIZE, zoneId="z1"),
    ],
)
def test_topology_without_this_node_is_for_another_one(rig: Rig, request_: VolumeRequest) -> None:
    with pytest.raises(ResourceExhausted):
        rig.controller.create_volume(request_)

    assert rig.pool.catalog.ids() == []


# DeleteVolume


def test_deleted_volume_is_gone_and_deleting_it_again_is_fine(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE))

    rig.controller.delete_volume(made.id)
    rig.controller.delete_volume(made.id)

    with pytest.raises(NotFound):
        rig.controller.get_volume(made.id)
    rig.settle()
    assert rig.pool.capacity().available_bytes == GIB


def test_deleting_removes_what_a_failed_creation_left(rig: Rig) -> None:
    volume_id, snapshot_id = rig.pool.id_of("a"), rig.pool.snapshot_id_of("a")
    staging = rig.pool.catalog.root / "staging"
    for left in (volume_id, snapshot_id):
        (staging / left / "data").mkdir(parents=True)

    rig.controller.delete_volume(volume_id)
    assert [path.name for path in staging.iterdir()] == [snapshot_id]
    rig.snapshots.delete(snapshot_id)

    assert list(staging.iterdir()) == []


@pytest.mark.parametrize("volume_id", ["", "nothing", "../../etc", "/", "a\0b", "x" * 5000, "p-1-2"])
def test_deleting_what_never_was_is_fine(rig: Rig, volume_id: str) -> None:
    rig.controller.delete_volume(volume_id)


def test_volume_of_another_disk_is_not_deleted_by_saying_so(rig: Rig) -> None:
    with pytest.raises(FailedPrecondition, match="tag 00000000"):
        rig.controller.delete_volume(str(VolumeId("p", "00000000", name_hash("a"))))


def test_deleting_while_a_call_for_the_name_is_under_way_is_aborted(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE))

    with rig.locks.hold(name_hash("a")), pytest.raises(Aborted):
        rig.controller.delete_volume(made.id)


def test_damaged_volume_can_be_deleted(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE))
    (rig.pool.catalog.get(made.id).path / "volume.json").write_text("{")

    rig.controller.delete_volume(made.id)

    assert rig.pool.catalog.ids() == []


# ValidateVolumeCapabilities


def test_validation_says_what_does_not_fit(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE, mode="0700"))

    def validate(
        *capabilities: object, parameters: dict[str, str] | None = None, context: dict[str, str] | None = None
    ) -> str:
        return rig.controller.validate(made.id, capabilities, parameters or {}, context or {}, {})  # type: ignore[arg-type]

    assert validate(capability()) == ""
    assert validate(capability(AccessMode.MULTI_NODE_MULTI_WRITER), parameters={"mode": "0700"}) == ""
    assert "mount volume" in validate(capability(access_type=AccessType.BLOCK))
    assert "filesystem" in validate(capability(fs_type="xfs"))
    assert "made with" in validate(capability(), parameters={"mode": "0777"})
    assert "volume_context" in validate(capability(), context={"a": "b"})
    assert "bind options" in validate(replace(capability(), mount_flags=("noexec", "data=journal")))
    assert validate(replace(capability(), mount_flags=("noexec",))) == ""
    with pytest.raises(NotFound):
        rig.controller.validate("nothing", (capability(),), {}, {}, {})


# ListVolumes


def test_pages_hold_every_volume_once_in_order(rig: Rig) -> None:
    made = {rig.controller.create_volume(volume(f"v{number}", MIB)).id for number in range(25)}

    for size in (1, 4, 5, 24, 25, 26):
        seen: list[str] = []
        token = ""
        while True:
            page, token = rig.controller.list_volumes(size, token)
            assert len(page) <= size
            seen += [one.id for one in page]
            if not token:
                break
        assert seen == sorted(made)

    everything, token = rig.controller.list_volumes(0, "")
    assert ([one.id for one in everything], token) == (sorted(made), "")


def test_pages_stay_right_while_volumes_come_and_go(rig: Rig) -> None:
    ids = sorted(rig.controller.create_volume(volume(f"v{number}", MIB)).id for number in range(10))
    first, token = rig.controller.list_volumes(4, "")

    rig.controller.delete_volume(ids[3])  # the last one of the page: the token's
    rig.controller.delete_volume(ids[7])
    rest, _ = rig.controller.list_volumes(0, token)

    assert [one.id for one in first] == ids[:4]
    assert [one.id for one in rest] == [volume_id for volume_id in ids[4:] if volume_id != ids[7]]


@pytest.mark.parametrize("token", ["x", "5", str(VolumeId("p", "00000000", name_hash("a")))])
def test_token_that_was_never_given_is_aborted(rig: Rig, token: str) -> None:
    with pytest.raises(Aborted, match="starting_token"):
        rig.controller.list_volumes(0, token)


def test_volumes_of_several_pools_are_one_list(tmp_path: Path) -> None:
    with open_rig(*(configure(MEMORY, tmp_path / name, name=name) for name in ("a", "ab"))) as rig:
        made = {
            rig.controller.create_volume(volume(f"{pool}{number}", MIB, pool=pool)).id
            for pool in ("a", "ab")
            for number in range(3)
        }

        page, token = rig.controller.list_volumes(4, "")
        rest, end = rig.controller.list_volumes(4, token)

    assert [one.id for one in page + rest] == sorted(made)
    assert end == ""


def test_damaged_record_does_not_hide_the_others(rig: Rig) -> None:
    bad, good = (rig.controller.create_volume(volume(name, MIB)).id for name in "ab")
    (rig.pool.catalog.get(bad).path / "volume.json").write_text("{")

    listed, _ = rig.controller.list_volumes(0, "")

    assert [one.id for one in listed] == [good]
    [(sick, [entry])], _ = rig.controller.list_health(0, "")
    assert (sick, entry.status, entry.reason) == (bad, HealthStatus.DATA_LOSS, "RecordDamaged")


def test_volume_that_is_deleted_as_it_is_looked_at_is_not_sick(rig: Rig) -> None:
    home = rig.pool.catalog.get(rig.controller.create_volume(volume("a", MIB)).id)

    def delete(*_: object) -> None:
        rig.pool.delete(home)
        raise Error("its payload is gone")

    with interposed(rig.pool, health=delete):
        assert rig.health.of_volume(rig.pool, home) == []


def test_volume_that_cannot_be_looked_at_is_told_and_hides_no_other(rig: Rig) -> None:
    bad, good = (rig.controller.create_volume(volume(name, MIB)).id for name in "ab")

    def refuse(home: Home, *_: object) -> None:
        if home.id == bad:
            raise Error("its payload is a directory")

    with interposed(rig.pool, health=refuse):
        told, _ = rig.controller.list_health(0, "")
    assert [(one, entry.reason) for one, entries in told for entry in entries if one != good] == [
        (bad, "Unreadable")
    ]


def test_volume_that_the_disk_will_not_show_does_not_hide_the_others(rig: Rig) -> None:
    bad, good = (rig.controller.create_volume(volume(name, MIB)).id for name in "ab")

    def unreadable(home: Home, *_: object) -> None:
        if home.id == bad:
            raise OSError(5, "Input/output error", "volume.json")

    with interposed(rig.pool, size_bytes=unreadable, health=unreadable):
        listed, _ = rig.controller.list_volumes(0, "")
        [(sick, [entry])], _ = rig.controller.list_health(0, "")

    assert [one.id for one in listed] == [good]
    assert (sick, entry.status, entry.reason) == (bad, HealthStatus.INACCESSIBLE, "Unreadable")
    assert "Input/output error" in entry.message


# GetCapacity


def test_capacity_is_for_this_node_only(rig: Rig) -> None:
    assert rig.controller.capacity((), {}, None).available_bytes == GIB
    assert rig.controller.capacity((), {}, NODE_SEGMENTS).available_bytes == GIB
    assert rig.controller.capacity((), {}, ELSEWHERE) == NOTHING


@pytest.mark.parametrize("parameters", [{"pool": "nvme"}, {"type": "gold"}, {"regionId": "r"}])
def test_capacity_for_what_another_node_may_have_is_nothing(
    tmp_path: Path, parameters: dict[str, str]
) -> None:
    config = configure(MEMORY, tmp_path / "p")
    with open_rig(config, elsewhere=frozenset({"nvme", "gold"})) as rig:
        assert rig.controller.capacity((), parameters, None) == NOTHING


@pytest.mark.parametrize("parameters", [{"pool": "none"}, {"type": "none"}, {"colour": "red"}, {"mode": "x"}])
def test_a_wrong_parameter_is_told_by_create_volume_not_by_a_want_of_room(
    rig: Rig, parameters: dict[str, str]
) -> None:
    assert rig.controller.capacity((), parameters, None).available_bytes == GIB


def test_capacity_for_block_where_there_is_none_is_nothing(rig: Rig) -> None:
    assert rig.controller.capacity((capability(access_type=AccessType.BLOCK),), {}, None) == NOTHING


def test_capacity_is_the_largest_pools_not_the_sum(tmp_path: Path) -> None:
    small = Kind("small", "memory", options='total = "100Mi"\n')
    configs = (configure(MEMORY, tmp_path / "a", name="a"), configure(small, tmp_path / "b", name="b"))

    with open_rig(*configs) as rig:
        assert rig.controller.capacity((), {}, None).available_bytes == GIB
        assert rig.controller.capacity((), {"pool": "b"}, None).available_bytes == 100 * MIB


def test_capacity_of_a_pool_that_went_away_is_nothing(rig: Rig) -> None:
    rig.pool.catalog.root.rename(rig.pool.catalog.root.with_name("moved"))

    assert rig.controller.capacity((), {}, None) == NOTHING


def test_what_is_offered_can_be_made_and_no_more(opened: OpenRig) -> None:
    rig = opened(extra='reserved = "7%"\n')
    offered = rig.controller.capacity((), {}, None)

    with pytest.raises(ResourceExhausted):
        rig.controller.create_volume(volume("a", offered.available_bytes + 4096))
    rig.controller.create_volume(volume("a", offered.maximum_volume_bytes))

    assert rig.controller.capacity((), {}, None).maximum_volume_bytes == 0


def test_hundred_creates_at_once_for_a_pool_of_thirty(rig: Rig) -> None:
    size = GIB // 30 // 4096 * 4096
    start = threading.Barrier(100)
    answers: list[str] = []

    def create(number: int) -> None:
        start.wait()
        try:
            answers.append(rig.controller.create_volume(volume(f"v{number}", size)).id)
        except ResourceExhausted:
            answers.append("")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    made = sorted(filter(None, answers))
    assert len(answers) == 100
    assert len(made) == 30
    assert rig.pool.catalog.ids() == made
    assert list(rig.pool.catalog.staged()) == []
    assert rig.controller.capacity((), {}, None).available_bytes == GIB - 30 * size


# ControllerExpandVolume


def test_expanded_volume(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE))

    assert rig.controller.expand_volume(made.id, CapacityRange(3 * SIZE), capability()) == (3 * SIZE, False)
    assert rig.controller.expand_volume(made.id, CapacityRange(SIZE), None) == (3 * SIZE, False)
    assert rig.controller.get_volume(made.id).size_bytes == 3 * SIZE


def test_expansion_that_cannot_be(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE))

    with pytest.raises(NotFound):
        rig.controller.expand_volume("nothing", CapacityRange(SIZE), None)
    with pytest.raises(InvalidArgument):
        rig.controller.expand_volume(made.id, CapacityRange(SIZE), capability(access_type=AccessType.BLOCK))
    with pytest.raises(OutOfRange):
        rig.controller.expand_volume(made.id, CapacityRange(2**63 - 1), None)
    with pytest.raises(OutOfRange):
        rig.controller.expand_volume(made.id, CapacityRange(0, SIZE - 4096), None)
    with pytest.raises(ResourceExhausted):
        rig.controller.expand_volume(made.id, CapacityRange(2 * GIB), None)
    assert rig.controller.get_volume(made.id).size_bytes == SIZE


def test_where_nodes_expand_the_controller_does_not(rig: Rig) -> None:
    other = Rig(rig.pools, expands=False)

    with pytest.raises(Unimplemented, match="NodeExpandVolume"):
        other.controller.expand_volume("a", CapacityRange(SIZE), None)


# Health


def test_healthy_volumes_are_not_listed(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", SIZE))

    assert rig.controller.volume_health(made.id) == []
    assert rig.controller.list_health(0, "") == ([], "")
    with pytest.raises(NotFound):
        rig.controller.volume_health("nothing")


def test_sick_volumes_come_in_pages(rig: Rig) -> None:
    ids = sorted(rig.controller.create_volume(volume(f"v{number}", MIB)).id for number in range(6))
    for volume_id in ids[::2]:
        (rig.pool.catalog.get(volume_id).path / "data").rmdir()

    first, token = rig.controller.list_health(2, "")
    rest, end = rig.controller.list_health(2, token)

    assert [volume_id for volume_id, _ in first + rest] == ids[::2]
    assert {entry.reason for _, entries in first + rest for entry in entries} == {"PayloadMissing"}
    assert end == ""
