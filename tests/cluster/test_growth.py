# SPDX-License-Identifier: Apache-2.0
"""A claim is made larger, and its volume follows."""

import pytest

from tests.cluster import kube
from tests.cluster.kube import Namespace, claim, pod


def grow(namespace: Namespace, name: str, size: str) -> None:
    wanted = f'{{"spec": {{"resources": {{"requests": {{"storage": "{size}"}}}}}}}}'
    namespace.kubectl("patch", "persistentvolumeclaim", name, "--patch", wanted)


def size_of(namespace: Namespace, name: str) -> str:
    return str(namespace.get("persistentvolumeclaim", name)["status"]["capacity"]["storage"])


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_the_filesystem_grows_in_the_running_pod(namespace: Namespace, fs_type: str) -> None:
    kube.apply(kube.storage_class(f"csi-{fs_type}", {"type": "cloud_ssd", "fsType": fs_type}))
    namespace.apply(claim("data", "1Gi", storage_class=f"csi-{fs_type}"), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    namespace.shell("app", "echo kept > /data/file")

    grow(namespace, "data", "2Gi")

    kube.wait_until(lambda: size_of(namespace, "data") == "2Gi", "the claim to say 2Gi", tell=namespace.story)
    kilobytes = int(namespace.shell("app", "df -k /data | tail -1").split()[1])
    assert kilobytes > 1.8 * 2**20
    assert namespace.shell("app", "cat /data/file") == "kept"
    assert namespace.get("pod", "app")["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_volume_without_a_pod_grows_when_the_next_pod_starts(namespace: Namespace) -> None:
    namespace.apply(claim("data", "1Gi"), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    namespace.delete("pod", "app")

    grow(namespace, "data", "3Gi")
    namespace.apply(pod("later", {"/data": "data"}))
    namespace.wait_until_running("later")

    kube.wait_until(lambda: size_of(namespace, "data") == "3Gi", "the claim to say 3Gi", tell=namespace.story)
    assert int(namespace.shell("later", "df -k /data | tail -1").split()[1]) > 2.8 * 2**20


def test_a_block_device_grows_in_the_running_pod(namespace: Namespace) -> None:
    namespace.apply(
        claim("device", "1Gi", volumeMode="Block"), pod("app", {"/dev/data": "device"}, block=True)
    )
    namespace.wait_until_running("app")

    grow(namespace, "device", "2Gi")

    kube.wait_until(
        lambda: size_of(namespace, "device") == "2Gi", "the claim to say 2Gi", tell=namespace.story
    )
    assert namespace.shell("app", "blockdev --getsize64 /dev/data") == str(2 * 2**30)
