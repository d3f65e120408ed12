# SPDX-License-Identifier: Apache-2.0
"""One volume, many nodes: the driver for what every node reaches, beside the one for each node's own disks.

This machine's kernel need not have NFS: the pool is of directories, on the one disk that both nodes have mounted.
"""

from collections.abc import Iterator

import pytest
import yaml

from tests.cluster import kube
from tests.cluster.harness import deploy, layout, node
from tests.cluster.harness.layout import Node
from tests.cluster.kube import EXAMPLES, Manifest, Namespace, claim, from_snapshot, pod, snapshot

DRIVER = "shared.orlop.dev"
NODES = ("node1", "node2")
ROOT = layout.SHARED_DISK.mount_point
WORKLOADS = ("daemonset/orlop-shared-node", "deployment/orlop-shared-controller")


@pytest.fixture(scope="module", autouse=True)
def shared_driver(cluster: None) -> Iterator[None]:
    deploy.install_both()
    deploy.wait(*WORKLOADS)
    yield
    deploy.install()
    deploy.wait()


@pytest.fixture
def reports(namespace: Namespace) -> Iterator[None]:
    """A directory of long ago on the shared disk, and no PersistentVolume over it when the test is over."""
    node.execute(Node(1), "sh", "-c", f"mkdir --parents {ROOT}/reports && echo of 1999 > {ROOT}/reports/file")
    yield
    namespace.clear()
    for name in ("shared-directory", "readers"):
        kube.kubectl("delete", "persistentvolume", name, "--ignore-not-found", "--timeout=180s")
    node.execute(Node(1), "rm", "--recursive", f"{ROOT}/reports")


def on(name: str) -> Manifest:
    return {"kubernetes.io/hostname": name}


def apart(labels: dict[str, str]) -> Manifest:
    """Two pods of these labels are never on one node."""
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def replicas(name: str, command: str) -> Manifest:
    """A Deployment of two pods on two nodes, on the claim of the same name."""
    labels = {"app": name}
    template = pod(name, {"/data": name}, command, affinity=apart(labels))
    spec = {
        "replicas": 2,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
    }
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def names_by_node(namespace: Namespace, app: str) -> dict[str, str]:
    """The running pods of a Deployment, by their nodes."""
    namespace.kubectl("rollout", "status", f"deployment/{app}", "--timeout=240s")
    pods = namespace.select("pods", f"app={app}")
    return {one["spec"]["nodeName"]: one["metadata"]["name"] for one in pods}


def volume_over(name: str, csi: Manifest, mode: str = "ReadWriteMany", policy: str = "Retain") -> Manifest:
    """A PersistentVolume made by hand."""
    spec = {
        "capacity": {"storage": "5Gi"},
        "accessModes": [mode],
        "persistentVolumeReclaimPolicy": policy,
        "storageClassName": "",
        "csi": csi,
    }
    # Who deletes it, if that is its policy: csi-provisioner passes over those that do not name it.
    metadata = {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": DRIVER}}
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec}


def test_replicas_on_two_nodes_read_what_the_other_wrote(namespace: Namespace) -> None:
    namespace.apply(
        claim("common", "1Gi", "everywhere", accessModes=["ReadWriteMany"]),
        replicas("common", "echo from $(hostname) > /data/$(hostname); exec sleep 3600"),
    )
    pods = names_by_node(namespace, "common")
    assert pods.keys() == set(NODES)

    for reader, writer in ((pods["node1"], pods["node2"]), (pods["node2"], pods["node1"])):
        namespace.wait_until_it_says(reader, f"cat /data/{writer}", f"from {writer}")
    namespace.shell(pods["node1"], "echo later > /data/later")
    assert namespace.shell(pods["node2"], "cat /data/later") == "later"
    assert "nodeAffinity" not in namespace.volume_of("common")["spec"]
    assert namespace.shell(pods["node2"], "stat -c %a /data") == "770"


def test_a_replica_moves_to_the_other_node_with_its_volume(namespace: Namespace) -> None:
    replica = next(yaml.safe_load_all((EXAMPLES / "statefulset.yaml").read_text()))
    replica["spec"]["replicas"] = 1
    replica["spec"]["volumeClaimTemplates"][0]["spec"]["storageClassName"] = "everywhere"
    namespace.apply(replica)
    namespace.wait_until_running("db-0")
    namespace.wait_until_it_says("db-0", "cat /data/name", "db-0")
    namespace.shell("db-0", "echo before the move >> /data/name; sync")
    home = namespace.node_of("db-0")

    try:
        kube.drain(home)
        namespace.wait_until_running("db-0", timeout_s=240)
        assert namespace.node_of("db-0") != home
        assert namespace.shell("db-0", "cat /data/name") == "db-0\nbefore the move"
    finally:
        kube.kubectl("uncordon", home)
        deploy.wait(*WORKLOADS)


def test_readers_on_two_nodes_cannot_write(namespace: Namespace, reports: None) -> None:
    attributes = {"pool": "team", "directory": "reports"}
    csi = {"driver": DRIVER, "volumeHandle": "readers", "volumeAttributes": attributes}
    namespace.apply(volume_over("readers", csi, "ReadOnlyMany"))
    namespace.apply(
        claim("readers", "5Gi", "", accessModes=["ReadOnlyMany"], volumeName="readers"),
        replicas("readers", "exec sleep 3600"),
    )

    pods = names_by_node(namespace, "readers")

    assert pods.keys() == set(NODES)
    for name in pods.values():
        assert namespace.shell(name, "cat /data/file") == "of 1999"
        assert "Read-only file system" in namespace.refusal(name, "echo more >> /data/file")
        assert "Read-only file system" in namespace.refusal(name, "mkdir /data/more")


def test_what_a_released_volume_kept_is_taken_over_on_the_other_node(namespace: Namespace) -> None:
    namespace.apply(
        claim("first", "1Gi", "everywhere-kept", accessModes=["ReadWriteMany"]),
        pod("first", {"/data": "first"}, nodeSelector=on("node1")),
    )
    namespace.wait_until_running("first")
    namespace.shell("first", "echo precious > /data/file; sync")
    old = namespace.volume_of("first")
    name, csi = old["metadata"]["name"], old["spec"]["csi"]

    namespace.delete("pod", "first")
    namespace.delete("persistentvolumeclaim", "first")
    namespace.wait_until_phase("persistentvolume", name, "Released")
    kube.kubectl("delete", "persistentvolume", name, "--timeout=180s")
    # With Delete this time: the volume ends with the claim that has taken it over.
    namespace.apply(volume_over(f"{name}-again", csi, policy="Delete"))
    namespace.apply(
        claim("second", "5Gi", "", accessModes=["ReadWriteMany"], volumeName=f"{name}-again"),
        pod("second", {"/data": "second"}, nodeSelector=on("node2")),
    )
    namespace.wait_until_running("second")

    assert namespace.shell("second", "cat /data/file") == "precious"


def test_each_node_s_doctor_finds_this_driver_well(namespace: Namespace) -> None:
    said = kube.doctors("shared-node")

    assert said.keys() == set(NODES)
    assert all(f"registers {DRIVER}" in words for words in said.values())


def test_a_directory_of_long_ago_serves_replicas_on_two_nodes(namespace: Namespace, reports: None) -> None:
    namespace.apply_example("shared-directory.yaml")

    pods = names_by_node(namespace, "shared-directory")

    assert pods.keys() == set(NODES)
    for name in pods.values():
        assert namespace.shell(name, "cat /data/file") == "of 1999"
        namespace.wait_until_it_says(name, "sort /data/writers", "\n".join(sorted(pods.values())))
    namespace.kubectl("delete", "deployment", "shared-directory", "--timeout=180s")
    namespace.delete("persistentvolumeclaim", "shared-directory")
    namespace.wait_until_phase("persistentvolume", "shared-directory", "Released")
    assert node.execute(Node(2), "cat", f"{ROOT}/reports/file") == "of 1999\n"


def test_a_snapshot_of_a_volume_is_restored_for_the_other_node(namespace: Namespace) -> None:
    namespace.apply(
        claim("data", "1Gi", "everywhere", accessModes=["ReadWriteMany"]),
        pod("app", {"/data": "data"}, nodeSelector=on("node1")),
    )
    namespace.wait_until_running("app")
    namespace.shell("app", "echo before > /data/file; sync")
    namespace.apply(snapshot("moment", of="data", snapshot_class="orlop-shared"))
    namespace.wait_until_snapshot_is_ready("moment")
    namespace.shell("app", "echo after > /data/file; sync")

    source = from_snapshot("moment")
    namespace.apply(
        claim("restored", "1Gi", "everywhere", accessModes=["ReadWriteMany"], dataSource=source),
        pod("reader", {"/data": "restored"}, nodeSelector=on("node2")),
    )
    namespace.wait_until_running("reader")

    assert namespace.shell("reader", "cat /data/file") == "before"


def test_one_pod_has_a_volume_of_each_driver(namespace: Namespace) -> None:
    namespace.apply(
        claim("own"),
        claim("common", "1Gi", "everywhere", accessModes=["ReadWriteMany"]),
        pod("app", {"/own": "own", "/common": "common"}, nodeSelector=on("node2")),
        pod("other", {"/common": "common"}, nodeSelector=on("node1")),
    )
    for name in ("app", "other"):
        namespace.wait_until_running(name)

    namespace.shell("app", "echo mine > /own/file; cp /own/file /common/file")

    assert namespace.shell("other", "cat /common/file") == "mine"
    drivers = {name: namespace.volume_of(name)["spec"]["csi"]["driver"] for name in ("own", "common")}
    assert drivers == {"own": kube.DRIVER, "common": DRIVER}


def test_the_shared_driver_s_pods_may_be_replaced_under_a_pod_that_writes(namespace: Namespace) -> None:
    writing = "while :; do date +%s >> /data/log || exit 1; sleep 0.2; done"
    namespace.apply(
        claim("data", "1Gi", "everywhere", accessModes=["ReadWriteMany"]),
        pod("writer", {"/data": "data"}, writing, nodeSelector=on("node1")),
    )
    namespace.wait_until_running("writer")

    kube.kubectl("--namespace=orlop", "rollout", "restart", *WORKLOADS)
    deploy.wait(*WORKLOADS)

    lines = int(namespace.shell("writer", "wc -l < /data/log"))
    kube.wait_until(
        lambda: int(namespace.shell("writer", "wc -l < /data/log")) > lines, "the pod to write on"
    )
    assert namespace.get("pod", "writer")["status"]["containerStatuses"][0]["restartCount"] == 0
    namespace.apply(pod("reader", {"/data": "data"}, nodeSelector=on("node2")))
    namespace.wait_until_running("reader")
    assert int(namespace.shell("reader", "wc -l < /data/log")) >= lines
