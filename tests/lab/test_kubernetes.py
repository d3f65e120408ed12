# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes of two nodes over a real NFS server: the cluster of tests/cluster, inside the second kernel.

`make test-cluster-nfs` runs it. The nodes' mounts are the kernel's own NFS client's, the server is the kernel's own nfsd on
a machine of its own.
"""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import kube, traces
from tests.cluster.harness import cluster as kubernetes
from tests.cluster.harness import deploy, driver_image, node
from tests.cluster.harness.layout import Node
from tests.cluster.kube import EXAMPLES, KubectlFailed, Manifest, Namespace, claim, pod
from tests.lab.disks import Disk, run
from tests.lab.hosts import KernelServer, serving

pytestmark = pytest.mark.cluster

IMAGE = "localhost/orlop:nfs"
# Images that nothing here uses: in there, each takes ten seconds to load.
SUPERFLUOUS = ("attacher", "snapshot")
NODES = (Node(1), Node(2))
# One CPU, on which a system call costs what fifty cost outside.
PATIENCE_S = 240


@pytest.fixture(scope="module")
def server() -> Iterator[KernelServer]:
    """A NAS: it has a directory of long ago, `old`, and `pool`, where a pool is to be."""
    disk = Disk.make("xfs", Path("/export-disk"), "16G")
    disk.mount()
    for name in ("old", "pool"):
        (disk.target / "share" / name).mkdir(parents=True)
    (disk.target / "share/old/file").write_text("from 1999\n")
    with serving(KernelServer(disk.target)) as made:
        yield made
    disk.remove()


@pytest.fixture(scope="module")
def cluster(server: KernelServer) -> Iterator[None]:
    """Two nodes, and the driver for file servers, installed by its chart, with a pool `team` on the server."""
    _tell_a_clock_speed()
    archives = kubernetes.build()
    try:
        kubernetes.start(list(NODES), [])
        _load([one for one in archives if not any(word in one.name for word in SUPERFLUOUS)])
        _load([driver_image.archive(IMAGE)])
        deploy.make_namespace()
        pool = {"backend": "nfs", "server": server.address, "path": "/share/pool"}
        deploy.install(
            f"image.tag={IMAGE.rpartition(':')[2]}",
            "local.enabled=false",
            "snapshots.enabled=false",
            "shared.enabled=true",
            "shared.controller.replicas=1",
            *(f"shared.pools.team.{key}={value}" for key, value in pool.items()),
        )
        for workload in ("daemonset/orlop-shared-node", "deployment/orlop-shared-controller"):
            patiently("--namespace=orlop", "rollout", "status", workload)
        yield
    except BaseException:
        print(kubernetes.tails(), deploy.logs(), sep="\n")
        raise
    finally:
        kubernetes.down()


def _load(archives: list[Path]) -> None:
    """Images for both nodes, read by containerd's client: twice as fast in there as by containerd itself."""
    for one in NODES:
        for archive in archives:
            words = ("ctr", "--namespace", "k8s.io", "images", "import", "--local")
            node.execute(one, *words, os.fspath(archive))


def _tell_a_clock_speed() -> None:
    """kubelet does not start on a processor without one, and that of user-mode Linux has none."""
    cpu = Path("/sys/devices/system/cpu/cpu0")
    if "MHz" not in Path("/proc/cpuinfo").read_text() and not (cpu / "cpufreq").exists():
        run("mount", "-t", "tmpfs", "cpu", cpu)
        (cpu / "cpufreq").mkdir()
        (cpu / "cpufreq/cpuinfo_max_freq").write_text("1000000\n")


@pytest.fixture
def namespace(cluster: None) -> Iterator[Namespace]:
    """A fresh namespace; after the test nothing of it is left in the cluster, and nothing mounted on a node."""
    one = Namespace(f"story-{secrets.token_hex(3)}")
    kube.kubectl("create", "namespace", one.name)
    # Without it no pod is let in; a controller makes it, a moment later.
    kube.wait_until(
        lambda: one.exists("serviceaccount", "default"), "the namespace's default account", PATIENCE_S
    )
    yield one
    clear(one)
    kube.kubectl("delete", "namespace", one.name, "--wait=false")
    patiently("delete", "persistentvolumes,storageclasses", "--all")
    kube.wait_until(
        lambda: not traces.of_all_nodes(),
        "all volumes to be unmounted",
        PATIENCE_S,
        tell=lambda: "\n".join(sorted(traces.of_all_nodes())),
    )


def patiently(*arguments: str) -> str:
    """What kubectl waits for, with an end."""
    return kube.kubectl(*arguments, f"--timeout={PATIENCE_S}s", timeout_s=PATIENCE_S + 30)


def wait(namespace: Namespace, *arguments: str) -> None:
    """Let kubectl wait; if in vain, tell what a user would look at, and what the driver said."""
    try:
        patiently(f"--namespace={namespace.name}", *arguments)
    except KubectlFailed as error:
        objects = namespace.kubectl("get", "pods,persistentvolumeclaims", "--output=wide")
        events = namespace.kubectl("get", "events", "--sort-by=.lastTimestamp")
        raise AssertionError(f"{error}\n{objects}\n{events}\n{deploy.logs(lines=60)}") from error


def clear(namespace: Namespace) -> None:
    """Delete all that uses volumes, and wait for it."""
    kinds = "deployments,statefulsets,pods,persistentvolumeclaims"
    patiently(f"--namespace={namespace.name}", "delete", kinds, "--all", "--grace-period=1")


def apply_example(namespace: Namespace, name: str, server: KernelServer) -> None:
    """Apply an example whose file server is this one."""
    text = (EXAMPLES / name).read_text()
    text = text.replace("files.example.org", server.address).replace("/export/team", "/share")
    namespace.kubectl("apply", "--filename=-", stdin=text.replace("directory: reports", "directory: old"))


def static_volume(name: str, server: KernelServer, mode: str) -> Manifest:
    """An administrator's PersistentVolume over the server's old directory."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "5Gi"},
            "accessModes": [mode],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "csi": {
                "driver": "shared.orlop.dev",
                "volumeHandle": name,
                "volumeAttributes": {"server": server.address, "path": "/share/old"},
            },
        },
    }


def replicas_by_node(namespace: Namespace, deployment: str) -> dict[str, str]:
    """The pods of a deployment that has all of them ready, by their nodes."""
    wait(namespace, "rollout", "status", f"deployment/{deployment}")
    return {str(one["spec"]["nodeName"]): str(one["metadata"]["name"]) for one in namespace.select("pods")}


def wait_for(namespace: Namespace, what: str, name: str) -> None:
    wait(namespace, "wait", f"--for={what}", name)


def nfs_mounts(one: Node) -> list[str]:
    """Type, source and target of what the node has mounted from servers for pods."""
    lines = [line.split() for line in node.execute(one, "cat", "/proc/self/mounts").splitlines()]
    return [f"{kind} {source}" for source, target, kind, *_ in lines if kind == "nfs4" and "/pods/" in target]


def test_replicas_on_two_nodes_share_an_administrators_volume_and_its_data_outlives_the_claim(
    namespace: Namespace, server: KernelServer
) -> None:
    apply_example(namespace, "nfs-static.yaml", server)
    pods = replicas_by_node(namespace, "nfs-static")

    assert sorted(pods) == [one.name for one in NODES]
    assert [nfs_mounts(one) for one in NODES] == [[f"nfs4 {server.address}:/share/old"]] * 2
    for writer in pods.values():
        namespace.shell(writer, f"echo {writer} > /data/by-{writer}")
    for reader in pods.values():
        assert namespace.shell(reader, "cat /data/file") == "from 1999"
        assert {namespace.shell(reader, f"cat /data/by-{writer}") for writer in pods.values()} == {
            *pods.values()
        }
        namespace.wait_until_it_says(reader, "sort /data/writers", "\n".join(sorted(pods.values())))
    assert (server.export / f"share/old/by-{pods['node2']}").read_text().strip() == pods["node2"]

    clear(namespace)
    wait_for(namespace, "jsonpath={.status.phase}=Released", "persistentvolume/nfs-static")
    namespace.apply(
        static_volume("again", server, "ReadWriteMany"),
        claim("again", "5Gi", storage_class="", volumeName="again", accessModes=["ReadWriteMany"]),
        pod("successor", {"/data": "again"}),
    )
    wait_for(namespace, "condition=Ready", "pod/successor")
    assert namespace.shell("successor", f"cat /data/by-{pods['node1']}") == pods["node1"]


def test_read_only_replicas_on_two_nodes_read_and_cannot_write(
    namespace: Namespace, server: KernelServer
) -> None:
    namespace.apply(
        static_volume("readers", server, "ReadOnlyMany"),
        claim("readers", "5Gi", storage_class="", volumeName="readers", accessModes=["ReadOnlyMany"]),
        *(pod(f"on-{one.name}", {"/data": "readers"}, nodeName=one.name) for one in NODES),
    )

    for reader in (f"on-{one.name}" for one in NODES):
        wait_for(namespace, "condition=Ready", f"pod/{reader}")
        assert namespace.shell(reader, "cat /data/file") == "from 1999"
        assert "Read-only file system" in namespace.refusal(reader, "echo more >> /data/file")
    assert (server.export / "share/old/file").read_text() == "from 1999\n"


def test_replicas_on_two_nodes_share_a_volume_of_the_pool(namespace: Namespace, server: KernelServer) -> None:
    apply_example(namespace, "nfs.yaml", server)
    pods = replicas_by_node(namespace, "team")

    assert sorted(pods) == [one.name for one in NODES]
    for reader in pods.values():
        namespace.wait_until_it_says(reader, "sort /data/writers", "\n".join(sorted(pods.values())))

    clear(namespace)
    patiently("wait", "--for=delete", "persistentvolumes", "--all")
    # The class says `onDelete: archive`; the driver does that behind its answer.
    archive = server.export / "share/pool/archive"
    kube.wait_until(lambda: any(archive.rglob("writers")), "the volume to be in the archive", PATIENCE_S)
    kept = list(archive.rglob("writers"))
    assert [sorted(file.read_text().split()) for file in kept] == [sorted(pods.values())]


def test_a_stateful_sets_pod_moves_to_the_other_node_with_its_volume(
    namespace: Namespace, server: KernelServer
) -> None:
    namespace.apply(_storage_class("moves"))
    example = (EXAMPLES / "statefulset.yaml").read_text()
    example = example.replace("csi-disk", "moves").replace("replicas: 3", "replicas: 1")
    namespace.kubectl("apply", "--filename=-", stdin=example)
    wait_for(namespace, "create", "pod/db-0")
    wait_for(namespace, "condition=Ready", "pod/db-0")
    namespace.shell("db-0", "echo 42 > /data/answer")
    home = namespace.node_of("db-0")

    kube.kubectl("cordon", home)
    try:
        namespace.delete("pod", "db-0")
        wait_for(namespace, "create", "pod/db-0")
        wait_for(namespace, "condition=Ready", "pod/db-0")
    finally:
        kube.kubectl("uncordon", home)

    assert namespace.node_of("db-0") != home
    assert namespace.shell("db-0", "cat /data/name /data/answer") == "db-0\n42"


def _storage_class(name: str) -> Manifest:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": "shared.orlop.dev",
        "parameters": {"pool": "team"},
    }
