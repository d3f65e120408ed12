# SPDX-License-Identifier: Apache-2.0
"""Who may use a volume at the same time, as whom, and from where."""

from tests.cluster import kube
from tests.cluster.kube import Namespace, claim, pod


def test_read_write_once_pod_refuses_the_second_pod(namespace: Namespace) -> None:
    namespace.apply_example("single-pod.yaml")
    namespace.wait_until_running("exclusive")

    namespace.apply(pod("second", {"/data": "exclusive"}))

    message = namespace.wait_for_event("second", "ReadWriteOncePod")
    assert "already in-use by another pod" in message
    namespace.delete("pod", "exclusive")
    namespace.wait_until_running("second")


def test_pods_of_one_node_share_a_read_write_many_volume(namespace: Namespace) -> None:
    namespace.apply_example("read-write-many.yaml")
    namespace.kubectl("rollout", "status", "deployment/common", "--timeout=180s")

    def writers() -> set[str]:
        script = ("sh", "-c", "cat /data/writers || true")
        return set(namespace.kubectl("exec", "deployment/common", "--", *script).split())

    kube.wait_until(lambda: len(writers()) == 2, "both pods to have written", tell=namespace.story)
    pods = namespace.select("pods", "app=common")
    assert len({one["spec"]["nodeName"] for one in pods}) == 1


def test_fs_group_makes_the_volume_writable_for_a_pod_that_is_not_root(namespace: Namespace) -> None:
    namespace.apply_example("nonroot.yaml")
    namespace.wait_until_running("nonroot")

    namespace.wait_until_it_says("nonroot", "id -u; stat -c '%u %g' /data/file", "1000\n1000 2000")


def test_a_raw_block_device_keeps_what_was_written(namespace: Namespace) -> None:
    namespace.apply_example("block.yaml")
    namespace.wait_until_running("device")
    assert namespace.shell("device", "blockdev --getsize64 /dev/data") == str(2**30)
    namespace.shell("device", "echo raw | dd of=/dev/data bs=4096 seek=1000 conv=sync,fsync")

    namespace.delete("pod", "device")
    namespace.apply_example("block.yaml")
    namespace.wait_until_running("device")

    assert namespace.shell("device", "dd if=/dev/data bs=4096 skip=1000 count=1 | head -c 3") == "raw"


def test_a_pod_follows_its_volume_to_its_node(namespace: Namespace) -> None:
    namespace.apply(
        claim("data"), pod("first", {"/data": "data"}, nodeSelector={"kubernetes.io/hostname": "node2"})
    )
    namespace.wait_until_running("first")

    for number in range(3):
        namespace.apply(pod(f"follower-{number}", {"/data": "data"}))
        namespace.wait_until_running(f"follower-{number}")

        assert namespace.node_of(f"follower-{number}") == "node2"


def test_the_volume_says_where_it_is(namespace: Namespace) -> None:
    namespace.apply(claim("data"), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")

    terms = namespace.volume_of("data")["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]

    assert {one["key"]: one["values"] for one in terms[0]["matchExpressions"]} == {
        kube.NODE_KEY: [namespace.node_of("app")],
        "topology.kubernetes.io/region": ["region-1"],
        "topology.kubernetes.io/zone": ["zone-a"],
    }
