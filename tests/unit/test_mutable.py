# SPDX-License-Identifier: Apache-2.0
"""What a VolumeAttributesClass may say, and limits in a tree of files that is laid out as cgroup v2 is."""

import os
from pathlib import Path

import pytest

from csi_driver import mutable
from csi_driver.backends import parameters
from csi_driver.errors import InvalidArgument
from csi_driver.linux.throttle import PODS, Throttle, Unlimited
from csi_driver.model import GIB, MIB, PLACEMENT_KEYS
from csi_driver.mutable import IoLimits, Mutable

DEVICE = os.makedev(7, 3)
LIMITS = IoLimits(read_bps=10 * MIB, write_iops=500)


def test_values_are_understood() -> None:
    given = {"retention": "24h", "readBps": "10Mi", "writeBps": "1G", "readIops": "500", "writeIops": "max"}

    parsed = mutable.parse(given)

    assert parsed == Mutable(86400.0, IoLimits(10 * MIB, 10**9, 500, 0))
    assert mutable.parse({}) == Mutable()
    assert not mutable.parse({"readBps": "max"}).limits


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"iops": "1"}, "unknown key 'iops'; known keys: readBps, readIops, retention, writeBps, writeIops"),
        ({"fsType": "xfs", "pool": "p"}, "'fsType', 'pool': decided by the StorageClass"),
        ({"retention": "a week"}, "mutable_parameters.retention: 'a week' is not a duration"),
        ({"readBps": "fast"}, "mutable_parameters.readBps: 'fast' is not a size"),
        ({"readBps": "0"}, "mutable_parameters.readBps '0': give a number from 65536"),
        ({"writeBps": "1Ki"}, "mutable_parameters.writeBps '1Ki': give"),
        ({"writeBps": "99999999E"}, "mutable_parameters.writeBps '99999999E': give"),
        ({"readIops": "1k"}, "mutable_parameters.readIops: '1k' is not a number"),
        ({"readIops": "٣٣٣"}, "mutable_parameters.readIops: '٣٣٣' is not a number"),
        ({"writeIops": "1"}, "mutable_parameters.writeIops '1': give a number from 10"),
        ({"writeIops": str(2**32)}, f"mutable_parameters.writeIops '{2**32}': give"),
        ({"writeIops": ""}, "mutable_parameters.writeIops: '' is not a number"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        mutable.parse(given)

    assert words in str(refused.value)


def test_every_parameter_of_a_storage_class_is_known_to_be_fixed() -> None:
    known = {*PLACEMENT_KEYS, *parameters.EVERY}

    assert set(mutable.FIXED) == known


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    pods = tmp_path / PODS[0]
    pods.mkdir()
    (pods / "io.max").write_text("8:0 rbps=max wbps=max riops=100 wiops=max\n")
    return tmp_path


def test_a_limit_is_a_line_of_the_pods_cgroup(root: Path) -> None:
    throttle = Throttle(root)

    throttle.limit(DEVICE, LIMITS)

    # The kernel keeps the other devices' lines; a file shows what was written last.
    assert (root / PODS[0] / "io.max").read_text() == "7:3 rbps=10485760 wbps=max riops=max wiops=500\n"
    assert throttle.limits_of(DEVICE) == LIMITS
    assert throttle.problem() == ""


def test_no_limits_lift_those_that_are_there(root: Path) -> None:
    throttle = Throttle(root)
    throttle.limit(DEVICE, LIMITS)

    throttle.limit(DEVICE, IoLimits())

    assert (root / PODS[0] / "io.max").read_text() == "7:3 rbps=max wbps=max riops=max wiops=max\n"


def test_nothing_is_written_where_nothing_is_to_change(root: Path) -> None:
    io_max = root / PODS[0] / "io.max"
    before = io_max.stat().st_mtime_ns, io_max.read_text()

    Throttle(root).limit(DEVICE, IoLimits())
    Throttle(root).limit(os.makedev(8, 0), IoLimits(read_iops=100))

    assert (io_max.stat().st_mtime_ns, io_max.read_text()) == before


@pytest.mark.parametrize("name", PODS)
def test_the_pods_are_found_wherever_kubelet_keeps_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "cgroup.controllers").write_text("io\n")
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "io.max").write_text("")

    Throttle(tmp_path).limit(DEVICE, IoLimits(read_bps=GIB))

    assert "rbps=1073741824" in (tmp_path / name / "io.max").read_text()


def _v1(root: Path) -> None:
    (root / "cgroup.controllers").unlink()


def _without_io(root: Path) -> None:
    (root / "cgroup.controllers").write_text("cpu memory\n")


def _without_pods(root: Path) -> None:
    (root / PODS[0]).rename(root / "elsewhere.slice")


def _not_enabled(root: Path) -> None:
    (root / PODS[0] / "io.max").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_v1, "this node runs cgroup v1"),
        (_without_io, "io controller of cgroup v2 is not available"),
        (_without_pods, "name what is above it as cgroup_root"),
        (_not_enabled, "not enabled for it (write +io"),
    ],
)
def test_a_node_that_cannot_says_why(root: Path, change: object, words: str) -> None:
    assert callable(change)
    change(root)
    throttle = Throttle(root)

    assert words in throttle.problem()
    with pytest.raises(Unlimited) as refused:
        throttle.limit(DEVICE, LIMITS)
    assert words in str(refused.value)
    throttle.limit(DEVICE, IoLimits())
    assert throttle.limits_of(DEVICE) == IoLimits()
