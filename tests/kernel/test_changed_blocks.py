# SPDX-License-Identifier: Apache-2.0
"""Changed blocks through the socket: a backup program that reads them, what it gets wrong, and one that stops reading."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc
from tests.kernel.conftest import MIB, MakePool
from tests.unit.wire import Client, directory, driver_over, serving

SIZE = 16 * MIB
BLOCK = 4096
Code = grpc.StatusCode


@dataclass
class Scene:
    """A driver, its clients, and a raw volume in it."""

    client: Client
    stub: Any
    root: Path
    volume_id: str

    def write(self, offset: int, data: bytes) -> None:
        with open(self.root / "volumes" / self.volume_id / "image", "r+b") as image:
            image.seek(offset)
            image.write(data)
            image.flush()
            os.fsync(image.fileno())

    def snapshot(self, name: str) -> str:
        made = self.client.call(pb.CreateSnapshotRequest(name=name, source_volume_id=self.volume_id))
        return str(made.snapshot.snapshot_id)

    def content(self, snapshot_id: str) -> bytes:
        return (self.root / "snapshots" / snapshot_id / "image").read_bytes()

    def allocated(self, snapshot_id: str, **more: Any) -> Any:
        return self.stub.GetMetadataAllocated(
            pb.GetMetadataAllocatedRequest(snapshot_id=snapshot_id, **more), timeout=20
        )

    def delta(self, base: str, target: str, **more: Any) -> Any:
        request = pb.GetMetadataDeltaRequest(base_snapshot_id=base, target_snapshot_id=target, **more)
        return self.stub.GetMetadataDelta(request, timeout=20)


@contextmanager
def served(pool: Path, workers: int = 16) -> Iterator[Scene]:
    root = pool / "orlop"
    config = f'workers = {workers}\n[pools.fast]\nbackend = "image"\nroot = "{root}"\nreserved = 0\nprovisioning = "thin"\n'
    mode = pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    raw = pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=mode)
    wanted = pb.CreateVolumeRequest(
        name="v", capacity_range=pb.CapacityRange(required_bytes=SIZE), volume_capabilities=[raw]
    )
    with (
        directory() as base,
        driver_over(config) as driver,
        serving(driver.handlers, base, workers) as client,
    ):
        with grpc.insecure_channel(f"unix:{base / 'csi.sock'}") as channel:
            made = client.call(wanted).volume.volume_id
            yield Scene(client, csi_pb2_grpc.SnapshotMetadataStub(channel), root, made)


def ranges(stream: Any) -> list[tuple[int, int]]:
    return [(one.byte_offset, one.size_bytes) for message in stream for one in message.block_metadata]


def refusal(stream: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return caught.value.code()


def first_code(stream: Any) -> grpc.StatusCode:
    """How the first message of an answer was waited for."""
    try:
        next(iter(stream))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return Code.OK


def scatter(scene: Scene, count: int) -> None:
    with open(scene.root / "volumes" / scene.volume_id / "image", "r+b") as image:
        for number in range(count):
            os.pwrite(image.fileno(), b"x" * BLOCK, 2 * number * BLOCK)
        os.fsync(image.fileno())


@pytest.mark.parametrize("fs_type", ["xfs", "ext4"])
def test_a_base_and_its_delta_are_the_target(make_pool: MakePool, fs_type: str) -> None:
    with served(make_pool(fs_type)) as scene:
        scene.write(0, os.urandom(5 * MIB))
        base = scene.snapshot("base")
        scene.write(2 * MIB + 123, b"y" * 5000)
        scene.write(9 * MIB, os.urandom(MIB))
        target = scene.snapshot("target")

        whole = bytearray(SIZE)
        for offset, size in ranges(scene.allocated(base)):
            whole[offset : offset + size] = scene.content(base)[offset : offset + size]
        assert bytes(whole) == scene.content(base)
        found = ranges(scene.delta(base, target, max_results=1))
        for offset, size in found:
            whole[offset : offset + size] = scene.content(target)[offset : offset + size]
        assert bytes(whole) == scene.content(target)
        assert sum(size for _, size in found) < 2 * MIB

        # Somebody who was interrupted goes on where the last message ended.
        first = next(iter(scene.delta(base, target, max_results=1)))
        (one,) = first.block_metadata
        assert first.volume_capacity_bytes == SIZE
        rest = ranges(scene.delta(base, target, starting_offset=one.byte_offset + one.size_bytes))
        assert [(one.byte_offset, one.size_bytes), *rest] == found
        assert ranges(scene.delta(target, target)) == []


def test_what_cannot_be_told_is_refused(make_pool: MakePool) -> None:
    with served(make_pool("xfs")) as scene:
        base = scene.snapshot("base")

        assert ranges(scene.allocated(base, starting_offset=SIZE)) == []
        assert refusal(scene.allocated(base, starting_offset=SIZE + 1)) is Code.OUT_OF_RANGE
        assert refusal(scene.delta(base, base, starting_offset=SIZE + 1)) is Code.OUT_OF_RANGE
        assert refusal(scene.allocated(base, starting_offset=-1)) is Code.INVALID_ARGUMENT
        assert refusal(scene.allocated(base, max_results=-1)) is Code.INVALID_ARGUMENT
        assert refusal(scene.allocated("")) is Code.INVALID_ARGUMENT
        assert refusal(scene.allocated(scene.volume_id)) is Code.NOT_FOUND
        assert refusal(scene.delta(f"{base[:-4]}0000", base)) is Code.NOT_FOUND


def test_programs_that_stop_reading_hold_up_nobody(make_pool: MakePool) -> None:
    with served(make_pool("xfs"), workers=8) as scene:
        # More messages than fit into what is sent ahead.
        scatter(scene, 2000)
        taken = scene.snapshot("taken")
        open_ones = [scene.allocated(taken, max_results=1) for _ in range(8)]
        codes = [first_code(stream) for stream in open_ones]

        assert codes.count(Code.OK) == 2
        assert codes.count(Code.UNAVAILABLE) == 6
        probed = scene.client.call(pb.ProbeRequest(), timeout=5)
        assert probed.ready.value

        for stream in open_ones:
            stream.cancel()
        deadline = time.monotonic() + 60
        while scene.client.call(pb.DeleteSnapshotRequest(snapshot_id=taken)) != pb.DeleteSnapshotResponse():
            assert time.monotonic() < deadline, "a stream that was given up keeps its snapshot"
            time.sleep(0.05)
