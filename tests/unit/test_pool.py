# SPDX-License-Identifier: Apache-2.0
"""One pool: making, growing, deleting, and what a start finds."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest

from csi_driver.backends.base import Backend
from csi_driver.catalog import Catalog, Home
from csi_driver.errors import Aborted, ConfigurationError, ResourceExhausted
from csi_driver.identity import SCHEMA
from csi_driver.model import (
    GIB,
    MIB,
    AccessType,
    Record,
    Source,
    SourceKind,
    TopologyRequirement,
    VolumeSpec,
)
from csi_driver.pool import Pool
from csi_driver.values import Reserved
from tests.rig import Rig, configure, open_pool, volume
from tests.unit.conftest import MEMORY, OpenRig

SIZE = 16 * MIB


def create(pool: Pool, name: str = "a", size_bytes: int = SIZE) -> Home:
    record = Record(
        schema=SCHEMA,
        id=pool.id_of(name),
        name=name,
        size_bytes=size_bytes,
        access_type=AccessType.MOUNT,
    )
    return pool.create(VolumeSpec(size_bytes, AccessType.MOUNT), record)


def entries(pool: Pool, area: str) -> list[str]:
    return sorted(path.name for path in (pool.catalog.root / area).iterdir())


Hook = Callable[..., None]


@dataclass
class Interposed:
    """Another backend, with something done before (or after) some of its methods."""

    backend: Backend
    hooks: Mapping[str, Hook]
    after: bool

    def __getattr__(self, name: str) -> object:
        method, hook = getattr(self.backend, name), self.hooks.get(name)
        if hook is None:
            return method

        def call(*arguments: object, **named: object) -> object:
            if not self.after:
                hook(*arguments)
            answer = method(*arguments, **named)
            if self.after:
                hook(*arguments)
            return answer

        return call


@contextmanager
def interposed(pool: Pool, *, after: bool = False, **hooks: Hook) -> Iterator[None]:
    whole = pool.backend
    interposer = cast(Backend, Interposed(whole, hooks, after))
    # The pool and its parts, which have the backend each.
    places = [
        (part, name)
        for part in (pool, *vars(pool).values())
        for name, value in getattr(part, "__dict__", {}).items()
        if value is whole
    ]
    for part, name in places:
        setattr(part, name, interposer)
    try:
        yield
    finally:
        for part, name in places:
            setattr(part, name, whole)


def fail(error: Exception) -> Hook:
    def hook(*_: object) -> None:
        raise error

    return hook


BROKEN, BUSY = fail(ValueError("broken")), fail(OSError(16, "busy"))


def test_created_volume_is_there_and_counted(rig: Rig) -> None:
    home = create(rig.pool)

    assert rig.pool.catalog.ids() == [home.id]
    assert rig.pool.size_bytes(home) == SIZE
    assert rig.pool.capacity().available_bytes == GIB - SIZE


@pytest.mark.parametrize("after", [False, True])
def test_failed_making_leaves_nothing(rig: Rig, after: bool) -> None:
    with interposed(rig.pool, after=after, make=BROKEN), pytest.raises(ValueError, match="broken"):
        create(rig.pool)

    assert entries(rig.pool, "staging") == entries(rig.pool, "volumes") == []
    assert rig.pool.capacity().available_bytes == GIB
    create(rig.pool)


@pytest.mark.parametrize("number", [28, 122, 30])  # ENOSPC, EDQUOT, EROFS
def test_filesystem_that_refuses_is_no_room_here(rig: Rig, number: int) -> None:
    refused = fail(OSError(number, "refused", "x"))

    with interposed(rig.pool, make=refused), pytest.raises(ResourceExhausted, match=r"pool 'p'.*refused"):
        create(rig.pool)

    assert entries(rig.pool, "staging") == []


def test_undo_that_fails_is_aborted_and_the_next_try_finishes_it(rig: Rig) -> None:
    with interposed(rig.pool, make=BROKEN, clear=BUSY), pytest.raises(Aborted, match=r"broken.*busy"):
        create(rig.pool)
    assert entries(rig.pool, "staging") == [rig.pool.id_of("a")]

    create(rig.pool)

    assert entries(rig.pool, "staging") == []
    assert rig.pool.capacity().available_bytes == GIB - SIZE


def test_leftover_that_cannot_be_removed_is_aborted(rig: Rig) -> None:
    rig.pool.catalog.begin(rig.pool.id_of("a"))

    with interposed(rig.pool, clear=BUSY), pytest.raises(Aborted, match="earlier try"):
        create(rig.pool)


def test_volume_that_stands_after_all_is_counted(rig: Rig) -> None:
    asked: list[object] = []

    def once(home: object) -> None:
        asked.append(home)
        if len(asked) == 1:
            raise OSError(5, "I/O error")

    with interposed(rig.pool, written_bytes=once), pytest.raises(OSError, match="I/O error"):
        create(rig.pool)

    assert len(rig.pool.catalog.ids()) == 1
    assert rig.pool.capacity().available_bytes == GIB - SIZE


@pytest.mark.parametrize("kind", ["clone", "snapshot"])
def test_a_copy_that_stands_after_all_is_counted(
    opened: OpenRig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rig = opened()
    source = create(rig.pool)
    catalog, really = rig.pool.catalog, os.fsync
    made = rig.pool.id_of("b") if kind == "clone" else rig.pool.snapshot_id_of("b")

    def sync(fd: int) -> None:
        if catalog.find(made) or catalog.find_snapshot(made):
            raise OSError(5, "I/O error")
        really(fd)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(Aborted, match="made, but not surely on disk"):
        if kind == "clone":
            wanted = replace(volume("b", SIZE), source=Source(SourceKind.VOLUME, source.id))
            rig.controller.create_volume(wanted)
        else:
            rig.snapshots.create("b", source.id, {}, TopologyRequirement())
    monkeypatch.undo()

    counted = rig.pool.space.promised()
    assert opened().pool.space.promised() == counted > SIZE


def test_no_room_is_told_before_anything_is_made(rig: Rig) -> None:
    with interposed(rig.pool, make=BROKEN), pytest.raises(ResourceExhausted):
        create(rig.pool, size_bytes=2 * GIB)


def test_grown_volume_takes_the_difference(rig: Rig) -> None:
    home = create(rig.pool)

    actual = rig.pool.grow(home, rig.pool.catalog.read(home), 3 * SIZE)

    assert actual == 3 * SIZE
    assert rig.pool.catalog.read(home).size_bytes == 3 * SIZE
    assert rig.pool.capacity().available_bytes == GIB - 3 * SIZE


def test_never_shrinks(rig: Rig) -> None:
    home = create(rig.pool)

    assert rig.pool.grow(home, rig.pool.catalog.read(home), SIZE // 2) == SIZE
    assert rig.pool.catalog.read(home).size_bytes == SIZE
    assert rig.pool.capacity().available_bytes == GIB - SIZE


def test_growth_without_room_changes_nothing(rig: Rig) -> None:
    home = create(rig.pool)

    with pytest.raises(ResourceExhausted):
        rig.pool.grow(home, rig.pool.catalog.read(home), 2 * GIB)

    assert rig.pool.size_bytes(home) == rig.pool.catalog.read(home).size_bytes == SIZE
    assert rig.pool.capacity().available_bytes == GIB - SIZE


def test_growing_again_reaches_the_backend(rig: Rig) -> None:
    home = create(rig.pool)
    rig.pool.grow(home, rig.pool.catalog.read(home), 2 * SIZE)

    with interposed(rig.pool, grow=BROKEN), pytest.raises(ValueError, match="broken"):
        rig.pool.grow(home, rig.pool.catalog.read(home), 2 * SIZE)


def test_storage_ahead_of_its_record_after_a_crash_is_counted_as_it_is(opened: OpenRig) -> None:
    rig = opened()
    home = create(rig.pool)
    rig.backend.grow(home, 3 * SIZE)  # the process died before the record was written

    rig = opened()

    assert rig.pool.capacity().available_bytes == GIB - 3 * SIZE
    home = rig.pool.catalog.get(home.id)
    assert rig.pool.grow(home, rig.pool.catalog.read(home), 3 * SIZE) == 3 * SIZE
    assert rig.pool.catalog.read(home).size_bytes == 3 * SIZE


def test_deleted_volume_is_gone_at_once_and_its_room_once_the_trash_is_emptied(rig: Rig) -> None:
    told: list[int] = []
    rig.pool.on_trash = lambda: told.append(1)
    home = create(rig.pool)

    rig.pool.delete(home)
    assert rig.pool.catalog.find(home.id) is None
    assert rig.pool.capacity().available_bytes == GIB - SIZE
    assert told == [1]

    assert rig.pool.empty_trash() is None
    assert entries(rig.pool, "trash") == []
    assert rig.pool.capacity().available_bytes == GIB


def test_what_is_in_the_trash_makes_room_as_soon_as_it_is_needed(rig: Rig) -> None:
    for number in range(3):
        home = create(rig.pool, f"v{number}", 768 * MIB)
        if number == 1:
            rig.pool.grow(home, rig.pool.catalog.read(home), GIB)
        rig.pool.delete(home)

    assert len(entries(rig.pool, "trash")) == 1


def test_what_retention_keeps_in_the_trash_makes_no_room(opened: OpenRig) -> None:
    rig = opened(extra='reserved = "0%"\nretention = "1h"\n')
    rig.pool.delete(create(rig.pool, "a", 768 * MIB))

    with pytest.raises(ResourceExhausted):
        create(rig.pool, "b", 768 * MIB)

    assert len(entries(rig.pool, "trash")) == 1


def test_a_trash_that_cannot_be_emptied_is_no_room(rig: Rig) -> None:
    rig.pool.delete(create(rig.pool, "a", 768 * MIB))

    with interposed(rig.pool, clear=BUSY), pytest.raises(ResourceExhausted):
        create(rig.pool, "b", 768 * MIB)

    create(rig.pool, "b", 768 * MIB)


def test_name_is_free_again_while_its_old_volume_is_in_the_trash(rig: Rig) -> None:
    rig.pool.delete(create(rig.pool))

    create(rig.pool)

    assert rig.pool.capacity().available_bytes == GIB - 2 * SIZE


def test_retention_keeps_the_deleted(opened: OpenRig) -> None:
    rig = opened(extra='reserved = "0%"\nretention = "1h"\n')
    rig.pool.delete(create(rig.pool, "kept"))
    rig.pool.delete(create(rig.pool, "inline"), keep=False)

    due = rig.pool.empty_trash()
    assert due is not None
    assert 3590 < due <= 3600
    assert [name.split(".")[0] for name in entries(rig.pool, "trash")] == [rig.pool.id_of("kept")]

    assert rig.pool.empty_trash(now=time.time() + 3601) is None
    assert entries(rig.pool, "trash") == []


def test_trash_survives_a_restart_and_is_counted(opened: OpenRig) -> None:
    rig = opened()
    rig.pool.delete(create(rig.pool))

    rig = opened()
    assert rig.pool.capacity().available_bytes == GIB - SIZE
    rig.pool.empty_trash()

    assert rig.pool.capacity().available_bytes == GIB


def test_one_that_cannot_be_removed_does_not_keep_the_others(rig: Rig) -> None:
    stuck, other = create(rig.pool, "stuck"), create(rig.pool, "other")
    rig.pool.delete(stuck)
    rig.pool.delete(other)

    def busy(home: Home) -> None:
        if home.id == stuck.id:
            raise OSError(16, "busy")

    with interposed(rig.pool, clear=busy), pytest.raises(OSError, match="busy"):
        rig.pool.empty_trash()

    assert [name.split(".")[0] for name in entries(rig.pool, "trash")] == [stuck.id]
    assert rig.pool.capacity().available_bytes == GIB - SIZE


def test_what_a_wrong_clock_deleted_in_the_future_is_kept_no_longer_than_the_rest(opened: OpenRig) -> None:
    rig = opened(extra='reserved = "0%"\nretention = "1h"\n')
    rig.pool.delete(create(rig.pool))
    (ahead,) = (rig.pool.catalog.root / "trash").iterdir()
    ahead.rename(ahead.with_suffix(f".{time.time_ns() + 10**18}"))
    rig = opened(extra='reserved = "0%"\nretention = "1h"\n')

    due = rig.pool.empty_trash()
    assert due is not None
    assert due <= 3600
    rig.pool.empty_trash(now=time.time() + 3700)

    assert entries(rig.pool, "trash") == []
    assert rig.pool.capacity().available_bytes == GIB


def test_delete_whose_last_sync_failed_keeps_no_promise(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    home = create(rig.pool)
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", fail(OSError(5, "I/O error")))
        with pytest.raises(OSError, match="fsync"):
            rig.pool.delete(home)

    assert rig.pool.catalog.find(home.id) is None
    assert rig.pool.space.promised() == 0


def test_growth_that_failed_after_all_was_grown_is_counted_as_it_is(rig: Rig) -> None:
    home = create(rig.pool)

    with interposed(rig.pool, after=True, grow=BROKEN), pytest.raises(ValueError, match="broken"):
        rig.pool.grow(home, rig.pool.catalog.read(home), 2 * SIZE)

    assert rig.pool.space.promised() == 2 * SIZE


def test_volume_that_cannot_be_read_does_not_keep_the_others_from_being_counted(rig: Rig) -> None:
    sick, well = sorted(create(rig.pool, name).id for name in "ab")
    counted: list[str] = []

    def count(home: Home) -> None:
        counted.append(home.id)
        if home.id == sick:
            raise OSError(5, "I/O error")

    with interposed(rig.pool, written_bytes=count):
        rig.pool.refresh()

    assert counted == [sick, well]


# What a start finds


def test_pool_that_lost_its_uuid_is_not_given_another(opened: OpenRig) -> None:
    rig = opened()
    home = create(rig.pool)
    (rig.pool.catalog.root / "pool.json").unlink()

    with pytest.raises(ConfigurationError, match=rf"pool.json: missing.*{home.id}.*backup"):
        opened()


def test_half_made_volumes_are_thrown_away(opened: OpenRig) -> None:
    rig = opened()
    staged = rig.pool.catalog.begin(rig.pool.id_of("a"))
    rig.backend.make(staged, VolumeSpec(SIZE, AccessType.MOUNT))
    assert rig.pool.was_interrupted()

    rig = opened()

    assert entries(rig.pool, "staging") == []
    assert not rig.pool.was_interrupted()
    assert len(entries(rig.pool, "trash")) == 1, "a start does not wait until all files are removed"
    rig.settle()
    assert entries(rig.pool, "trash") == []
    assert rig.pool.capacity().available_bytes == GIB


def test_volumes_are_adopted(opened: OpenRig) -> None:
    rig = opened()
    made = {create(rig.pool, f"v{number}").id for number in range(10)}

    rig = opened()

    assert set(rig.pool.catalog.ids()) == made
    assert rig.pool.capacity().available_bytes == GIB - 10 * SIZE
    assert rig.pool.damaged == {}


def test_damaged_record_does_not_stop_the_others(opened: OpenRig) -> None:
    rig = opened()
    bad, good = create(rig.pool, "bad"), create(rig.pool, "good")
    (bad.path / "volume.json").write_text("{")

    rig = opened()

    assert list(rig.pool.damaged) == [bad.id]
    assert "damaged" in rig.pool.damaged[bad.id]
    assert rig.pool.catalog.find(good.id) is not None


def test_payload_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    pool = open_pool(configure(MEMORY, tmp_path / "p"))
    home = create(pool)
    with interposed(pool, size_bytes=fail(FileNotFoundError(2, "gone", "image"))):
        pool.adopt()
    pool.close()

    assert list(pool.damaged) == [home.id]


def test_record_of_a_newer_version_stops_the_start(opened: OpenRig) -> None:
    rig = opened()
    home = create(rig.pool)
    path = home.path / "volume.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": SCHEMA + 1}))

    with pytest.raises(ConfigurationError, match="newer version"):
        opened()


def test_renamed_pool_stops_the_start_and_says_what_it_was_called(tmp_path: Path) -> None:
    pool = open_pool(configure(MEMORY, tmp_path / "p"))
    create(pool)
    pool.close()

    with pytest.raises(ConfigurationError, match=r"pool named 'p'.*\[pools.p\]"):
        open_pool(configure(MEMORY, tmp_path / "p", name="q"))

    open_pool(configure(MEMORY, tmp_path / "p")).close()


def test_strange_things_in_a_pool_are_left_alone(opened: OpenRig) -> None:
    rig = opened()
    create(rig.pool)
    strange = rig.pool.catalog.root / "volumes" / "lost+found"
    strange.mkdir()

    rig = opened()

    assert rig.pool.damaged == {}
    assert strange.is_dir()


def test_capacity_heeds_what_is_reserved(opened: OpenRig) -> None:
    for extra, reserved in (('reserved = "10%"\n', GIB // 10), ("reserved = 4096\n", 4096)):
        capacity = opened(extra=extra).pool.capacity()

        assert capacity.available_bytes == GIB - reserved
        assert capacity.maximum_volume_bytes <= capacity.available_bytes
        assert capacity.available_bytes - capacity.maximum_volume_bytes < 4096
        assert capacity.minimum_volume_bytes == 4096


def test_largest_volume_offered_can_be_made(rig: Rig) -> None:
    create(rig.pool, size_bytes=rig.pool.capacity().maximum_volume_bytes)

    assert rig.pool.capacity().maximum_volume_bytes == 0


def test_pool_whose_directory_went_away_has_no_room(rig: Rig) -> None:
    rig.pool.catalog.root.rename(rig.pool.catalog.root.with_name("moved"))

    with pytest.raises(ResourceExhausted, match="not there any more"):
        create(rig.pool)


def test_ids_say_pool_and_disk(rig: Rig) -> None:
    pool, tag, _ = rig.pool.id_of("a").split("-")

    assert (pool, tag) == ("p", rig.pool.catalog.tag)
    assert rig.pool.id_of("a") != rig.pool.id_of("b")


def test_reserved_share_of_nothing_is_nothing() -> None:
    assert Reserved(share=0.5).of(0) == 0


def test_catalog_is_the_pools_while_it_is_open(rig: Rig) -> None:
    with pytest.raises(ConfigurationError, match="another process"):
        Catalog.open(rig.pool.catalog.root, "memory")
