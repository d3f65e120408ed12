# SPDX-License-Identifier: Apache-2.0
"""A user gets something wrong, and the claim's events say what, in a sentence."""

import pytest

from tests.cluster import kube
from tests.cluster.kube import Namespace, claim, pod


@pytest.mark.parametrize(
    ("parameters", "size", "words"),
    [
        ({"typo": "cloud_ssd"}, "1Gi", ["typo", "known"]),
        ({"pool": "slow"}, "1Gi", ["slow", "fast"]),
        ({"type": "cloud_gold"}, "1Gi", ["cloud_gold", "cloud_ssd"]),
        ({"type": "cloud_ssd", "fsType": "ntfs"}, "1Gi", ["ntfs", "ext4"]),
        ({"type": "cloud_ssd", "regionId": "region-9"}, "1Gi", ["region-9", "region-1"]),
        ({"type": "cloud_ssd", "fsType": "xfs"}, "1Mi", ["xfs"]),
    ],
    ids=["parameter", "pool", "type", "filesystem", "region", "too-small"],
)
def test_the_claims_events_say_what_is_wrong(
    namespace: Namespace, parameters: dict[str, str], size: str, words: list[str]
) -> None:
    # Immediate: with a node that reports no capacity for the class, the scheduler would not even ask the driver.
    name = f"wrong-{namespace.name}"
    namespace.apply(kube.storage_class(name, parameters, binding="Immediate"))

    namespace.apply(claim("data", size, storage_class=name))

    message = namespace.wait_for_event("data", "failed to provision volume")
    for word in words:
        assert word in message
    kube.kubectl("delete", "storageclass", name)


def test_a_size_that_no_node_has_leaves_the_pod_unscheduled_with_a_reason(namespace: Namespace) -> None:
    namespace.apply(claim("data", "900Gi"), pod("app", {"/data": "data"}))

    message = namespace.wait_for_event("app", "did not have enough free storage")

    assert "0/2 nodes are available" in message or "0/1 nodes are available" in message
