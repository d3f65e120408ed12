# SPDX-License-Identifier: Apache-2.0
"""What the driver says it can do, and the answers' form."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi_driver import __version__
from csi_driver.model import (
    DriverFeatures,
    HealthEntry,
    HealthStatus,
    NodeInfo,
    Record,
    Stats,
    StorageEntry,
    StorageStatus,
    Volume,
)
from csi_driver.rpc import answers
from csi_driver.rpc.calls import Calls
from csi_driver.rpc.interceptor import Interceptor
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.servicers import ControllerService, Identity, NodeService
from tests.unit.wire import SERVICES, Client, directory, driver_over, memory_pool, mount_capability, serving

ALL = DriverFeatures(stages=True, grows_in_controller=True, grows_on_node=True)
NONE = DriverFeatures(stages=False, grows_in_controller=False, grows_on_node=False)


@contextmanager
def advertising(features: DriverFeatures) -> Iterator[Client]:
    """A driver that is only asked what it can do: nothing stands behind it."""
    nothing: Any = None
    services = [
        (SERVICES["Identity"], Identity("x.orlop.dev", features)),
        (SERVICES["Controller"], ControllerService(nothing, nothing, features, "node-1")),
        (SERVICES["Node"], NodeService(nothing, features)),
    ]
    with directory() as base, serving(Interceptor(services, Calls()), base) as client:
        yield client


@contextmanager
def real(more: str = "") -> Iterator[tuple[Client, Path]]:
    with directory() as base, driver_over(more + memory_pool(base / "pool")) as driver:
        with serving(driver.handlers, base) as client:
            yield client, base


def controller_can(client: Client) -> set[str]:
    kinds = pb.ControllerServiceCapability.RPC.Type
    answer = client.call(pb.ControllerGetCapabilitiesRequest())
    return {kinds.Name(capability.rpc.type) for capability in answer.capabilities}


def node_can(client: Client) -> set[str]:
    kinds = pb.NodeServiceCapability.RPC.Type
    answer = client.call(pb.NodeGetCapabilitiesRequest())
    return {kinds.Name(capability.rpc.type) for capability in answer.capabilities}


def test_the_driver_says_who_it_is() -> None:
    with advertising(ALL) as client:
        info = client.call(pb.GetPluginInfoRequest())
        ready = client.call(pb.ProbeRequest())

    assert (info.name, info.vendor_version) == ("x.orlop.dev", __version__)
    assert ready.ready.value is True


@pytest.mark.parametrize(("features", "grows"), [(ALL, True), (NONE, False)])
def test_what_the_plugin_can_do(features: DriverFeatures, grows: bool) -> None:
    with advertising(features) as client:
        answer = client.call(pb.GetPluginCapabilitiesRequest())

    kinds = pb.PluginCapability.Service.Type
    services = [kinds.Name(one.service.type) for one in answer.capabilities if one.HasField("service")]
    online = pb.PluginCapability.VolumeExpansion.Type.ONLINE
    expansion = [one.volume_expansion.type for one in answer.capabilities if one.HasField("volume_expansion")]
    assert services == [
        "CONTROLLER_SERVICE",
        "VOLUME_ACCESSIBILITY_CONSTRAINTS",
        "GROUP_CONTROLLER_SERVICE",
        "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS",
    ]
    assert expansion == ([online] if grows else [])


def test_what_the_controller_can_do() -> None:
    always = {
        "CREATE_DELETE_VOLUME",
        "LIST_VOLUMES",
        "LIST_VOLUMES_PUBLISHED_NODES",
        "GET_CAPACITY",
        "GET_VOLUME",
        "SINGLE_NODE_MULTI_WRITER",
        "GET_VOLUME_HEALTH",
        "LIST_VOLUME_HEALTH",
        "CREATE_DELETE_SNAPSHOT",
        "LIST_SNAPSHOTS",
        "GET_SNAPSHOT",
        "CLONE_VOLUME",
        "MODIFY_VOLUME",
    }
    with advertising(NONE) as client:
        assert controller_can(client) == always
    with advertising(ALL) as client:
        assert controller_can(client) == {*always, "EXPAND_VOLUME"}


def test_what_the_node_can_do() -> None:
    always = {"GET_VOLUME_STATS", "SINGLE_NODE_MULTI_WRITER", "GET_VOLUME_HEALTH", "GET_STORAGE_HEALTH"}
    with advertising(NONE) as client:
        assert node_can(client) == always
    with advertising(ALL) as client:
        assert node_can(client) == {*always, "STAGE_UNSTAGE_VOLUME", "EXPAND_VOLUME"}


@pytest.mark.parametrize(
    "request_",
    [
        pb.NodeStageVolumeRequest(
            volume_id="v", staging_target_path="/s", volume_capability=mount_capability()
        ),
        pb.NodeUnstageVolumeRequest(volume_id="v", staging_target_path="/s"),
        pb.NodeExpandVolumeRequest(volume_id="v", volume_path="/p"),
        pb.ControllerPublishVolumeRequest(),
        pb.CreateVolumeGroupSnapshotRequest(),
    ],
)
def test_what_is_not_advertised_is_unimplemented(request_: Any) -> None:
    with advertising(NONE) as client:
        failure = client.call(request_)

    assert failure.code is grpc.StatusCode.UNIMPLEMENTED
    assert failure.message


def test_a_volume_says_where_it_is() -> None:
    with real('node_id = "node-1"\nregion = "r"\nzone = "z"\n') as (client, _):
        made = client.call(
            pb.CreateVolumeRequest(name="one", volume_capabilities=[mount_capability()])
        ).volume
        listed = client.call(pb.ListVolumesRequest())
        got = client.call(pb.ControllerGetVolumeRequest(volume_id=made.volume_id))

    place = {
        "topology.local.orlop.dev/node": "node-1",
        "topology.kubernetes.io/region": "r",
        "topology.kubernetes.io/zone": "z",
    }
    assert [dict(topology.segments) for topology in made.accessible_topology] == [place]
    assert made.capacity_bytes > 0
    assert [entry.volume for entry in listed.entries] == [made]
    assert [list(entry.status.published_node_ids) for entry in listed.entries] == [[]]
    assert got.volume == made


def test_capacity_has_both_bounds() -> None:
    with real() as (client, _):
        capacity = client.call(pb.GetCapacityRequest())

    assert capacity.available_capacity == capacity.maximum_volume_size.value == 1 << 30
    assert capacity.minimum_volume_size.value == 4096


def test_capabilities_are_confirmed_as_a_whole_or_not_at_all() -> None:
    with real() as (client, _):
        made = client.call(
            pb.CreateVolumeRequest(name="one", volume_capabilities=[mount_capability()])
        ).volume
        fits = pb.ValidateVolumeCapabilitiesRequest(
            volume_id=made.volume_id, volume_capabilities=[mount_capability()]
        )
        confirmed = client.call(fits)
        fits.mutable_parameters["retention"] = "1h"
        refused = client.call(fits)
        client.call(
            pb.ControllerModifyVolumeRequest(
                volume_id=made.volume_id,
                mutable_parameters={"retention": "1h", "csi.storage.k8s.io/pv/name": "x"},
            )
        )
        changed = client.call(fits)

    assert list(confirmed.confirmed.volume_capabilities) == [mount_capability()]
    assert not refused.HasField("confirmed")
    assert refused.message == "mutable_parameters {'retention': '1h'}: the volume has {}"
    assert dict(changed.confirmed.mutable_parameters) == {"retention": "1h"}


def test_the_node_says_what_and_where_it_is() -> None:
    with real('node_id = "node-1"\nmax_volumes_per_node = 7\n') as (client, _):
        info = client.call(pb.NodeGetInfoRequest())

    assert (info.node_id, info.max_volumes_per_node) == ("node-1", 7)
    assert dict(info.accessible_topology.segments) == {"topology.local.orlop.dev/node": "node-1"}


def test_a_volume_in_use_is_published_here() -> None:
    record = Record(schema=1, id="v", name="n", size_bytes=1, access_type="mount")  # type: ignore[arg-type] # not read
    used = Volume(id="v", size_bytes=1, record=record, in_use=True)

    assert list(answers.listed(used, "node-1").status.published_node_ids) == ["node-1"]


def test_a_device_has_no_inodes() -> None:
    block = answers.stats(Stats(total_bytes=5))
    filesystem = answers.stats(Stats(5, 2, 3, total_inodes=7, used_inodes=3, available_inodes=4))

    assert list(block.usage) == [pb.VolumeUsage(unit=pb.VolumeUsage.Unit.BYTES, total=5)]
    assert list(filesystem.usage) == [
        pb.VolumeUsage(unit=pb.VolumeUsage.Unit.BYTES, total=5, used=2, available=3),
        pb.VolumeUsage(unit=pb.VolumeUsage.Unit.INODES, total=7, used=3, available=4),
    ]


@pytest.mark.parametrize("status", list(HealthStatus))
def test_every_condition_of_a_volume_has_a_number(status: HealthStatus) -> None:
    health = answers.volume_health("v", [HealthEntry(status, "Why", "because")])

    assert pb.VolumeHealthErrorType.Name(health.health_statuses[0].status) == status


@pytest.mark.parametrize("status", list(StorageStatus))
def test_every_condition_of_a_pool_has_a_number(status: StorageStatus) -> None:
    health = answers.storage_health([StorageEntry(status, "Why", "because")])

    assert pb.StorageHealthErrorType.Name(health.backend_health[0].status) == status


def test_a_node_without_a_known_limit_says_none() -> None:
    assert answers.node_info(NodeInfo("n", 0, {})).max_volumes_per_node == 0
