# SPDX-License-Identifier: Apache-2.0
"""Checks of single fields of a request. A refusal names the field, the value (shortened, printable) and the remedy.

Which fields a call needs is `convert`'s business; whether what they name exists, the layers' below.
Secrets are never checked, so they are never quoted.
"""

import posixpath
import re
from collections.abc import Mapping

from csi_driver.errors import InvalidArgument, NotFound, invalid
from csi_driver.rpc.status import shorten

STRING_BYTES = 128
"""CSI's limit for strings where a field has none of its own."""
MAP_BYTES = 4096
"""CSI's limit for all keys and values of a map together."""
NODE_ID_BYTES = 256
"""CSI's limit for a node's id."""
PATH_BYTES = 4095
"""What the kernel takes (PATH_MAX counts the NUL)."""
QUOTED_BYTES = 64

# The specification bans these from names: control characters other than common whitespace.
_BANNED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def required(field: str, value: str, limit: int = STRING_BYTES) -> str:
    """A string that must be given, of at most `limit` bytes."""
    if not value:
        raise InvalidArgument(f"{field}: missing: it is required")
    return optional(field, value, limit)


def optional(field: str, value: str, limit: int = STRING_BYTES) -> str:
    """A string of at most `limit` bytes."""
    if size_bytes(value) > limit:
        raise invalid(field, quoted(value), f"has {size_bytes(value)} bytes; at most {limit} are allowed")
    return value


def name(field: str, value: str) -> str:
    """A name that the caller has chosen for a new thing."""
    required(field, value)
    if _BANNED.search(value):
        raise invalid(field, quoted(value), "has control characters; leave them out")
    return value


def path(field: str, value: str) -> str:
    """An absolute path on the node, in its simplest spelling; never the root directory."""
    if not value:
        raise InvalidArgument(f"{field}: missing: it is required")
    if "\0" in value:
        raise invalid(field, quoted(value), "has a NUL character: give the path of a directory")
    if size_bytes(value) > PATH_BYTES:
        raise invalid(
            field, quoted(value), f"has {size_bytes(value)} bytes; at most {PATH_BYTES} are allowed"
        )
    if not value.startswith("/"):
        raise invalid(field, quoted(value), "give an absolute path")
    if ".." in value.split("/"):
        raise invalid(field, quoted(value), "has a component '..': give the path without it")
    # normpath leaves two slashes at the beginning, which POSIX lets mean something else.
    simple = posixpath.normpath("/" + value.lstrip("/"))
    if simple == "/":
        raise invalid(
            field, quoted(value), "the root directory cannot be it: give the path of a directory beneath"
        )
    return simple


def published_path(field: str, value: str) -> str:
    """Where a volume is said to be. A relative path is no mistake of form to CSI: no volume is there.

    Raises:
        NotFound: it is relative.
    """
    if value and "\0" not in value and not value.startswith("/"):
        raise NotFound(f"{field} {quoted(value)!r}: no volume is there: volumes are at absolute paths")
    return path(field, value)


def optional_path(field: str, value: str) -> str:
    """As `path`, or ""."""
    return path(field, value) if value else ""


def mapping(field: str, value: Mapping[str, str]) -> dict[str, str]:
    """A map of at most 4 KiB."""
    size = sum(size_bytes(key) + size_bytes(text) for key, text in value.items())
    if size > MAP_BYTES:
        raise InvalidArgument(
            f"{field}: has {size} bytes of keys and values; at most {MAP_BYTES} are allowed"
        )
    return dict(value)


def not_negative(field: str, value: int) -> int:
    """A number of things or of bytes."""
    if value < 0:
        raise invalid(field, value, "must not be negative")
    return value


def quoted(value: str) -> str:
    """So much of a value as a message may quote (`invalid` makes it printable)."""
    return shorten(value, QUOTED_BYTES)


def size_bytes(value: str) -> int:
    """How long a string is on the wire."""
    return len(value) if value.isascii() else len(value.encode())
