# SPDX-License-Identifier: Apache-2.0
"""What must be there before anything is started; the refusal says how to get it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.cluster.harness import layout

PACKAGES = Path(__file__).resolve().parent.parent / "debian-packages.txt"
COMMANDS = (
    *("runc", "ip", "iptables", "busybox", "conntrack", "socat", "openssl", "buildah", "mmdebstrap"),
    *("losetup", "unshare", "nsenter", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"),
)
GO = (1, 26)


def check() -> None:
    if os.geteuid() != 0:
        raise SystemExit(
            "the cluster needs root: it makes mounts, loop devices, network interfaces and containers"
        )
    if _missing() and shutil.which("apt-get"):
        _install_packages()
    if missing := _missing():
        raise SystemExit(f"missing: {', '.join(missing)}; on Debian or Ubuntu install {PACKAGES}")
    _check_go()


def _missing() -> list[str]:
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    return missing if layout.CNI_PLUGINS.is_dir() else [*missing, os.fspath(layout.CNI_PLUGINS)]


def _install_packages() -> None:
    names = [line for line in PACKAGES.read_text().split("\n") if line and not line.startswith("#")]
    print(f"installing Debian packages: {' '.join(names)}", flush=True)
    options = ["--quiet=2", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "--quiet=2"], env=quiet, check=True)
    subprocess.run(["apt-get", "install", *options, *names], env=quiet, check=True)


def _check_go() -> None:
    go = shutil.which("go")
    output = subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout if go else ""
    found = re.search(r"go(\d+)\.(\d+)", output)
    if found is None or (int(found[1]), int(found[2])) < GO:
        raise SystemExit(f"the cluster's programs are built from source: Go >= {GO[0]}.{GO[1]} is needed")
