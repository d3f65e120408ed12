# SPDX-License-Identifier: Apache-2.0
"""A pool that gets full in the middle of a copy, filled by others than its volumes: nothing half is left, and it says so."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.copies import Copier
from csi_driver.errors import Aborted, Error, ResourceExhausted
from csi_driver.jobs import Jobs
from csi_driver.linux.freeze import Freezer
from csi_driver.model import MIB, Source, SourceKind, TopologyRequirement, VolumeRequest
from csi_driver.snapshots import Snapshots
from tests.rig import KINDS, NODE_SEGMENTS, SHARING, Kind, Rig, volume, wait_until
from tests.scene import Scene, in_pod, set_up
from tests.unit.test_pool import interposed

SIZE = 128 * MIB
DATA = 48 * MIB
ANYWHERE = TopologyRequirement()
# What moves data: copies that share blocks take no room worth speaking of.
COPYING = [kind for kind in KINDS if kind.name in ("image", "directory")]
THICK_CLONES = [kind for kind in SHARING if kind.name == "image-xfs"]


@pytest.fixture(params=COPYING, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def scene(kind: Kind, place: Path) -> Iterator[Scene]:
    with set_up(kind, place) as scene:
        yield scene


def ballast_of(scene: Scene) -> Path:
    assert scene.filesystem is not None
    return scene.filesystem / "ballast"


def fill_up(scene: Scene) -> None:
    """Take all the room there is, as a stranger who shares the disk would."""
    step = 64 * MIB
    with open(ballast_of(scene), "wb") as file:
        size = 0
        while step >= 4096:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError:
                step //= 2


def homes(rig: Rig) -> dict[str, list[str]]:
    root = rig.pool.catalog.root
    return {area: sorted(os.listdir(root / area)) for area in ("volumes", "snapshots", "staging")}


def origin(scene: Scene, rig: Rig) -> str:
    made = rig.controller.create_volume(volume("origin", SIZE)).id
    with in_pod(scene, rig, made) as pod:
        (pod / "file").write_bytes(os.urandom(DATA))
        os.sync()
    return made


def copy_of(kind: str, rig: Rig, source: str) -> Callable[[], object]:
    if kind == "snapshot":
        return lambda: rig.snapshots.create("copy", source, {}, ANYWHERE)
    if kind == "restore":
        taken = rig.snapshots.create("s", source, {}, ANYWHERE).record.id
        return lambda: rig.controller.create_volume(request(Source(SourceKind.SNAPSHOT, taken)))
    return lambda: rig.controller.create_volume(request(Source(SourceKind.VOLUME, source)))


def request(source: Source) -> VolumeRequest:
    return replace(volume("copy", SIZE), source=source)


@pytest.mark.parametrize("what", ["snapshot", "restore", "clone"])
def test_a_copy_in_the_call_ends_with_nothing_left(scene: Scene, what: str) -> None:
    rig = scene.open()
    source = origin(scene, rig)
    copy = copy_of(what, rig, source)
    before = homes(rig)

    with interposed(rig.pool, copy=lambda *_: fill_up(scene)), pytest.raises(ResourceExhausted):
        copy()
    assert homes(rig) == before

    ballast_of(scene).unlink()
    rig.pool.refresh()
    room = rig.pool.space.available()
    copy()
    assert homes(rig) != before
    assert homes(rig)["staging"] == []
    assert rig.pool.space.available() < room


@contextmanager
def in_background(scene: Scene) -> Iterator[Rig]:
    """A driver whose copies are jobs that nobody waits for."""
    rig = scene.open()
    rig.copier.close()
    rig.copier = Copier(Jobs(1), Freezer(), patience_s=0.0)
    rig.snapshots = Snapshots(rig.pools, rig.locks, rig.copier, NODE_SEGMENTS)
    rig.controller = type(rig.controller)(
        rig.pools, rig.locks, rig.health, rig.copier, NODE_SEGMENTS, expands=True
    )
    yield rig


def repeated(copy: Callable[[], object]) -> object:
    """As Kubernetes asks: again, until there is an end."""
    while True:
        try:
            answer = copy()
        except Aborted:
            threading.Event().wait(0.05)
            continue
        if getattr(answer, "ready", True):
            return answer
        threading.Event().wait(0.05)


@pytest.mark.parametrize("what", ["snapshot", "restore", "clone"])
def test_a_copy_behind_the_call_ends_with_nothing_left(scene: Scene, what: str) -> None:
    with in_background(scene) as rig:
        source = origin(scene, rig)
        if what == "restore":
            repeated(lambda: rig.snapshots.create("s", source, {}, ANYWHERE))
        copy = copy_of(what, rig, source)
        before = homes(rig)

        with interposed(rig.pool, copy=lambda *_: fill_up(scene)), pytest.raises(ResourceExhausted):
            repeated(copy)
        assert homes(rig) == before
        assert rig.copier.jobs.counts().ended[what, "failed"] == 1

        ballast_of(scene).unlink()
        rig.pool.refresh()
        repeated(copy)
        assert homes(rig)["staging"] == []
        assert homes(rig) != before


@pytest.mark.parametrize("kind", THICK_CLONES, ids=lambda kind: kind.name)
def test_a_larger_thick_clone_that_has_no_room_to_be_thick_leaves_nothing(scene: Scene) -> None:
    rig = scene.open()
    source = origin(scene, rig)
    before = homes(rig)
    larger = replace(volume("copy", 2 * SIZE), source=Source(SourceKind.VOLUME, source))

    filling = interposed(rig.pool, finish=lambda *_: fill_up(scene))
    with filling, pytest.raises(ResourceExhausted):
        rig.controller.create_volume(larger)
    assert homes(rig) == before

    full = rig.backend.store().free_bytes
    ballast_of(scene).unlink()
    # XFS frees it in the background, and what was counted a moment ago is not counted again.
    assert wait_until(lambda: rig.backend.store().free_bytes > full + 3 * SIZE)
    rig.pool.refresh()
    rig.controller.create_volume(larger)
    assert homes(rig)["staging"] == []


class Copying(threading.Thread):
    """A copy in another thread, and what it failed with."""

    def __init__(self, copy: Callable[[], object]) -> None:
        super().__init__()
        self._copy = copy
        self.failure: Error | None = None

    def run(self) -> None:
        try:
            self._copy()
        except Error as error:
            self.failure = error


def wait_for_data(scene: Scene) -> None:
    deadline = time.monotonic() + 20
    while not any(path.is_file() and path.stat().st_blocks for path in scene.root.glob("staging/*/**/*")):
        assert time.monotonic() < deadline, "no copy began"
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["snapshot", "clone"])
def test_a_disk_that_others_fill_between_two_steps_of_a_copy(scene: Scene, what: str) -> None:
    # Some steps, which leave time to fill the disk between them.
    rig = scene.open(f'reserved = 0\ncopy_bandwidth = "{DATA // 3}"\n')
    source = origin(scene, rig)
    copy = copy_of(what, rig, source)
    before, room = homes(rig), rig.pool.space.available()
    copying = Copying(copy)

    copying.start()
    wait_for_data(scene)
    fill_up(scene)
    copying.join()

    assert isinstance(copying.failure, ResourceExhausted), copying.failure
    assert homes(rig) == before
    ballast_of(scene).unlink()
    os.sync()
    rig.settle()
    assert abs(rig.pool.space.available() - room) < MIB
    copy()
