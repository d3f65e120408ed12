# SPDX-License-Identifier: Apache-2.0
"""Run an action in a child process and kill it after its n-th step, a step being a system call that changes something.

The child is traced with ptrace(2): nothing of the driver is replaced, and the kill comes at the boundary of a system
call, where a power switch or an OOM killer could come too. Programs that the child starts are not traced: they live
on for a while, as they do when a driver is killed. What an action is, and what must be true afterwards, is the tests'
business.
"""

import ctypes
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from ctypes import c_uint8, c_uint32, c_uint64
from dataclasses import dataclass

PTRACE_TRACEME = 0
PTRACE_GETREGS = 12
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GET_SYSCALL_INFO = 0x420E
PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_EXITKILL = 0x100000
SYSCALL_INFO_ENTRY = 1
SYSCALL_INFO_EXIT = 2

O_CREAT = os.O_CREAT
TIMEOUT_STEPS = 5000

# Numbers of the calls that change something outside the process, by machine; the rest is not counted.
_X86_64 = {
    "write": 1, "ioctl": 16, "pwrite64": 18, "clone": 56, "fork": 57, "vfork": 58, "wait4": 61,
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86,
    "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "mknod": 133, "mount": 165,
    "umount2": 166, "quotactl": 179, "open": 2, "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260,
    "unlinkat": 263, "renameat": 264, "fchmodat": 268, "fallocate": 285, "renameat2": 316, "copy_file_range": 326,
}  # fmt: skip
_AARCH64 = {
    "write": 64, "ioctl": 29, "pwrite64": 68, "clone": 220, "wait4": 260, "fsync": 82, "fdatasync": 83,
    "truncate": 45, "ftruncate": 46, "mknodat": 33, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37,
    "renameat": 38, "mount": 40, "umount2": 39, "quotactl": 60, "fallocate": 47, "openat": 56, "fchmod": 52,
    "fchmodat": 53, "fchownat": 54, "fchown": 55, "renameat2": 276, "copy_file_range": 285,
}  # fmt: skip
# The same on both.
_BOTH = {
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "clone3": 435, "openat2": 437,
    "mount_setattr": 442, "quotactl_fd": 443,
}  # fmt: skip
_NAMES = {
    number: name
    for name, number in ((_X86_64 if platform.machine() == "x86_64" else _AARCH64) | _BOTH).items()
}
_OPENS = {"open": 1, "openat": 2}
# ioctls that only look: TCGETS, LOOP_GET_STATUS64, BLKGETSIZE64, BLKSSZGET, FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR,
# BTRFS_IOC_INO_LOOKUP, BTRFS_IOC_FS_INFO, BTRFS_IOC_DEV_INFO, BTRFS_IOC_SUBVOL_GETFLAGS, TIOCGWINSZ.
_LOOKS = {
    0x5401, 0x4C05, 0x80081272, 0x1268, 0x80086601, 0x801C581F, 0xD0009412, 0x8400941F, 0xD000941E, 0x80089419, 0x5413,
}  # fmt: skip


# struct user_regs_struct of x86-64: where the call's number, its arguments and its result are.
_REGISTERS = 27
_RESULT, _NUMBER, _ARGUMENTS = 10, 15, (14, 13, 12, 7, 9, 8)


class SyscallInfo(ctypes.Structure):
    """struct ptrace_syscall_info, its union as words: at entry number and arguments, at exit the result."""

    _fields_ = [
        ("op", c_uint8),
        ("pad", c_uint8 * 3),
        ("arch", c_uint32),
        ("instruction_pointer", c_uint64),
        ("stack_pointer", c_uint64),
        ("words", c_uint64 * 8),
    ]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: by itself (`killed_after` is ""), or killed after the system call named."""

    killed_after: str
    steps: int

    @property
    def finished(self) -> bool:
        return not self.killed_after


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def run_until(action: Callable[[], Callable[[], object]], step: int) -> Outcome:
    """Run `action()()` in a child; the outer call sets up and is not counted, the inner one dies after `step` steps.

    `step` 0 never kills. The child is a fork of this process, which must have no other threads.
    """
    pid = os.fork()
    if pid == 0:
        _child(action)
    try:
        return _trace(pid, step)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _child(action: Callable[[], Callable[[], object]]) -> None:
    code = 3
    try:
        inner = action()
        _ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        inner()
        code = 0
    except BaseException:  # noqa: BLE001  # nothing may return into the tests from here
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
    finally:
        os._exit(code)


def _trace(pid: int, step: int) -> Outcome:
    _wait_for_stop(pid)
    _ptrace(PTRACE_SETOPTIONS, pid, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL)
    steps, entered = 0, ""
    deliver = 0
    look = _looker(pid)
    while True:
        _ptrace(PTRACE_SYSCALL, pid, deliver)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise AssertionError(
                    f"the action failed in the child (exit code {os.WEXITSTATUS(status)}): see its output"
                )
            return Outcome("", steps)
        if os.WIFSIGNALED(status):
            raise AssertionError(f"the child died of signal {os.WTERMSIG(status)}")
        stopped_by = os.WSTOPSIG(status)
        if stopped_by != signal.SIGTRAP | 0x80:
            deliver = stopped_by
            continue
        deliver = 0
        info = look()
        if info.op == SYSCALL_INFO_ENTRY:
            entered = _changing(pid, info)
        elif info.op == SYSCALL_INFO_EXIT and entered and ctypes.c_int64(info.words[0]).value >= 0:
            steps += 1
            if steps == step:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Outcome(entered, steps)
            assert steps < TIMEOUT_STEPS, "the action does not end"


def _looker(pid: int) -> Callable[[], SyscallInfo]:
    """What tells of the call that the child is stopped in; to be asked at each stop."""

    def told() -> SyscallInfo:
        info = SyscallInfo()
        _ptrace(PTRACE_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
        return info

    try:
        told()
    except OSError:
        return _Registers(pid).look
    return told


class _Registers:
    """The same from the registers: user-mode Linux tells nothing else. Entry and exit take turns, and one begins in neither."""

    def __init__(self, pid: int) -> None:
        assert platform.machine() == "x86_64", "the second kernel is x86-64's"
        self._pid = pid
        self._op = SYSCALL_INFO_EXIT

    def look(self) -> SyscallInfo:
        values = (c_uint64 * _REGISTERS)()
        _ptrace(PTRACE_GETREGS, self._pid, ctypes.addressof(values))
        self._op = SYSCALL_INFO_EXIT if self._op == SYSCALL_INFO_ENTRY else SYSCALL_INFO_ENTRY
        info = SyscallInfo(op=self._op)
        if self._op == SYSCALL_INFO_EXIT:
            info.words[0] = values[_RESULT]
        else:
            info.words[0] = values[_NUMBER]
            for number, register in enumerate(_ARGUMENTS, 1):
                info.words[number] = values[register]
        return info


def _changing(pid: int, info: SyscallInfo) -> str:
    """The name of the call if it will change something, with what it is about; else ""."""
    name = _NAMES.get(int(info.words[0]), "")
    arguments = info.words[1:7]
    if name in _OPENS and not arguments[_OPENS[name]] & O_CREAT:
        return ""
    if name == "openat2" and not int.from_bytes(_memory(pid, arguments[2], 8), "little") & O_CREAT:
        return ""
    if name == "ioctl":
        code = arguments[1] & 0xFFFFFFFF
        return "" if code in _LOOKS else f"ioctl {code:#x}"
    if name == "write" and arguments[0] <= 2:
        return ""  # the test's own output
    return name


def _memory(pid: int, address: int, length: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(length)


def _wait_for_stop(pid: int) -> None:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        raise AssertionError("setting up failed in the child: see its output")


def _ptrace(request: int, pid: int, data_or_size: int = 0, address: int = 0) -> None:
    # For PTRACE_GET_SYSCALL_INFO the size goes where others have nothing, and the buffer where they have data.
    first, second = (data_or_size, address) if address else (0, data_or_size)
    if _libc.ptrace(request, pid, first, second) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"ptrace {request:#x}")
