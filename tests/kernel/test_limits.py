# SPDX-License-Identifier: Apache-2.0
"""I/O limits of image volumes from class to device: real loop devices, and a tree of files laid out as cgroup v2 is.

That the kernel holds a device to such a line, `tests/lab/test_throttle.py` proves.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver import mutable
from csi_driver.app import build
from csi_driver.backends.base import Device
from csi_driver.config import parse
from csi_driver.errors import FailedPrecondition, InvalidArgument
from csi_driver.linux.throttle import Throttle
from csi_driver.model import (
    MIB,
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    Source,
    SourceKind,
    Volume,
    VolumeRequest,
)
from csi_driver.mutable import IoLimits
from tests.kernel.node_scene import Scene
from tests.rig import capability, open_rig

pytestmark = pytest.mark.kernel
SIZE = 16 * MIB
GIVEN = {"readBps": "10Mi", "writeIops": "500"}
LIMITS = IoLimits(read_bps=10 * MIB, write_iops=500)
BLOCK = capability(AccessMode.SINGLE_NODE_WRITER, AccessType.BLOCK)


@pytest.fixture
def cgroups(workshop: Path) -> Path:
    root = workshop / "cgroup"
    (root / "kubepods").mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu io memory\n")
    (root / "kubepods" / "io.max").write_text("")
    return root


@pytest.fixture
def scene(workshop: Path, scratch: Path, cgroups: Path) -> Iterator[Scene]:
    made = Scene.make(workshop, scratch / "pool", f'backend = "image"\ncgroup_root = "{cgroups}"')
    yield made
    made.rig.close()


def create(scene: Scene, name: str, given: dict[str, str], wanted: Capability | None = None) -> Volume:
    request = VolumeRequest(name, (wanted or capability(),), CapacityRange(SIZE), mutable=given)
    return scene.rig.controller.create_volume(request)


def number_of(scene: Scene, volume: Volume, *, readonly: bool = False) -> int:
    home = scene.rig.pool.catalog.get(volume.id)
    attached = scene.rig.backend.find_attached(home, volume.record, readonly=readonly)
    assert isinstance(attached, Device)
    return attached.number


def line(cgroups: Path) -> str:
    return (cgroups / "kubepods" / "io.max").read_text()


def name(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def test_limits_hold_from_stage_to_unstage(scene: Scene, cgroups: Path) -> None:
    volume = create(scene, "a", GIVEN)
    assert line(cgroups) == ""

    scene.run(volume)
    device = number_of(scene, volume)
    assert line(cgroups) == f"{name(device)} rbps=10485760 wbps=max riops=max wiops=500\n"

    scene.end(volume)
    assert Throttle(cgroups).limits_of(device) == IoLimits()
    scene.delete(volume)


def test_a_volume_in_use_is_changed_at_once(scene: Scene, cgroups: Path) -> None:
    volume = create(scene, "a", {})
    scene.run(volume)
    device = number_of(scene, volume)
    assert line(cgroups) == ""

    scene.rig.controller.modify_volume(volume.id, GIVEN)
    assert Throttle(cgroups).limits_of(device) == LIMITS

    scene.rig.controller.modify_volume(volume.id, {"readBps": "max"})
    assert Throttle(cgroups).limits_of(device) == IoLimits()

    scene.end(volume)
    scene.delete(volume)


def test_limits_are_set_again_after_a_restart_of_driver_and_machine(scene: Scene, cgroups: Path) -> None:
    volume = create(scene, "a", GIVEN)
    scene.run(volume)
    (cgroups / "kubepods" / "io.max").write_text("")

    scene.rig.close()
    build(parse(scene.text)).close()
    scene.rig = open_rig(parse(scene.text).pools["p"])
    assert Throttle(cgroups).limits_of(number_of(scene, volume)) == LIMITS

    scene.end(volume)
    scene.restart()
    scene.run(volume)
    assert Throttle(cgroups).limits_of(number_of(scene, volume)) == LIMITS
    scene.end(volume)
    scene.delete(volume)


def test_a_device_that_was_another_volumes_inherits_nothing(scene: Scene, cgroups: Path) -> None:
    limited, plain = create(scene, "a", GIVEN), create(scene, "b", {})
    scene.run(limited)
    left_over = line(cgroups)
    device = number_of(scene, limited)
    scene.end(limited)
    # As if the driver had died before it took the line away.
    (cgroups / "kubepods" / "io.max").write_text(left_over)

    scene.run(plain)
    if number_of(scene, plain) == device:
        assert Throttle(cgroups).limits_of(device) == IoLimits()
    scene.end(plain)
    scene.delete(limited)
    scene.delete(plain)


def test_both_devices_of_a_block_volume_are_limited(scene: Scene, cgroups: Path) -> None:
    volume = create(scene, "a", GIVEN, BLOCK)
    scene.stage(volume, BLOCK)
    scene.publish(volume, "reader", BLOCK, readonly=True)

    device = number_of(scene, volume, readonly=True)

    assert device != number_of(scene, volume)
    assert line(cgroups).startswith(f"{name(device)} rbps=10485760")
    scene.end(volume, "reader")
    scene.delete(volume)


def test_a_node_that_cannot_refuses_limits_and_takes_everything_else(scene: Scene, cgroups: Path) -> None:
    limited, plain = create(scene, "a", GIVEN), create(scene, "b", {})
    (cgroups / "cgroup.controllers").unlink()

    with pytest.raises(
        InvalidArgument, match="readBps, writeIops: no limits in pool 'p': this node runs cgroup v1"
    ):
        scene.rig.controller.modify_volume(plain.id, GIVEN)
    with pytest.raises(InvalidArgument, match="this node runs cgroup v1"):
        create(scene, "c", GIVEN)
    with pytest.raises(FailedPrecondition, match="cannot be kept on this node: this node runs cgroup v1"):
        scene.stage(limited)
    assert not scene.rig.backend.holders([scene.rig.pool.catalog.get(limited.id)])

    scene.run(plain)
    scene.end(plain)
    scene.rig.controller.modify_volume(limited.id, {"retention": "0"})
    scene.run(limited)
    scene.end(limited)
    scene.delete(limited)
    scene.delete(plain)


def test_a_copy_has_its_own_class(scene: Scene) -> None:
    volume = create(scene, "a", GIVEN)
    request = VolumeRequest(
        "b", (capability(),), CapacityRange(SIZE), source=Source(SourceKind.VOLUME, volume.id)
    )
    clone = scene.rig.controller.create_volume(request)

    assert clone.record.mutable == {}
    assert mutable.parse(scene.rig.controller.get_volume(volume.id).record.mutable).limits == LIMITS
    scene.delete(clone)
    scene.delete(volume)
