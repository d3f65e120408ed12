# SPDX-License-Identifier: Apache-2.0
"""Volumes without a claim of their own: inline ones, which live as long as their pod, and an administrator's directories."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from csi_driver.linux import mount
from csi_driver.model import AccessMode, AccessType, Capability, HealthStatus
from tests.kernel.conftest import MakePool
from tests.kernel.node_scene import Scene, inline_request, static_request

INLINE = "csi-0123456789abcdef"


@pytest.fixture
def scene(workshop: Path, scratch: Path) -> Iterator[Scene]:
    exports = scratch / "exports"
    exports.mkdir()
    options = f'backend = "image"\nstatic_roots = ["{exports}"]\nretention = "1h"'
    scene = Scene.make(workshop, scratch / "pool", options)
    yield scene
    scene.rig.close()


@pytest.fixture
def exports(scratch: Path) -> Path:
    return scratch / "exports"


def homes(scene: Scene) -> list[str]:
    root = scene.rig.pool.catalog.root
    return sorted(path.name for area in ("volumes", "staging", "trash") for path in (root / area).iterdir())


# Inline volumes


def test_an_inline_volume_has_its_size_and_goes_with_its_pod(scene: Scene) -> None:
    scene.rig.node.publish(inline_request(scene, INLINE, size="16Mi"))
    target = scene.kubelet / "pod"

    with pytest.raises(OSError) as caught, open(target / "big", "wb", buffering=0) as file:
        for _ in range(32):
            file.write(b"x" * (1 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert scene.rig.node.stats(INLINE, str(target)).total_bytes <= 16 << 20

    scene.rig.node.unpublish(INLINE, str(target))
    scene.rig.settle()
    assert homes(scene) == []
    assert scene.rig.pool.space.promised() == 0


def test_an_inline_volume_published_again_keeps_its_data(scene: Scene) -> None:
    request = inline_request(scene, INLINE, size="16Mi")
    scene.rig.node.publish(request)
    (scene.kubelet / "pod" / "kept").write_text("yes")

    scene.restart()
    scene.rig.node.publish(request)

    assert (scene.kubelet / "pod" / "kept").read_text() == "yes"
    scene.rig.node.unpublish(INLINE, str(scene.kubelet / "pod"))


def test_an_inline_volume_goes_also_when_unpublish_comes_after_a_crash(scene: Scene) -> None:
    scene.rig.node.publish(inline_request(scene, INLINE, size="16Mi"))
    target = scene.kubelet / "pod"
    # What a reboot leaves: the home, and neither mount nor process.
    mount.unmount(target)
    target.rmdir()
    scene.restart()

    scene.rig.node.unpublish(INLINE, str(target))
    scene.rig.settle()

    assert homes(scene) == []


def test_an_inline_volume_that_cannot_be_published_is_not_left_behind(scene: Scene) -> None:
    target = scene.kubelet / "pod"
    target.write_text("in the way")
    with pytest.raises(FailedPrecondition):
        scene.rig.node.publish(inline_request(scene, INLINE, size="16Mi"))
    target.unlink()
    with pytest.raises(ResourceExhausted):
        scene.rig.node.publish(inline_request(scene, INLINE, size="15Ti"))
    wrong: list[dict[str, str]] = [{}, {"size": "much"}, {"size": "16Mi", "pool": "none"}]
    for attributes in (*wrong, {"size": "16Mi", "colour": "red"}):
        with pytest.raises(InvalidArgument):
            scene.rig.node.publish(inline_request(scene, INLINE, None, **attributes))

    scene.rig.settle()

    assert homes(scene) == []


def test_an_inline_volume_can_be_read_only_and_of_any_filesystem(scene: Scene) -> None:
    request = inline_request(scene, INLINE, size="300Mi", fsType="xfs", mode="0777")
    scene.rig.node.publish(request)
    target = scene.kubelet / "pod"
    assert target.stat().st_mode & 0o777 == 0o777
    scene.rig.node.unpublish(INLINE, str(target))

    only = Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_READER_ONLY)
    scene.rig.node.publish(inline_request(scene, INLINE, only, size="16Mi"))
    with pytest.raises(OSError, match="Read-only"):
        (target / "no").write_text("no")
    scene.rig.node.unpublish(INLINE, str(target))


def test_unpublishing_never_deletes_an_ordinary_volume(scene: Scene) -> None:
    volume = scene.create(INLINE, 16 << 20)

    scene.rig.node.unpublish(INLINE, str(scene.kubelet / "pod"))

    assert scene.rig.controller.get_volume(volume.id).record.name == INLINE


# Static volumes


def test_a_static_volume_shows_the_directory_and_nothing_is_done_to_it(scene: Scene, exports: Path) -> None:
    directory = exports / "team" / "photos"
    directory.mkdir(parents=True, mode=0o700)
    (directory / "old").write_text("there")
    before = directory.stat()
    request = static_request(scene, directory)

    scene.rig.node.publish(request)
    scene.rig.node.publish(request)

    target = scene.kubelet / "pod"
    assert (target / "old").read_text() == "there"
    assert target.stat().st_ino == before.st_ino
    assert scene.rig.node.stats(request.volume_id, str(target)).total_bytes > 0
    scene.rig.node.unpublish(request.volume_id, str(target))
    scene.rig.controller.delete_volume(request.volume_id)
    after = directory.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (before.st_mode, before.st_uid, before.st_mtime)
    assert (directory / "old").read_text() == "there"


def test_a_static_volume_takes_read_only_and_a_sub_path(scene: Scene, exports: Path) -> None:
    request = static_request(scene, exports, subPath="pods/${pod.name}")
    context = dict(request.context) | {"csi.storage.k8s.io/pod.name": "web-0"}
    only = Capability(AccessType.MOUNT, AccessMode.MULTI_NODE_READER_ONLY)

    scene.rig.node.publish(type(request)(request.volume_id, request.target_path, only, context=context))

    assert (exports / "pods" / "web-0").stat().st_ino == Path(request.target_path).stat().st_ino
    with pytest.raises(OSError, match="Read-only"):
        (Path(request.target_path) / "no").write_text("no")
    scene.rig.node.unpublish(request.volume_id, request.target_path)


def test_a_static_path_cannot_leave_the_allowed_roots(scene: Scene, exports: Path, scratch: Path) -> None:
    secret = scratch / "secret"
    secret.mkdir()
    (exports / "link").symlink_to(secret)
    (exports / "file").write_text("no directory")
    refused = (
        os.fspath(secret),
        f"{exports}/../secret",
        f"{exports}/link",
        f"{exports}/file",
        f"{exports}x",
        "exports",
        "/",
        "",
    )
    for path in refused:
        with pytest.raises(InvalidArgument):
            scene.rig.node.publish(static_request(scene, path))
    with pytest.raises(NotFound):
        scene.rig.node.publish(static_request(scene, exports / "missing"))
    for wrong in ({"pool": "none"}, {"server": "nas"}):
        with pytest.raises(InvalidArgument):
            scene.rig.node.publish(static_request(scene, exports, **wrong))

    assert not (scene.kubelet / "pod").exists()
    assert list(secret.iterdir()) == []


def test_the_health_of_a_static_volume_is_that_of_what_is_mounted(scene: Scene, exports: Path) -> None:
    request = static_request(scene, exports)
    scene.rig.node.publish(request)
    target = scene.kubelet / "pod"

    assert scene.rig.node.volume_health(request.volume_id, str(target)) == []
    for path in ("", "/proc", str(scene.kubelet)):
        with pytest.raises(NotFound):
            scene.rig.node.volume_health(request.volume_id, path)

    scene.rig.node.unpublish(request.volume_id, str(target))
    with pytest.raises(NotFound):
        scene.rig.node.volume_health(request.volume_id, str(target))


def test_a_static_volume_on_a_filesystem_that_turned_read_only_is_degraded(
    workshop: Path, scratch: Path, make_pool: MakePool
) -> None:
    disk = make_pool("ext4")
    options = f'backend = "image"\nstatic_roots = ["{disk}"]'
    scene = Scene.make(workshop, scratch / "pool", options)
    with closing(scene.rig):
        request = static_request(scene, disk)
        scene.rig.node.publish(request)
        target = str(scene.kubelet / "pod")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

        found = scene.rig.node.volume_health(request.volume_id, target)

        assert [(one.status, one.reason) for one in found] == [(HealthStatus.DEGRADED, "FilesystemReadOnly")]
        scene.rig.node.unpublish(request.volume_id, target)


def test_stats_of_what_is_no_static_volume_are_not_found(scene: Scene, workshop: Path) -> None:
    for path in (workshop, Path("/proc"), workshop / "nowhere"):
        with pytest.raises(NotFound):
            scene.rig.node.stats("any/handle at all", str(path))
