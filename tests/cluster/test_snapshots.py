# SPDX-License-Identifier: Apache-2.0
"""A user keeps a moment of a volume, and gets it back: through the real snapshot-controller and csi-snapshotter."""

from collections.abc import Iterator

import pytest

from tests.cluster import kube, traces
from tests.cluster.kube import Namespace, claim, from_claim, from_snapshot, pod, snapshot

# Copies are made on their source's node: a class that asks no scheduler finds it.
POOLS = {"csi-disk-immediate": "image", "csi-bulk-immediate": "btrfs"}


@pytest.fixture(autouse=True)
def classes(cluster: None) -> None:
    kube.apply(
        kube.storage_class("csi-disk-immediate", {"type": "cloud_ssd"}, binding="Immediate"),
        kube.storage_class("csi-bulk-immediate", {"pool": "shared"}, binding="Immediate"),
    )


@pytest.fixture(params=POOLS, ids=POOLS.get)
def storage_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(namespace: Namespace, words: str) -> None:
    namespace.shell("app", f"echo {words} > /data/file && sync")


def start(namespace: Namespace, storage_class: str, words: str) -> None:
    """A claim with a pod that has written `words`."""
    namespace.apply(claim("data", storage_class=storage_class), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    write(namespace, words)


def take(namespace: Namespace, name: str) -> None:
    namespace.apply(snapshot(name, of="data"))
    namespace.wait_until_snapshot_is_ready(name)


def read(namespace: Namespace, name: str, **wanted: object) -> str:
    """What a new pod finds in the claim `name`, made as `wanted` says. Both nodes may try, again and again, to make it."""
    namespace.apply(claim(name, **wanted), pod(name, {"/data": name}))  # type: ignore[arg-type]
    namespace.wait_until_running(name, timeout_s=240)
    return namespace.shell(name, "cat /data/file")


def test_a_restored_claim_is_of_the_moment_of_its_snapshot(namespace: Namespace, storage_class: str) -> None:
    start(namespace, storage_class, "before")
    take(namespace, "moment")
    write(namespace, "after")

    source = from_snapshot("moment")
    assert read(namespace, "same", storage_class=storage_class, dataSource=source) == "before"
    assert read(namespace, "larger", storage_class=storage_class, size="2Gi", dataSource=source) == "before"

    assert namespace.get("persistentvolumeclaim", "larger")["status"]["capacity"]["storage"] == "2Gi"
    if storage_class == "csi-disk-immediate":  # df of a subvolume shows the whole pool
        assert int(namespace.shell("larger", "df -k /data | tail -1").split()[1]) > 1.8 * 2**20
    assert namespace.node_of("larger") == namespace.node_of("app")
    assert namespace.shell("app", "cat /data/file") == "after"


def test_a_pod_that_names_the_node_restores_with_its_first_consumer(namespace: Namespace) -> None:
    start(namespace, "csi-disk", "before")
    take(namespace, "moment")
    here = {"kubernetes.io/hostname": namespace.node_of("app")}

    namespace.apply(
        claim("late", dataSource=from_snapshot("moment")), pod("late", {"/data": "late"}, nodeSelector=here)
    )

    namespace.wait_until_running("late")
    assert namespace.shell("late", "cat /data/file") == "before"


def test_a_clone_goes_its_own_way(namespace: Namespace, storage_class: str) -> None:
    start(namespace, storage_class, "shared")

    assert read(namespace, "clone", storage_class=storage_class, dataSource=from_claim("data")) == "shared"

    namespace.shell("clone", "echo mine > /data/file && sync")
    assert namespace.shell("app", "cat /data/file") == "shared"


def test_a_snapshot_outlives_its_volume(namespace: Namespace, storage_class: str) -> None:
    start(namespace, storage_class, "precious")
    take(namespace, "moment")
    volume = namespace.volume_of("data")["metadata"]["name"]

    namespace.delete("pod", "app")
    namespace.delete("persistentvolumeclaim", "data")
    kube.wait_until(lambda: not namespace.exists("persistentvolume", volume), f"{volume} to be gone")

    source = from_snapshot("moment")
    assert read(namespace, "again", storage_class=storage_class, dataSource=source) == "precious"


def test_a_deleted_snapshot_leaves_nothing_on_the_node(namespace: Namespace, storage_class: str) -> None:
    start(namespace, storage_class, "words")
    before = traces.of_all_nodes()
    take(namespace, "moment")
    assert traces.of_all_nodes() > before

    namespace.delete("volumesnapshot", "moment")

    kube.wait_until(
        lambda: traces.of_all_nodes() == before,
        "the snapshot to be gone from the node",
        tell=lambda: "\n".join(sorted(traces.of_all_nodes() - before)),
    )
    assert namespace.shell("app", "cat /data/file") == "words"


@pytest.fixture
def retaining_class(cluster: None) -> Iterator[str]:
    """From the start: who changes a content's policy cannot know when snapshot-controller has seen it."""
    name = "retaining"
    kube.apply(
        {
            "apiVersion": "snapshot.storage.k8s.io/v1",
            "kind": "VolumeSnapshotClass",
            "metadata": {"name": name},
            "driver": kube.DRIVER,
            "deletionPolicy": "Retain",
        }
    )
    yield name
    kube.kubectl("delete", "volumesnapshotclass", name, "--ignore-not-found")


def test_a_retained_snapshot_stays_until_its_content_is_deleted(
    namespace: Namespace, retaining_class: str
) -> None:
    start(namespace, "csi-bulk-immediate", "kept")
    namespace.apply(snapshot("moment", of="data", snapshot_class=retaining_class))
    namespace.wait_until_snapshot_is_ready("moment")
    content = namespace.get("volumesnapshot", "moment")["status"]["boundVolumeSnapshotContentName"]
    handle = namespace.get("volumesnapshotcontent", content)["status"]["snapshotHandle"]

    namespace.delete("volumesnapshot", "moment")
    assert any(handle in trace for trace in traces.of_all_nodes())

    release = '{"spec": {"deletionPolicy": "Delete"}}'
    kube.kubectl("patch", "volumesnapshotcontent", content, "--type=merge", f"--patch={release}")
    kube.kubectl("delete", "volumesnapshotcontent", content, "--timeout=180s")
    kube.wait_until(
        lambda: not any(handle in trace for trace in traces.of_all_nodes()), "the snapshot to be gone"
    )


def test_the_examples_of_snapshot_restore_and_clone_work(namespace: Namespace) -> None:
    namespace.apply_example("dynamic.yaml")
    namespace.wait_until_running("app")
    namespace.wait_until_it_says("app", "cat /data/log", "started")
    namespace.apply_example("snapshot.yaml")
    namespace.wait_until_snapshot_is_ready("data-snapshot")

    namespace.apply_example("immediate.yaml")
    namespace.apply_example("restore.yaml")
    namespace.apply_example("clone.yaml")

    for name in ("restored", "clone"):
        namespace.wait_until_running(name, timeout_s=240)
        assert namespace.shell(name, "cat /data/log") == "started"


def test_a_smaller_restore_is_refused_in_a_sentence(namespace: Namespace) -> None:
    start(namespace, "csi-disk", "words")
    take(namespace, "moment")

    namespace.apply(
        claim("small", "64Mi", dataSource=from_snapshot("moment")), pod("small", {"/data": "small"})
    )

    message = namespace.wait_for_event("small", "is less than the size")
    assert str(64 * 2**20) in message
    assert str(2**30) in message
