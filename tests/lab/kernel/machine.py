# SPDX-License-Identifier: Apache-2.0
"""One run of the second kernel: start it in its cage, pass its output on, hand back its command's exit status.

The cage (`cage.py`) has a mount and a pid namespace of its own. Whatever kills this process takes the cage with it, and
with the cage goes everything: processes, mounts, files. Which program the kernel is is not its business.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO, NoReturn

HERE = Path(__file__).resolve().parent
INIT = HERE / "init"
LOG_LINES = 60
OUT_OF_TIME, BROKEN = 124, 125


@dataclass(frozen=True)
class Job:
    command: list[str]
    interactive: bool = False
    memory: str = "2G"
    writable: list[Path] = field(default_factory=list)

    def script(self) -> str:
        """What the kernel's first program is to run: a shell script."""
        kept = {key: value for key, value in os.environ.items() if key not in ("TMPDIR", "PYTHONPATH")}
        variables = [f"{key}={value}" for key, value in (kept | {"LAB": "1"}).items()]
        words = ["env", "-i", *variables, *self.command]
        return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}\n"


@dataclass(frozen=True)
class Channels:
    """The write ends of our pipes, inherited by the kernel, and a terminal if it is to have one."""

    log: int
    stdout: int
    stderr: int
    terminal: int | None = None

    def all(self) -> list[int]:
        return [fd for fd in (self.log, self.stdout, self.stderr, self.terminal) if fd is not None]


def run(kernel: Callable[[Job, Channels], list[str]], job: Job, timeout_s: float, log: Path | None) -> int:
    """Boot, run the job, power off; its exit status, or OUT_OF_TIME, or BROKEN."""
    said: deque[bytes] = deque(maxlen=LOG_LINES)
    kept = log.open("wb") if log else None
    # Pipes of our own: the kernel makes what it is given non-blocking, and our stdout belongs to others too.
    log_read, log_write = os.pipe()
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    channels = Channels(log_write, out_write, err_write)
    if job.interactive:
        channels = Channels(log_write, os.dup(1), err_write, terminal=os.dup(0))
    cage = _start(kernel(job, channels), job, channels)
    for fd in (log_write, out_write, err_write):
        os.close(fd)
    pumps = [
        threading.Thread(target=_pump, args=pair, daemon=True)
        for pair in ((out_read, sys.stdout.buffer), (err_read, sys.stderr.buffer))
    ]
    pumps.append(threading.Thread(target=_keep, args=(log_read, said, kept), daemon=True))
    for pump in pumps:
        pump.start()
    status = _wait(cage, job, timeout_s)
    for pump in pumps:
        pump.join(5)
    if status in (OUT_OF_TIME, BROKEN):
        reason = f"not done within {timeout_s:g} s" if status == OUT_OF_TIME else "the kernel failed"
        sys.stderr.write(f"lab: {reason}; the end of its log:\n")
        sys.stderr.write(b"".join(said).decode(errors="replace"))
    return status


def _start(kernel: list[str], job: Job, channels: Channels) -> subprocess.Popen[bytes]:
    cage = [
        # The cage dies with us, and its first process with the cage, whatever the way.
        *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--mount-proc", "--fork"),
        *("--kill-child=KILL", "--propagation", "private", sys.executable, os.fspath(HERE / "cage.py")),
        *("--fds", ",".join(map(str, channels.all()))),
        *(word for path in job.writable for word in ("--writable", os.fspath(path))),
        *("--", *kernel),
    ]
    process = subprocess.Popen(
        cage,
        stdin=subprocess.PIPE,
        pass_fds=channels.all(),
        env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(os.fsencode(job.script()))
    process.stdin.close()
    return process


def _wait(cage: subprocess.Popen[bytes], job: Job, timeout_s: float) -> int:
    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        cage.kill()
        cage.wait()
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    try:
        return cage.wait(None if job.interactive else timeout_s)
    except subprocess.TimeoutExpired:
        cage.kill()
        cage.wait()
        return OUT_OF_TIME


def _pump(fd: int, out: BinaryIO) -> None:
    while part := os.read(fd, 1 << 16):
        try:
            out.write(part)
            out.flush()
        except BrokenPipeError:
            pass  # Nobody reads any more; the kernel must not block on that.


def _keep(fd: int, said: deque[bytes], kept: BinaryIO | None) -> None:
    with os.fdopen(fd, "rb") as lines:
        for line in lines:
            said.append(line)
            if kept:
                kept.write(line)
                kept.flush()
