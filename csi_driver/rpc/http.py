# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server for probes and Prometheus: some paths, each a function that makes a page.

What the pages say is the caller's business, but for the form of a probe's (`probe`, `verdict`).
"""

import logging
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc

from csi_driver.errors import ConfigurationError, Error
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.status import shorten

log = logging.getLogger(__name__)

WORKERS = 8
"""Made as they are needed: a probe must find one free beside slow scrapes and clients that say nothing."""
PROBE_TIMEOUT_S = 3.0
CLIENT_TIMEOUT_S = 10.0
TEXT = "text/plain; charset=utf-8"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Page:
    """What is answered to one GET."""

    body: bytes
    status: int = 200
    content_type: str = TEXT


Routes = Mapping[str, Callable[[], Page]]


class Http:
    """Answers on one address from `start` to `stop`."""

    def __init__(self, address: str, routes: Routes) -> None:
        self._server = _listening(address, routes)
        self._thread = Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens (the address may have said 0: any)."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `:9808`, `127.0.0.1:9808` or `[::1]:9808`.

    Raises:
        ConfigurationError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ConfigurationError(f"HTTP address {text!r}: give host and port, like :9808 or 127.0.0.1:9808")
    return host, int(port)


def probe(endpoint: Path) -> str:
    """Why the driver does not answer a Probe on its socket, or ""."""
    # A connection of its own every time: an old one would still work when the socket has been removed.
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(f"unix:{endpoint}", options=options) as channel:
        call = channel.unary_unary(
            "/csi.v1.Identity/Probe",
            request_serializer=pb.ProbeRequest.SerializeToString,
            response_deserializer=pb.ProbeResponse.FromString,
        )
        try:
            call(pb.ProbeRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            return f"no answer to a Probe on {endpoint}: {error.code().name}: {error.details()}"
    return ""


def verdict(problem: str) -> Page:
    """The page of a probe: 200 when there is no problem, else 503 and the problem."""
    return Page(f"{problem}\n".encode(), status=503) if problem else Page(b"ok\n")


class _Server(HTTPServer):
    """A few threads, so that a client which is slow to ask holds up no probe."""

    # Kubernetes may start a new process while the old one's connections linger.
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], family: int, routes: Routes) -> None:
        self.address_family = family
        self.routes = routes
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="http")
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Not HTTPServer's: it asks the name service who we are, which may take seconds.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._pool.submit(self._answer, request, client_address).add_done_callback(_log_failure)

    def _answer(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        try:
            self.finish_request(request, client_address)
        except OSError:
            log.debug("HTTP client went away", extra={"fields": {"client": client_address[0]}})
        finally:
            self._open.discard(request)
            self.shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        # The process waits for its threads at its end, and they for clients.
        for request in list(self._open):
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_TIMEOUT_S
    server_version = "orlop"
    sys_version = ""

    def do_GET(self) -> None:
        make = self.server.routes.get(self.path.partition("?")[0])
        if make is None:
            page = Page(f"there is {', '.join(sorted(self.server.routes))}\n".encode(), status=404)
        else:
            page = _made(self.path, make)
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        self.wfile.write(page.body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("HTTP", extra={"fields": {"line": shorten(format % args, 256)}})


def _made(path: str, make: Callable[[], Page]) -> Page:
    try:
        return make()
    except (OSError, Error):
        log.exception("HTTP page failed", extra={"fields": {"path": path}})
        return Page(b"it failed; the driver's log has the details\n", status=500)


def _log_failure(answered: "Future[None]") -> None:
    # Nobody waits for the answer to a page, and a pool keeps what goes wrong in it to itself.
    error = answered.exception()
    if error is not None:
        log.error("HTTP page failed", exc_info=error)


def _listening(address: str, routes: Routes) -> _Server:
    host, port = parse_address(address)
    try:
        if not host and socket.has_dualstack_ipv6():
            return _Server(("::", port), socket.AF_INET6, routes)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return _Server((host, port), family, routes)
    except OSError as error:
        raise ConfigurationError(
            f"HTTP address {address!r}: cannot be listened on: {error.strerror}"
        ) from error
