# SPDX-License-Identifier: Apache-2.0
"""A filesystem that others fill while a copy into it goes on: the copy is refused, nothing is left, a repeat succeeds."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.errors import Error, ResourceExhausted
from csi_driver.model import MIB, Source, SourceKind, TopologyRequirement
from tests.rig import KINDS, Kind, Rig, volume
from tests.scene import Scene, in_pod, set_up

DATA_BYTES = 24 * MIB
# Three steps of a copy, which leave time to fill the filesystem between them.
EXTRA = 'reserved = 0\ncopy_bandwidth = "8Mi"\n'
COPIED = tuple(kind for kind in KINDS if kind.name in ("image", "directory"))


@pytest.mark.parametrize("what", ["snapshot", "clone"])
@pytest.mark.parametrize("kind", COPIED, ids=lambda kind: kind.name)
def test_a_pool_that_gets_full_in_the_middle(kind: Kind, what: str, place: Path) -> None:
    with set_up(kind, place, 256 * MIB) as scene:
        rig = scene.open(EXTRA)
        origin = rig.controller.create_volume(volume("origin", 48 * MIB)).id
        with in_pod(scene, rig, origin) as pod:
            for number in range(3):
                (pod / f"file{number}").write_bytes(os.urandom(DATA_BYTES // 3))
        os.sync()
        before = rig.pool.space.available()
        copying = Copying(rig, origin, what)
        copying.start()
        wait_for_data(scene)
        filler = fill(scene)
        copying.join()

        assert isinstance(copying.failure, ResourceExhausted), copying.failure
        assert os.listdir(scene.root / "staging") == os.listdir(scene.root / "snapshots") == []
        filler.unlink()
        os.sync()
        rig.settle()
        assert abs(rig.pool.space.available() - before) < MIB
        again = Copying(rig, origin, what)
        again.run()
        assert again.failure is None


class Copying(threading.Thread):
    """A call in another thread, and what it failed with."""

    def __init__(self, rig: Rig, origin: str, what: str) -> None:
        super().__init__()
        self._rig = rig
        self._origin = origin
        self._what = what
        self.failure: Error | None = None

    def run(self) -> None:
        try:
            if self._what == "snapshot":
                self._rig.snapshots.create("s", self._origin, {}, TopologyRequirement())
            else:
                source = Source(SourceKind.VOLUME, self._origin)
                self._rig.controller.create_volume(replace(volume("clone", 48 * MIB), source=source))
        except Error as error:
            self.failure = error


def wait_for_data(scene: Scene) -> None:
    deadline = time.monotonic() + 20
    while not any(path.is_file() and path.stat().st_blocks for path in scene.root.glob("staging/*/**/*")):
        assert time.monotonic() < deadline, "no copy began"
        time.sleep(0.01)


def fill(scene: Scene) -> Path:
    """Take all that the filesystem has."""
    path, step, size = scene.root.parent / "filler", 64 * MIB, 0
    with open(path, "wb") as file:
        while step >= 4096:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError:
                step //= 2
    return path
