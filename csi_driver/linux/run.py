# SPDX-License-Identifier: Apache-2.0
"""Run a program and wait for it, never for longer than asked. What its output means is the caller's business.

Argument lists only, never a shell. stdout and stderr are kept apart: tools warn on stderr while they succeed.
"""

import logging
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

_TAIL: Final = 2000
_REAP_S: Final = 5.0
# A daemon's or an ssh session's PATH often lacks these, and mkfs lives there.
_SBIN: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")

PACKAGES: Final = {
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "tune2fs": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
    "xfs_admin": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "btrfs": "btrfs-progs",
    "btrfstune": "btrfs-progs",
    "lvcreate": "lvm2",
    "lvremove": "lvm2",
    "lvextend": "lvm2",
    "lvchange": "lvm2",
    "lvs": "lvm2",
    "vgs": "lvm2",
    "lvm": "lvm2",
    "mount.nfs": "nfs-common",
    "mount.nfs4": "nfs-common",
    "showmount": "nfs-common",
    "mount.cifs": "cifs-utils",
    "mount.ceph": "ceph-common",
    "rbd": "ceph-common",
    "mount": "mount",
    "umount": "mount",
    "losetup": "mount",
    "blkid": "util-linux",
    "fsfreeze": "util-linux",
    "iscsiadm": "open-iscsi",
    "cryptsetup": "cryptsetup-bin",
}


class CommandError(Exception):
    """A program did not do its work."""


class CommandMissing(CommandError):
    """The program is not installed, or may not be executed."""

    def __init__(self, tool: str) -> None:
        package = PACKAGES.get(os.path.basename(tool))
        remedy = f"install the Debian package {package}" if package else "install it"
        super().__init__(f"{tool} is not here: {remedy}")
        self.tool = tool
        self.package = package


class CommandFailed(CommandError):
    """It ended with an exit code, by a signal (`returncode` negative), or not in time (`timed_out`)."""

    def __init__(
        self, argv: Sequence[str], returncode: int, stderr: str, timeout_s: float | None = None
    ) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr = stderr
        self.timed_out = timeout_s is not None
        # mkfs.xfs and others follow their reason with all of their usage.
        reason = re.split(r"^usage:", stderr, maxsplit=1, flags=re.IGNORECASE | re.MULTILINE)[0] or stderr
        detail = " ".join(reason.split())
        super().__init__(
            f"{shlex.join(argv)} {_ending(returncode, timeout_s)}" + (f": {detail}" if detail else "")
        )


def _ending(returncode: int, timeout_s: float | None) -> str:
    if timeout_s is not None:
        return f"did not end within {timeout_s:g} s and was killed"
    if returncode >= 0:
        return f"failed with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (the memory limit of the container, perhaps)" if -returncode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    input: bytes | None = None,
    pass_fds: Sequence[int] = (),
) -> str:
    """Run to its end and return what it printed on stdout.

    LC_ALL=C; stdin is empty unless `input`; the child leads its own session, and the whole process group is
    killed at the deadline. Only `pass_fds` are inherited.

    Raises:
        CommandMissing: not installed, or not executable.
        CommandFailed: exit code, signal or deadline, with the end of stderr.
    """
    words = [os.fspath(word) for word in argv]
    started = time.monotonic()
    process = _start(words, input is not None, pass_fds)
    timed_out = False
    try:
        stdout, stderr = process.communicate(input, timeout_s)
    except subprocess.TimeoutExpired:
        stdout, stderr = _kill(process)
        timed_out = True
    except BaseException:
        _kill(process)
        raise
    took_ms = (time.monotonic() - started) * 1000
    _log.debug("ran %s: exit %s, %.1f ms", shlex.join(words), process.returncode, took_ms)
    if timed_out or process.returncode != 0:
        tail = stderr[-_TAIL:].decode(errors="replace")
        returncode = -signal.SIGKILL if process.returncode is None else process.returncode
        raise CommandFailed(words, returncode, tail, timeout_s if timed_out else None)
    return stdout.decode(errors="surrogateescape")


def _start(words: list[str], has_input: bool, pass_fds: Sequence[int]) -> subprocess.Popen[bytes]:
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path += [folder for folder in _SBIN if folder not in path]
    environment = {**os.environ, "LC_ALL": "C", "LANGUAGE": "C", "PATH": os.pathsep.join(path)}
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    except (FileNotFoundError, PermissionError) as error:
        raise CommandMissing(words[0]) from error


def _kill(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # All of the group ended meanwhile.
    try:
        return process.communicate(timeout=_REAP_S)
    except subprocess.TimeoutExpired as late:
        # Stuck in the kernel and deaf even to SIGKILL, or a grandchild that left the group holds the pipes:
        # do not wait for it. If the child is the stuck one, Popen reaps it later.
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.poll()
        return late.stdout or b"", late.stderr or b""
