# SPDX-License-Identifier: Apache-2.0
"""The child that a node's `remote.Server` talks to: does one thing after the other on one server, and may hang in each.

A program of its own, so that it can be killed. It holds nothing between two requests, and ends with its parent.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csi_driver.linux import export, files, remote, worker
from csi_driver.linux import mount as mounts
from csi_driver.linux.run import CommandError

_DIRECTORY = os.O_PATH | os.O_DIRECTORY


def mount(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Mount an export."""
    options = tuple(request["options"])
    export.mount(export.Source(request["source"], request["fs_type"], options), Path(request["target"]))
    return {}, -1


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
    """The same for a directory beneath one that must be there, made first if it is missing."""
    root_fd = os.open(request["root"], _DIRECTORY)
    try:
        directory_fd = files.open_beneath(root_fd, request["directory"] or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return {}, files.ensure_directory(directory_fd, request["path"], **request["owner"])
        finally:
            os.close(directory_fd)
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


Operations = dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], int]]]

OPERATIONS: Operations = {
    "mount": mount,
    "open": open_directory,
    "ensure": ensure_directory,
    "unmount": unmount,
    "usage": usage,
}


def serve(operations: Operations) -> None:
    """Do what is asked for, until nobody is there to ask."""
    connection = worker.connect()
    for content in worker.requests(connection):
        request = json.loads(content)
        fd = -1
        try:
            values, fd = operations[request["operation"]](request)
        except CommandError as error:
            values = {"errno": errno.EIO, "error": str(error), "path": None}
        except OSError as error:
            path = os.fspath(error.filename) if error.filename is not None else None
            values = {"errno": error.errno, "error": error.strerror, "path": path}
        remote.send(connection, remote.Message(json.dumps(values).encode(), fd))
        if fd >= 0:
            os.close(fd)


if __name__ == "__main__":
    serve(OPERATIONS)
