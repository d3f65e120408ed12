# SPDX-License-Identifier: Apache-2.0
"""What the node must refuse, and what it must not: calls out of order, ways around an access mode, users' mistakes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import loop
from csi_driver.model import MIB, AccessMode, AccessType, Capability
from tests.kernel.node_scene import Scene
from tests.rig import capability

BLOCK = Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER)
RWOP = capability(AccessMode.SINGLE_NODE_SINGLE_WRITER)
BLOCK_RWOP = Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_SINGLE_WRITER)


@pytest.fixture
def scene(workshop: Path, scratch: Path) -> Iterator[Scene]:
    (scratch / "exports").mkdir()
    options = f'backend = "image"\nstatic_roots = ["{scratch}"]'
    scene = Scene.make(workshop, scratch / "pool", options)
    yield scene
    scene.rig.close()


def images(scene: Scene) -> list[loop.Loop]:
    """The loop devices over the pool's images."""
    files = {path.stat().st_ino for path in scene.rig.pool.catalog.root.glob("volumes/*/image")}
    device = scene.rig.pool.catalog.root.stat().st_dev
    return [one for one in loop.all() if one.backing_device == device and one.backing_inode in files]


# Calls out of order


@pytest.mark.parametrize("readonly", [False, True])
def test_a_raw_device_is_not_taken_from_under_the_pod_that_has_it(scene: Scene, readonly: bool) -> None:
    volume = scene.create("v", 8 * MIB, BLOCK)
    scene.stage(volume, BLOCK)
    target = scene.publish(volume, "pod", BLOCK, readonly=readonly)

    # Else the number goes to the next volume, and the pod's node with it.
    with pytest.raises(FailedPrecondition, match=r"still published at .*pod"):
        scene.rig.node.unstage(volume.id, str(scene.staging(volume)))

    assert target.stat().st_rdev in {one.device for one in images(scene)}
    scene.end(volume)
    assert images(scene) == []


# ReadWriteOncePod


# The same call again


# Users' mistakes


# Inline and static volumes


# Crashes
