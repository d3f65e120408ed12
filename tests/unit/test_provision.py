# SPDX-License-Identifier: Apache-2.0
"""From a request to a volume: the one that exists, or a new one in the right pool."""

from pathlib import Path

import pytest

from csi_driver.errors import AlreadyExists, InvalidArgument, OutOfRange, ResourceExhausted
from csi_driver.model import DEFAULT_SIZE, MIB, AccessMode, AccessType, Record, VolumeRequest
from csi_driver.provision import fits, grown_size, provision
from tests.rig import Kind, Rig, capability, configure, open_rig, volume
from tests.unit.conftest import MEMORY, OpenRig

SIZE = 16 * MIB


def make(rig: Rig, request: VolumeRequest) -> tuple[str, Record]:
    pool, home = provision(rig.pools, request)
    return home.id, pool.catalog.read(home)


def test_record_says_enough_to_write_the_claim_anew(rig: Rig) -> None:
    request = VolumeRequest(
        "pvc-1",
        (capability(),),
        volume("", SIZE).capacity_range,
        {"pool": "p", "mode": "0700", "subPath": "${pvc.metadata.name}"},
        pvc_namespace="team",
        pvc_name="data",
        pv_name="pvc-1",
    )

    volume_id, record = make(rig, request)

    assert record.id == volume_id
    assert record.name == "pvc-1"
    assert record.size_bytes == SIZE
    assert record.access_type is AccessType.MOUNT
    assert record.parameters == request.parameters
    assert (record.pvc_namespace, record.pvc_name, record.pv_name) == ("team", "data", "pvc-1")
    assert record.created_at > 1.7e9
    assert not record.ephemeral


def test_replay_is_the_same_volume(rig: Rig) -> None:
    assert make(rig, volume("a", SIZE)) == make(rig, volume("a", SIZE))


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE])
def test_replay_with_less_required_is_the_same_volume(rig: Rig, size: int) -> None:
    made, _ = make(rig, volume("a", SIZE))

    assert make(rig, volume("a", size))[0] == made
    assert make(rig, volume("a", size, SIZE))[0] == made


def test_replay_after_growth_is_the_same_volume(rig: Rig) -> None:
    made, record = make(rig, volume("a", SIZE))
    pool, home = rig.pools.get(made)
    pool.grow(home, record, 2 * SIZE)

    assert make(rig, volume("a", SIZE))[0] == made


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (volume("a", SIZE + 1), "16777216 bytes"),
        (volume("a", 0, SIZE - 1), "16777216 bytes"),
        (volume("a", SIZE, pool="p"), "parameters"),
        (volume("a", SIZE, mode="0700"), "parameters"),
        (volume("a", SIZE, capabilities=(capability(access_type=AccessType.BLOCK),)), "mount volume"),
        (volume("a", SIZE, capabilities=(capability(fs_type="memfs"),)), "filesystem"),
        (VolumeRequest("a", (capability(),), volume("", SIZE).capacity_range, ephemeral=True), "ordinary"),
    ],
)
def test_same_name_asked_for_otherwise_already_exists(rig: Rig, other: VolumeRequest, said: str) -> None:
    made, record = make(rig, volume("a", SIZE))

    with pytest.raises(AlreadyExists, match=said) as refused:
        make(rig, other)

    assert "'a'" in str(refused.value)
    assert made in str(refused.value)
    assert rig.pool.catalog.read(rig.pool.catalog.get(made)) == record


def test_existence_is_checked_before_room(opened: OpenRig) -> None:
    rig = opened()
    make(rig, volume("a", rig.pool.capacity().maximum_volume_bytes))

    make(rig, volume("a", SIZE))


def test_name_taken_in_another_pool_already_exists(tmp_path: Path) -> None:
    with open_rig(*(configure(MEMORY, tmp_path / name, name=name) for name in "pq")) as rig:
        make(rig, volume("a", SIZE, pool="p"))

        with pytest.raises(AlreadyExists, match="made in pool 'p'"):
            make(rig, volume("a", SIZE, pool="q"))


def test_next_pool_is_tried_when_the_first_has_no_room(tmp_path: Path) -> None:
    small = Kind("small", "memory", options='total = "64Mi"\nclasses = ["x"]\nreserved = 0\n')
    large = Kind("large", "memory", options='total = "65Mi"\nclasses = ["x"]\nreserved = 0\n')
    configs = [configure(kind, tmp_path / kind.name, name=kind.name, extra="") for kind in (small, large)]

    with open_rig(*configs) as rig:
        first, _ = make(rig, volume("a", 40 * MIB, type="x"))
        second, _ = make(rig, volume("b", 40 * MIB, type="x"))
        with pytest.raises(ResourceExhausted):
            make(rig, volume("c", 40 * MIB, type="x"))

    assert (first.split("-")[0], second.split("-")[0]) == ("large", "small")


def test_pool_that_cannot_do_it_is_passed_over_for_one_that_can(tmp_path: Path) -> None:
    roomy = Kind("roomy", "directory", options='classes = ["x"]\nenforce_capacity = false\n')
    small = Kind("small", "memory", options='total = "64Mi"\nclasses = ["x"]\n')
    configs = [configure(kind, tmp_path / kind.name, name=kind.name) for kind in (roomy, small)]
    wanted = (capability(fs_type="memfs"),)

    with open_rig(*configs) as rig:
        assert [pool.name for pool in rig.pools.candidates({"type": "x"})] == ["roomy", "small"]
        made, _ = make(rig, volume("a", MIB, type="x", capabilities=wanted))
        with pytest.raises(ResourceExhausted):
            make(rig, volume("b", 65 * MIB, type="x", capabilities=wanted))

    assert made.startswith("small-")


@pytest.mark.parametrize(
    ("request_", "kind", "said"),
    [
        (volume("a", SIZE, colour="red"), InvalidArgument, r"unknown key 'colour'.*mode.*subPath.*zoneId"),
        (volume("a", SIZE, mode="999"), InvalidArgument, "parameters.mode '999'"),
        (volume("a", SIZE, mode="٧"), InvalidArgument, "parameters.mode"),
        (volume("a", SIZE, uid="-1"), InvalidArgument, "parameters.uid '-1'"),
        (volume("a", SIZE, gid="4294967295"), InvalidArgument, "parameters.gid"),
        (volume("a", SIZE, subPath="../x"), InvalidArgument, "subPath"),
        (volume("a", SIZE, subPath="${pvc.spec}"), InvalidArgument, "unknown variable"),
        (volume("a", SIZE, mkfsOptions="-m 0"), InvalidArgument, "unknown key 'mkfsOptions'"),
        (volume("a", SIZE, fsType="xfs"), InvalidArgument, "fsType 'xfs'"),
        (
            volume("a", SIZE, fsType="memfs", capabilities=(capability(fs_type="xfs"),)),
            InvalidArgument,
            "'xfs'",
        ),
        (
            volume("a", SIZE, capabilities=(capability(access_type=AccessType.BLOCK),)),
            InvalidArgument,
            "no block",
        ),
        (
            volume("a", SIZE, capabilities=(capability(), capability(access_type=AccessType.BLOCK))),
            InvalidArgument,
            "block",
        ),
        (
            volume("a", SIZE, capabilities=(capability(fs_type="ext4"), capability(fs_type="xfs"))),
            InvalidArgument,
            "ext4, xfs",
        ),
        (volume("a", 1, 1), OutOfRange, "limit_bytes 1"),
        (volume("a", 2**63 - 1), OutOfRange, "required_bytes"),
        (volume("a", 2**50), ResourceExhausted, "are free"),
    ],
)
def test_what_cannot_be_made_says_why_and_leaves_nothing(
    rig: Rig, request_: VolumeRequest, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        make(rig, request_)

    assert rig.pool.catalog.ids() == []
    assert list(rig.pool.catalog.staged()) == []
    assert rig.pool.space.count() == 0


def test_without_a_size_it_is_the_usual_one(tmp_path: Path) -> None:
    with open_rig(configure(Kind("m", "memory", options='total = "2Gi"\n'), tmp_path / "p")) as rig:
        assert make(rig, volume("a"))[1].size_bytes == DEFAULT_SIZE


def test_sizes_are_rounded_up(rig: Rig) -> None:
    assert make(rig, volume("a", SIZE + 1))[1].size_bytes == SIZE + 4096


@pytest.mark.parametrize("mode", list(AccessMode))
def test_every_mode_of_one_node(rig: Rig, mode: AccessMode) -> None:
    make(rig, volume("a", SIZE, capabilities=(capability(mode),)))


@pytest.mark.parametrize(
    ("size", "required", "limit", "answer"),
    [
        (100, 0, 0, True),
        (100, 100, 100, True),
        (100, 101, 0, False),
        (100, 0, 99, False),
        (0, 50, 60, True),
    ],
)
def test_fits(size: int, required: int, limit: int, answer: bool) -> None:
    assert fits(size, volume("", required, limit).capacity_range) is answer


def test_grown_size(rig: Rig) -> None:
    _, record = make(rig, volume("a", SIZE))

    def wanted(required: int, limit: int = 0, now: int = SIZE) -> int:
        return grown_size(rig.pool, record, volume("", required, limit).capacity_range, now)

    assert wanted(SIZE) == SIZE
    assert wanted(0) == SIZE
    assert wanted(1) == SIZE
    assert wanted(SIZE + 1) == SIZE + 4096
    assert wanted(2 * SIZE, now=0) == 2 * SIZE
    with pytest.raises(OutOfRange, match="never shrink"):
        wanted(1, SIZE - 1)
    with pytest.raises(OutOfRange):
        wanted(SIZE + 1, SIZE + 2)
