# SPDX-License-Identifier: Apache-2.0
"""A view of the mounts that is this process's own: what it mounts, nobody else sees, copies or holds."""

import os
from typing import Final

from csi_driver.linux import syscall

CLONE_NEWNS: Final = 0x20000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18

_unshare = syscall.libc.unshare


def own_mounts() -> None:
    """Leave the mount namespace for a copy of it. For the calling thread, and threads and processes it makes later.

    Raises OSError: EPERM without CAP_SYS_ADMIN.
    """
    if _unshare(CLONE_NEWNS) < 0:
        raise syscall.failure("unshare", f"process {os.getpid()}")
    syscall.mount("none", "/", None, MS_REC | MS_PRIVATE, None)
