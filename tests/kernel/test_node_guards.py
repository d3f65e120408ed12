# SPDX-License-Identifier: Apache-2.0
"""What the node must refuse, and what it must not: calls out of order, ways around an access mode, users' mistakes."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from csi_driver.linux import loop
from csi_driver.model import MIB, AccessMode, AccessType, Capability, CapacityRange
from tests.kernel.node_scene import Scene, inline_request, static_request
from tests.rig import capability, published

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


def test_two_calls_for_one_path_do_not_meet(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    scene.stage(volume)
    target = scene.kubelet / "pod"

    with scene.rig.locks.hold(str(target)):
        with pytest.raises(Aborted, match="another call"):
            scene.publish(volume)
        with pytest.raises(Aborted, match="another call"):
            scene.rig.node.unpublish(volume.id, str(target))

    scene.end(volume)


# ReadWriteOncePod


def test_one_pod_means_one_also_with_a_sub_path_for_each(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB, RWOP, subPath="${pod.name}")
    scene.stage(volume, RWOP)

    def publish(pod: str) -> None:
        context = {"csi.storage.k8s.io/pod.name": pod}
        request = published(volume.id, scene.kubelet / pod, scene.staging(volume), RWOP)
        scene.rig.node.publish(replace(request, context=context))

    publish("one")
    publish("one")
    with pytest.raises(FailedPrecondition, match="allows one target"):
        publish("two")

    scene.end(volume, "one")


def test_one_pod_means_one_also_when_the_other_only_reads_the_device(scene: Scene) -> None:
    volume = scene.create("v", 8 * MIB, BLOCK_RWOP)
    scene.run(volume, "writer", BLOCK_RWOP)

    with pytest.raises(FailedPrecondition, match="allows one target"):
        scene.publish(volume, "reader", BLOCK_RWOP, readonly=True)
    scene.end(volume, "writer")

    scene.stage(volume, BLOCK_RWOP)
    scene.publish(volume, "reader", BLOCK_RWOP, readonly=True)
    with pytest.raises(FailedPrecondition, match="allows one target"):
        scene.publish(volume, "writer", BLOCK_RWOP)
    scene.end(volume, "reader")


def test_one_pod_means_one_of_a_static_directory_too(scene: Scene, scratch: Path) -> None:
    request = replace(static_request(scene, scratch / "exports"), capability=RWOP)
    other = replace(request, target_path=str(scene.kubelet / "other"))
    scene.rig.node.publish(request)

    scene.rig.node.publish(request)
    with pytest.raises(FailedPrecondition, match="allows one target"):
        scene.rig.node.publish(other)

    scene.rig.node.unpublish(request.volume_id, request.target_path)
    scene.rig.node.publish(other)
    scene.rig.node.unpublish(other.volume_id, other.target_path)


# Users' mistakes


@pytest.mark.parametrize("option", ["logdev=/dev/null", "journal_path=/dev/null", "device=/dev/null"])
def test_an_option_that_names_another_device_is_refused(scene: Scene, option: str) -> None:
    volume = scene.create("v", 32 * MIB)

    with pytest.raises(InvalidArgument, match="is not for a volume"):
        scene.stage(volume, replace(capability(), mount_flags=(option,)))

    assert images(scene) == []


def test_mkfs_options_that_mkfs_refuses_are_the_users_fault(scene: Scene) -> None:
    with pytest.raises(InvalidArgument, match=r"mkfs.ext4"):
        scene.create("v", 32 * MIB, mkfsOptions="-N 999999999999")

    assert scene.rig.pool.catalog.ids() == []
    assert list(scene.rig.pool.catalog.staged()) == []


def test_a_file_in_the_sub_paths_place_is_named(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    (scene.run(volume) / "taken").write_text("a file")
    request = published(volume.id, scene.kubelet / "other", scene.staging(volume))

    with pytest.raises(FailedPrecondition, match=r"subPath 'taken'"):
        scene.rig.node.publish(replace(request, context={"subPath": "taken"}))

    scene.end(volume)


def test_a_volumes_attribute_can_name_the_sub_path(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    (scene.run(volume) / "outside").write_text("x")
    request = published(volume.id, scene.kubelet / "other", scene.staging(volume))

    scene.rig.node.publish(replace(request, context={"subPath": "deep/${pvc.metadata.name}"}))

    assert list((scene.kubelet / "other").iterdir()) == []
    assert (scene.kubelet / "pod" / "deep" / "data").is_dir()
    scene.end(volume, "pod", "other")


def test_a_volume_grows_through_a_target_that_is_read_only(scene: Scene) -> None:
    volume = scene.create("v", 300 * MIB, fsType="xfs")
    scene.stage(volume)
    target = scene.publish(volume, readonly=True)

    scene.rig.node.expand(volume.id, str(target), str(scene.staging(volume)), CapacityRange(400 * MIB))

    assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize > 310 * MIB
    scene.end(volume)


# Inline and static volumes


def test_an_inline_volume_cannot_be_called_like_an_ordinary_one(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)

    with pytest.raises(InvalidArgument, match="inline"):
        scene.rig.node.publish(inline_request(scene, volume.id, size="16Mi"))

    assert scene.rig.pool.catalog.ids() == [volume.id]


@pytest.mark.parametrize("size", ["9" * 400 + ".0", "9" * 400])
def test_an_inline_size_beyond_all_numbers_is_refused(scene: Scene, size: str) -> None:
    with pytest.raises((InvalidArgument, OutOfRange)):
        scene.rig.node.publish(inline_request(scene, "csi-0123", size=size))


@pytest.mark.parametrize("inside", ["", "volumes", "trash"])
def test_a_static_volume_shows_no_pools_inside(scene: Scene, scratch: Path, inside: str) -> None:
    with pytest.raises(InvalidArgument, match="lies in pool"):
        scene.rig.node.publish(static_request(scene, scratch / "pool" / inside))


def test_a_static_root_that_is_not_there_is_not_found(scene: Scene, scratch: Path) -> None:
    gone = scratch / "gone"
    scene.text = scene.text.replace(f'"{scratch}"', f'"{gone}"')
    scene.restart()

    with pytest.raises(NotFound, match="gone"):
        scene.rig.node.publish(static_request(scene, gone / "photos"))


def test_a_static_sub_path_that_is_a_file_is_named(scene: Scene, scratch: Path) -> None:
    (scratch / "exports" / "file").write_text("x")

    with pytest.raises(FailedPrecondition, match=r"subPath 'file'"):
        scene.rig.node.publish(static_request(scene, scratch / "exports", subPath="file"))


# Crashes


def test_a_device_whose_attaching_was_cut_short_refuses_discards_when_it_is_found(scene: Scene) -> None:
    volume = scene.create("v", 32 * MIB)
    image = scene.rig.pool.catalog.root / "volumes" / volume.id / "image"
    with open(image, "rb") as file:
        cut = loop.attach(file.fileno(), sector_size=4096)

    scene.stage(volume)

    limit = Path(f"/sys/block/loop{cut.number}/queue/discard_max_bytes")
    assert int(limit.read_text()) == 0
    scene.publish(volume)
    scene.end(volume)
