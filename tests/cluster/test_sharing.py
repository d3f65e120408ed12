# SPDX-License-Identifier: Apache-2.0
"""Containers share a volume, keep apart in it, or may only read it."""

from contextlib import suppress

from tests.cluster import kube
from tests.cluster.kube import KubectlFailed, Namespace, claim, pod


def test_a_killed_container_comes_back_to_its_data(namespace: Namespace) -> None:
    # PID 1 of a container ignores signals it does not handle: the shell waits for a child that can be killed.
    namespace.apply(
        claim("data"), pod("app", {"/data": "data"}, command="echo start >> /data/log; sleep 3600; exit 1")
    )
    namespace.wait_until_running("app")

    # Whoever else is in the container ends with it: sometimes the messenger, before it can say that it was done.
    with suppress(KubectlFailed):
        namespace.shell("app", "killall sleep")

    kube.wait_until(
        lambda: namespace.get("pod", "app")["status"]["containerStatuses"][0]["restartCount"] == 1,
        "kubelet to restart the container",
        tell=namespace.story,
    )
    namespace.wait_until_running("app")
    namespace.wait_until_it_says("app", "cat /data/log", "start\nstart")


def test_sub_paths_keep_two_containers_apart_and_a_reader_cannot_write(namespace: Namespace) -> None:
    namespace.apply_example("subpath.yaml")
    namespace.wait_until_running("caches")

    for name in ("one", "two"):
        namespace.wait_until_it_says("caches", "cat /cache/owner", name, container=name)
    both = "cat /caches/cache1/owner /caches/cache2/owner"
    namespace.wait_until_it_says("caches", both, "one\ntwo", container="reader")
    assert "Read-only file system" in namespace.refusal("caches", "touch /caches/mine", container="reader")


def test_a_read_only_claim_refuses_writes(namespace: Namespace) -> None:
    namespace.apply(claim("data"), pod("writer", {"/data": "data"}))
    namespace.wait_until_running("writer")
    namespace.shell("writer", "echo written > /data/file; sync")
    read_only = [{"name": "data", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}}]

    namespace.apply(pod("reader", {"/data": "data"}, volumes=read_only))
    namespace.wait_until_running("reader")

    assert namespace.shell("reader", "cat /data/file") == "written"
    assert "Read-only file system" in namespace.refusal("reader", "echo more >> /data/file")
    namespace.shell("writer", "echo still writes >> /data/file")


def test_a_read_only_block_volume_refuses_writes(namespace: Namespace) -> None:
    namespace.apply(claim("device", volumeMode="Block"), pod("writer", {"/dev/data": "device"}, block=True))
    namespace.wait_until_running("writer")
    namespace.shell("writer", "echo written | dd of=/dev/data bs=4096 conv=sync,fsync")
    namespace.delete("pod", "writer")
    read_only = [{"name": "device", "persistentVolumeClaim": {"claimName": "device", "readOnly": True}}]

    namespace.apply(pod("reader", {"/dev/data": "device"}, block=True, volumes=read_only))
    namespace.wait_until_running("reader")

    assert namespace.shell("reader", "head -c 7 /dev/data") == "written"
    refused = namespace.refusal("reader", "dd if=/dev/zero of=/dev/data bs=4096 count=1 conv=fsync")
    assert "not permitted" in refused or "Read-only" in refused


def test_the_drivers_own_sub_path_is_the_root_that_the_pod_sees(namespace: Namespace) -> None:
    namespace.apply_example("driver-subpath.yaml")
    namespace.wait_until_running("tenant")
    namespace.shell("tenant", "echo mine > /data/file")

    assert namespace.find_on_node("tenant", f"tenants/{namespace.name}/tenant/file") != []
    assert namespace.shell("tenant", "ls /data") == "file"


def test_a_claim_beside_every_other_kind_of_volume(namespace: Namespace) -> None:
    namespace.apply_example("mixed.yaml")
    namespace.wait_until_running("mixed")

    namespace.wait_until_it_says("mixed", "cat /data/copy", "swordfisheverything in its placeswordfish")
    namespace.shell("mixed", "touch /scratch/file && ls /node-logs")
