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


MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")


def static_volume(
    name: str,
    directory: str,
    size: str,
    storage_class: str = "",
    mode: str = "ReadWriteOnce",
    **labels: str,
) -> Manifest:
    expression = {"key": kube.NODE_KEY, "operator": "In", "values": ["node1"]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": [mode],
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
        kube.kubectl("delete", "persistentvolume", name, "--timeout=180s")
    node.execute(Node(1), "rm", "-r", ROOT)


def test_a_retained_volume_is_released_and_a_new_one_takes_its_data_over(namespace: Namespace) -> None:
    namespace.apply_example("static.yaml")
    namespace.wait_until_running("static")
    assert namespace.get("persistentvolume", "pv-static")["status"]["phase"] == "Bound"
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


def test_claims_take_the_smallest_volume_that_fits_or_what_they_select(namespace: Namespace) -> None:
    namespace.apply_example("static-sizes.yaml")

    for name, volume in (("ten", "pv-20"), ("old", "pv-80")):
        namespace.wait_until_phase("persistentvolumeclaim", name, "Bound")
        assert namespace.volume_of(name)["metadata"]["name"] == volume
    namespace.wait_until_phase("persistentvolume", "pv-5", "Available")


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


def bind_each_mode(namespace: Namespace) -> None:
    """A volume of each access mode, and a claim for each, called like its mode."""
    # The one for a single pod has a directory of its own: the driver asks the kernel who uses it, whatever the volume.
    directories = {one: "small" if one == "ReadWriteOncePod" else "reports" for one in MODES}
    namespace.apply(*(static_volume(f"pv-{one.lower()}", directories[one], "5Gi", mode=one) for one in MODES))
    namespace.apply(
        *(claim(one.lower(), "5Gi", storage_class="", accessModes=[one]) for one in reversed(MODES))
    )
    for mode in MODES:
        namespace.wait_until_phase("persistentvolumeclaim", mode.lower(), "Bound")


def test_a_claim_takes_only_a_volume_of_its_access_mode(namespace: Namespace) -> None:
    bind_each_mode(namespace)

    for mode in MODES:
        assert namespace.volume_of(mode.lower())["metadata"]["name"] == f"pv-{mode.lower()}"
    namespace.apply(static_volume("pv-spare", "large", "5Gi", mode="ReadOnlyMany"))
    namespace.apply(claim("writers", "5Gi", storage_class="", accessModes=["ReadWriteMany"]))
    namespace.wait_for_event("writers", "no persistent volumes available for this claim")
    assert namespace.get("persistentvolumeclaim", "writers")["status"]["phase"] == "Pending"


def test_each_access_mode_lets_in_whom_it_says(namespace: Namespace) -> None:
    bind_each_mode(namespace)

    for mode in ("readwriteonce", "readwritemany", "readonlymany"):
        for name in (f"{mode}-1", f"{mode}-2"):
            namespace.apply(pod(name, {"/data": mode}))
            namespace.wait_until_running(name)
            assert namespace.shell(name, "head -1 /data/file") == "reports of 1999"
            if mode == "readonlymany":
                assert "Read-only file system" in namespace.refusal(name, "echo more >> /data/file")
            else:
                namespace.shell(name, "echo more >> /data/file")
    namespace.apply(pod("only", {"/data": "readwriteoncepod"}))
    namespace.wait_until_running("only")
    namespace.apply(pod("second", {"/data": "readwriteoncepod"}))
    assert "already in-use by another pod" in namespace.wait_for_event("second", "ReadWriteOncePod")


def test_a_path_outside_of_the_allowed_roots_is_refused(namespace: Namespace) -> None:
    namespace.apply(static_volume("pv-outside", "../../../../etc", "5Gi"))
    namespace.apply(
        claim("data", "5Gi", storage_class="", volumeName="pv-outside"), pod("app", {"/data": "data"})
    )

    message = namespace.wait_for_event("app", "InvalidArgument")

    assert "path" in message
