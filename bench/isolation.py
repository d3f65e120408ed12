# SPDX-License-Identifier: Apache-2.0
"""A mount namespace for one run: what it mounts is seen by nobody else, and goes with it however it ends.

Without it every namespace that another program makes meanwhile takes a copy of our mounts along, and keeps our loop
devices busy. What is mounted is not this module's business.
"""

import os
import shutil
import sys

_INSIDE = "ORLOP_MOUNT_NAMESPACE"


def enter_own_namespace(module: str) -> None:
    """Run `python -m module` anew, with the same arguments, in a mount namespace of its own; does nothing there.

    Exits with a sentence where the machine does not allow it.
    """
    if os.environ.get(_INSIDE) == str(os.getpid()):
        return
    if os.geteuid() != 0:
        sys.exit(f"{module}: it mounts and makes loop devices: run it as root")
    unshare = shutil.which("unshare")
    if unshare is None:
        sys.exit(f"{module}: unshare not found: install the Debian package util-linux")
    # exec, twice: the process keeps its number, by which the one inside knows that it is there.
    os.environ[_INSIDE] = str(os.getpid())
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    os.execv(unshare, [unshare, "--mount", "--propagation", "private", "--", *command])
