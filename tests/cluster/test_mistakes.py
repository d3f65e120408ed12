# SPDX-License-Identifier: Apache-2.0
"""A user gets something wrong, and an event says what, in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster import kube
from tests.cluster.kube import Namespace, claim, pod


@contextmanager
def a_class(name: str, parameters: dict[str, str]) -> Iterator[None]:
    kube.apply(kube.storage_class(name, parameters))
    try:
        yield
    finally:
        kube.kubectl("delete", "storageclass", name)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "cloud_ssd", "tpye": "cloud_ssd"}, ["tpye", "fsType"]),
        ({"type": "cloud_ssd", "fsType": "ntfs"}, ["ntfs", "ext4"]),
        ({"type": "cloud_ssd", "mode": "rwx"}, ["rwx", "octal"]),
        ({"pool": "shared", "fsType": "xfs"}, ["xfs", "btrfs"]),
        ({"type": "cloud_ssd", "mkfsOptions": "-F /etc"}, ["mkfsOptions"]),
        ({"pool": "slow"}, ["slow", "shared"]),
        ({"type": "cloud_gold"}, ["cloud_gold", "cloud_ssd"]),
    ],
    ids=["unknown-key", "filesystem", "mode", "filesystem-of-pool", "mkfs-options", "pool", "type"],
)
def test_a_wrong_parameter_is_told_in_the_claims_events(
    namespace: Namespace, parameters: dict[str, str], words: list[str]
) -> None:
    with a_class("wrong", parameters):
        namespace.apply(claim("data", storage_class="wrong"), pod("app", {"/data": "data"}))

        message = namespace.wait_for_event("data", "InvalidArgument")

    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "parameters",
    [{"type": "cloud_nvme"}, {"type": "cloud_ssd", "regionId": "region-9"}],
    ids=["type", "region"],
)
def test_what_no_node_offers_is_told_in_the_pods_events(
    namespace: Namespace, parameters: dict[str, str]
) -> None:
    # Other nodes are known to have such a pool or region: each says that it has no room, and only the scheduler sees them all.
    with a_class("elsewhere", parameters):
        namespace.apply(claim("data", storage_class="elsewhere"), pod("app", {"/data": "data"}))

        message = namespace.wait_for_event("app", "did not have enough free storage")

    assert message.startswith("0/")


def test_a_size_that_no_node_has_is_told_in_the_pods_events(namespace: Namespace) -> None:
    namespace.apply(claim("data", "900Gi"), pod("app", {"/data": "data"}))

    message = namespace.wait_for_event("app", "did not have enough free storage")

    assert message.startswith("0/")


def test_a_size_too_small_becomes_the_smallest_there_is(namespace: Namespace) -> None:
    with a_class("tiny", {"type": "cloud_ssd", "fsType": "xfs"}):
        namespace.apply(claim("data", "1Mi", storage_class="tiny"), pod("app", {"/data": "data"}))

        namespace.wait_until_running("app")

    assert namespace.get("persistentvolumeclaim", "data")["status"]["capacity"]["storage"] == "300Mi"
