# SPDX-License-Identifier: Apache-2.0
"""A whole driver over the wire: a volume's life, secrets that stay secret, and requests nobody should send."""

import io
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver.model import GIB, KIB, MIB
from csi_driver.rpc.convert import TOKENS
from csi_driver.rpc.logs import Json, Text
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.conftest import require_root
from tests.unit.wire import (
    METHODS,
    Client,
    Failure,
    directory,
    driver_over,
    memory_pool,
    mount_capability,
    requests_of,
    serving,
)

OURS = ("Identity", "Controller", "Node")
OUR_METHODS = sorted(name for name, method in METHODS.items() if method.containing_service.name in OURS)


@dataclass(frozen=True)
class Rig:
    """A served driver with one volume, and the places around it."""

    client: Client
    base: Path
    kept: str
    """The id of a volume that stands."""

    @property
    def targets(self) -> Path:
        return self.base / "targets"

    @property
    def outside(self) -> Path:
        return self.base / "outside"

    def mounts(self) -> list[str]:
        """What is mounted beneath the rig."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [path for path in (line.split()[4] for line in lines) if path.startswith(f"{self.base}/")]

    def unpublish_all(self) -> None:
        # Where something else was below, the path itself stays, and that is said: what counts is the mount.
        for path in reversed(self.mounts()):
            self.client.call(pb.NodeUnpublishVolumeRequest(volume_id=self.kept, target_path=path))
        assert self.mounts() == []

    def reset(self) -> None:
        """One volume, published nowhere."""
        self.unpublish_all()
        for entry in self.client.call(pb.ListVolumesRequest()).entries:
            if entry.volume.volume_id != self.kept:
                self.client.call(pb.DeleteVolumeRequest(volume_id=entry.volume.volume_id))
        for _ in range(100):
            answer = self.client.call(create("kept"))
            # What was deleted takes room until the maintenance has removed it; hostile calls grew the volume, too.
            if not isinstance(answer, Failure):
                return
            if answer.code is grpc.StatusCode.ALREADY_EXISTS:
                self.client.call(pb.DeleteVolumeRequest(volume_id=self.kept))
            time.sleep(0.05)
        raise AssertionError(answer.message)


def create(name: str, **changes: Any) -> pb.CreateVolumeRequest:
    wanted: dict[str, Any] = {
        "capacity_range": pb.CapacityRange(required_bytes=MIB),
        "volume_capabilities": [mount_capability()],
    }
    return pb.CreateVolumeRequest(name=name, **(wanted | changes))


@contextmanager
def rig() -> Iterator[Rig]:
    with directory() as base:
        for place in ("targets", "staging", "outside/directory", "static/shared"):
            (base / place).mkdir(parents=True)
        for file in ("outside/file", "targets/.kept"):
            (base / file).write_text("precious")
        (base / "outside/directory/file").write_text("precious")
        (base / "link").symlink_to(base / "outside/directory")
        pools = memory_pool(base / "pool", more=f'static_roots = ["{base}/static"]')
        pools += memory_pool(base / "other", name="other", more=f'total = "{16 * MIB}"')
        config = 'node_id = "node-1"\ndefault_pool = "mem"\nexpansion = "controller"\n' + pools
        with driver_over(config) as driver, serving(driver.handlers, base) as client:
            driver.maintenance.start()
            kept = client.call(create("kept")).volume.volume_id
            made = Rig(client, base, kept)
            try:
                yield made
            finally:
                made.unpublish_all()
                driver.maintenance.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    require_root()
    with rig() as made:
        yield made


# A volume's life


def test_a_volume_lives_its_life_over_the_wire() -> None:
    require_root()
    with rig() as made:
        client, target = made.client, str(made.targets / "pod")
        volume = client.call(create("one", capacity_range=pb.CapacityRange(required_bytes=2 * MIB))).volume
        again = client.call(create("one", capacity_range=pb.CapacityRange(required_bytes=2 * MIB))).volume
        publish = pb.NodePublishVolumeRequest(
            volume_id=volume.volume_id, target_path=target, volume_capability=mount_capability()
        )
        assert again == volume
        assert client.call(publish) == pb.NodePublishVolumeResponse()
        (made.targets / "pod" / "file").write_bytes(b"x" * 10 * KIB)
        stats = client.call(
            pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=target)
        ).usage[0]
        listed = client.call(pb.ListVolumesRequest())
        in_use = client.call(pb.DeleteVolumeRequest(volume_id=volume.volume_id))
        grown = client.call(
            pb.NodeExpandVolumeRequest(
                volume_id=volume.volume_id,
                volume_path=target,
                capacity_range=pb.CapacityRange(required_bytes=3 * MIB),
            )
        )
        assert (
            client.call(pb.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=target))
            == pb.NodeUnpublishVolumeResponse()
        )
        deleted = client.call(pb.DeleteVolumeRequest(volume_id=volume.volume_id))
        gone = client.call(pb.ControllerGetVolumeRequest(volume_id=volume.volume_id))

    assert (stats.unit, stats.total, stats.used) == (pb.VolumeUsage.Unit.BYTES, 2 * MIB, 10 * KIB)
    assert {entry.volume.volume_id: list(entry.status.published_node_ids) for entry in listed.entries} == {
        volume.volume_id: ["node-1"],
        made.kept: [],
    }
    assert in_use.code is grpc.StatusCode.FAILED_PRECONDITION
    assert grown.capacity_bytes == 3 * MIB
    assert deleted == pb.DeleteVolumeResponse()
    assert gone.code is grpc.StatusCode.NOT_FOUND
    assert not (made.targets / "pod").exists()


def test_pages_walk_through_all_volumes_in_order() -> None:
    with rig() as made:
        for name in "abcde":
            made.client.call(create(name))
        ids: list[str] = []
        token = ""
        while True:
            page = made.client.call(pb.ListVolumesRequest(max_entries=2, starting_token=token))
            assert 1 <= len(page.entries) <= 2
            ids.extend(entry.volume.volume_id for entry in page.entries)
            token = page.next_token
            if not token:
                break

    assert len(ids) == 6
    assert ids == sorted(ids)


# Secrets

CANARY = "c4n4ry-k3pt-s3cr3t"


def secret_fields(method: MethodDescriptor) -> list[str]:
    return [field.name for field in method.input_type.fields if field.GetOptions().Extensions[pb.csi_secret]]


def with_canaries(request: Message) -> Message:
    """The request with the canary wherever a secret may be."""
    for name in secret_fields(METHODS[type(request).DESCRIPTOR.name.removesuffix("Request")]):
        getattr(request, name)["password"] = CANARY
    if "volume_context" in type(request).DESCRIPTOR.fields_by_name:
        getattr(request, "volume_context")[TOKENS] = f'{{"":{{"token":"{CANARY}"}}}}'  # noqa: B009 - messages differ
    return request


def plausible(method: MethodDescriptor, made: Rig) -> Message:
    """A request with every field filled in such a way that it gets far."""
    values: dict[str, Any] = {
        "name": "canary",
        "volume_id": made.kept,
        "target_path": str(made.targets / "canary"),
        "staging_target_path": str(made.base / "staging"),
        "volume_path": str(made.targets / "canary"),
        "volume_capability": mount_capability(),
        "volume_capabilities": [mount_capability()],
        "capacity_range": pb.CapacityRange(required_bytes=2 * MIB),
    }
    fields = method.input_type.fields_by_name
    made_so: Message = requests_of(method)(
        **{name: value for name, value in values.items() if name in fields}
    )
    return made_so


def test_every_secret_field_is_found() -> None:
    found = [name for name, method in METHODS.items() if secret_fields(method)]

    assert "CreateVolume" in found
    assert len(found) >= 19


@pytest.mark.parametrize("form", [Text(), Json()])
def test_secrets_are_in_no_line_of_the_log_and_in_no_answer(form: logging.Formatter) -> None:
    require_root()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(form)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    answers = []
    try:
        with rig() as made:
            for method in METHODS.values():
                for request in (plausible(method, made), requests_of(method)()):
                    answers.append(str(made.client.call(with_canaries(request))))
                    answers.append(str(made.client.raw("/x/y", with_canaries(request).SerializeToString())))
    finally:
        root.removeHandler(handler)
        root.setLevel(before)

    log = stream.getvalue()
    assert "NodePublishVolume" in log and "CreateVolume" in log
    assert CANARY not in log
    assert not [answer for answer in answers if CANARY in answer]


# Requests nobody should send

NASTY_TEXT = (
    "",
    "kept",
    "../../etc/passwd",
    "..",
    ".",
    "/",
    "a\x00b",
    "\x1b[31mred",
    "line\nbreak",
    "$(reboot)",
    "'; drop table volumes; --",
    "%s%n{}",
    "ü" * 64,
    "n" * 128,
    "n" * 129,
    "日本" * 200,
    "\U0010ffff",
    "pool-00000000-" + "0" * 32,
    "mem-zzzzzzzz-" + "0" * 32,
)
SIZES = (0, 1, -1, 4095, MIB, GIB, 2**40, 2**62, 2**63 - 1, -(2**63))
PARAMETERS = (
    "pool",
    "type",
    "regionId",
    "zoneId",
    "fsType",
    "mkfsOptions",
    "mode",
    "uid",
    "gid",
    "subPath",
    "provisioning",
    "path",
    "size",
    "csi.storage.k8s.io/fstype",
    "csi.storage.k8s.io/ephemeral",
    "csi.storage.k8s.io/pvc/name",
    "csi.storage.k8s.io/pod.namespace",
    TOKENS,
)
VALUES = (
    "mem", "other", "true", "1Gi", "64Ki", "-1", "0", "99999999999999999999", "0750", "07777", "9.9e999",
    "${pvc.metadata.name}", "${}", "${x", "a/../b", "/abs", "memfs", "ext4", "-O ^has_journal",
)  # fmt: skip


def texts() -> st.SearchStrategy[str]:
    # Lone surrogates cannot be on the wire.
    return st.sampled_from(NASTY_TEXT) | st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def ids(made: Rig) -> st.SearchStrategy[str]:
    pool, tag, number = made.kept.split("-")
    known = (made.kept, f"{pool}-{tag}-{'0' * 32}", f"{pool}-{'0' * 8}-{number}", f"other-{tag}-{number}")
    return st.sampled_from(known) | texts()


def paths(made: Rig) -> st.SearchStrategy[str]:
    """Paths beneath the rig, and such as are refused whatever is there: the machine itself is not at stake."""
    base = str(made.base)
    beneath = (
        f"{base}/targets/a", f"{base}/targets/b", f"{base}/targets/missing/c", f"{base}/targets", f"{base}/link",
        f"{base}/link/x", f"{base}/outside/file", f"{base}/outside/file/x", f"{base}/outside/directory",
        f"{base}/outside", f"{base}//targets/./a/", f"{base}/targets/{'n' * 255}", f"{base}/targets/{'n' * 256}",
        f"{base}/staging", f"{base}/targets" + "/d" * 2000, f"{base}/targets/ü日本", f"{base}/csi.sock",
    )  # fmt: skip
    refused = (
        "",
        "/",
        "//",
        "relative",
        "..",
        f"{base}/../x",
        f"{base}/..",
        f"{base}/a\0b",
        "/" + "x" * 5000,
    )
    return st.sampled_from((*beneath, *refused)) | texts().filter(lambda text: not text.startswith("/"))


def maps(made: Rig) -> st.SearchStrategy[dict[str, str]]:
    places = (f"{made.base}/static/shared", f"{made.base}/static/../outside", f"{made.base}/outside")
    values = st.sampled_from((*VALUES, *places, "v" * 5000)) | texts()
    return st.dictionaries(st.sampled_from(PARAMETERS) | texts(), values, max_size=5)


def field_values(field: FieldDescriptor, made: Rig) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return maps(made)
    if kind is not None:
        one: st.SearchStrategy[Any] = messages(kind, made)
    elif field.type == FieldDescriptor.TYPE_STRING:
        one = strings(field.name, made)
    elif field.type == FieldDescriptor.TYPE_BOOL:
        one = st.booleans()
    elif field.type == FieldDescriptor.TYPE_ENUM:
        one = st.integers(-1, 9) | st.sampled_from((2**31 - 1, -(2**31)))
    elif field.type == FieldDescriptor.TYPE_INT32:
        one = st.sampled_from((0, 1, 3, -1, 2**31 - 1, -(2**31)))
    else:
        one = st.sampled_from(SIZES) | st.integers(-(2**63), 2**63 - 1)
    return st.lists(one, max_size=3) if field.is_repeated else one


def strings(name: str, made: Rig) -> st.SearchStrategy[str]:
    if name.endswith("path"):
        return paths(made)
    if name.endswith("_id") or name == "starting_token":
        return ids(made)
    if name == "fs_type":
        return st.sampled_from(("", "memfs", "ext4")) | texts()
    if name == "mount_flags":
        return st.sampled_from(("ro", "noexec", "bind", "remount", "size=1", "loop", ",,")) | texts()
    return texts()


def messages(kind: Descriptor, made: Rig) -> st.SearchStrategy[Any]:
    """Messages of this type, each field there or not; of a oneof at most one."""
    optional = {field.name: field_values(field, made) for field in kind.fields}
    any_of_it = st.fixed_dictionaries({}, optional=optional).map(
        lambda values: GetMessageClass(kind)(**values)
    )
    if kind.full_name == "csi.v1.VolumeCapability":
        # Without a good share of good ones no request gets far.
        return st.just(mount_capability()) | any_of_it
    return any_of_it


@st.composite
def requests(draw: st.DrawFn, method: MethodDescriptor, made: Rig) -> Message:
    """Any message at all, or one that would do but for up to three fields: the former rarely get far."""
    kind = method.input_type
    if not kind.fields or draw(st.integers(0, 3)) == 0:
        made_up: Message = draw(messages(kind, made))
        return made_up
    request = plausible(method, made)
    names = st.sampled_from([field.name for field in kind.fields])
    for name in draw(st.lists(names, max_size=3, unique=True)):
        request.ClearField(name)
        value = draw(field_values(kind.fields_by_name[name], made))
        request.MergeFrom(GetMessageClass(kind)(**{name: value}))
    return request


def world(made: Rig) -> dict[str, Any]:
    """All that no request may change."""
    return {
        "machine": os.listdir("/"),
        "rig": sorted(os.listdir(made.base)),
        "outside": {str(path): path.read_bytes() for path in made.outside.rglob("*") if path.is_file()},
        "static": sorted(str(path) for path in (made.base / "static").rglob("*")),
        "link": os.readlink(made.base / "link"),
        "mounted elsewhere": [path for path in made.mounts() if not path.startswith(f"{made.targets}/")],
    }


@pytest.mark.parametrize("name", OUR_METHODS)
def test_no_request_is_our_fault_or_touches_what_is_not_ours(shared: Rig, name: str) -> None:
    shared.reset()
    before = world(shared)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(requests(METHODS[name], shared))
    def check(request: Message) -> None:
        answer = shared.client.call(request)

        if isinstance(answer, Failure):
            assert answer.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), answer.message
            assert answer.message
        elif name in ("CreateVolume", "DeleteVolume", "ControllerExpandVolume", "NodeExpandVolume"):
            shared.reset()

    check()
    shared.unpublish_all()

    assert world(shared) == before
    standing = shared.client.call(pb.ControllerGetVolumeRequest(volume_id=shared.kept))
    assert standing.volume.volume_id == shared.kept
