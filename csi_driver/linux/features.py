# SPDX-License-Identifier: Apache-2.0
"""What this kernel (and the sandbox around this process) can do, found out by trying it on something harmless.

Each function returns when it can, and raises OSError when it cannot: ENOSYS too old, EPERM not allowed. For `orlop
doctor`; the driver itself tries the real thing and falls back.
"""

import ctypes
import errno
import os
from pathlib import Path

from csi_driver.linux import files, loop, mount, syscall

_PROBE_BYTES = 1 << 20


def resolve_beneath() -> None:
    """openat2(2): a path that cannot leave a directory."""
    fd = files.open_directory(Path("/"))
    try:
        os.close(syscall.openat2(fd, "proc", os.O_PATH, 0, syscall.RESOLVE_BENEATH))
    finally:
        os.close(fd)


def set_attributes() -> None:
    """open_tree(2) and mount_setattr(2): a bind mount that is read-only from its first moment. Needs CAP_SYS_ADMIN."""
    fd = files.open_directory(Path("/proc"))
    try:
        tree = syscall.open_tree(fd, mount.OPEN_TREE_CLONE)
        try:
            syscall.mount_setattr(tree, mount.MOUNT_ATTR_RDONLY, 0)
        finally:
            os.close(tree)
    finally:
        os.close(fd)


def mount_api() -> None:
    """fsopen(2): a filesystem that is mounted where nobody sees it, and tells why it could not be. Needs CAP_SYS_ADMIN."""
    os.close(syscall.fsopen("tmpfs"))


def filesystem(fs_type: str) -> None:
    """Whether the kernel has this filesystem; it loads the module if that is what it takes. ENODEV: it has not."""
    os.close(syscall.fsopen(fs_type))


def mount_points() -> None:
    """statx(2) that tells whether a path is a mount point."""
    if mount.find_mounted(Path("/proc")) is None:
        raise OSError(errno.ENOSYS, "the mount at /proc was not seen")


def statmount() -> None:
    """statmount(2): a mount's attributes without the list of all mounts."""
    found = syscall.statx(syscall.AT_FDCWD, "/proc", 0, syscall.STATX_MNT_ID_UNIQUE)
    if not found.stx_mask & syscall.STATX_MNT_ID_UNIQUE:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    size = ctypes.sizeof(mount.MountIdRequest)
    request = mount.MountIdRequest(size, 0, found.stx_mnt_id, mount.STATMOUNT_MNT_BASIC)
    status = mount.Statmount()
    size = ctypes.sizeof(status)
    if syscall.raw_statmount(ctypes.byref(request), ctypes.byref(status), size, 0) != 0:
        raise syscall.failure("statmount", "/proc")


def loop_devices() -> None:
    """LOOP_CONFIGURE: a file (here one in memory) behind a loop device, and away again. Needs CAP_SYS_ADMIN."""
    fd = os.memfd_create("orlop-features", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _PROBE_BYTES)
        loop.detach(loop.attach(fd))
    finally:
        os.close(fd)
