# SPDX-License-Identifier: Apache-2.0
"""One run of fio on one file. What the file lies on, and what it is compared with, is `io`'s business."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SLACK_S = 60.0


@dataclass(frozen=True)
class Job:
    """What fio does. `fresh`: to a file whose blocks are allocated, and none of them written."""

    name: str
    mode: str
    block: str
    depth: int
    direct: bool = True
    fresh: bool = False

    @property
    def writes(self) -> bool:
        return "write" in self.mode


JOBS = (
    Job("sequential read 1M q8", "read", "1M", 8),
    Job("sequential write 1M q8", "write", "1M", 8),
    Job("sequential write 1M q8, fresh", "write", "1M", 8, fresh=True),
    Job("random read 4k q1", "randread", "4k", 1),
    Job("random read 4k q16", "randread", "4k", 16),
    Job("random write 4k q1", "randwrite", "4k", 1),
    Job("random write 4k q1, fresh", "randwrite", "4k", 1, fresh=True),
    Job("random write 4k q16", "randwrite", "4k", 16),
    Job("random write 4k q16, fresh", "randwrite", "4k", 16, fresh=True),
    Job("sequential read 1M, cached", "read", "1M", 1, direct=False),
    Job("sequential write 1M, cached, synced", "write", "1M", 1, direct=False),
    Job("random read 4k, cached", "randread", "4k", 1, direct=False),
    Job("random write 4k, cached, synced", "randwrite", "4k", 1, direct=False),
)


def prepare(path: Path, size_bytes: int, *, written: bool) -> None:
    """A file with all its blocks, unwritten or written in full; nothing of it in the page cache."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        if written:
            # Not zeros: a filesystem or disk may treat those as nothing.
            block = os.urandom(1 << 20)
            for offset in range(0, size_bytes, len(block)):
                os.pwrite(fd, block, offset)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def smooth(path: Path, size_bytes: int) -> None:
    """Write the file in full, so that its extents are few again.

    Random writes to unwritten extents leave tens of thousands of them; to remove such a file from a filesystem that
    discards what it frees takes minutes, and who measures next would wait for that.
    """
    prepare(path, size_bytes, written=True)


def run_fio(job: Job, path: Path, size_bytes: int, seconds: float) -> float:
    """Bytes a second. Cached writes count with the fsync at their end."""
    argv = ["fio", "--name=job", f"--filename={path}", f"--size={size_bytes}", f"--rw={job.mode}"]
    argv += [
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        f"--direct={int(job.direct)}",
        "--ioengine=libaio",
    ]
    argv += [
        f"--runtime={seconds * 1000:.0f}ms",
        "--time_based",
        "--fallocate=none",
        "--randrepeat=0",
        "--norandommap",
    ]
    argv += ["--invalidate=1", "--output-format=json"]
    if job.writes and not job.direct:
        # A pass over the file and its fsync, however long that takes: a time would end before the disk has it.
        argv = [word for word in argv if word != "--time_based" and not word.startswith("--runtime")]
        argv += ["--end_fsync=1", f"--io_size={_cached_bytes(job, size_bytes)}"]
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds + _SLACK_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fio: exit {done.returncode}: {done.stderr.strip()}")
    result = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = result["write" if job.writes else "read"]
    if job.writes and not job.direct:
        # fio leaves the final fsync out of the bandwidth; the job's own time has it.
        return float(side["io_bytes"]) / float(result["job_runtime"]) * 1000
    return float(side["bw_bytes"])


def _cached_bytes(job: Job, size_bytes: int) -> int:
    return size_bytes if job.mode == "write" else size_bytes // 8
