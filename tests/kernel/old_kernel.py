# SPDX-License-Identifier: Apache-2.0
"""Run Python as on an older kernel: chosen system calls answer ENOSYS, by a seccomp filter of the child's own.

So the fallbacks are tried for what they do, without another kernel and without replacing a function of ours.
"""

import ctypes
import errno
import struct
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

_BPF_LD_W_ABS, _BPF_JEQ_K, _BPF_RET_K = 0x20, 0x15, 0x06
_SECCOMP_RET_ALLOW, _SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def forget(numbers: Sequence[int]) -> None:
    """Let these system calls fail with ENOSYS in this process from now on; there is no way back."""
    steps = [struct.pack("HBBI", _BPF_LD_W_ABS, 0, 0, 0)]  # seccomp_data.nr
    for number in numbers:
        steps.append(struct.pack("HBBI", _BPF_JEQ_K, 0, 1, number))
        steps.append(struct.pack("HBBI", _BPF_RET_K, 0, 0, _SECCOMP_RET_ERRNO | errno.ENOSYS))
    steps.append(struct.pack("HBBI", _BPF_RET_K, 0, 0, _SECCOMP_RET_ALLOW))
    program = _Program(len(steps), b"".join(steps))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *([ctypes.c_ulong] * 4)]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def run_without(numbers: Sequence[int], script: str, *arguments: object) -> str:
    """Run the script (`sys.argv[1:]` are the arguments) in a child without these system calls; what it printed."""
    whole = f"import sys\nfrom tests.kernel.old_kernel import forget\nforget({list(numbers)!r})\n{textwrap.dedent(script)}"
    done = subprocess.run(
        [sys.executable, "-c", whole, *map(str, arguments)],
        check=False,  # asserted below, with what it said
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
