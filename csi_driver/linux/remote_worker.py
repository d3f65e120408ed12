# SPDX-License-Identifier: Apache-2.0
"""The child that `remote` talks to: does one thing after the other on one file server, and may hang in any of them.

A program of its own, so that it can be killed. It holds nothing between two requests, and ends with its parent.
"""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csi_driver.linux import files
from csi_driver.linux import mount as mounts

_MESSAGE = 1 << 16
_DIRECTORY = os.O_PATH | os.O_DIRECTORY


def mount(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Mount an export. Its program resolves the server's name and agrees on the protocol, as mount(8) would."""
    os.makedirs(request["target"], mode=0o700, exist_ok=True)
    words = [f"mount.{request['fs_type']}", request["source"], request["target"], "-o", request["options"]]
    # In our process group: who kills us kills it.
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise OSError(_number(said), said, request["source"])
    return {}, -1


def _number(said: str) -> int:
    for number in (
        errno.EACCES,
        errno.ENOENT,
        errno.EINVAL,
        errno.ETIMEDOUT,
        errno.ECONNREFUSED,
        errno.EBUSY,
    ):
        if os.strerror(number).lower() in said.lower():
            return number
    return errno.EACCES if "access denied" in said else errno.EIO


def open_directory(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A descriptor of a directory beneath a mount's root. Asks the server for it, so that a stale one is found out."""
    root_fd = os.open(request["root"], _DIRECTORY)
    try:
        fd = files.open_beneath(root_fd, request["path"] or ".", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(root_fd)
    os.fstat(fd)
    return {}, fd


def ensure_directory(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The same, made first if it is missing."""
    root_fd = os.open(request["root"], _DIRECTORY)
    try:
        return {}, files.ensure_directory(root_fd, request["path"], **request["owner"])
    finally:
        os.close(root_fd)


def unmount(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Unmount what is at a path. The last one of a server's filesystem tells the server, after it is gone from here."""
    mounts.unmount(Path(request["target"]), lazy=request["lazy"])
    return {}, -1


def usage(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """How full the filesystem at a path is."""
    found = files.usage(Path(request["path"]))
    return {
        "total_bytes": found.total_bytes,
        "used_bytes": found.used_bytes,
        "available_bytes": found.free_bytes,
        "total_inodes": found.total_inodes,
        "used_inodes": found.used_inodes,
        "available_inodes": found.free_inodes,
    }, -1


OPERATIONS: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], int]]] = {
    "mount": mount,
    "open": open_directory,
    "ensure": ensure_directory,
    "unmount": unmount,
    "usage": usage,
}


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    while message := connection.recv(_MESSAGE):
        request = json.loads(message)
        fd = -1
        try:
            values, fd = OPERATIONS[request["operation"]](request)
        except OSError as error:
            path = os.fspath(error.filename) if error.filename is not None else None
            values = {"errno": error.errno, "error": error.strerror, "path": path}
        if fd < 0:
            connection.send(json.dumps(values).encode())
        else:
            socket.send_fds(connection, [json.dumps(values).encode()], [fd])
            os.close(fd)


if __name__ == "__main__":
    main()
