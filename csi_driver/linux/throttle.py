# SPDX-License-Identifier: Apache-2.0
"""Hold a block device to so many bytes and operations a second, by cgroup v2's io controller. See cgroup-v2(7).

The kernel keeps limits by cgroup and device. Every pod is in one cgroup, kubelet's: a line for the device in its
`io.max` binds whatever pod uses that device, and nobody outside. A number that is free again is the next volume's, and
would inherit the line: whoever attaches a device says its limits, also when it has none.
"""

import errno
import os
from pathlib import Path
from typing import Final

from csi_driver.mutable import IoLimits

ROOT: Final = Path("/sys/fs/cgroup")
PODS: Final = ("kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods")
"""Where kubelet keeps all pods: with the systemd driver, with the cgroupfs driver, and both below a kubelet's own."""
_KEYS: Final = ("rbps", "wbps", "riops", "wiops")
_MAX: Final = "max"


class Unlimited(Exception):
    """This node cannot hold a device to limits; says why."""


class Throttle:
    """The limits of the node whose cgroup v2 hierarchy is mounted at `root`."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def problem(self) -> str:
        """Why no limits can be set here; "" when they can."""
        try:
            self._io_max()
        except Unlimited as error:
            return str(error)
        return ""

    def limit(self, device: int, limits: IoLimits) -> None:
        """Make these the limits of the device (its st_rdev); those that it had are gone.

        Raises:
            Unlimited: it cannot be; never for no limits.
        """
        try:
            io_max = self._io_max()
            if self._read(io_max, device) != limits:
                _write(io_max, f"{_name(device)} {_line(limits)}\n")
        except Unlimited:
            if limits:
                raise

    def limits_of(self, device: int) -> IoLimits:
        """The limits that the kernel holds the device to now."""
        try:
            return self._read(self._io_max(), device)
        except Unlimited:
            return IoLimits()

    def _read(self, io_max: Path, device: int) -> IoLimits:
        for line in io_max.read_text().splitlines():
            name, *fields = line.split()
            if name == _name(device):
                found = dict(field.split("=", 1) for field in fields)
                return IoLimits(*(_value(found.get(key, _MAX)) for key in _KEYS))
        return IoLimits()

    def _io_max(self) -> Path:
        try:
            controllers = (self._root / "cgroup.controllers").read_text().split()
        except OSError as error:
            raise Unlimited(
                f"this node runs cgroup v1 (no cgroup v2 at {self._root}): boot it with systemd.unified_cgroup_hierarchy=1"
            ) from error
        if "io" not in controllers:
            raise Unlimited(f"the io controller of cgroup v2 is not available at {self._root}")
        pods = next((self._root / name for name in PODS if (self._root / name).is_dir()), None)
        if pods is None:
            raise Unlimited(
                f"no cgroup of all pods is at {self._root} ({', '.join(PODS)}): name what is above it as cgroup_root"
            )
        if not (pods / "io.max").is_file():
            raise Unlimited(
                f"{pods} has no io.max: the io controller is not enabled for it (write +io to the "
                "cgroup.subtree_control above it), or the kernel lacks BLK_DEV_THROTTLING"
            )
        return pods / "io.max"


def _write(io_max: Path, line: str) -> None:
    try:
        fd = os.open(io_max, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise Unlimited(
            f"{io_max} cannot be written ({error.strerror}): run the driver privileged, with the node's cgroups"
        ) from error


def _name(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _line(limits: IoLimits) -> str:
    values = (limits.read_bps, limits.write_bps, limits.read_iops, limits.write_iops)
    return " ".join(f"{key}={value or _MAX}" for key, value in zip(_KEYS, values, strict=True))


def _value(text: str) -> int:
    return 0 if text == _MAX else int(text)
