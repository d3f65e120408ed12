# SPDX-License-Identifier: Apache-2.0
"""User-mode Linux: Debian's kernel as an ordinary program. Boots in seconds, computes at native speed, has one CPU."""

import os
from pathlib import Path

from tests.lab.kernel.machine import INIT, Channels, Job

MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


def or_else_qemu() -> str:
    """The kernel to take when none is asked for."""
    # Linux 6.1 as a program has room for 2,696 bytes of a process's FPU state; AMX tiles alone need 8,192.
    return "qemu" if " amx_tile" in Path("/proc/cpuinfo").read_text() else "uml"


def argv(job: Job, channels: Channels) -> list[str]:
    # Every scattered page of a process in there is a mapping out here; past the limit it would be killed.
    if int(MAX_MAP_COUNT.read_text()) < 1 << 20:
        MAX_MAP_COUNT.write_text(str(1 << 20))
    # On one CPU the switches between kernel and process are two to three times faster.
    cpu = str(max(os.sched_getaffinity(0)))
    consoles = [
        f"con0=null,fd:{channels.log}",
        f"con1={'null' if channels.terminal is None else f'fd:{channels.terminal}'},fd:{channels.stdout}",
        f"con2=null,fd:{channels.stderr}",
    ]
    return [
        *("taskset", "-c", cpu, "linux.uml", f"mem={job.memory}"),
        *("rootfstype=hostfs", "rootflags=/", "ro", "quiet", f"init={INIT}"),
        *("con=null", *consoles, "ssl=null", "uml_dir=/run/lab/uml", "umid=lab"),
        *([] if channels.terminal is None else ["LAB_TERMINAL=1"]),
    ]
