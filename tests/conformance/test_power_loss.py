# SPDX-License-Identifier: Apache-2.0
"""The power goes out the moment an answer has been given: what was answered is on the disk.

The file behind the pool's filesystem is copied as it is then. Whatever the kernel had only in memory is not in the
copy; mounting that is what the next boot does.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.model import CapacityRange
from tests.rig import Rig, configure, open_rig, unmount, volume
from tests.scene import Scene, end_managed


def image_as_it_is(scene: Scene) -> Path:
    scene.leave_out_served("what a server has on its disk then is the server's business")
    copy = scene.place / "after.img"
    subprocess.run(["cp", "--sparse=always", scene.place / "filesystem.img", copy], check=True)
    return copy


@contextmanager
def booted(scene: Scene, copy: Path) -> Iterator[Rig]:
    """A driver over the copy. The first filesystem is gone then: two with one uuid are not mounted together."""
    assert scene.filesystem is not None
    scene.current.close()
    end_managed(scene.root)
    unmount(scene.filesystem)
    subprocess.run(["mount", "-o", "loop", "--make-private", copy, scene.filesystem], check=True)
    try:
        with open_rig(configure(scene.kind, scene.root)) as rig:
            yield rig
    finally:
        end_managed(scene.root)
        unmount(scene.filesystem)
        copy.unlink()
        # For who unmounts at the end.
        image = scene.place / "filesystem.img"
        subprocess.run(["mount", "-o", "loop", "--make-private", image, scene.filesystem], check=True)


def test_created_volume_is_on_disk_with_its_size(real_scene: Scene) -> None:
    rig = real_scene.open()
    os.sync()  # the new pool itself was never promised to anybody
    made = [
        rig.controller.create_volume(volume(f"v{number}", real_scene.kind.size_bytes)) for number in range(3)
    ]

    copy = image_as_it_is(real_scene)

    with booted(real_scene, copy) as rig:
        listed, _ = rig.controller.list_volumes(0, "")
        assert [(one.id, one.size_bytes) for one in listed] == sorted(
            (one.id, one.size_bytes) for one in made
        )
        assert rig.pool.damaged == {}
        for one in listed:
            assert rig.controller.volume_health(one.id) == []
        assert os.listdir(real_scene.root / "staging") == []


def test_grown_volume_is_on_disk_as_large_as_answered(real_scene: Scene) -> None:
    rig = real_scene.open()
    size = real_scene.kind.size_bytes
    volume_id = rig.controller.create_volume(volume("a", size)).id
    os.sync()

    answered, _ = rig.controller.expand_volume(volume_id, CapacityRange(2 * size), None)
    copy = image_as_it_is(real_scene)

    with booted(real_scene, copy) as rig:
        found = rig.controller.get_volume(volume_id)
        assert answered == found.record.size_bytes == 2 * size
        # The answer is what the claim has from then on, also where nothing enforces it.
        assert found.size_bytes == (answered if rig.backend.features.enforces_capacity else 0)
        assert rig.controller.volume_health(volume_id) == []


def test_deleted_volume_does_not_come_back(real_scene: Scene) -> None:
    rig = real_scene.open()
    volume_id = rig.controller.create_volume(volume("a", real_scene.kind.size_bytes)).id
    os.sync()

    rig.controller.delete_volume(volume_id)
    copy = image_as_it_is(real_scene)

    with booted(real_scene, copy) as rig:
        assert rig.controller.list_volumes(0, "") == ([], "")
        rig.settle()
        assert os.listdir(real_scene.root / "trash") == []
