# SPDX-License-Identifier: Apache-2.0
"""A served driver over memory pools, and a client that can also send what no stub would."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from csi_driver.app import Driver, build
from csi_driver.config import parse
from csi_driver.rpc.interceptor import path_of
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.server import Server

SERVICES = pb.DESCRIPTOR.services_by_name
METHODS = {method.name: method for service in SERVICES.values() for method in service.methods}


@dataclass(frozen=True)
class Failure:
    """How a call failed."""

    code: grpc.StatusCode
    message: str


class Client:
    """One connection to a socket."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(
            f"unix:{socket}", options=(("grpc.use_local_subchannel_pool", 1),)
        )

    def close(self) -> None:
        self._channel.close()

    def raw(self, path: str, request: bytes, timeout: float = 20) -> bytes | Failure:
        """Bytes to a path, whatever they are."""
        try:
            call: Any = self._channel.unary_unary(path)  # without serializers it takes and gives bytes
            answer: bytes = call(request, timeout=timeout)
        except grpc.RpcError as error:
            return Failure(error.code(), error.details() or "")
        return answer

    def call(self, request: Message, timeout: float = 20) -> Any:
        """The answer to a request, or the Failure. Which call it is, the request's type says."""
        method = METHODS[type(request).DESCRIPTOR.name.removesuffix("Request")]
        answer = self.raw(path_of(method), request.SerializeToString(), timeout)
        return (
            answer if isinstance(answer, Failure) else GetMessageClass(method.output_type).FromString(answer)
        )


def requests_of(method: MethodDescriptor) -> Callable[..., Any]:
    """The class of a method's requests."""
    return GetMessageClass(method.input_type)


@contextmanager
def directory() -> Iterator[Path]:
    """A directory whose name is short enough for sockets, as pytest's are not always."""
    path = Path(tempfile.mkdtemp(prefix="orlop-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def serving(handlers: grpc.GenericRpcHandler, base: Path, workers: int = 4) -> Iterator[Client]:
    """A server on a socket in `base`, and a client of it."""
    server = Server(handlers, workers, "test")
    server.listen(base / "csi.sock")
    client = Client(base / "csi.sock")
    try:
        yield client
    finally:
        client.close()
        server.stop(5)


@contextmanager
def driver_over(text: str) -> Iterator[Driver]:
    """A driver with the configuration `text`."""
    driver = build(parse(text))
    try:
        yield driver
    finally:
        driver.close()


def memory_pool(root: Path, name: str = "mem", more: str = "") -> str:
    """The configuration of a pool in memory."""
    return f'[pools.{name}]\nbackend = "memory"\nroot = "{root}"\nreserved = 0\n{more}\n'


def mount_capability(**changes: Any) -> pb.VolumeCapability:
    """A filesystem, for one writer."""
    mode = pb.VolumeCapability.AccessMode.Mode.SINGLE_NODE_WRITER
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(**changes),
        access_mode=pb.VolumeCapability.AccessMode(mode=mode),
    )
