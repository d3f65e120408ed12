# SPDX-License-Identifier: Apache-2.0
"""Whose a file's or a device's content is: a managed pool's own filesystem, half of one, nothing, or somebody's.

A pool's filesystem is known by its uuid, which begins with the project's name and ends with a hash of the pool's. A
device that is being given one begins with a mark, until all of it is there. Changes nothing.
"""

import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from csi_driver.linux import holes, signature

MARK_BYTES = 512
_BRAND = b"orlop"
_MARK = re.compile(rb"Orlop is making a filesystem here for pool ([a-z0-9]+): ([0-9a-f-]{36})\n\0+")


class State(StrEnum):
    """What may be done with it: all, all, be used, nothing."""

    BLANK = "blank"
    HALF_MADE = "half-made"
    OURS = "ours"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Content:
    """What was found. `uuid` is there for what is ours, and whole; `what` tells a person."""

    state: State
    what: str
    uuid: UUID | None = None
    missing_bytes: int = 0
    """What a filesystem of ours needs beyond the end of its file or device."""


def new_uuid(pool: str) -> UUID:
    """A uuid (version 8) for the filesystem of this pool, unlike that of its namesake on another node."""
    raw = bytearray(_BRAND + secrets.token_bytes(5) + _hash(pool))
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return UUID(bytes=bytes(raw))


def is_of(uuid: UUID, pool: str) -> bool:
    """Whether a filesystem of this uuid was made for this pool."""
    return uuid.bytes.startswith(_BRAND) and uuid.bytes.endswith(_hash(pool))


def _hash(pool: str) -> bytes:
    return hashlib.sha256(pool.encode()).digest()[:6]


def mark(pool: str, uuid: UUID) -> bytes:
    """What the first sector holds while the filesystem is being brought there."""
    text = f"Orlop is making a filesystem here for pool {pool}: {uuid}\n"
    return text.encode().ljust(MARK_BYTES, b"\0")


def look(fd: int, pool: str) -> Content:
    """What an existing file or device holds, seen from this pool.

    Raises OSError: it cannot be read. What cannot be read is never called blank.
    """
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        return Content(State.BLANK, "nothing")
    identity, known = signature.identify(fd), signature.detect(fd)
    half = _MARK.fullmatch(os.pread(fd, MARK_BYTES, 0))
    if half:
        # Whoever came after the mark has left a signature, where its format keeps that.
        if half[1].decode() == pool and (
            known is None or (identity is not None and is_of(identity.uuid, pool))
        ):
            return Content(State.HALF_MADE, "a filesystem of this pool, half made")
        if known is None:
            return Content(State.FOREIGN, f"a half-made filesystem of pool {half[1].decode()!r}")
    if identity is not None and is_of(identity.uuid, pool):
        return Content(State.OURS, identity.fs_type, identity.uuid, max(0, identity.size_bytes - size))
    if identity is not None:
        return Content(State.FOREIGN, f"{identity.fs_type} with the uuid {identity.uuid}")
    if known is not None:
        return Content(State.FOREIGN, known)
    if _is_unused(fd):
        return Content(State.BLANK, "nothing")
    return Content(State.FOREIGN, "data of no known format")


def _is_unused(fd: int) -> bool:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return signature.is_unused(fd)
    # A file tells where data can be; what only was read before counts as that, too.
    ranges = holes.data_ranges(fd, os.fstat(fd).st_size)
    return all(signature.is_zero(fd, start, end - start) for start, end in ranges)
