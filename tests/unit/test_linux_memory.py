# SPDX-License-Identifier: Apache-2.0
"""Heaps of the C library."""

import subprocess
import sys

from tests.conftest import unavailable


def test_threads_share_heaps_when_told_to() -> None:
    """glibc tells how many it has made: with one, threads that all take memory have added none."""
    code = (
        "import ctypes, threading\n"
        "from csi_driver.linux import memory\n"
        "shared = memory.share_arenas(1)\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "barrier = threading.Barrier(8)\n"
        "def take():\n"
        "    barrier.wait(); libc.malloc(ctypes.c_size_t(1000)); barrier.wait()\n"
        "threads = [threading.Thread(target=take) for _ in range(8)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "print(shared, flush=True)\n"
        "if shared: libc.malloc_stats()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    if done.stdout.strip() != "True":
        unavailable("the C library has no mallopt: it is not glibc")
    assert done.stderr.count("Arena ") == 1
