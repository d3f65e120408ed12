# SPDX-License-Identifier: Apache-2.0
"""A served driver is killed from outside in the middle of a call; started again, it gets the same call again.

What the tracer of the matrix cannot reach: threads, the socket, and a kill between two system calls.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from bench.driver import Driver
from csi_driver.pool import Pool
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc as services
from tests.crash.cases import (
    IMAGE_XFS,
    INLINE,
    OPERATIONS,
    Case,
    Operation,
    Picture,
    check_content,
    clear,
    picture_after,
    run,
    settled,
)
from tests.rig import KINDS, Kind
from tests.scene import clean_place, mounts_beneath, set_up

pytestmark = pytest.mark.crash

CALL_TIMEOUT_S = 120.0
# Of the time that the call takes undisturbed.
KILLED_AT = (0.3, 0.7)
SERVED = (
    "create",
    "delete",
    "stage",
    "unstage",
    "publish",
    "unpublish",
    "expand",
    "publish-inline",
    "unpublish-inline",
    "snapshot",
    "delete-snapshot",
    "restore",
    "clone",
    "group",
    "delete-group",
)


def request_of(name: str, case: Case, pool: Pool) -> tuple[str, Message]:
    """The service's method and its message for an operation of the matrix."""
    volume_id, snapshot_id = pool.id_of("a"), pool.snapshot_id_of("s")
    mode = pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    capability = pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(), access_mode=mode)
    staging, target, size = os.fspath(case.staging), os.fspath(case.target), case.size_bytes
    context = {"csi.storage.k8s.io/ephemeral": "true", "size": str(size)}
    match name:
        case "create":
            wanted = pb.CapacityRange(required_bytes=size)
            return "CreateVolume", pb.CreateVolumeRequest(
                name="a", capacity_range=wanted, volume_capabilities=[capability]
            )
        case "delete":
            return "DeleteVolume", pb.DeleteVolumeRequest(volume_id=volume_id)
        case "stage":
            return "NodeStageVolume", pb.NodeStageVolumeRequest(
                volume_id=volume_id, staging_target_path=staging, volume_capability=capability
            )
        case "unstage":
            return "NodeUnstageVolume", pb.NodeUnstageVolumeRequest(
                volume_id=volume_id, staging_target_path=staging
            )
        case "publish":
            return "NodePublishVolume", pb.NodePublishVolumeRequest(
                volume_id=volume_id,
                staging_target_path=staging,
                target_path=target,
                volume_capability=capability,
            )
        case "unpublish":
            return "NodeUnpublishVolume", pb.NodeUnpublishVolumeRequest(
                volume_id=volume_id, target_path=target
            )
        case "expand":
            where = staging if case.scene.kind.backend == "image" else target
            return "NodeExpandVolume", pb.NodeExpandVolumeRequest(
                volume_id=volume_id,
                volume_path=where,
                staging_target_path=staging,
                capacity_range=pb.CapacityRange(required_bytes=2 * size),
            )
        case "publish-inline":
            return "NodePublishVolume", pb.NodePublishVolumeRequest(
                volume_id=INLINE, target_path=target, volume_capability=capability, volume_context=context
            )
        case "unpublish-inline":
            return "NodeUnpublishVolume", pb.NodeUnpublishVolumeRequest(volume_id=INLINE, target_path=target)
        case "snapshot":
            return "CreateSnapshot", pb.CreateSnapshotRequest(name="s", source_volume_id=volume_id)
        case "delete-snapshot":
            return "DeleteSnapshot", pb.DeleteSnapshotRequest(snapshot_id=snapshot_id)
        case "restore":
            source = pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot_id)
            return "CreateVolume", pb.CreateVolumeRequest(
                name="copy",
                capacity_range=pb.CapacityRange(required_bytes=2 * size),
                volume_capabilities=[capability],
                volume_content_source=pb.VolumeContentSource(snapshot=source),
            )
        case "clone":
            origin = pb.VolumeContentSource.VolumeSource(volume_id=volume_id)
            return "CreateVolume", pb.CreateVolumeRequest(
                name="copy",
                capacity_range=pb.CapacityRange(required_bytes=size),
                volume_capabilities=[capability],
                volume_content_source=pb.VolumeContentSource(volume=origin),
            )
        case "group":
            return "CreateVolumeGroupSnapshot", pb.CreateVolumeGroupSnapshotRequest(
                name="g", source_volume_ids=[volume_id, pool.id_of("b")]
            )
        case "delete-group":
            return "DeleteVolumeGroupSnapshot", pb.DeleteVolumeGroupSnapshotRequest(
                group_snapshot_id=pool.group_id_of("g")
            )
    raise AssertionError(name)


Stubs = tuple[services.ControllerStub, services.NodeStub, services.GroupControllerStub]


@contextmanager
def connected(driver: Driver) -> Iterator[Stubs]:
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(f"unix:{driver.socket}", options=options) as channel:
        # Connecting takes longer than most calls.
        grpc.channel_ready_future(channel).result(CALL_TIMEOUT_S)
        yield (
            services.ControllerStub(channel),
            services.NodeStub(channel),
            services.GroupControllerStub(channel),
        )


def multicallable(stubs: Stubs, method: str) -> grpc.UnaryUnaryMultiCallable:  # type: ignore[type-arg]
    return next(getattr(stub, method) for stub in stubs if hasattr(stub, method))


def is_done(stubs: Stubs, method: str, request: Message) -> bool:
    """Call; whether that was it, and nothing is copied behind the answer."""
    try:
        answer = multicallable(stubs, method)(request, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.ABORTED and "being copied" in str(error.details()):
            return False
        raise
    return not isinstance(answer, pb.CreateSnapshotResponse) or answer.snapshot.ready_to_use


def served_call(driver: Driver, method: str, request: Message) -> float:
    """Start, call (again, while something is copied behind the answer), stop; how long it took, in seconds."""
    driver.start()
    try:
        with connected(driver) as stubs:
            began = time.perf_counter()
            while not is_done(stubs, method, request):
                assert time.perf_counter() - began < CALL_TIMEOUT_S, f"{method}: the copy does not end"
                time.sleep(0.1)
            return time.perf_counter() - began
    finally:
        driver.stop()


def killed_call(driver: Driver, method: str, request: Message, after_s: float) -> None:
    """Start, and kill in the middle of the call."""
    driver.start()
    with connected(driver) as stubs:
        answer = multicallable(stubs, method).future(request, timeout=CALL_TIMEOUT_S)
        time.sleep(after_s)
        driver.kill()
        code = answer.code()
    # ABORTED: a copy went on behind it, and was ended with the rest.
    known = (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
    assert code in known, f"{method}: {code}: {answer.details()}"


def write_config(kind: Kind, root: Path, path: Path, extra: str = "") -> None:
    path.write_text(
        'driver_name = "crash.orlop.dev"\nnode_id = "node-1"\n\n[pools.p]\n'
        f'backend = "{kind.backend}"\nroot = "{root}"\nreserved = "0%"\n{kind.options}{extra}',
        encoding="utf-8",
    )


def cases() -> list[object]:
    return [
        pytest.param(
            name,
            IMAGE_XFS if name == "expand" and kind.backend == "image" else kind,
            id=f"{name}-{kind.name}",
        )
        for name in SERVED
        for kind in KINDS
        # Only devices are staged.
        if kind.needs_root and (kind.backend == "image" or name not in ("stage", "unstage"))
    ]


# Where nothing can be shared, and more than a call waits for at that speed.
COPYING = tuple(replace(kind, size_bytes=64 << 20) for kind in KINDS if kind.filesystem == "ext4")
BANDWIDTH = 4 << 20
SLOWLY = f"copy_bandwidth = {BANDWIDTH}\n"
MUCH = random.Random(1).randbytes(24 << 20)


@pytest.fixture
def place() -> Iterator[Path]:
    with clean_place() as path:
        yield path


@pytest.mark.parametrize(("name", "kind"), cases())
def test_served_driver_killed_in_the_middle(name: str, kind: Kind, place: Path) -> None:
    operation: Operation = OPERATIONS[name]
    with set_up(kind, place, 2 << 30) as scene:
        case = Case(scene, place / "pods")
        case.pods.mkdir()
        write_config(kind, scene.root, place / "orlop.toml")
        driver = Driver(place, place / "orlop.toml")
        empty = picture_after(case, ())
        method, request = request_of(name, case, scene.open().pool)
        expected = picture_after(case, (*operation.before, operation.act))
        clear(case, empty)

        run(case, operation.before)
        if name == "stage":
            case.staging.mkdir(exist_ok=True)  # kubelet does
        took_s = served_call(driver, method, request)
        for part in KILLED_AT:
            check(case, expected)
            clear(case, empty)
            run(case, operation.before)
            if name == "stage":
                case.staging.mkdir(exist_ok=True)
            killed_call(driver, method, request, part * took_s)
            served_call(driver, method, request)
        check(case, expected)
        clear(case, empty)


@pytest.mark.parametrize("repeated", [True, False], ids=["repeated", "given-up"])
@pytest.mark.parametrize("name", ["snapshot", "restore", "clone"])
@pytest.mark.parametrize("kind", COPYING, ids=lambda kind: str(kind.name))
def test_served_driver_killed_while_it_copies_behind_its_answer(
    kind: Kind, name: str, repeated: bool, place: Path
) -> None:
    operation: Operation = OPERATIONS[name]
    with set_up(kind, place, 2 << 30) as scene:
        case = Case(scene, place / "pods", MUCH)
        case.pods.mkdir()
        write_config(kind, scene.root, place / "orlop.toml", SLOWLY)
        driver = Driver(place, place / "orlop.toml")
        empty = picture_after(case, ())
        goes_on = () if repeated else operation.undo
        expected = picture_after(case, (*operation.before, operation.act, *goes_on))
        clear(case, empty)

        run(case, operation.before)
        method, request = request_of(name, case, scene.open().pool)
        case.scene.current.close()
        driver.start()
        try:
            with connected(driver) as stubs:
                assert not is_done(stubs, method, request)
        finally:
            driver.kill()
        half_made = [path for path in (scene.root / "staging").iterdir() if any(path.iterdir())]
        assert half_made, "killed in the middle of it"
        if repeated:
            assert served_call(driver, method, request) > len(MUCH) / BANDWIDTH / 2, "it began anew"
        else:
            run(case, operation.undo)
        check(case, expected)
        if repeated:
            if name == "snapshot":
                run(case, (Case.restore,))
            check_content(case, "copy")
        clear(case, empty)


def check(case: Case, expected: Picture) -> None:
    if not mounts_beneath(case.staging) and "staging True" not in expected.pods and case.staging.is_dir():
        case.staging.rmdir()  # kubelet does
    found = settled(case, case.scene.open(), expected)
    case.scene.current.close()
    assert found.same(expected), f"{found}, not {expected}"
