# SPDX-License-Identifier: Apache-2.0
"""One process at a time: a lock on a directory that waits for its turn, and ends with the process however that ends."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from csi_driver.linux import files

_PAUSE_S: Final = 0.05


@contextmanager
def turn(directory: Path, timeout_s: float) -> Iterator[None]:
    """Hold the exclusive flock(2) of the directory while the body runs.

    Raises OSError: EBUSY another process has held it for all of the time.
    """
    fd = files.open_directory(directory)
    try:
        deadline = time.monotonic() + timeout_s
        while not _try(fd):
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process is at work there", os.fspath(directory))
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(fd)


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
