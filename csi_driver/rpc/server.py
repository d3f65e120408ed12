# SPDX-License-Identifier: Apache-2.0
"""A gRPC server on a unix socket: the socket appears whole, replaces only what is dead, and goes when the server does.

What is served is the caller's business, and so is when.
"""

import os
import socket
import stat
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from csi_driver.errors import ConfigurationError

SOCKET_PATH_BYTES = 107
"""What fits into a socket's address (sun_path, with its NUL)."""

SETTLE_S = 0.1
"""For what is on its way inside grpc: a call that has just arrived, an answer that has just been given."""

_OPTIONS = (
    # A second process must not share the address silently.
    ("grpc.so_reuseport", 0),
)


class Server:
    """One server. `listen` once, `stop` once."""

    def __init__(self, handlers: grpc.GenericRpcHandler, workers: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._server = grpc.server(self._pool, handlers=[handlers], options=_OPTIONS)
        self._path: Path | None = None
        self._identity: tuple[int, int] | None = None

    def listen(self, path: Path) -> None:
        """Answer on the socket at `path`, which appears when that is true.

        Raises:
            ConfigurationError: a living process has it, something else is in the way, or it cannot be made.
        """
        check_path(path)
        check_free(path)
        # Made out of everybody's sight, where nobody can connect before its mode is right; a name with a dot in front
        # is one that kubelet passes over. (Not by umask: that is the whole process's.)
        # By the socket's name, which no other driver's has: all of them are the same process number of their containers.
        hidden = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):x}")
        fresh = hidden / "s"
        check_path(fresh)
        try:
            hidden.mkdir(mode=0o700, exist_ok=True)
            fresh.unlink(missing_ok=True)  # of a process that died here
            self._bind(fresh)
            fresh.chmod(0o600)
            self._server.start()
            # Takes the place of a stale socket without a moment in which there is none.
            fresh.rename(path)
            hidden.rmdir()
        except OSError as error:
            raise ConfigurationError(
                f"socket {path}: cannot be made: {error.strerror}: is {path.parent} there, and writable?"
            ) from error
        self._path, self._identity = path, _identity(path)

    def _bind(self, path: Path) -> None:
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            # grpc does not say why.
            raise ConfigurationError(f"socket {path}: cannot be bound; the log above may say why") from error

    def is_listening(self) -> bool:
        """Whether the socket at our path is still the one made here."""
        return self._path is not None and _identity(self._path) == self._identity

    def stop(self, grace_s: float) -> None:
        """Take the socket away, refuse new calls, and let those under way end for so long."""
        if self._path is not None and self.is_listening():
            self._path.unlink(missing_ok=True)
        stopped = self._server.stop(grace_s)
        if not stopped.wait(SETTLE_S):
            # There are calls, or only connections that nobody closes: grpc would wait for either.
            ending = threading.Thread(target=self._pool.shutdown, name="drain", daemon=True)
            ending.start()
            ending.join(grace_s)
            stopped.wait(SETTLE_S)
            self._server.stop(0).wait(1.0)
        self._pool.shutdown(wait=False)


def parse_endpoint(text: str) -> Path:
    """The path in `unix:///a/b`, `unix:/a/b` or `/a/b`.

    Raises:
        ConfigurationError: it is none of these, or too long for a socket.
    """
    path = text.removeprefix("unix:")
    if path.startswith("//"):
        path = path[2:]
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ConfigurationError(
            f"endpoint {text!r}: give a unix socket by its absolute path, like unix:///run/orlop/csi.sock"
        )
    check_path(Path(path))
    return Path(path)


def check_path(path: Path) -> None:
    """Whether a socket can have this name.

    Raises:
        ConfigurationError: it is too long.
    """
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_BYTES:
        raise ConfigurationError(
            f"socket {path}: the path has {size} bytes; the kernel takes at most {SOCKET_PATH_BYTES}: use a shorter one"
        )


def check_free(path: Path) -> None:
    """Whether a socket may be put at `path`: nothing is there, or only one that nobody answers on.

    Raises:
        ConfigurationError: somebody does, or it is no socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigurationError(f"socket {path}: cannot be looked at: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(
            f"socket {path}: something that is no socket is there: remove it or choose another path"
        )
    if _answers(path):
        raise ConfigurationError(
            f"socket {path}: another process answers there: stop it first, or give this one another --endpoint"
        )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(2.0)
        try:
            client.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            # A full backlog, for one: there is somebody, if a busy one.
            return True
        return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
