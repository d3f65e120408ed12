# SPDX-License-Identifier: Apache-2.0
"""The first process of the namespaces that a second kernel runs in: makes this machine read-only, then starts it.

Its stdin is the job's script. It lays that into /run/lab, on a tmpfs that only this namespace has, where the kernel's first
program finds it and leaves the exit status. A file of its own that imports nothing of the project: it runs as pid 1.
"""

import argparse
import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

EXCHANGE = Path("/run/lab")
BROKEN = 125
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fds", type=lambda text: [int(fd) for fd in text.split(",")], default=[])
    parser.add_argument("--writable", action="append", default=[])
    parser.add_argument("kernel", nargs="+")
    arguments = parser.parse_args()
    set_read_only("/", True, AT_RECURSIVE)
    for path in arguments.writable:
        subprocess.run(["mount", "--bind", path, path], check=True)
        set_read_only(path, False, 0)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "lab", "/run"], check=True)
    EXCHANGE.mkdir()
    (EXCHANGE / "job").write_bytes(sys.stdin.buffer.read())
    (EXCHANGE / "writable").write_text("".join(f"{path}\n" for path in arguments.writable))
    # Not by exec: as pid 1 a kernel that panics could not abort itself, and would spin.
    subprocess.run(
        arguments.kernel,
        stdin=subprocess.DEVNULL,
        pass_fds=arguments.fds,
        env={**os.environ, "TMPDIR": "/run", "HOME": "/root"},
        check=False,
    )
    try:
        return int((EXCHANGE / "status").read_text())
    except (OSError, ValueError):
        return BROKEN


def set_read_only(path: str, read_only: bool, flags: int) -> None:
    """mount_setattr(2); mount(8) of Debian 12 cannot do it recursively."""
    wanted = struct.pack("QQQQ", *((MOUNT_ATTR_RDONLY, 0) if read_only else (0, MOUNT_ATTR_RDONLY)), 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t(len(wanted))
    if libc.syscall(ctypes.c_long(SYS_MOUNT_SETATTR), AT_FDCWD, os.fsencode(path), flags, wanted, size) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


if __name__ == "__main__":
    sys.exit(main())
