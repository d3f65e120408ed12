# SPDX-License-Identifier: Apache-2.0
"""Bring a cluster up, take it down, say how it is: the order of things, nothing of their detail."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster.harness import (
    certificates,
    cleanup,
    control_plane,
    images,
    layout,
    node,
    prerequisites,
    processes,
    programs,
)
from tests.cluster.harness.layout import Node
from tests.cluster.harness.processes import run


def build() -> list[Path]:
    """Everything a cluster is made of; returns the image archives."""
    prerequisites.check()
    programs.build_all()
    return images.build_all()


def up(count: int) -> None:
    archives = build()
    if is_up(count):
        return print(usage())
    standing = len(layout.existing_nodes())
    if standing not in (0, count) and is_up(standing):
        # It may be somebody's, with all they keep in it.
        raise SystemExit(
            f"a cluster of {standing} node(s) is running: `make cluster-down` removes it, with all its data"
        )
    cleanup.remove_all()  # what a crash or another size of cluster left
    try:
        start([Node(number) for number in range(1, count + 1)], archives)
    except BaseException:
        print(tails())
        raise
    print(usage())


def start(nodes: list[Node], archives: list[Path]) -> None:
    """Start what is not there at all, with these images on every node."""
    begin = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - begin:5.1f} s  {what}", flush=True)

    layout.ROOT.mkdir(parents=True)
    cleanup.remember_machine()
    certificates.make_all(nodes)
    control_plane.start_network()
    control_plane.start_api()
    _make_shared_disk()
    say("etcd and API server started")
    _for_all(nodes, node.start)
    say(f"{len(nodes)} node(s) with containerd started")
    load(archives)
    say(f"{len(archives)} images loaded")
    control_plane.wait_for_api()
    control_plane.start_controllers()
    say("API server ready, controllers started")
    _for_all(nodes, node.allow_kubelet)
    processes.wait_until(lambda: all(map(_is_ready, nodes)), "the nodes to be Ready", timeout_s=240)
    processes.wait_until(_has_default_account, "the default service account", timeout_s=240)
    say("nodes Ready")


def down() -> None:
    cleanup.remove_all()


def is_up(count: int) -> bool:
    if len(layout.existing_nodes()) != count or not all(map(processes.find, control_plane.COMPONENTS)):
        return False
    nodes = layout.existing_nodes()
    return all(processes.find(f"{one.name}-init") for one in nodes) and all(map(_is_ready, nodes))


def load(archives: list[Path]) -> None:
    for archive in archives:
        _for_all(layout.existing_nodes(), lambda one, archive=archive: node.load_image(one, archive))  # type: ignore[misc]


def stop() -> None:
    """As `minikube stop` without a virtual machine: pods and control plane end, files and mounts stay."""
    _for_all(layout.existing_nodes(), node.stop_agents)
    for component in reversed(control_plane.COMPONENTS):
        processes.kill(component)


def start_again() -> None:
    """After `stop`: the same cluster, with all it had."""
    nodes = layout.existing_nodes()
    control_plane.start_api()
    control_plane.wait_for_api()
    control_plane.start_controllers()
    _for_all(nodes, node.allow_kubelet)
    processes.wait_until(lambda: all(map(_is_ready, nodes)), "the nodes to be Ready", timeout_s=240)


def power_cut(one: Node) -> None:
    """The node loses its power and comes back: processes and mounts are gone, disks are not."""
    cleanup.stop_node(one)
    node.start(one)
    node.allow_kubelet(one)


def usage() -> str:
    return "\n".join(
        (
            run("kubectl", "get", "nodes").strip(),
            "",
            f"export KUBECONFIG={layout.KUBECONFIG} PATH={programs.bin_directory()}:$PATH",
            "tests/cluster/cluster node-exec 1 COMMAND   # in the namespaces of a node",
            "tests/cluster/cluster load IMAGE.tar        # into containerd of every node",
            f"tests/cluster/cluster logs                  # the end of each log below {layout.ROOT}",
            "tests/cluster/cluster down",
        )
    )


def log_files() -> list[Path]:
    components = (file for file in layout.LOGS.glob("*.log") if not file.name.startswith("audit"))
    orlop = layout.ROOT.glob("node*/root/var/log/pods/orlop_*/*/*.log")
    return sorted([*components, *layout.ROOT.glob("node*/log/*.log"), *orlop])


def tails(lines: int = 15) -> str:
    """The end of every component's log, for the reader of a failure."""
    parts = []
    for file in log_files():
        end = "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
        parts.append(f"==> {file}\n{end}\n")
    return "\n".join(parts)


def _make_shared_disk() -> None:
    node.make_image(layout.SHARED_IMAGE, layout.SHARED_DISK)
    run("losetup", "--find", layout.SHARED_IMAGE)


def _for_all(nodes: list[Node], action: Callable[[Node], None]) -> None:
    if not nodes:
        raise SystemExit("there is no cluster: `make cluster` starts one")
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(action, nodes))


def _is_ready(one: Node) -> bool:
    path = '{.status.conditions[?(@.type=="Ready")].status}'
    return run("kubectl", "get", "node", one.name, "-o", f"jsonpath={path}", check=False) == "True"


def _has_default_account() -> bool:
    return run("kubectl", "get", "serviceaccount", "default", "-o", "name", check=False) != ""
