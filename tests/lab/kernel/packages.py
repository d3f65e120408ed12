# SPDX-License-Identifier: Apache-2.0
"""What the second kernel needs of the machine: Debian's packages, and root to use them."""

import glob
import os
import shutil
import subprocess
from pathlib import Path

LIST = Path(__file__).resolve().parent.parent / "debian-packages.txt"
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def ensure(kernel: str) -> str:
    """Install what is missing; why that cannot be, or "" when all is there."""
    if os.geteuid() != 0:
        return "needs root: the kernel runs in namespaces of its own"
    missing = _missing(kernel)
    if not missing:
        return ""
    if shutil.which("apt-get") is None:
        return f"not found: what Debian calls {', '.join(missing)}"
    print(f"lab: installing {' '.join(missing)}", flush=True)
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in ([*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"apt-get could not install {', '.join(missing)}: {' '.join(done.stderr.split())[-500:]}"
    return f"still not found after installing: {', '.join(left)}" if (left := _missing(kernel)) else ""


def _missing(kernel: str) -> list[str]:
    lines = [line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    wanted = [(package, program) for package, program, purpose, *_ in lines if purpose in (kernel, "lab")]
    return [package for package, program in wanted if not _is_there(program)]


def _is_there(program: str) -> bool:
    """Whether a program, or the file that a pattern describes, is installed."""
    if program.startswith("/"):
        return bool(glob.glob(program))
    return shutil.which(program, path=SEARCH) is not None
