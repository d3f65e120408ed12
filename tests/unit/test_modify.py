# SPDX-License-Identifier: Apache-2.0
"""Volumes that are changed after they were made, over the memory backend."""

import dataclasses

import pytest

from csi_driver import backends
from csi_driver.config import parse
from csi_driver.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from csi_driver.model import MIB, VolumeId, VolumeRequest, lock_key, name_hash
from tests.rig import Rig, volume
from tests.unit.conftest import OpenRig
from tests.unit.test_pool import entries, fail, interposed

HOUR = 3600.0
KEPT = {"retention": "1h"}


def asked(name: str, mutable: dict[str, str]) -> VolumeRequest:
    return dataclasses.replace(volume(name, 16 * MIB), mutable=mutable)


def mutable_of(rig: Rig, volume_id: str) -> dict[str, str]:
    return rig.controller.get_volume(volume_id).record.mutable


def test_a_volume_has_what_its_class_says_and_keeps_it_over_a_restart(opened: OpenRig) -> None:
    rig = opened()
    made = rig.controller.create_volume(asked("a", KEPT))
    plain = rig.controller.create_volume(volume("b", 16 * MIB))
    rig.controller.modify_volume(plain.id, KEPT)

    rig = opened()

    assert mutable_of(rig, made.id) == mutable_of(rig, plain.id) == KEPT


def test_another_class_takes_the_place_of_the_first(rig: Rig) -> None:
    made = rig.controller.create_volume(asked("a", KEPT))

    for _ in range(2):
        rig.controller.modify_volume(made.id, {"retention": "2h"})

    assert mutable_of(rig, made.id) == {"retention": "2h"}


def test_fields_of_a_later_version_stay_in_the_record(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", 16 * MIB))
    record = rig.pool.catalog.home(made.id).path / "volume.json"
    record.write_text(record.read_text().replace('"schema": 1', '"schema": 1, "colour": "blue"'))

    rig.controller.modify_volume(made.id, KEPT)

    assert '"colour": "blue"' in record.read_text()
    assert sorted(path.name for path in record.parent.iterdir()) == ["data", "size", "volume.json"]


@pytest.mark.parametrize(("retention", "kept"), [("1h", True), ("0", False)])
@pytest.mark.parametrize("pools", ["0s", "30m"])
def test_a_deleted_volume_is_kept_as_its_class_says(
    opened: OpenRig, retention: str, kept: bool, pools: str
) -> None:
    rig = opened(extra=f'reserved = "0%"\nretention = "{pools}"\n')
    made = rig.controller.create_volume(asked("a", {"retention": retention}))
    rig.controller.delete_volume(made.id)
    trashed = float(entries(rig.pool, "trash")[0].split(".")[1]) / 1e9

    rig.pool.empty_trash(trashed + HOUR - 1)
    assert bool(entries(rig.pool, "trash")) is kept

    rig = opened(extra=f'reserved = "0%"\nretention = "{pools}"\n')
    rig.pool.empty_trash(trashed + HOUR + 1)
    assert entries(rig.pool, "trash") == []


def test_a_volume_without_a_class_is_kept_as_the_pool_says(opened: OpenRig) -> None:
    rig = opened(extra='reserved = "0%"\nretention = "1h"\n')
    rig.controller.delete_volume(rig.controller.create_volume(volume("a", 16 * MIB)).id)
    trashed = float(entries(rig.pool, "trash")[0].split(".")[1]) / 1e9

    rig.pool.empty_trash(trashed + HOUR - 1)
    assert entries(rig.pool, "trash")
    rig.pool.empty_trash(trashed + HOUR + 1)
    assert entries(rig.pool, "trash") == []


@pytest.mark.parametrize(
    ("mutable", "words"),
    [
        ({"colour": "blue"}, "unknown key 'colour'"),
        ({"mode": "0700"}, "'mode': decided by the StorageClass"),
        (
            {"readBps": "10Mi", "retention": "1h"},
            "readBps: no limits in pool 'p': its volumes have no device",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(rig: Rig, mutable: dict[str, str], words: str) -> None:
    made = rig.controller.create_volume(asked("a", KEPT))

    with pytest.raises(InvalidArgument, match=words):
        rig.controller.modify_volume(made.id, mutable)
    with pytest.raises(InvalidArgument, match=words):
        rig.controller.create_volume(asked("b", mutable))

    assert mutable_of(rig, made.id) == KEPT
    assert rig.pool.catalog.ids() == [made.id]


def test_a_volume_that_is_not_here_is_told_from_one_that_is_nowhere(rig: Rig) -> None:
    with pytest.raises(NotFound):
        rig.controller.modify_volume("no-such-volume", KEPT)
    with pytest.raises(NotFound):
        rig.controller.modify_volume(rig.pool.id_of("a"), KEPT)
    with pytest.raises(FailedPrecondition, match="the node with that pool has to be asked"):
        rig.controller.modify_volume(str(VolumeId("p", "00000000", name_hash("a"))), KEPT)


def test_a_volume_that_another_call_works_on_is_aborted(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", 16 * MIB))

    with rig.locks.hold(lock_key(made.id)), pytest.raises(Aborted):
        rig.controller.modify_volume(made.id, KEPT)


def test_the_record_stays_as_it_was_when_the_device_cannot_be_limited(rig: Rig) -> None:
    made = rig.controller.create_volume(asked("a", KEPT))
    with interposed(rig.pool, limit=fail(FailedPrecondition("no"))), pytest.raises(FailedPrecondition):
        rig.controller.modify_volume(made.id, {"retention": "2h"})

    assert mutable_of(rig, made.id) == KEPT


def test_a_create_repeated_with_another_class_is_another_volume(rig: Rig) -> None:
    made = rig.controller.create_volume(asked("a", KEPT))

    assert rig.controller.create_volume(asked("a", KEPT)).id == made.id
    with pytest.raises(AlreadyExists, match="with mutable_parameters"):
        rig.controller.create_volume(asked("a", {}))


def test_validation_confirms_the_class_that_the_volume_has(rig: Rig) -> None:
    made = rig.controller.create_volume(asked("a", KEPT))
    capabilities = volume("a").capabilities

    assert rig.controller.validate(made.id, capabilities, {}, {}, KEPT) == ""
    refused = rig.controller.validate(made.id, capabilities, {}, {}, {"retention": "2h"})
    assert "the volume has {'retention': '1h'}" in refused


def test_volumes_on_a_file_server_have_no_device_to_limit() -> None:
    pool = parse(
        'scope = "shared"\n[pools.nas]\nbackend = "nfs"\nroot = "/mnt/nas"\nserver = "nas"\npath = "/export"\n'
    ).pools["nas"]

    assert backends.create(pool).limits_problem().startswith("its volumes are on a file server")
