# SPDX-License-Identifier: Apache-2.0
"""Which node a volume is handed to that one node at a time may have: a file in its home, changed by controllers.

Whether that node really uses it, the lock on its payload tells, which nodes hold for as long as they do; and USER_FILE, which
a node writes under that lock, who it was. Callers hold the volume's lock.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

import msgspec

from csi_driver.errors import Error, FailedPrecondition
from csi_driver.linux import files

log = logging.getLogger(__name__)

R = TypeVar("R", bound=msgspec.Struct)

HOLDER_FILE, USER_FILE = "holder.json", "user.json"
NODE, GENERATION = "node", "generation"


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """HOLDER_FILE. `node` is "" after the volume was taken back; `generation` tells each handing over from all others."""

    node: str
    generation: int
    since: float = 0.0


class User(msgspec.Struct, frozen=True, kw_only=True):
    """USER_FILE: gone once the node has let go in order."""

    node: str
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Handed:
    """What ControllerPublishVolume tells the node, by way of publish_context."""

    node: str
    generation: str

    @classmethod
    def of(cls, context: Mapping[str, str]) -> Self | None:
        """As a publish_context has it; None: nobody attaches volumes in this cluster."""
        if NODE not in context or GENERATION not in context:
            return None
        return cls(context[NODE], context[GENERATION])

    def told(self) -> dict[str, str]:
        """As a publish_context."""
        return {NODE: self.node, GENERATION: self.generation}


def holder(area_fd: int, name: str) -> Holder | None:
    """Who a volume was handed to last."""
    return _read(area_fd, f"{name}/{HOLDER_FILE}", Holder)


def hand_out(area_fd: int, name: str, volume_id: str, node: str) -> Holder:
    """Hand the volume to the node, if no other one has it. Repeatable.

    Raises:
        FailedPrecondition: another one has. CSI: "volume published to another node".
    """
    now = holder(area_fd, name)
    if now is not None and now.node == node:
        return now
    if now is not None and now.node:
        raise FailedPrecondition(
            f"volume {volume_id!r}: published to node {now.node!r}, and one node at a time can have it: end the pods that "
            f"use it there; if the node is dead, tell Kubernetes (the taint node.kubernetes.io/out-of-service)"
        )
    made = Holder(node=node, generation=now.generation + 1 if now else 1, since=time.time())
    _write(area_fd, name, made)
    return made


def take_back(area_fd: int, name: str, volume_id: str, payload: str, node: str) -> None:
    """Take the volume back from the node ("": whichever has it), which must have let it go, or be dead. Repeatable.

    Raises:
        FailedPrecondition: it has not, and it is not: it may write yet.
    """
    now = holder(area_fd, name)
    if now is None or not now.node or node not in ("", now.node):
        return
    left = user(area_fd, name)
    if is_used(area_fd, name, payload):
        raise FailedPrecondition(
            f"volume {volume_id!r}: node {left.node if left else now.node!r} uses it yet: it is let go when its pods there have "
            "ended, or, if the node is dead, when its lease on the file server has ended: repeat"
        )
    if left is not None and left.node == now.node:
        log.warning(
            "volume %s: taken back from node %s, which did not let it go: its lease on the server has ended",
            volume_id, now.node,
        )  # fmt: skip
    _write(area_fd, name, Holder(node="", generation=now.generation, since=time.time()))


def is_used(area_fd: int, name: str, payload: str) -> bool:
    """Whether any node has the payload locked; one that is not there is not."""
    try:
        fd = files.open_beneath(area_fd, f"{name}/{payload}", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return files.is_locked(fd)
    finally:
        os.close(fd)


def user(area_fd: int, name: str) -> User | None:
    """The node that uses the volume, or has used it last and not let it go."""
    return _read(area_fd, f"{name}/{USER_FILE}", User)


def _read(area_fd: int, path: str, kind: type[R]) -> R | None:
    try:
        return msgspec.json.decode(files.read(area_fd, path), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Error(f"{path}: damaged ({error}): remove it if no node uses the volume") from error


def _write(area_fd: int, name: str, made: Holder) -> None:
    home_fd = files.open_beneath(area_fd, name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files.write_atomic(home_fd, HOLDER_FILE, msgspec.json.encode(made) + b"\n")
        files.sync(home_fd)
    finally:
        os.close(home_fd)
