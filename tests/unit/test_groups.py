# SPDX-License-Identifier: Apache-2.0
"""Groups of snapshots over memory pools, through the socket: all of them or none."""

import os
from typing import Any

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from tests.unit.test_snapshots import Scene, scene
from tests.unit.wire import Failure, directory, driver_over, memory_pool, serving

Code = grpc.StatusCode
MIB = 1 << 20


def group(made: Scene, name: str, *volume_ids: str) -> Any:
    request = pb.CreateVolumeGroupSnapshotRequest(name=name, source_volume_ids=volume_ids)
    answer = made.client.call(request)
    return answer if isinstance(answer, Failure) else answer.group_snapshot


def test_a_group_is_its_members() -> None:
    with scene() as made:
        volumes = [made.create(f"v{number}").volume_id for number in range(3)]
        for volume_id in volumes:
            (made.data(volume_id) / "file").write_text(volume_id)

        taken = group(made, "g", *volumes)
        again = group(made, "g", *reversed(volumes))
        got = made.client.call(
            pb.GetVolumeGroupSnapshotRequest(
                group_snapshot_id=taken.group_snapshot_id,
                snapshot_ids=[one.snapshot_id for one in taken.snapshots],
            )
        ).group_snapshot

        assert taken == again == got
        assert sorted(one.source_volume_id for one in taken.snapshots) == sorted(volumes)
        assert {one.group_snapshot_id for one in taken.snapshots} == {taken.group_snapshot_id}
        assert taken.ready_to_use
        assert made.listed() == sorted(one.snapshot_id for one in taken.snapshots)
        for one in taken.snapshots:
            restored = made.restore(f"r{one.snapshot_id[-4:]}", one.snapshot_id)
            assert (made.data(restored.volume_id) / "file").read_text() == one.source_volume_id


def test_members_go_with_their_group() -> None:
    with scene() as made:
        volumes = [made.create(f"v{number}").volume_id for number in range(2)]
        taken = group(made, "g", *volumes)
        member = taken.snapshots[0].snapshot_id

        alone = made.client.call(pb.DeleteSnapshotRequest(snapshot_id=member))
        wrong = made.client.call(
            pb.DeleteVolumeGroupSnapshotRequest(
                group_snapshot_id=taken.group_snapshot_id, snapshot_ids=[member]
            )
        )
        request = pb.DeleteVolumeGroupSnapshotRequest(group_snapshot_id=taken.group_snapshot_id)
        whole = [made.client.call(request) for _ in range(2)]

        assert alone.code is Code.FAILED_PRECONDITION
        assert wrong.code is Code.INVALID_ARGUMENT
        assert whole == [pb.DeleteVolumeGroupSnapshotResponse()] * 2
        assert made.listed() == []
        gone = made.client.call(pb.GetVolumeGroupSnapshotRequest(group_snapshot_id=taken.group_snapshot_id))
        assert gone.code is Code.NOT_FOUND


@pytest.mark.parametrize("broken", ["missing volume", "no room"])
def test_all_or_nothing(broken: str) -> None:
    with scene("total = '8Mi'") as made:
        volumes = [made.create(f"v{number}", 2 * MIB).volume_id for number in range(3)]
        room = made.available()
        pool, tag, _ = volumes[0].split("-")
        other = f"{pool}-{tag}-{'0' * 32}"

        failure = group(made, "g", *volumes[:2], other if broken == "missing volume" else volumes[2])

        assert failure.code is (Code.NOT_FOUND if broken == "missing volume" else Code.RESOURCE_EXHAUSTED)
        for one in made.driver.pools:
            one.empty_trash()
        assert made.listed() == []
        assert made.available() == room
        assert os.listdir(made.base / "mem" / "staging") == []


def test_a_name_is_taken_by_other_volumes() -> None:
    with scene() as made:
        one, two = (made.create(name).volume_id for name in ("one", "two"))
        group(made, "g", one)

        assert group(made, "g", one, two).code is Code.ALREADY_EXISTS
        # A snapshot of that name is something else.
        assert made.snapshot("g", two).ready_to_use


def test_a_group_that_was_not_finished_leaves_no_members() -> None:
    with directory() as base:
        config = memory_pool(base / "mem")
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            volumes = [made.create(f"v{number}").volume_id for number in range(2)]
            taken = group(made, "g", *volumes)
        # As if the driver had died before the group's own rename.
        home = base / "mem" / "groups" / taken.group_snapshot_id
        (home / "group.json").unlink()
        home.rmdir()
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            again = Scene(client, base, driver)
            assert again.listed() == []
            assert os.listdir(base / "mem" / "snapshots") == []
            assert len(group(again, "g", *volumes).snapshots) == 2


def test_members_may_be_in_several_pools() -> None:
    with directory() as base:
        config = memory_pool(base / "mem") + memory_pool(base / "other", "other")
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            one = made.create("one", parameters={"pool": "mem"}).volume_id
            two = made.create("two", parameters={"pool": "other"}).volume_id
            taken = group(made, "g", two, one)
            assert sorted(snapshot.source_volume_id for snapshot in taken.snapshots) == sorted([one, two])
            again = group(made, "g", one, two)
    assert taken == again


def test_members_stay_while_the_pool_that_their_group_is_in_is_not_configured() -> None:
    with directory() as base:
        other = memory_pool(base / "other", "other")
        both = memory_pool(base / "mem") + other
        with driver_over(both) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            sources = [made.create(name, parameters={"pool": name}).volume_id for name in ("mem", "other")]
            taken = group(made, "g", *sources)
        with driver_over(other) as driver, serving(driver.handlers, base) as client:
            assert Scene(client, base, driver).listed() == []
        with driver_over(both) as driver, serving(driver.handlers, base) as client:
            found = client.call(
                pb.GetVolumeGroupSnapshotRequest(group_snapshot_id=taken.group_snapshot_id)
            ).group_snapshot
            assert found == taken
        # Only when that pool is said to be gone for good, nobody has them any more.
        tag = taken.group_snapshot_id.split("-")[1]
        with driver_over(f'retired_tags = ["{tag}"]\n' + other):
            assert os.listdir(base / "other" / "snapshots") == []
