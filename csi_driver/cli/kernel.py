# SPDX-License-Identifier: Apache-2.0
"""What the kernel shows of volumes, in lines for people. It only looks: /proc and /sys, no programs."""

import os
import re
from pathlib import Path

from csi_driver.cli import words
from csi_driver.linux import loop, mount
from csi_driver.linux.loop import Loop
from csi_driver.linux.mount import Mount

CAP_SYS_ADMIN = 21

_SYS_BLOCK = Path("/sys/block")
_HASH = re.compile(r"(-[0-9a-f]{8}-[0-9a-f]{4})[0-9a-f]{28}")


def mounts_beneath(directory: Path) -> list[Mount]:
    """Everything mounted at or below a directory, the oldest first."""
    inside = f"{directory}/"
    return [
        entry for entry in mount.mounts() if entry.target == str(directory) or entry.target.startswith(inside)
    ]


def loops_beneath(directory: Path) -> dict[str, str]:
    """Loop devices whose file lies (or lay) below a directory: `/dev/loop3` to the file."""
    found = {}
    for file in _SYS_BLOCK.glob("loop*/loop/backing_file"):
        try:
            backing = file.read_text().rstrip("\n")
        except OSError:
            continue  # detached since it was listed
        if backing.startswith(f"{directory}/"):
            found[f"/dev/{file.parts[3]}"] = backing
    return found


def loop_of(image: Path) -> Loop | None:
    """The loop device over a file."""
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return next(iter(loop.find(fd)), None)
    finally:
        os.close(fd)


def describe_mount(entry: Mount, base: Path) -> str:
    """As findmnt would tell it: what, of which filesystem, is where, and how."""
    part = "" if entry.root == "/" else f"[{shorter(entry.root, base)}]"
    options = ",".join(entry.options)
    return f"{shorter(entry.target, base)}: {entry.fs_type} {entry.source}{part} ({options})"


def describe_loop(device: Loop, image: Path, base: Path) -> str:
    """As losetup would tell it."""
    ways = ["direct I/O" if device.direct_io else "buffered", f"{device.sector_size}-byte sectors"]
    if device.readonly:
        ways.append("read-only")
    return f"{device.path}: {words.size(device.size_bytes)} over {shorter(image, base)} ({', '.join(ways)})"


def describe_file(path: Path, base: Path) -> str:
    """Its size, and how much of that it occupies."""
    found = path.lstat()
    return (
        f"{shorter(path, base)}: {words.size(found.st_size)}, {words.size(found.st_blocks * 512)} allocated"
    )


def describe_usage(path: Path, base: Path) -> str:
    """As df would tell it."""
    usage = os.statvfs(path)
    total, free = usage.f_blocks * usage.f_frsize, usage.f_bavail * usage.f_frsize
    return f"df {shorter(path, base)}: {words.size(total)}, {words.size(free)} available"


def shorter(text: Path | str, base: Path) -> str:
    """The path or text with paths told from `base` on, and without the long ends of volumes' ids."""
    return _HASH.sub(r"\1…", os.fspath(text).replace(f"{base}/", ""))


def has_capability(pid: int, number: int) -> bool:
    """Whether a process may do what this capability (linux/capability.h) stands for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> number & 1)
