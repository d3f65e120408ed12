# SPDX-License-Identifier: Apache-2.0
"""Snapshots, restores and clones over memory pools, through the socket."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi_driver.app import Driver
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.unit.wire import Client, Failure, directory, driver_over, memory_pool, mount_capability, serving

MIB = 1 << 20
Code = grpc.StatusCode


@dataclass
class Scene:
    """One driver and its client."""

    client: Client
    base: Path
    driver: Driver

    def create(self, name: str, size: int = MIB, **more: Any) -> Any:
        wanted = pb.CreateVolumeRequest(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=size),
            volume_capabilities=[mount_capability()],
            **more,
        )
        answer = self.client.call(wanted)
        return answer if isinstance(answer, Failure) else answer.volume

    def snapshot(self, name: str, volume_id: str, **more: Any) -> Any:
        answer = self.client.call(pb.CreateSnapshotRequest(name=name, source_volume_id=volume_id, **more))
        return answer if isinstance(answer, Failure) else answer.snapshot

    def restore(self, name: str, snapshot_id: str, size: int = MIB, **more: Any) -> Any:
        source = pb.VolumeContentSource(
            snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot_id)
        )
        return self.create(name, size, volume_content_source=source, **more)

    def clone(self, name: str, volume_id: str, size: int = MIB, **more: Any) -> Any:
        source = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=volume_id))
        return self.create(name, size, volume_content_source=source, **more)

    def listed(self, **more: Any) -> list[str]:
        return [one.snapshot.snapshot_id for one in self.client.call(pb.ListSnapshotsRequest(**more)).entries]

    def data(self, made_id: str, kind: str = "volumes") -> Path:
        pool = made_id.partition("-")[0]
        return self.base / pool / kind / made_id / "data"

    def available(self) -> int:
        answer = self.client.call(pb.GetCapacityRequest())
        return int(answer.available_capacity)


@contextmanager
def scene(more: str = "", head: str = "") -> Iterator[Scene]:
    with directory() as base, driver_over(head + memory_pool(base / "mem", more=more)) as driver:
        with serving(driver.handlers, base) as client:
            yield Scene(client, base, driver)


@pytest.fixture
def here() -> Iterator[Scene]:
    with scene() as made:
        yield made


def test_a_snapshot_shows_its_volume_as_it_was(here: Scene) -> None:
    volume = here.create("v")
    (here.data(volume.volume_id) / "file").write_text("before")

    snapshot = here.snapshot("s", volume.volume_id)
    (here.data(volume.volume_id) / "file").write_text("after")
    restored = here.restore("r", snapshot.snapshot_id)

    assert snapshot.ready_to_use
    assert snapshot.source_volume_id == volume.volume_id
    assert snapshot.size_bytes == volume.capacity_bytes
    assert (here.data(restored.volume_id) / "file").read_text() == "before"
    assert restored.content_source.snapshot.snapshot_id == snapshot.snapshot_id


def test_a_clone_is_a_volume_of_its_own(here: Scene) -> None:
    volume = here.create("v")
    (here.data(volume.volume_id) / "file").write_text("one")

    cloned = here.clone("c", volume.volume_id)
    (here.data(cloned.volume_id) / "file").write_text("two")

    assert (here.data(volume.volume_id) / "file").read_text() == "one"
    assert cloned.content_source.volume.volume_id == volume.volume_id


def test_repeats_find_what_there_is(here: Scene) -> None:
    volume = here.create("v")

    first, again = (here.snapshot("s", volume.volume_id) for _ in range(2))
    one, same = (here.restore("r", first.snapshot_id) for _ in range(2))

    assert first == again
    assert one == same


def test_a_name_is_taken_by_other_arguments(here: Scene) -> None:
    one, two = here.create("one"), here.create("two")
    snapshot = here.snapshot("s", one.volume_id)
    here.restore("r", snapshot.snapshot_id)

    assert here.snapshot("s", two.volume_id).code is Code.ALREADY_EXISTS
    assert here.create("r").code is Code.ALREADY_EXISTS
    assert here.clone("r", one.volume_id).code is Code.ALREADY_EXISTS
    assert here.restore("one", snapshot.snapshot_id).code is Code.ALREADY_EXISTS


def test_a_volume_and_a_snapshot_of_one_name_do_not_meet(here: Scene) -> None:
    volume = here.create("same")
    snapshot = here.snapshot("same", volume.volume_id)

    assert snapshot.snapshot_id != volume.volume_id
    here.client.call(pb.DeleteSnapshotRequest(snapshot_id=volume.volume_id))
    assert here.client.call(pb.ControllerGetVolumeRequest(volume_id=volume.volume_id)).volume == volume


@pytest.mark.parametrize("kind", ["restore", "clone"])
def test_a_copy_is_as_large_as_its_source_or_larger(here: Scene, kind: str) -> None:
    volume = here.create("v", 2 * MIB)
    source = volume.volume_id if kind == "clone" else here.snapshot("s", volume.volume_id).snapshot_id
    copy = getattr(here, kind)

    assert copy("smaller", source, MIB).code is Code.OUT_OF_RANGE
    assert copy("same", source, 2 * MIB).capacity_bytes == 2 * MIB
    assert copy("any", source, 0).capacity_bytes == 2 * MIB
    assert copy("larger", source, 3 * MIB).capacity_bytes == 3 * MIB


def test_sources_that_are_not_there(here: Scene) -> None:
    volume = here.create("v")
    pool, tag, rest = volume.volume_id.split("-")
    unknown, foreign = f"{pool}-{tag}-{'0' * 32}", f"{pool}-{'0' * 8}-{rest}"

    for name, source, code in (
        ("a", "nothing of ours", Code.NOT_FOUND),
        ("b", unknown, Code.NOT_FOUND),
        ("c", foreign, Code.RESOURCE_EXHAUSTED),
    ):
        assert here.restore(name, source).code is code
        assert here.clone(name, source).code is code
    assert here.snapshot("s", unknown).code is Code.NOT_FOUND
    # A volume is no snapshot, nor the other way round.
    assert here.restore("d", volume.volume_id).code is Code.NOT_FOUND


def test_either_may_go_first(here: Scene) -> None:
    volume = here.create("v")
    (here.data(volume.volume_id) / "file").write_text("kept")
    one, two = here.snapshot("one", volume.volume_id), here.snapshot("two", volume.volume_id)

    restored = here.restore("r", one.snapshot_id)
    here.client.call(pb.DeleteSnapshotRequest(snapshot_id=one.snapshot_id))
    here.client.call(pb.DeleteVolumeRequest(volume_id=volume.volume_id))
    later = here.restore("later", two.snapshot_id)

    assert here.listed() == [two.snapshot_id]
    for copy in (restored, later):
        assert (here.data(copy.volume_id) / "file").read_text() == "kept"


def test_deleting_what_is_not_there_is_fine_unless_it_may_be_elsewhere(here: Scene) -> None:
    unknown = here.client.call(pb.DeleteSnapshotRequest(snapshot_id="never made"))
    foreign = here.client.call(pb.DeleteSnapshotRequest(snapshot_id=f"mem-{'0' * 8}-{'0' * 32}"))

    assert unknown == pb.DeleteSnapshotResponse()
    assert foreign.code is Code.FAILED_PRECONDITION


def test_lists_have_filters_and_stable_pages(here: Scene) -> None:
    one, two = here.create("one"), here.create("two")
    made = sorted(here.snapshot(f"s{number}", one.volume_id).snapshot_id for number in range(5))
    other = here.snapshot("other", two.volume_id).snapshot_id

    page = here.client.call(pb.ListSnapshotsRequest(max_entries=2, source_volume_id=one.volume_id))
    here.client.call(pb.DeleteSnapshotRequest(snapshot_id=made[1]))
    rest = here.client.call(
        pb.ListSnapshotsRequest(source_volume_id=one.volume_id, starting_token=page.next_token)
    )

    assert [entry.snapshot.snapshot_id for entry in page.entries] == made[:2]
    assert [entry.snapshot.snapshot_id for entry in rest.entries] == made[2:]
    assert not rest.next_token
    assert here.listed(snapshot_id=other) == [other]
    assert here.listed(snapshot_id=other, source_volume_id=one.volume_id) == []
    assert here.listed(snapshot_id="x" * 500) == []
    assert here.client.call(pb.ListSnapshotsRequest(starting_token="x")).code is Code.ABORTED


def test_a_snapshot_with_a_damaged_record_hides_no_others_and_can_be_deleted(here: Scene) -> None:
    volume = here.create("v")
    made = [here.snapshot(f"s{number}", volume.volume_id).snapshot_id for number in range(3)]
    (here.data(made[1], "snapshots").parent / "snapshot.json").write_bytes(b"{")

    assert here.listed() == sorted((made[0], made[2]))
    assert here.listed(source_volume_id=volume.volume_id) == sorted((made[0], made[2]))
    assert here.client.call(pb.GetSnapshotRequest(snapshot_id=made[1])).code is Code.INTERNAL

    deleted = here.client.call(pb.DeleteSnapshotRequest(snapshot_id=made[1]))
    assert deleted == pb.DeleteSnapshotResponse()
    assert here.client.call(pb.GetSnapshotRequest(snapshot_id=made[1])).code is Code.NOT_FOUND


def test_one_snapshot_by_its_id(here: Scene) -> None:
    volume = here.create("v")
    snapshot = here.snapshot("s", volume.volume_id)

    assert here.client.call(pb.GetSnapshotRequest(snapshot_id=snapshot.snapshot_id)).snapshot == snapshot
    assert here.client.call(pb.GetSnapshotRequest(snapshot_id=volume.volume_id)).code is Code.NOT_FOUND


def test_a_snapshot_is_where_its_volume_is() -> None:
    with scene(head='node_id = "here"\n') as made:
        volume = made.create("v")
        place = pb.Topology(segments={"topology.local.orlop.dev/node": "here"})
        other = pb.Topology(segments={"topology.local.orlop.dev/node": "there"})

        wanted = pb.TopologyRequirement(requisite=[place], preferred=[place])
        snapshot = made.snapshot("s", volume.volume_id, accessibility_requirements=wanted)
        elsewhere = made.snapshot(
            "e", volume.volume_id, accessibility_requirements=pb.TopologyRequirement(requisite=[other])
        )

    assert list(snapshot.accessible_topology) == [place]
    assert elsewhere.code is Code.INVALID_ARGUMENT


def test_parameters_of_a_class_that_mean_nothing_are_refused(here: Scene) -> None:
    volume = here.create("v")

    assert here.snapshot("s", volume.volume_id, parameters={"speed": "1"}).code is Code.INVALID_ARGUMENT
    named = {"csi.storage.k8s.io/volumesnapshot/name": "n"}
    assert here.snapshot("s", volume.volume_id, parameters=named).ready_to_use


def test_a_copy_takes_room_and_gives_it_back(here: Scene) -> None:
    empty = here.available()
    volume = here.create("v", 4 * MIB)
    snapshot = here.snapshot("s", volume.volume_id)
    assert here.available() == empty - 8 * MIB
    assert here.restore("r", snapshot.snapshot_id, empty).code is Code.RESOURCE_EXHAUSTED

    here.client.call(pb.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id))
    for pool in here.driver.pools:
        pool.empty_trash()

    assert here.available() == empty - 4 * MIB
    assert os.listdir(here.base / "mem" / "staging") == []


def test_what_there_is_is_adopted() -> None:
    with directory() as base:
        config = memory_pool(base / "mem")
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            volume = made.create("v")
            snapshot = made.snapshot("s", volume.volume_id)
            room = made.available()
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            again = Scene(client, base, driver)
            assert again.listed() == [snapshot.snapshot_id]
            assert again.available() == room
            assert again.snapshot("s", volume.volume_id) == snapshot


def test_another_pool_of_the_node_takes_a_full_copy() -> None:
    with directory() as base:
        config = memory_pool(base / "mem") + memory_pool(base / "other", "other")
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            volume = made.create("v", parameters={"pool": "mem"})
            (made.data(volume.volume_id) / "file").write_text("moved")
            snapshot = made.snapshot("s", volume.volume_id)

            there = made.restore("r", snapshot.snapshot_id, parameters={"pool": "other"})
            here = made.restore("h", snapshot.snapshot_id)

    assert there.volume_id.startswith("other-")
    assert here.volume_id.startswith("mem-")


# Copies in the background


@contextmanager
def slow(bandwidth: int = 4 * MIB, file_bytes: int = 32 * MIB) -> Iterator[tuple[Scene, Any]]:
    """A pool that copies slowly, and a volume that takes long."""
    with scene(f"instant_copies = false\ncopy_bandwidth = {bandwidth}") as made:
        volume = made.create("v", 64 * MIB)
        (made.data(volume.volume_id) / "file").write_bytes(os.urandom(file_bytes))
        yield made, volume


def until(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def test_a_small_copy_is_there_at_once() -> None:
    with slow(bandwidth=0, file_bytes=MIB) as (made, volume):
        snapshot = made.snapshot("s", volume.volume_id)
        restored = made.restore("r", snapshot.snapshot_id, 64 * MIB)

        assert snapshot.ready_to_use
        same = made.data(volume.volume_id) / "file"
        assert (made.data(restored.volume_id) / "file").read_bytes() == same.read_bytes()


def test_a_long_copy_goes_on_behind_the_call() -> None:
    with slow(bandwidth=8 * MIB) as (made, volume):
        first = made.snapshot("s", volume.volume_id)
        listed = made.client.call(pb.ListSnapshotsRequest()).entries
        again = made.snapshot("s", volume.volume_id)
        early = made.restore("r", first.snapshot_id, 64 * MIB)
        deleting = made.client.call(pb.DeleteVolumeRequest(volume_id=volume.volume_id))
        until(lambda: made.snapshot("s", volume.volume_id).ready_to_use)

        assert not first.ready_to_use
        assert [entry.snapshot for entry in listed] == [first]
        assert again == first
        assert early.code in (Code.NOT_FOUND, Code.ABORTED)
        assert deleting.code is Code.ABORTED
        done = made.client.call(pb.GetSnapshotRequest(snapshot_id=first.snapshot_id)).snapshot
        assert done.creation_time == first.creation_time


def test_a_volume_is_aborted_until_its_copy_has_ended() -> None:
    with slow(bandwidth=8 * MIB) as (made, volume):
        codes = [made.clone("c", volume.volume_id, 64 * MIB).code for _ in range(2)]
        until(lambda: not isinstance(made.clone("c", volume.volume_id, 64 * MIB), Failure))
        cloned = made.clone("c", volume.volume_id, 64 * MIB)

        assert set(codes) == {Code.ABORTED}
        same = made.data(volume.volume_id) / "file"
        assert (made.data(cloned.volume_id) / "file").read_bytes() == same.read_bytes()


@pytest.mark.parametrize("kind", ["snapshot", "clone"])
def test_a_copy_is_called_off_by_its_deletion(kind: str) -> None:
    with slow(bandwidth=MIB) as (made, volume):
        room = made.available()
        if kind == "snapshot":
            made_id = made.snapshot("s", volume.volume_id).snapshot_id
            request: Any = pb.DeleteSnapshotRequest(snapshot_id=made_id)
        else:
            made.clone("c", volume.volume_id, 64 * MIB)
            made_id = next(iter(made.driver.pools)).id_of("c")
            request = pb.DeleteVolumeRequest(volume_id=made_id)

        until(lambda: not isinstance(made.client.call(request), Failure))

        assert made.listed() == []
        assert os.listdir(made.base / "mem" / "staging") == []
        assert made.available() == room


def test_a_restart_drops_what_is_half_copied_and_the_repeat_begins_anew() -> None:
    with directory() as base:
        config = memory_pool(base / "mem", more=f"instant_copies = false\ncopy_bandwidth = {MIB}")
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            volume = made.create("v", 64 * MIB)
            (made.data(volume.volume_id) / "file").write_bytes(os.urandom(32 * MIB))
            assert not made.snapshot("s", volume.volume_id).ready_to_use
        assert os.listdir(base / "mem" / "staging") == []
        fast = memory_pool(base / "mem")
        with driver_over(fast) as driver, serving(driver.handlers, base) as client:
            again = Scene(client, base, driver)
            assert again.listed() == []
            assert again.snapshot("s", volume.volume_id).ready_to_use


def test_many_restores_of_one_snapshot_at_once(here: Scene) -> None:
    volume = here.create("v")
    (here.data(volume.volume_id) / "file").write_text("shared")
    snapshot = here.snapshot("s", volume.volume_id)
    made: list[Any] = []

    def restore(number: int) -> None:
        made.append(here.restore(f"r{number}", snapshot.snapshot_id))

    threads = [threading.Thread(target=restore, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not [one for one in made if isinstance(one, Failure)]
    assert {(here.data(one.volume_id) / "file").read_text() for one in made} == {"shared"}


@pytest.mark.parametrize("kind", ["snapshot", "volume"])
def test_the_source_of_a_copy_cannot_be_deleted_while_it_runs(kind: str) -> None:
    with slow(bandwidth=8 * MIB, file_bytes=MIB) as (made, volume):
        taken = made.snapshot("s", volume.volume_id)
        content = os.urandom(32 * MIB)
        area = "volumes" if kind == "volume" else "snapshots"
        source_id = volume.volume_id if kind == "volume" else taken.snapshot_id
        (made.data(source_id, area) / "file").write_bytes(content)
        copy = made.clone if kind == "volume" else made.restore
        request: Any = (
            pb.DeleteVolumeRequest(volume_id=source_id)
            if kind == "volume"
            else pb.DeleteSnapshotRequest(snapshot_id=source_id)
        )

        assert copy("c", source_id, 64 * MIB).code is Code.ABORTED
        refused = made.client.call(request)
        until(lambda: not isinstance(copy("c", source_id, 64 * MIB), Failure))
        deleted = made.client.call(request)

        assert refused.code is Code.ABORTED
        assert not isinstance(deleted, Failure)
        copied = made.data(copy("c", source_id, 64 * MIB).volume_id)
        assert (copied / "file").read_bytes() == content


def test_the_source_is_held_also_where_a_second_pool_is_the_one_with_room() -> None:
    with directory() as base:
        text = memory_pool(base / "near", "near", f"total = {80 * MIB}\ninstant_copies = false")
        text += memory_pool(base / "far", "far", f"instant_copies = false\ncopy_bandwidth = {8 * MIB}")
        with driver_over(text) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            volume = made.create("v", 64 * MIB, parameters={"pool": "near"})
            content = os.urandom(32 * MIB)
            (made.data(volume.volume_id) / "file").write_bytes(content)
            request = pb.DeleteVolumeRequest(volume_id=volume.volume_id)

            assert made.clone("c", volume.volume_id, 64 * MIB).code is Code.ABORTED
            assert made.client.call(request).code is Code.ABORTED
            until(lambda: not isinstance(made.clone("c", volume.volume_id, 64 * MIB), Failure))
            copied = made.clone("c", volume.volume_id, 64 * MIB).volume_id

            assert copied.startswith("far-")
            assert (made.data(copied) / "file").read_bytes() == content
            assert not isinstance(made.client.call(request), Failure)


def test_at_most_so_many_copies_run_at_once() -> None:
    with scene(f"instant_copies = false\ncopy_bandwidth = {16 * MIB}", head="copy_jobs = 2\n") as made:
        volumes = [made.create(f"v{number}", 32 * MIB).volume_id for number in range(5)]
        for volume_id in volumes:
            (made.data(volume_id) / "file").write_bytes(os.urandom(16 * MIB))
        most = 0
        threads = [
            threading.Thread(target=made.snapshot, args=(f"s{number}", volume_id))
            for number, volume_id in enumerate(volumes)
        ]
        for thread in threads:
            thread.start()
        waited = False
        while (
            len(
                [
                    one
                    for one in made.client.call(pb.ListSnapshotsRequest()).entries
                    if one.snapshot.ready_to_use
                ]
            )
            < 5
        ):
            counts = made.driver.copier.jobs.counts().copying
            most = max(most, counts["snapshot", "running"])
            waited = waited or counts["snapshot", "waiting"] > 0
            time.sleep(0.02)
        for thread in threads:
            thread.join()

        assert most == 2
        assert waited
        assert made.driver.copier.jobs.counts().ended == {("snapshot", "done"): 5}


def test_the_copies_of_a_pool_share_its_bandwidth_and_others_do_not() -> None:
    with directory() as base:
        # As many as there are: `copy_jobs` is the driver's, and a job of the fast pool must not wait for the slow ones.
        text = "copy_jobs = 3\n"
        text += memory_pool(base / "slow", "slow", f"instant_copies = false\ncopy_bandwidth = {8 * MIB}")
        text += memory_pool(base / "fast", "fast", "instant_copies = false")
        with driver_over(text) as driver, serving(driver.handlers, base) as client:
            made = Scene(client, base, driver)
            ids = {}
            # So much that the fast one would be the last if it shared the others' bandwidth.
            for name, size in (("slow1", 16 * MIB), ("slow2", 16 * MIB), ("fast1", 24 * MIB)):
                volume = made.create(name, 32 * MIB, parameters={"pool": name[:4]})
                (made.data(volume.volume_id) / "file").write_bytes(os.urandom(size))
                ids[name] = volume.volume_id
            ended: dict[str, float] = {}

            def take(name: str) -> None:
                until(lambda: made.snapshot(f"of-{name}", ids[name]).ready_to_use)
                ended[name] = time.monotonic() - began

            began = time.monotonic()
            threads = [threading.Thread(target=take, args=(name,)) for name in ids]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    # 32 MiB at 8 MiB a second; the first piece need not wait.
    assert max(ended["slow1"], ended["slow2"]) > 2.5
    assert ended["fast1"] < max(ended["slow1"], ended["slow2"])
