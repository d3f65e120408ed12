# SPDX-License-Identifier: Apache-2.0
"""The machine beneath a driver: what its kernel can do, by trying it, and which programs it has."""

import errno
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from csi_driver.cli import kernel
from csi_driver.cli.doctor.finding import Finding, error, ok, warning
from csi_driver.linux import features, loop, privileges
from csi_driver.linux.child import Child
from csi_driver.linux.filesystem import FILESYSTEMS
from csi_driver.linux.run import PACKAGES
from csi_driver.linux.throttle import Throttle

KERNEL, TOOLS, LOOPS = "kernel", "tools", "loop devices"
VERSION_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Feature:
    name: str
    since: str
    attempt: Callable[[], None]
    consequence: str
    optional: bool = False


_FEATURES = (
    _Feature("openat2", "5.6", features.resolve_beneath, "paths could not be kept within a pool"),
    _Feature("statx tells mount points", "5.8", features.mount_points, "what is mounted could not be found"),
    _Feature(
        "open_tree, mount_setattr",
        "5.12",
        features.set_attributes,
        "mounts are made the old way: in two steps, and not by descriptor",
        optional=True,
    ),
    _Feature(
        "fsopen, fsmount",
        "5.2",
        features.mount_api,
        "mounts are made the old way, and the kernel's reason for a refusal is not told",
        optional=True,
    ),
    _Feature(
        "statmount",
        "6.8",
        features.statmount,
        "attributes of mounts are found out the old way",
        optional=True,
    ),
)

_OTHER_TOOLS = {
    "e2fsck": "ext4 volumes that a driver without CAP_SYS_RESOURCE grows",
    "resize2fs": "ext4 volumes that a driver without CAP_SYS_RESOURCE grows",
}


def look_at_kernel() -> Iterator[Finding]:
    """System calls, each tried on something harmless, and what this process may do."""
    yield ok(KERNEL, f"{platform.system()} {platform.release()}, {platform.machine()}")
    for feature in _FEATURES:
        yield _tried(feature)
    yield from _look_at_rights()
    problem = Throttle().problem()
    yield ok(KERNEL, f"no I/O limits for volumes: {problem}" if problem else "volumes can have I/O limits")


def look_at_tools() -> Iterator[Finding]:
    """The programs that the driver runs."""
    for fs_type, kind in FILESYSTEMS.items():
        yield _tool(kind.tool, f"{fs_type} volumes in image pools")
    for name, purpose in _OTHER_TOOLS.items():
        yield _tool(name, purpose)
    yield _look_at_filesystems()


def look_at_loops() -> Iterator[Finding]:
    """Whether a file can be put behind a loop device: tried, with one in memory."""
    problem = loop.available()
    if problem:
        yield error(
            LOOPS, problem, "image pools put every volume behind one", "see there; other backends do without"
        )
        return
    try:
        features.loop_devices()
    except OSError as failure:
        yield error(
            LOOPS,
            f"attaching a file failed: {failure.strerror}",
            "image pools put every volume behind a loop device (LOOP_CONFIGURE, kernel 5.8)",
            "run as root, privileged in a container, on kernel 5.8 or newer",
        )
        return
    try:
        attached = len(loop.all())
    except OSError as failure:
        yield warning(
            LOOPS,
            f"cannot be listed: {failure}",
            "volumes in use could not be found",
            "let the host's /dev be seen",
        )
        return
    yield ok(LOOPS, f"a file in memory was attached and detached; {attached} in use")


def _look_at_rights() -> Iterator[Finding]:
    if not kernel.has_capability(os.getpid(), kernel.CAP_SYS_ADMIN):
        yield error(
            KERNEL,
            "this process lacks CAP_SYS_ADMIN",
            "nothing can be mounted",
            "run as root; in a container, privileged",
        )
    if not kernel.has_capability(os.getpid(), privileges.CAP_SYS_RESOURCE):
        yield warning(
            KERNEL,
            "this process lacks CAP_SYS_RESOURCE",
            "the kernel grows a mounted ext4 only with it: such volumes grow when their pods start anew",
            "give the driver's container CAP_SYS_RESOURCE (privileged has it), or use xfs",
        )


def _tried(feature: _Feature) -> Finding:
    try:
        feature.attempt()
    except OSError as failure:
        if failure.errno == errno.EPERM:
            return warning(
                KERNEL, f"{feature.name}: may not be tried", "the driver needs it", "run this command as root"
            )
        find = warning if feature.optional else error
        remedy = f"use kernel {feature.since} or newer; a sandbox may be in the way as well"
        return find(KERNEL, f"{feature.name}: {failure.strerror or failure}", feature.consequence, remedy)
    return ok(KERNEL, feature.name)


def _tool(name: str, purpose: str) -> Finding:
    # As the driver looks for them: an ordinary PATH often lacks the second half.
    path = shutil.which(
        name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    )
    if not path:
        return warning(
            TOOLS,
            f"{name} is not here",
            f"it is needed for {purpose}",
            f"install the package {PACKAGES[name]}" if name in PACKAGES else "install it",
        )
    return ok(TOOLS, _version(name, path))


def _version(name: str, path: str) -> str:
    """The line in which a program names its version, which some write to stderr."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        child = Child.start([path, "-V"], fd)
        if child.wait(VERSION_TIMEOUT_S) is None:
            child.kill()
        said = os.pread(fd, 4096, 0).decode(errors="replace").splitlines()
    except OSError as failure:
        return f"{name}: {failure.strerror}"
    finally:
        os.close(fd)
    first = next(
        (line.strip() for line in said if any(letter.isdigit() for letter in line)), "version unknown"
    )
    return first if name in first else f"{name}: {first}"


def _look_at_filesystems() -> Finding:
    known = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    missing = sorted(FILESYSTEMS.keys() - known)
    if missing:
        return warning(
            TOOLS,
            f"the kernel does not list {', '.join(missing)}",
            "volumes with these filesystems can only be mounted if it loads them as modules when asked",
            f"modprobe {missing[0]}, or leave them out of StorageClasses",
        )
    return ok(TOOLS, f"the kernel mounts {', '.join(FILESYSTEMS)}")
