# SPDX-License-Identifier: Apache-2.0
"""Processes that outlive the command that started them: start, find again, end.

A pid file holds the start time too, so that a pid which now belongs to another process (after a
reboot, say) is never killed. Not its business: what the processes are.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.harness import layout, programs


def run(*command: str | Path, stdin: str | None = None, check: bool = True) -> str:
    """Run a short command with the cluster's programs first in PATH; return its output."""
    done = subprocess.run(
        command, input=stdin, env=environment(), capture_output=True, text=True, check=False
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def environment() -> dict[str, str]:
    system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    path = f"{programs.bin_directory()}:{system}"
    return os.environ | {"PATH": path, "KUBECONFIG": os.fspath(layout.KUBECONFIG)}


def start(name: str, command: list[str | Path]) -> int:
    """Start `command` detached, its output in the log of its name."""
    layout.LOGS.mkdir(parents=True, exist_ok=True)
    with (layout.LOGS / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            command,
            env=environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    remember(name, process.pid)
    process.returncode = (
        0  # it outlives this process, which will not wait for it and is not to be warned of that
    )
    return process.pid


def remember(name: str, pid: int) -> None:
    layout.PIDS.mkdir(parents=True, exist_ok=True)
    (layout.PIDS / name).write_text(f"{pid} {_start_time(pid)}\n")


def find(name: str) -> int | None:
    """The pid of the process remembered under `name`, if it still runs."""
    file = layout.PIDS / name
    if not file.exists():
        return None
    pid, started = file.read_text().split()
    return int(pid) if _start_time(int(pid)) == started else None


def kill(name: str) -> None:
    """Kill the process remembered under `name` and wait until it is gone."""
    pid = find(name)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: find(name) is None, f"{name} (pid {pid}) to end", timeout_s=240)
    (layout.PIDS / name).unlink(missing_ok=True)


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        asked = time.monotonic()
        if is_so():
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        # On a slow machine the asking itself would keep what is waited for from coming.
        time.sleep(max(0.1, time.monotonic() - asked))


def _start_time(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat; None for a process that is gone or a zombie.

    While any of its threads lives, it has its files, and its ports: a process whose first thread has ended is a zombie already.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold blanks
    return None if fields[0] == "Z" and len(threads) <= 1 else fields[19]
