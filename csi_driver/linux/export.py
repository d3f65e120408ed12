# SPDX-License-Identifier: Apache-2.0
"""One export of a file server: how it is named, how it is mounted. Mounting may hang; who calls, sees to that."""

import errno
import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.linux import mountinfo

GONE: Final = (errno.ESTALE, errno.ENOTCONN)
"""A mount that has these is of no use to anyone any more, and a new one of the same export is."""

NOT_REACHED: Final = (
    errno.ETIMEDOUT,
    errno.ECONNREFUSED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EIO,
)
"""What mounting fails with where the server, or what it was just told, has gone away: it works later, or never did."""

_TOLD: Final = (errno.EACCES, errno.ENOENT, errno.EINVAL, *NOT_REACHED[:-1], errno.EBUSY)
_SAID: Final = {
    "access denied": errno.EACCES,
    "incorrect mount option": errno.EINVAL,
    "failed to resolve server": errno.EHOSTUNREACH,
}
"""What mount.nfs says in its own words."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is mounted: `server:/path`, a type that has a mount.TYPE program, and options."""

    source: str
    fs_type: str = "nfs"
    options: tuple[str, ...] = ()

    @property
    def server(self) -> str:
        """The server's name: all before the path."""
        return self.source.partition(":/")[0].strip("[]")

    @property
    def key(self) -> str:
        """The name of its directory: the same for the same mount."""
        text = "\0".join((self.fs_type, self.source, *self.options))
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def address(server: str, path: str) -> str:
    """The `server:/path` of a source as the kernel tells it of what is mounted: no slash twice, none at the end.

    An IPv6 address gets brackets, or it would be cut at its first colon.
    """
    host = f"[{server}]" if ":" in server and not server.startswith("[") else server
    return f"{host}:/{'/'.join(part for part in path.split('/') if part not in ('', '.'))}"


def mount(source: Source, target: Path) -> None:
    """Mount it; `target` is made if it is missing. The program resolves the server's name and agrees on the protocol.

    Raises OSError: what the program said, as a number where it has one.
    """
    os.makedirs(target, mode=0o700, exist_ok=True)
    options = ",".join(_with_version(source.options))
    words = [f"mount.{source.fs_type}", source.source, os.fspath(target), "-o", options]
    try:
        # In our process group: who kills us kills it.
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(errno.ENOENT, f"no program {words[0]}: install nfs-common", source.source) from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise OSError(_number(said), said, source.source)


def _with_version(options: tuple[str, ...]) -> tuple[str, ...]:
    """Where nothing is said: the newest NFSv4 that both sides know.

    Left to itself mount.nfs tries NFSv3 after a path that does not exist, and that takes long and ends in talk of rpc.statd.
    """
    said = {option.partition("=")[0] for option in options}
    return options if said & {"vers", "nfsvers", "minorversion"} else ("vers=4", *options)


def find_source(path: Path) -> str | None:
    """The source of the export that is mounted at `path`, without asking its server; None: no export is."""
    target = os.fspath(path)
    for entry in reversed(mountinfo.mounts()):
        if entry.target == target:
            return entry.source if ":/" in entry.source else None
    return None


def _number(said: str) -> int:
    for number in _TOLD:
        if os.strerror(number).lower() in said.lower():
            return number
    return next((number for words, number in _SAID.items() if words in said.lower()), errno.EIO)
