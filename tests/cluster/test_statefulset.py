# SPDX-License-Identifier: Apache-2.0
"""Replicas with a volume each, which they find again."""

from tests.cluster import kube
from tests.cluster.kube import Namespace


def test_each_replica_finds_its_own_data_again(namespace: Namespace) -> None:
    namespace.apply_example("statefulset.yaml")
    for replica in ("db-0", "db-1", "db-2"):
        namespace.wait_until_running(replica, timeout_s=240)
    nodes = {replica: namespace.node_of(replica) for replica in ("db-0", "db-1", "db-2")}

    namespace.kubectl("scale", "statefulset/db", "--replicas=0")
    kube.wait_until(lambda: not namespace.exists("pod", "db-0"), "all replicas to end", timeout_s=240)
    namespace.kubectl("scale", "statefulset/db", "--replicas=3")

    for replica, home in nodes.items():
        namespace.wait_until_running(replica, timeout_s=240)
        namespace.wait_until_it_says(replica, "cat /data/name", replica)
        assert namespace.node_of(replica) == home
