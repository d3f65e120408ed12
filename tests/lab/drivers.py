# SPDX-License-Identifier: Apache-2.0
"""Drivers as they are deployed, each a process, here or on another machine; and the calls that most tests make."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc

from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc as stubs
from tests.lab.hosts import Host, wait_for

T = TypeVar("T")
MANY = pb.VolumeCapability(
    mount=pb.VolumeCapability.MountVolume(),
    access_mode=pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER),
)


class Driver:
    """An `orlop serve` of its own, somewhere."""

    def __init__(
        self,
        name: str,
        place: Path,
        config: str,
        role: str,
        host: Host | None = None,
        *,
        in_pod: bool = False,
    ) -> None:
        self._log = place / f"{name}.log"
        file, socket = place / f"{name}.toml", place / f"{name}.sock"
        file.write_text(config)
        words = [sys.executable, "-m", "csi_driver", "serve", "--node-id", name, "--role", role]
        words += ["--config", os.fspath(file), "--endpoint", os.fspath(socket)]
        if in_pod:
            # As a container with mountPropagation Bidirectional: a mount namespace of its own, gone when it ends.
            words = ["unshare", "--mount", "--propagation", "unchanged", *words]
        with self._log.open("wb") as log:
            argv = host.command(*words) if host else words
            # Another machine's working directory is its root.
            environment = {**os.environ, "PYTHONPATH": os.getcwd()}
            self._process = subprocess.Popen(
                argv, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        try:
            wait_for(socket.exists, 120)
        except AssertionError:
            self._process.kill()
            self._process.wait()
            print(self._log.read_text())
            raise
        self._channel = grpc.insecure_channel(f"unix://{socket}")
        self.identity = stubs.IdentityStub(self._channel)
        self.controller = stubs.ControllerStub(self._channel)
        self.node = stubs.NodeStub(self._channel)

    def end(self) -> None:
        self._channel.close()
        self._process.terminate()
        self._process.wait(120)
        print(self._log.read_text())


AGAIN = ("another call waits", "asked again in", "did not end within")
"""What a call is told that comes when a machine has much to do: opening a pool takes long then, and a new nfsd grants no lock for 10 s."""


def create(driver: Driver, name: str, *, patient: bool = True, **parameters: str) -> pb.Volume:
    asked = pb.CreateVolumeRequest(
        name=name,
        volume_capabilities=[MANY],
        capacity_range=pb.CapacityRange(required_bytes=64 << 20),
        parameters=parameters,
    )
    for _ in range(120):
        try:
            return driver.controller.CreateVolume(asked, timeout=90).volume
        except grpc.RpcError as error:
            if not patient or not any(words in str(error.details()) for words in AGAIN):
                raise
            time.sleep(0.5)
    raise AssertionError(f"volume {name} is not made, however often it is asked for")


def patiently(call: Callable[[], T]) -> T:
    """As Kubernetes does: again while the driver says that it could not yet."""
    for _ in range(240):
        try:
            return call()
        except grpc.RpcError as error:
            # Something is being copied, or a pool is being opened.
            if error.code() not in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE):
                raise
            time.sleep(0.5)
    return call()


def publish(driver: Driver, volume: pb.Volume, target: Path, *, readonly: bool = False) -> None:
    driver.node.NodePublishVolume(
        pb.NodePublishVolumeRequest(
            volume_id=volume.volume_id,
            target_path=str(target),
            volume_capability=MANY,
            volume_context=volume.volume_context,
            readonly=readonly,
        ),
        timeout=60,
    )
