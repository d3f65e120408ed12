# SPDX-License-Identifier: Apache-2.0
"""A user claims a volume, uses it, loses the pod, and gives the volume back."""

from tests.cluster import kube, traces
from tests.cluster.harness import layout, node
from tests.cluster.kube import Namespace, claim, pod


def test_a_volume_from_claim_to_deletion(namespace: Namespace) -> None:
    free_before = free_bytes()
    namespace.apply(claim("data", "2Gi"), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    namespace.shell("app", "echo precious > /data/file && sync")
    volume = namespace.volume_of("data")
    assert volume["spec"]["capacity"]["storage"] == "2Gi"
    assert free_bytes() <= free_before - 2 * 2**30

    namespace.delete("pod", "app")
    namespace.apply(pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    assert namespace.shell("app", "cat /data/file") == "precious"

    namespace.delete("pod", "app")
    namespace.delete("persistentvolumeclaim", "data")
    name, handle = volume["metadata"]["name"], volume["spec"]["csi"]["volumeHandle"]
    kube.wait_until(lambda: not namespace.exists("persistentvolume", name), f"{name} to be gone")
    kube.wait_until(
        lambda: not any(handle in trace for trace in traces.of_all_nodes()), "home and loop device to be gone"
    )
    kube.wait_until(lambda: free_bytes() >= free_before - 2**20, "the pool's space to come back")


def test_the_volume_waits_for_its_first_consumer(namespace: Namespace) -> None:
    namespace.apply(claim("data"))

    namespace.wait_for_event("data", "waiting for first consumer")

    assert namespace.get("persistentvolumeclaim", "data")["status"]["phase"] == "Pending"


def test_an_immediate_class_makes_the_volume_at_once(namespace: Namespace) -> None:
    namespace.apply(kube.storage_class("csi-disk-immediate", {"type": "cloud_ssd"}, binding="Immediate"))

    namespace.apply(claim("data", storage_class="csi-disk-immediate"))

    namespace.wait_until_phase("persistentvolumeclaim", "data", "Bound")
    namespace.apply(pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    assert home_node(namespace.volume_of("data")) == namespace.node_of("app")


def home_node(volume: kube.Manifest) -> str:
    """The node that the PersistentVolume's affinity names."""
    terms = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert len(terms) == 1
    (node_term,) = [one for one in terms[0]["matchExpressions"] if one["key"] == kube.NODE_KEY]
    (name,) = node_term["values"]
    return str(name)


def free_bytes() -> int:
    """Free bytes of the pool `fast`, on all nodes together."""
    ask = ["stat", "--file-system", "--format=%f %S", "/var/lib/orlop/fast"]
    answers = [node.execute(one, *ask).split() for one in layout.existing_nodes()]
    return sum(int(blocks) * int(size) for blocks, size in answers)
