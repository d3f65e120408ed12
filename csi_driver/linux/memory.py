# SPDX-License-Identifier: Apache-2.0
"""How the C library hands out memory in this process. What is kept in it is nobody's business here."""

import ctypes
from typing import Final

M_ARENA_MAX: Final = -8


def share_arenas(count: int) -> bool:
    """Let all threads take memory from `count` heaps, from now on; whether the C library can do that (musl's cannot).

    Otherwise every thread has a heap of its own, and keeps in it what it took once and another might use.
    """
    libc = ctypes.CDLL(None)
    try:
        mallopt = libc.mallopt
    except AttributeError:
        return False
    return bool(mallopt(ctypes.c_int(M_ARENA_MAX), ctypes.c_int(count)))
