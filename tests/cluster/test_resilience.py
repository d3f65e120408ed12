# SPDX-License-Identifier: Apache-2.0
"""Things die: the driver, kubelet, containerd, a whole node. Pods and volumes survive or come back."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.cluster import kube
from tests.cluster.harness import cluster, layout, node
from tests.cluster.harness.layout import Node
from tests.cluster.kube import Manifest, Namespace, claim, pod

MOST_CLAIMS = 200  # of one node
WRITING = "while :; do date +%s >> /data/log || exit 1; sleep 0.2; done"


def driver_pod(on: str) -> str:
    choice = ["--selector=app.kubernetes.io/component=node", f"--field-selector=spec.nodeName={on}"]
    return kube.kubectl("--namespace=orlop", "get", "pods", *choice, "--output=name").strip()


def wait_for_driver() -> None:
    wait = ("rollout", "status", "daemonset/orlop-node", "--timeout=420s")
    kube.kubectl("--namespace=orlop", *wait, timeout_s=450)


def writing_pod(namespace: Namespace, on: str) -> None:
    selector = {"kubernetes.io/hostname": on}
    namespace.apply(claim("data"), pod("writer", {"/data": "data"}, command=WRITING, nodeSelector=selector))
    namespace.wait_until_running("writer")


def writes_on(namespace: Namespace) -> None:
    """The pod of before still runs, was never restarted, and its log grows."""
    lines = namespace.shell("writer", "wc -l < /data/log")
    kube.wait_until(
        lambda: int(namespace.shell("writer", "wc -l < /data/log")) > int(lines), "the pod to write on"
    )
    assert namespace.get("pod", "writer")["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_daemon_set_gets_a_volume_on_each_node(namespace: Namespace) -> None:
    namespace.apply_example("daemonset.yaml")
    namespace.kubectl("rollout", "status", "daemonset/cache", "--timeout=240s")

    pods = namespace.select("pods", "app=cache")

    nodes = {one["spec"]["nodeName"] for one in pods}
    assert nodes == {one.name for one in layout.existing_nodes()}
    for one in pods:
        volume = namespace.volume_of(f"{one['metadata']['name']}-cache")
        assert one["spec"]["nodeName"] in str(volume["spec"]["nodeAffinity"])


def test_a_deleted_driver_pod_is_not_noticed_by_a_pod(namespace: Namespace) -> None:
    writing_pod(namespace, "node2")

    kube.kubectl("--namespace=orlop", "delete", driver_pod("node2"), "--wait")
    wait_for_driver()

    writes_on(namespace)
    namespace.delete("pod", "writer")


@pytest.mark.parametrize("program", ["kubelet", "containerd"])
def test_a_restarted_node_agent_is_not_noticed_by_a_pod(namespace: Namespace, program: str) -> None:
    writing_pod(namespace, "node2")

    assert node.kill(Node(2), f"^{program} ") >= 1  # between fork and exec, a child has its name
    time.sleep(5)

    kube.kubectl("wait", "--for=condition=Ready", "node/node2", "--timeout=180s")
    kube.wait_until(lambda: answers(namespace), "exec to work again")
    writes_on(namespace)
    namespace.apply(
        claim("later"), pod("later", {"/data": "later"}, nodeSelector={"kubernetes.io/hostname": "node2"})
    )
    namespace.wait_until_running("later", timeout_s=240)


def answers(namespace: Namespace) -> bool:
    try:
        return namespace.shell("writer", "echo yes") == "yes"
    except kube.KubectlFailed:
        return False


def test_a_drained_nodes_volume_waits_for_it(namespace: Namespace) -> None:
    namespace.apply_example("statefulset.yaml")
    namespace.kubectl("scale", "statefulset/db", "--replicas=1")
    namespace.wait_until_running("db-0")
    home = namespace.node_of("db-0")

    try:
        kube.drain(home)
        namespace.wait_for_event("db-0", "0/2 nodes are available")
    finally:
        kube.kubectl("uncordon", home)

    namespace.wait_until_running("db-0", timeout_s=240)
    assert namespace.node_of("db-0") == home
    namespace.wait_until_it_says("db-0", "cat /data/name", "db-0")


def test_after_a_power_cut_the_pod_comes_back_with_its_data(namespace: Namespace) -> None:
    writing_pod(namespace, "node2")
    namespace.shell("writer", "echo precious > /data/file && sync")

    cluster.power_cut(Node(2))

    kube.kubectl("wait", "--for=condition=Ready", "node/node2", "--timeout=240s")
    wait_for_driver()
    kube.wait_until(lambda: answers(namespace), "the pod to run again", timeout_s=420, tell=namespace.story)
    assert namespace.shell("writer", "cat /data/file") == "precious"


def kill_in_the_midst(one: Node, times: int) -> int:
    """Kill the node's driver whenever it is making a volume, in the first moments of it; how often that came about."""
    staging = node.path_of(one, "/var/lib/orlop/fast/staging")
    deadline = time.monotonic() + 900
    killed = 0
    while killed < times and time.monotonic() < deadline:
        drivers = node.find_processes(one, "orlop", "serve")
        if not drivers or any(staging.iterdir()):  # what the one before has left, until the next one sweeps
            time.sleep(0.05)
            continue
        while not any(staging.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.06))  # a volume takes about as long
        for pid in drivers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while set(drivers) & set(node.find_processes(one, "orlop", "serve")):
            time.sleep(0.01)
        killed += 1
    return killed


def claim_on(home: str, number: int) -> Manifest:
    """A claim for which a node is chosen already, as the scheduler does it: the other node's driver leaves it alone."""
    one = claim(f"{home}-{number}", "32Mi")
    one["metadata"] |= {
        "annotations": {"volume.kubernetes.io/selected-node": home},
        "labels": {"home": home},
    }
    return one


def waiting(namespace: Namespace, home: str) -> int:
    claims = namespace.select("persistentvolumeclaims", f"home={home}")
    return sum(one["status"]["phase"] != "Bound" for one in claims)


def test_a_driver_killed_again_and_again_under_a_burst_loses_and_leaks_nothing(namespace: Namespace) -> None:
    """SIGKILL between CreateVolume and its answer, twenty times: each claim gets one volume, and no home is an orphan."""
    nodes = (Node(1), Node(2))
    wanted = dict.fromkeys((one.name for one in nodes), 0)

    def want_more(home: str) -> None:
        namespace.apply(*(claim_on(home, wanted[home] + number) for number in range(10)))
        wanted[home] += 10

    with ThreadPoolExecutor() as killers:
        killing = {one.name: killers.submit(kill_in_the_midst, one, 10) for one in nodes}
        # Each node gets as many as it takes: how many it makes between two kills is chance.
        while unfinished := [home for home, one in killing.items() if not one.done()]:
            for home in unfinished:
                if wanted[home] < MOST_CLAIMS and waiting(namespace, home) < 5:
                    want_more(home)
            time.sleep(1)
    assert [one.result() for one in killing.values()] == [10, 10]
    count = sum(wanted.values())

    def all_bound() -> bool:
        claims = namespace.select("persistentvolumeclaims")
        return len(claims) == count and all(one["status"]["phase"] == "Bound" for one in claims)

    kube.wait_until(all_bound, "every claim to be bound", timeout_s=600, tell=namespace.story)
    assert homes() == handles()
    assert len(handles()) == count


def homes() -> set[str]:
    listed = (node.execute(one, "ls", "/var/lib/orlop/fast/volumes") for one in layout.existing_nodes())
    return {name for text in listed for name in text.split()}


def handles() -> set[str]:
    path = "--output=jsonpath={.items[*].spec.csi.volumeHandle}"
    return set(kube.kubectl("get", "persistentvolumes", path).split())
