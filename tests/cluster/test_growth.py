# SPDX-License-Identifier: Apache-2.0
"""A claim is made larger, and its volume follows."""

from pathlib import Path

import pytest

from tests.cluster import kube
from tests.cluster.kube import Namespace, claim, pod

CAP_SYS_RESOURCE = 24


def machine_grows_ext4_online() -> bool:
    """The kernel wants CAP_SYS_RESOURCE for that, which some containers have not, however privileged."""
    status = Path("/proc/self/status").read_text()
    bounding = next(line.split()[1] for line in status.splitlines() if line.startswith("CapBnd:"))
    return bool(int(bounding, 16) >> CAP_SYS_RESOURCE & 1)


def grow(namespace: Namespace, name: str, size: str) -> None:
    wanted = f'{{"spec": {{"resources": {{"requests": {{"storage": "{size}"}}}}}}}}'
    namespace.kubectl("patch", "persistentvolumeclaim", name, "--patch", wanted)


def size_of(namespace: Namespace, name: str) -> str:
    return str(namespace.get("persistentvolumeclaim", name)["status"]["capacity"]["storage"])


def device_bytes(namespace: Namespace, name: str) -> int:
    device = namespace.shell(name, "df /data | tail -1").split()[0].removeprefix("/dev/")
    return int(namespace.shell(name, f"cat /sys/block/{device}/size")) * 512


def kilobytes(namespace: Namespace, name: str) -> int:
    return int(namespace.shell(name, "df -k /data | tail -1").split()[1])


@pytest.fixture(autouse=True)
def classes(cluster: None) -> None:
    kube.apply(
        *(kube.storage_class(f"csi-{one}", {"type": "cloud_ssd", "fsType": one}) for one in ("xfs", "btrfs"))
    )


def start(namespace: Namespace, storage_class: str) -> None:
    namespace.apply(claim("data", "1Gi", storage_class=storage_class), pod("app", {"/data": "data"}))
    namespace.wait_until_running("app")
    namespace.shell("app", "echo kept > /data/file")


def check_grown(namespace: Namespace, name: str) -> None:
    kube.wait_until(lambda: size_of(namespace, "data") == "2Gi", "the claim to say 2Gi", tell=namespace.story)
    assert kilobytes(namespace, name) > 1.8 * 2**20
    assert namespace.shell(name, "cat /data/file") == "kept"
    assert namespace.get("pod", name)["status"]["containerStatuses"][0]["restartCount"] == 0


@pytest.mark.parametrize("storage_class", ["csi-disk", "csi-xfs", "csi-btrfs"])
def test_the_filesystem_grows_in_the_running_pod(namespace: Namespace, storage_class: str) -> None:
    start(namespace, storage_class)

    grow(namespace, "data", "2Gi")

    if storage_class == "csi-disk" and not machine_grows_ext4_online():
        # The device is larger, the filesystem is not: the next start of the pod finds it grown.
        kube.wait_until(lambda: device_bytes(namespace, "app") == 2 * 2**30, "the device to be larger")
        namespace.delete("pod", "app")
        namespace.apply(pod("app", {"/data": "data"}))
        namespace.wait_until_running("app")
    check_grown(namespace, "app")


def test_a_volume_without_a_pod_grows_when_the_next_pod_starts(namespace: Namespace) -> None:
    start(namespace, "csi-xfs")
    namespace.delete("pod", "app")

    grow(namespace, "data", "2Gi")
    namespace.apply(pod("later", {"/data": "data"}))
    namespace.wait_until_running("later")

    check_grown(namespace, "later")


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
