# SPDX-License-Identifier: Apache-2.0
"""What a pod does with a volume's files: writes, reads, fills. The part of the demo that is no call."""

import errno
import hashlib
import os
import random
from pathlib import Path

from csi_driver.model import MIB

DATA_BYTES = 8 * MIB
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a volume says that is full: quotas have their own word for it."""


def write_data(path: Path, seed: int) -> str:
    """Write some MiB that no zeroed block could pass for, to the disk; their checksum."""
    data = random.Random(seed).randbytes(DATA_BYTES)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.sync()  # btrfs counts what is used at its commits only
    return hashlib.sha256(data).hexdigest()


def checksum(path: Path) -> str:
    """The checksum of what is there; "" if nothing is."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def refused(path: Path) -> str:
    """Try to write a file; the kernel's word for no (`EROFS`), "" if it was written."""
    try:
        path.write_bytes(b"x")
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def fill(path: Path, at_most_bytes: int) -> tuple[int, str]:
    """Write until the volume is full; the bytes written and the kernel's word for full ("" if it never was)."""
    block = random.Random(0).randbytes(MIB)
    written = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while written < at_most_bytes:
            written += os.write(fd, block)
        os.fsync(fd)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return written, errno.errorcode[error.errno]
    finally:
        os.close(fd)
    return written, ""
