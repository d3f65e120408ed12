# SPDX-License-Identifier: Apache-2.0
"""Directories that were there before: an administrator makes the PersistentVolumes by hand."""

import json
from collections.abc import Iterator

import pytest

from tests.cluster import kube
from tests.cluster.harness import node
from tests.cluster.harness.layout import Node
from tests.cluster.kube import Manifest, Namespace, claim, pod

ROOT = "/var/lib/orlop/fast/static"


def static_volume(name: str, directory: str, size: str, storage_class: str = "", **labels: str) -> Manifest:
    expression = {"key": kube.NODE_KEY, "operator": "In", "values": ["node1"]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": storage_class,
            "csi": {
                "driver": kube.DRIVER,
                "volumeHandle": name,
                "volumeAttributes": {"pool": "fast", "path": f"{ROOT}/{directory}"},
            },
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}},
        },
    }


@pytest.fixture(autouse=True)
def directories(namespace: Namespace) -> Iterator[None]:
    """Data of long ago in three directories of node1; every PersistentVolume of the test goes with it."""
    for name in ("reports", "small", "large"):
        node.execute(
            Node(1), "sh", "-c", f"mkdir -p {ROOT}/{name} && echo {name} of 1999 > {ROOT}/{name}/file"
        )
    yield
    namespace.clear()
    volumes = json.loads(kube.kubectl("get", "persistentvolumes", "--output=json"))["items"]
    for name in (one["metadata"]["name"] for one in volumes if ROOT in json.dumps(one["spec"])):
        kube.kubectl("delete", "persistentvolume", name, "--timeout=30s")
    node.execute(Node(1), "rm", "-r", ROOT)


def test_a_retained_volume_is_released_and_a_new_one_takes_its_data_over(namespace: Namespace) -> None:
    namespace.apply_example("static.yaml")
    namespace.wait_until_running("static")
    assert namespace.shell("static", "cat /data/file") == "reports of 1999"
    namespace.shell("static", "echo more >> /data/file")

    namespace.delete("pod", "static")
    namespace.delete("persistentvolumeclaim", "static")
    namespace.wait_until_phase("persistentvolume", "pv-static", "Released")
    namespace.apply(claim("again", "5Gi", storage_class="", volumeName="pv-static"))
    namespace.wait_for_event("again", "already bound to a different claim")

    namespace.apply(static_volume("pv-again", "reports", "5Gi"))
    namespace.wait_until_phase("persistentvolume", "pv-again", "Available")
    namespace.apply(
        claim("new", "5Gi", storage_class="", volumeName="pv-again"), pod("app", {"/data": "new"})
    )
    namespace.wait_until_running("app")
    assert namespace.shell("app", "cat /data/file") == "reports of 1999\nmore"


def test_a_claim_takes_the_smallest_volume_that_fits(namespace: Namespace) -> None:
    sizes = {"5Gi": "small", "20Gi": "reports", "80Gi": "large"}
    namespace.apply(*(static_volume(f"pv-{size.lower()}", name, size) for size, name in sizes.items()))

    namespace.apply(claim("data", "10Gi", storage_class=""))

    namespace.wait_until_phase("persistentvolumeclaim", "data", "Bound")
    assert namespace.volume_of("data")["metadata"]["name"] == "pv-20gi"


def test_labels_and_class_choose_the_volume(namespace: Namespace) -> None:
    namespace.apply(
        static_volume("pv-old", "small", "5Gi", age="old"),
        static_volume("pv-new", "reports", "5Gi", age="new"),
        static_volume("pv-archive", "large", "5Gi", storage_class="archive"),
    )

    namespace.apply(
        claim("labelled", "1Gi", storage_class="", selector={"matchLabels": {"age": "new"}}),
        claim("classed", "1Gi", storage_class="archive"),
    )

    for name, volume in (("labelled", "pv-new"), ("classed", "pv-archive")):
        namespace.wait_until_phase("persistentvolumeclaim", name, "Bound")
        assert namespace.volume_of(name)["metadata"]["name"] == volume


def test_a_path_outside_of_the_allowed_roots_is_refused(namespace: Namespace) -> None:
    namespace.apply(static_volume("pv-outside", "../../../../etc", "5Gi"))
    namespace.apply(
        claim("data", "5Gi", storage_class="", volumeName="pv-outside"), pod("app", {"/data": "data"})
    )

    message = namespace.wait_for_event("app", "InvalidArgument")

    assert "path" in message
