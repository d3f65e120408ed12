# SPDX-License-Identifier: Apache-2.0
"""The filesystems that a volume can have: how each is made, with which options, and how small it can be.

One table. `make` formats whatever it is given: that it is a fresh payload which no one else can see is the caller's duty.
What is on a device already is in `signature`, what happens to a mounted filesystem in `online` (both re-exported).
"""

import errno
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from csi_driver.linux.online import device_size as device_size
from csi_driver.linux.online import error_count as error_count
from csi_driver.linux.online import freeze as freeze
from csi_driver.linux.online import grow as grow
from csi_driver.linux.online import thaw as thaw
from csi_driver.linux.run import run
from csi_driver.linux.signature import detect as detect
from csi_driver.linux.signature import is_blank as is_blank

_MIB: Final = 1 << 20
_SIZE: Final = r"[1-9]\d{0,11}[kKmMgG]?"
_NUMBER: Final = r"\d{1,12}"


def _keys(**patterns: str) -> str:
    """A comma-separated list of key=value, each value by its pattern."""
    one = "|".join(f"{key}=(?:{value})" for key, value in patterns.items())
    return f"(?:{one})(?:,(?:{one}))*"


def _words(words: str, prefix: str = "") -> str:
    one = f"{prefix}(?:{'|'.join(re.escape(word) for word in words.split())})"
    return f"{one}(?:,{one})*"


@dataclass(frozen=True)
class Filesystem:
    """How to make one kind. `options` maps each allowed mkfs option to the pattern of its value (None: takes none).

    `minimum_bytes` is the smallest size that mkfs makes with `defaults`, complete (with a journal) and able to grow.
    `merged` are options of which mkfs heeds the last alone, so that lists must be joined.
    """

    tool: str
    minimum_bytes: int
    defaults: tuple[str, ...]
    options: Mapping[str, str | None]
    merged: tuple[str, ...] = ()


_EXT4: Final = Filesystem(
    tool="mkfs.ext4",
    minimum_bytes=8 * _MIB,
    # nodiscard: a discard would punch the holes that fallocate just filled. Lazy: the image is zero already.
    defaults=("-F", "-q", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"),
    options=MappingProxyType(
        {
            "-i": _SIZE,
            "-I": "256|512|1024|2048",
            "-N": _NUMBER,
            "-m": r"\d{1,2}(?:\.\d{1,3})?",
            "-G": _NUMBER,
            "-J": _keys(size=_NUMBER),
            "-L": r"[\w.-]{1,16}",
            "-T": r"default|small|news|largefile|largefile4",
            "-E": _keys(
                stride=_NUMBER,
                **{"stripe-width": _NUMBER, "stripe_width": _NUMBER, "packed_meta_blocks": "[01]"},
                num_backup_sb="[012]",
                resize=_NUMBER,
            ),
            "-O": _words(
                "64bit casefold dir_index dir_nlink ea_inode encrypt extra_isize fast_commit flex_bg huge_file inline_data"
                " large_dir metadata_csum metadata_csum_seed orphan_file project quota resize_inode sparse_super"
                " sparse_super2 stable_inodes uninit_bg verity",
                r"\^?",
            ),
        }
    ),
    merged=("-E", "-O"),
)

_XFS: Final = Filesystem(
    tool="mkfs.xfs",
    minimum_bytes=300 * _MIB,
    # -K: no discard, as above. 4 KiB sectors fit loop devices and disks of either kind.
    defaults=("-q", "-K", "-f", "-s", "size=4096"),
    options=MappingProxyType(
        {
            "-m": _keys(finobt="[01]", rmapbt="[01]", reflink="[01]", bigtime="[01]", inobtcount="[01]"),
            "-d": _keys(agcount=_NUMBER, agsize=_SIZE, su=_SIZE, sw=_NUMBER, sunit=_NUMBER, swidth=_NUMBER),
            "-i": _keys(size="512|1024|2048", maxpct=r"\d{1,3}", sparse="[01]"),
            "-n": _keys(size="4096|8192|16384|32768|65536|4k|8k|16k|32k|64k", ftype="1"),
            "-l": _keys(size=_SIZE, su=_SIZE, sunit=_NUMBER),
            "-L": r"[\w.-]{1,12}",
        }
    ),
)

_BTRFS: Final = Filesystem(
    tool="mkfs.btrfs",
    # mkfs is content with 109 MiB, but the kernel refuses to resize to anything below 256 MiB (EINVAL).
    minimum_bytes=256 * _MIB,
    defaults=("-q", "-K", "-f"),
    options=MappingProxyType(
        {
            "-m": "single|dup",
            "--metadata": "single|dup",
            "-d": "single|dup",
            "--data": "single|dup",
            "-n": "4096|8192|16384|32768|65536|4k|8k|16k|32k|64k",
            "--nodesize": "4096|8192|16384|32768|65536|4k|8k|16k|32k|64k",
            "-s": "4096|4k",
            "--sectorsize": "4096|4k",
            "--csum": "crc32c|xxhash|sha256|blake2",
            "--checksum": "crc32c|xxhash|sha256|blake2",
            "-M": None,
            "--mixed": None,
            "-O": _words(
                "block-group-tree extref free-space-tree no-holes quota skinny-metadata squota", r"\^?"
            ),
            "-L": r"[\w.-]{1,255}",
        }
    ),
)

FILESYSTEMS: Final[Mapping[str, Filesystem]] = MappingProxyType({"ext4": _EXT4, "xfs": _XFS, "btrfs": _BTRFS})


def _filesystem(fs_type: str) -> Filesystem:
    try:
        return FILESYSTEMS[fs_type]
    except KeyError:
        raise ValueError(f"filesystem {fs_type!r} is not one of {', '.join(FILESYSTEMS)}") from None


def parse_options(fs_type: str, options: str) -> list[str]:
    """mkfs options from one string, each checked against the list of harmless ones; option and value alternate.

    Raises ValueError: naming the bad option and the allowed ones.
    """
    allowed = _filesystem(fs_type).options
    try:
        words = iter(shlex.split(options))
    except ValueError as error:
        raise ValueError(f"mkfs options {options!r}: {error}") from None
    parsed: list[str] = []
    for word in words:
        parsed += _option(fs_type, allowed, word, words)
    return parsed


def _option(fs_type: str, allowed: Mapping[str, str | None], word: str, rest: Iterator[str]) -> list[str]:
    name, value = _split(word)
    if name not in allowed:
        raise ValueError(
            f"mkfs option {word!r} is not allowed for {fs_type}; allowed are {', '.join(allowed)}"
        )
    pattern = allowed[name]
    if pattern is None:
        if value is not None:
            raise ValueError(f"mkfs option {name} of {fs_type} takes no value, but was given {value!r}")
        return [name]
    if value is None:
        value = next(rest, "")
    if not re.fullmatch(pattern, value, re.ASCII):
        raise ValueError(
            f"mkfs option {name} of {fs_type} cannot be {value!r}; allowed are {_readable(pattern)}"
        )
    return [name, value]


def _split(word: str) -> tuple[str, str | None]:
    if word.startswith("--"):
        name, separator, value = word.partition("=")
        return name, value if separator else None
    return word[:2], word[2:] or None


def _readable(pattern: str) -> str:
    first = pattern.split("(?:,")[0]
    # Of the innermost groups only those with a choice need their parentheses.
    plain = (
        re.sub(r"\(\?:([^()|]*)\)", r"\1", first)
        .replace("(?:", "(")
        .replace(r"\^?", "[^]")
        .replace(_SIZE, "SIZE")
        .replace(_NUMBER, "NUMBER")
    )
    return re.sub(r"\\(\W)", r"\1", plain)


def make(fs_type: str, image: Path, options: Sequence[str] = (), timeout_s: float = 120) -> None:
    """Format the file (or device). No loop device is needed; blocks allocated to the file stay so.

    Raises run.CommandFailed, run.CommandMissing; ValueError: unknown `fs_type`; OSError: no such file.
    """
    kind = _filesystem(fs_type)
    arguments = [*kind.defaults, *options]
    if fs_type == "ext4" and _reads_as_zero(image):
        # Then the kernel need not zero the inode tables behind the first mount's back.
        arguments += ["-E", "assume_storage_prezeroed=1"]
    run([kind.tool, *_merge(arguments, kind.merged), image], timeout_s=timeout_s)


def _merge(arguments: Sequence[str], merged: Sequence[str]) -> list[str]:
    """Join the lists of repeated options into the first: mkfs would heed the last alone."""
    result: list[str] = []
    place: dict[str, int] = {}
    words = iter(arguments)
    for word in words:
        if word not in merged:
            result.append(word)
            continue
        value = next(words)
        if word in place:
            result[place[word]] += f",{value}"
        else:
            result += [word, value]
            place[word] = len(result) - 1
    return result


def _reads_as_zero(image: Path) -> bool:
    """Whether a regular file has no data at all: only holes and unwritten extents."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    finally:
        os.close(fd)
    return False
