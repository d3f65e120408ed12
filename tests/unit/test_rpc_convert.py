# SPDX-License-Identifier: Apache-2.0
"""Requests become values, or are refused with a sentence that names the field."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from csi_driver.errors import Error, InvalidArgument, NotFound
from csi_driver.model import AccessMode, AccessType, Capability, CapacityRange
from csi_driver.rpc import check, convert
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.unit.wire import mount_capability

Mode = pb.VolumeCapability.AccessMode.Mode
WRITER = Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER)


def create(**changes: Any) -> pb.CreateVolumeRequest:
    return pb.CreateVolumeRequest(
        **({"name": "pvc-1", "volume_capabilities": [mount_capability()]} | changes)
    )


def stage(**changes: Any) -> pb.NodeStageVolumeRequest:
    fields: dict[str, Any] = {
        "volume_id": "v",
        "staging_target_path": "/s",
        "volume_capability": mount_capability(),
    }
    return pb.NodeStageVolumeRequest(**(fields | changes))


def publish(**changes: Any) -> pb.NodePublishVolumeRequest:
    fields: dict[str, Any] = {"volume_id": "v", "target_path": "/t", "volume_capability": mount_capability()}
    return pb.NodePublishVolumeRequest(**(fields | changes))


def refusal(read: Callable[[Any], object], request: Message) -> str:
    with pytest.raises(InvalidArgument) as caught:
        read(request)
    return str(caught.value)


# CreateVolume


def test_create_takes_all_that_is_asked() -> None:
    request = create(
        capacity_range=pb.CapacityRange(required_bytes=5, limit_bytes=7),
        parameters={"pool": "fast"},
        accessibility_requirements=pb.TopologyRequirement(
            requisite=[pb.Topology(segments={"z": "1"})], preferred=[pb.Topology(segments={"z": "2"})]
        ),
    )

    volume = convert.volume_request(request)

    assert volume.name == "pvc-1"
    assert volume.capacity_range == CapacityRange(5, 7)
    assert volume.capabilities == (WRITER,)
    assert volume.parameters == {"pool": "fast"}
    assert volume.topology.requisite == ({"z": "1"},)
    assert volume.topology.preferred == ({"z": "2"},)


def test_create_keeps_what_kubernetes_adds_out_of_the_parameters() -> None:
    given = {
        "csi.storage.k8s.io/pvc/name": "claim",
        "csi.storage.k8s.io/pvc/namespace": "space",
        "csi.storage.k8s.io/pv/name": "pv",
        "csi.storage.k8s.io/provisioner-secret-name": "s",
        "mode": "0750",
    }

    volume = convert.volume_request(create(parameters=given))

    assert volume.parameters == {"mode": "0750"}
    assert (volume.pvc_name, volume.pvc_namespace, volume.pv_name) == ("claim", "space", "pv")


def test_create_takes_the_filesystem_from_the_storage_class() -> None:
    volume = convert.volume_request(create(parameters={convert.FS_TYPE: "xfs"}))

    assert volume.capabilities[0].fs_type == "xfs"


def test_create_refuses_two_filesystems() -> None:
    request = create(
        volume_capabilities=[mount_capability(fs_type="ext4")], parameters={convert.FS_TYPE: "xfs"}
    )

    assert "'xfs': the volume capability says 'ext4'" in refusal(convert.volume_request, request)


def test_create_of_a_device_has_no_filesystem() -> None:
    block = pb.VolumeCapability(
        block=pb.VolumeCapability.BlockVolume(),
        access_mode=pb.VolumeCapability.AccessMode(mode=Mode.MULTI_NODE_MULTI_WRITER),
    )

    volume = convert.volume_request(create(volume_capabilities=[block], parameters={convert.FS_TYPE: "xfs"}))

    assert volume.capabilities == (Capability(AccessType.BLOCK, AccessMode.MULTI_NODE_MULTI_WRITER),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "name: missing"),
        ({"name": "n" * 129}, "129 bytes; at most 128"),
        ({"name": "ü" * 65}, "130 bytes; at most 128"),
        ({"name": "a\x00b"}, r"name 'a\x00b': has control characters"),
        ({"name": "a\x9fb"}, "control characters"),
        ({"volume_capabilities": []}, "volume_capabilities: missing"),
        ({"volume_capabilities": [pb.VolumeCapability()]}, "volume_capabilities[0].access_type: missing"),
        ({"parameters": {"k": "v" * 4096}}, "parameters: has 4097 bytes"),
        ({"capacity_range": pb.CapacityRange(required_bytes=-1)}, "capacity_range.required_bytes -1"),
        (
            {"capacity_range": pb.CapacityRange(limit_bytes=-(2**63))},
            "capacity_range.limit_bytes -9223372036854775808",
        ),
        (
            {"capacity_range": pb.CapacityRange(required_bytes=2, limit_bytes=1)},
            "less than required_bytes, 2",
        ),
        ({"volume_content_source": pb.VolumeContentSource()}, "volume_content_source: empty"),
        (
            {
                "volume_content_source": pb.VolumeContentSource(
                    snapshot=pb.VolumeContentSource.SnapshotSource()
                )
            },
            "volume_content_source.snapshot.snapshot_id: missing",
        ),
        ({"mutable_parameters": {"iops": "1" * 5000}}, "mutable_parameters: has 5004 bytes"),
    ],
)
def test_create_refuses(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(convert.volume_request, create(**changes))


def test_names_of_the_longest_length_and_any_language_are_taken() -> None:
    for name in ("n" * 128, "ü" * 64, "tab\tand\nline", "../../etc", "日本"):
        assert convert.volume_request(create(name=name)).name == name


# Capabilities


@pytest.mark.parametrize("number", [-1, 0, 8, 99, 2**31 - 1])
def test_unknown_access_modes_are_refused(number: Any) -> None:
    capability = mount_capability()
    capability.access_mode.mode = number

    words = refusal(convert.stage_request, stage(volume_capability=capability))

    assert f"volume_capability.access_mode.mode {number}" in words
    assert "SINGLE_NODE_WRITER" in words


@pytest.mark.parametrize("mode", list(AccessMode))
def test_every_access_mode_of_the_specification_is_read(mode: AccessMode) -> None:
    capability = mount_capability()
    capability.access_mode.mode = Mode.Value(mode)

    assert convert.required_capabilities([capability])[0].access_mode is mode


def test_a_mount_is_read_whole() -> None:
    capability = mount_capability(fs_type="xfs", mount_flags=["noexec", "nosuid"], volume_mount_group="7")

    assert convert.stage_request(stage(volume_capability=capability)).capability == Capability(
        AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER, "xfs", ("noexec", "nosuid"), "7"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fs_type": "x" * 129}, "fs_type"),
        ({"volume_mount_group": "1" * 129}, "volume_mount_group"),
        ({"mount_flags": ["x" * 4097]}, "mount_flags"),
    ],
)
def test_long_fields_of_a_mount_are_refused(fields: dict[str, Any], words: str) -> None:
    request = stage(volume_capability=mount_capability(**fields))

    assert words in refusal(convert.stage_request, request)


def test_mount_flags_are_not_quoted() -> None:
    request = stage(volume_capability=mount_capability(mount_flags=["password=geheim" * 400]))

    assert "geheim" not in refusal(convert.stage_request, request)


# Capacity


def test_capacity_is_asked_as_the_provisioner_does() -> None:
    capability = pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(), access_mode=pb.VolumeCapability.AccessMode(mode=Mode.UNKNOWN)
    )
    request = pb.GetCapacityRequest(
        volume_capabilities=[capability],
        parameters={"pool": "fast", "csi.storage.k8s.io/fstype": "xfs", "csi.storage.k8s.io/x": "y"},
    )

    capabilities, parameters, segments = convert.capacity(request)

    assert capabilities == (Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER, "xfs"),)
    assert parameters == {"pool": "fast"}
    assert segments is None


def test_capacity_of_a_place() -> None:
    request = pb.GetCapacityRequest(accessible_topology=pb.Topology(segments={"z": "1"}))

    assert convert.capacity(request) == ((), {}, {"z": "1"})


def test_capacity_of_an_empty_place_is_not_that_of_anywhere() -> None:
    request = pb.GetCapacityRequest(accessible_topology=pb.Topology())

    assert convert.capacity(request)[2] == {}


# Paths

BAD_PATHS = [
    ("", "missing"),
    ("relative/path", "give an absolute path"),
    ("/a/../b", "'..'"),
    ("/..", "'..'"),
    ("/a\0b", "NUL"),
    ("/" + "x" * 4095, "4096 bytes"),
    ("/", "the root directory"),
    ("//", "the root directory"),
    ("/.", "the root directory"),
]

PATH_FIELDS: list[tuple[Callable[[Any], object], Callable[[str], Message]]] = [
    (convert.stage_request, lambda path: stage(staging_target_path=path)),
    (convert.publish_request, lambda path: publish(target_path=path)),
    (convert.unstage, lambda path: pb.NodeUnstageVolumeRequest(volume_id="v", staging_target_path=path)),
    (convert.unpublish, lambda path: pb.NodeUnpublishVolumeRequest(volume_id="v", target_path=path)),
    (convert.stats, lambda path: pb.NodeGetVolumeStatsRequest(volume_id="v", volume_path=path)),
    (convert.node_expansion, lambda path: pb.NodeExpandVolumeRequest(volume_id="v", volume_path=path)),
]


@pytest.mark.parametrize(
    ("read", "make", "path", "words"),
    [
        (read, make, path, words)
        for read, make in PATH_FIELDS
        for path, words in BAD_PATHS
        # Where a volume is said to be: see test_no_volume_is_at_a_relative_path.
        if path.startswith("/") or not path or read not in (convert.stats, convert.node_expansion)
    ],
)
def test_bad_paths_are_refused_everywhere(
    read: Callable[[Any], object], make: Callable[[str], Message], path: str, words: str
) -> None:
    assert words in refusal(read, make(path))


@pytest.mark.parametrize(
    ("read", "request_"),
    [
        (convert.stats, pb.NodeGetVolumeStatsRequest(volume_id="v", volume_path="some/path")),
        (convert.node_expansion, pb.NodeExpandVolumeRequest(volume_id="v", volume_path="some/path")),
    ],
)
def test_no_volume_is_at_a_relative_path(read: Callable[[Any], object], request_: Message) -> None:
    with pytest.raises(NotFound, match="volume_path 'some/path'"):
        read(request_)


@pytest.mark.parametrize(("path", "words"), BAD_PATHS[1:])
def test_bad_optional_paths_are_refused(path: str, words: str) -> None:
    health = pb.NodeGetVolumeHealthRequest(volume_id="v", volume_publish_path=path)
    stats = pb.NodeGetVolumeStatsRequest(volume_id="v", volume_path="/p", staging_target_path=path)

    assert words in refusal(convert.publish_request, publish(staging_target_path=path))
    assert words in refusal(convert.volume_health, health)
    assert words in refusal(convert.stats, stats)


@pytest.mark.parametrize("path", ["/a/b", "//a/b", "/a//b/", "/a/./b", "/./a/b/."])
def test_a_path_has_one_spelling(path: str) -> None:
    assert convert.unpublish(pb.NodeUnpublishVolumeRequest(volume_id="v", target_path=path)) == ("v", "/a/b")


def test_dots_that_do_not_climb_are_names() -> None:
    assert check.path("p", "/a/..b/...") == "/a/..b/..."


# Everything else


@pytest.mark.parametrize(
    ("read", "request_"),
    [
        (convert.volume_id, pb.DeleteVolumeRequest()),
        (convert.volume_id, pb.ControllerGetVolumeRequest()),
        (convert.volume_id, pb.ControllerGetVolumeHealthRequest()),
        (convert.validation, pb.ValidateVolumeCapabilitiesRequest(volume_capabilities=[mount_capability()])),
        (convert.controller_expansion, pb.ControllerExpandVolumeRequest()),
        (convert.stage_request, stage(volume_id="")),
        (convert.publish_request, publish(volume_id="")),
        (convert.unstage, pb.NodeUnstageVolumeRequest(staging_target_path="/s")),
        (convert.unpublish, pb.NodeUnpublishVolumeRequest(target_path="/t")),
        (convert.stats, pb.NodeGetVolumeStatsRequest(volume_path="/p")),
        (convert.node_expansion, pb.NodeExpandVolumeRequest(volume_path="/p")),
        (convert.volume_health, pb.NodeGetVolumeHealthRequest()),
    ],
)
def test_a_volume_must_be_named(read: Callable[[Any], object], request_: Message) -> None:
    assert refusal(read, request_) == "volume_id: missing: it is required"


@pytest.mark.parametrize(
    ("read", "request_"),
    [
        (convert.stage_request, pb.NodeStageVolumeRequest(volume_id="v", staging_target_path="/s")),
        (convert.publish_request, pb.NodePublishVolumeRequest(volume_id="v", target_path="/t")),
        (convert.validation, pb.ValidateVolumeCapabilitiesRequest(volume_id="v")),
    ],
)
def test_a_capability_must_be_given(read: Callable[[Any], object], request_: Message) -> None:
    assert "missing" in refusal(read, request_)


def test_the_controller_grows_only_to_a_size() -> None:
    request = pb.ControllerExpandVolumeRequest(volume_id="v")

    assert "capacity_range: missing" in refusal(convert.controller_expansion, request)


def test_a_node_may_be_asked_to_grow_without_a_size() -> None:
    request = pb.NodeExpandVolumeRequest(volume_id="v", volume_path="/p")

    assert convert.node_expansion(request) == ("v", "/p", "", CapacityRange(), None)


def test_pages_are_not_negative() -> None:
    assert "max_entries -1" in refusal(convert.page, pb.ListVolumesRequest(max_entries=-1))


def test_the_pods_token_is_not_kept() -> None:
    given = {convert.TOKENS: "x" * 5000, "csi.storage.k8s.io/ephemeral": "true", "size": "1Gi"}

    request = convert.publish_request(publish(volume_context=given))

    assert request.context == {"csi.storage.k8s.io/ephemeral": "true", "size": "1Gi"}


def test_published_read_only() -> None:
    assert convert.publish_request(publish(readonly=True)).readonly


def test_health_is_asked_where_it_is_published_or_staged() -> None:
    request = pb.NodeGetVolumeHealthRequest(volume_id="v", volume_publish_path="/p", staging_target_path="/s")

    assert convert.volume_health(request) == ("v", "/p")
    request.volume_publish_path = ""
    assert convert.volume_health(request) == ("v", "/s")
    request.staging_target_path = ""
    assert convert.volume_health(request) == ("v", "")


def test_values_are_quoted_shortened_and_printable() -> None:
    with pytest.raises(Error) as caught:
        check.optional("field", "\x1b[31m" + "y" * 5000)

    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()
