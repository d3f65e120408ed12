# SPDX-License-Identifier: Apache-2.0
"""A volume is as large as it says, its user sees so, and the scheduler knows what each node has left."""

import json
import re
import time

import pytest

from tests.cluster import kube
from tests.cluster.harness import layout
from tests.cluster.kube import Namespace, claim, pod

GIB = 2**30


@pytest.mark.parametrize("pool", ["fast", "shared"])
def test_writing_past_the_size_is_refused_and_the_neighbour_writes_on(
    namespace: Namespace, pool: str
) -> None:
    kube.apply(kube.storage_class(f"csi-{pool}", {"pool": pool}))
    same_node = {"kubernetes.io/hostname": "node1"}
    for name in ("greedy", "neighbour"):
        namespace.apply(
            claim(name, "256Mi", f"csi-{pool}"), pod(name, {"/data": name}, nodeSelector=same_node)
        )
    for name in ("greedy", "neighbour"):
        namespace.wait_until_running(name)

    refused = namespace.refusal("greedy", "dd if=/dev/zero of=/data/file bs=1M count=400 && sync")

    assert re.search("No space left on device|Disk quota exceeded", refused)
    assert namespace.shell("neighbour", "dd if=/dev/zero of=/data/file bs=1M count=100 2>&1 && sync") != ""


def test_kubelet_tells_the_volumes_numbers(namespace: Namespace) -> None:
    namespace.apply(claim("data", "1Gi"), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    namespace.shell("app", "dd if=/dev/zero of=/data/file bs=1M count=200 && sync")
    seen = [int(word) * 1024 for word in namespace.shell("app", "df -k /data | tail -1").split()[1:4]]

    numbers: dict[str, float] = {}

    def is_counted() -> bool:
        nonlocal numbers
        text = kube.kubectl("get", "--raw", f"/api/v1/nodes/{namespace.node_of('app')}/proxy/metrics")
        found = re.findall(
            rf'^kubelet_volume_stats_(\w+)\{{namespace="{namespace.name}",.*\}} (\S+)', text, re.M
        )
        numbers = {name: float(value) for name, value in found}
        return numbers.get("used_bytes", 0) >= 200 * 2**20

    # Of one answer: kubelet leaves a volume out of it now and then.
    kube.wait_until(is_counted, "kubelet to have looked", timeout_s=240)
    capacity, used, available = seen
    assert numbers["capacity_bytes"] == capacity
    assert numbers["used_bytes"] == pytest.approx(used, abs=2**20)
    assert numbers["available_bytes"] == pytest.approx(available, abs=2**20)
    assert numbers["inodes_used"] >= 1


def capacities(storage_class: str) -> dict[str, int]:
    """Bytes that the scheduler believes each node has for the class."""
    listed = json.loads(kube.kubectl("--namespace=orlop", "get", "csistoragecapacities", "--output=json"))
    return {
        item["nodeTopology"]["matchLabels"][kube.NODE_KEY]: quantity(item["capacity"])
        for item in listed["items"]
        if item["storageClassName"] == storage_class and "capacity" in item
    }


def settled_capacities(storage_class: str) -> dict[str, int]:
    """As before, once what earlier tests gave back is in them: the sidecars look every 5 s here, the driver counts every 10."""
    seen: list[dict[str, int]] = []

    def is_settled() -> bool:
        time.sleep(6)
        seen.append(capacities(storage_class))
        return len(seen) >= 4 and all(one == seen[-1] for one in seen[-4:])

    kube.wait_until(is_settled, "the published capacities to settle")
    return seen[-1]


def quantity(text: str) -> int:
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)?", text)
    assert found is not None
    units = {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return int(found[1]) * units[found[2]]


def test_each_nodes_capacity_is_published_and_goes_down_with_each_volume(namespace: Namespace) -> None:
    nodes = {one.name for one in layout.existing_nodes()}
    kube.wait_until(lambda: capacities("csi-disk").keys() == nodes, "the capacity of every node")
    before = settled_capacities("csi-disk")

    namespace.apply(claim("data", "4Gi"), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")

    node = namespace.node_of("app")
    kube.wait_until(
        lambda: abs(before[node] - capacities("csi-disk")[node] - 4 * GIB) <= GIB // 64,
        "the capacity to go down by the volume",
        tell=lambda: f"before {before}, now {capacities('csi-disk')}",
    )


def test_a_pod_too_large_for_one_node_lands_on_the_other_and_a_third_waits(namespace: Namespace) -> None:
    nodes = [one.name for one in layout.existing_nodes()]
    kube.wait_until(lambda: capacities("csi-disk").keys() == set(nodes), "the capacity of every node")
    size = f"{max(capacities('csi-disk').values()) * 2 // 3 // GIB}Gi"

    where = []
    for name in nodes:
        namespace.apply(claim(name, size), pod(name, {"/data": name}))
        namespace.wait_until_running(name)
        where.append(namespace.node_of(name))
    namespace.apply(claim("too-much", size), pod("too-much", {"/data": "too-much"}))

    assert sorted(where) == sorted(nodes)
    assert namespace.wait_for_event("too-much", "did not have enough free storage")
