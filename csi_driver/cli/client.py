# SPDX-License-Identifier: Apache-2.0
"""A client of a driver's socket, as the sidecars and kubelet are. What the answers mean is the commands' business."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import grpc

from csi_driver.rpc.answers import COPYING
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb.csi_pb2_grpc import ControllerStub, IdentityStub, NodeStub

TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 3.0
PAGE = 500

Progress = tuple[int, int]
"""Bytes copied, and bytes to copy (0: not known)."""


class CallFailed(Exception):
    """A call was refused, or nobody answered; says both in one sentence."""

    def __init__(self, method: str, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{method}: {code.name}: {message}")
        self.code = code
        self.message = message


class Client:
    """The three services behind one endpoint."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.identity = IdentityStub(channel)
        self.controller = ControllerStub(channel)
        self.node = NodeStub(channel)

    @classmethod
    def connect(cls, endpoint: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Self:
        """A client whose channel stands.

        Raises:
            CallFailed: nobody answers there.
        """
        channel = grpc.insecure_channel(target_of(endpoint))
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            channel.close()
            raise CallFailed(
                "connect",
                grpc.StatusCode.UNAVAILABLE,
                f"nobody answers at {endpoint}: is the driver running?",
            ) from None
        return cls(channel)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def volumes(self) -> Iterator[pb.ListVolumesResponse.Entry]:
        """All volumes, page by page."""
        token = ""
        while True:
            with refusals("ListVolumes"):
                answer = self.controller.ListVolumes(
                    pb.ListVolumesRequest(max_entries=PAGE, starting_token=token), timeout=TIMEOUT_S
                )
            yield from answer.entries
            token = answer.next_token
            if not token:
                return

    def snapshots(self) -> tuple[list[pb.Snapshot], dict[str, Progress]]:
        """All snapshots, and how far the copies are that are under way (those of volumes too), by what they make."""
        found: list[pb.Snapshot] = []
        token = ""
        while True:
            with refusals("ListSnapshots"):
                answer, call = self.controller.ListSnapshots.with_call(
                    pb.ListSnapshotsRequest(max_entries=PAGE, starting_token=token), timeout=TIMEOUT_S
                )
            found.extend(entry.snapshot for entry in answer.entries)
            token = answer.next_token
            if not token:
                return found, _progress(call.trailing_metadata())


def _progress(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, Progress]:
    copying = {}
    for key, value in metadata or ():
        if key == COPYING and isinstance(value, str):
            made_id, done, total = value.split(" ")
            copying[made_id] = (int(done), int(total))
    return copying


@contextmanager
def connected(endpoint: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Iterator[Client]:
    """A client for the body.

    Raises:
        CallFailed: nobody answers there.
    """
    client = Client.connect(endpoint, timeout_s)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def refusals(method: str) -> Iterator[None]:
    """Turn gRPC's error into one that can be read."""
    try:
        yield
    except grpc.RpcError as error:
        raise CallFailed(method, error.code(), error.details() or "no details") from error


def target_of(endpoint: str) -> str:
    """What gRPC calls an endpoint given as `unix:///path`, or as a bare path."""
    return f"unix://{endpoint}" if endpoint.startswith("/") else endpoint
