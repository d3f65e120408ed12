# SPDX-License-Identifier: Apache-2.0
"""An administrator upgrades the driver, takes it out, puts it back, and asks it how each node is."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

import csi_driver
from tests.cluster import kube, traces
from tests.cluster.harness import cluster, deploy, driver_image, layout, node
from tests.cluster.harness.processes import run
from tests.cluster.kube import Manifest, Namespace, claim, pod

MINIKUBE = deploy.CHART.parents[1] / "minikube"
NODES = (layout.Node(1), layout.Node(2))
WRITING = "while :; do date +%s >> /data/log || exit 1; sync -f /data/log; sleep 0.1; done"


@pytest.fixture(autouse=True)
def installed(namespace: Namespace) -> Iterator[None]:
    """Whatever a test does to the driver, it is in place again when the test's objects are cleared away."""
    yield
    deploy.install()
    deploy.wait()


def test_an_upgrade_is_not_noticed_by_a_pod_that_writes(namespace: Namespace) -> None:
    """Another image of another version, rolled over both nodes while a pod on each writes into each kind of pool."""
    # Before the writers: this keeps the machine's disks busy, and their pauses are counted.
    cluster.load([driver_image.build_version(deploy.IMAGE.replace(":test", ":next"), "9.9.9")])
    kube.apply(kube.storage_class("csi-bulk", {"pool": "shared"}))
    writers = {f"{pool}-{one.name}": (pool, one.name) for pool in ("disk", "bulk") for one in NODES}
    for writer, (pool, home) in writers.items():
        namespace.apply(
            claim(writer, "256Mi", f"csi-{pool}"),
            pod(writer, {"/data": writer}, WRITING, nodeSelector={"kubernetes.io/hostname": home}),
        )
    for writer in writers:
        namespace.wait_until_running(writer)
    before = versions()

    deploy.install("image.tag=next", "node.updateStrategy.rollingUpdate.maxUnavailable=1")
    deploy.wait()

    assert before == {one.name: csi_driver.__version__ for one in NODES}
    assert versions() == {one.name: "9.9.9" for one in NODES}
    for writer in writers:
        writes_on(namespace, writer)
    namespace.apply(claim("later"), pod("later", {"/data": "later"}))
    namespace.wait_until_running("later")


def writes_on(namespace: Namespace, writer: str) -> None:
    """The pod still writes, was never restarted, and at no time stood still for long."""
    lines = int(namespace.shell(writer, "wc -l < /data/log"))
    kube.wait_until(lambda: int(namespace.shell(writer, "wc -l < /data/log")) > lines, "the pod to write on")
    assert namespace.get("pod", writer)["status"]["containerStatuses"][0]["restartCount"] == 0
    seconds = [int(line) for line in namespace.shell(writer, "cat /data/log").split()]
    assert max(after - earlier for earlier, after in pairwise(seconds)) <= 90


def versions() -> dict[str, str]:
    """What `orlop version` says in the driver's pod of each node."""
    said = kube.in_each_driver("node", "orlop", "version", "--json")
    return {home: json.loads(words)["version"] for home, words in said.items()}


def name_image(name: str) -> None:
    """Give the driver's image, as the nodes have it, another name."""
    for one in layout.existing_nodes():
        node.execute(one, "ctr", "--namespace", "k8s.io", "images", "tag", "--force", deploy.IMAGE, name)


def test_uninstalling_leaves_pods_and_data_alone_and_installing_adopts_them(namespace: Namespace) -> None:
    namespace.apply(claim("data"), pod("writer", {"/data": "data"}, command=WRITING))
    namespace.wait_until_running("writer")
    homes = traces.of_all_nodes()

    run("helm", "uninstall", "orlop", "--namespace", deploy.NAMESPACE, "--wait", "--timeout=240s")
    lines = int(namespace.shell("writer", "wc -l < /data/log"))
    kube.wait_until(
        lambda: int(namespace.shell("writer", "wc -l < /data/log")) > lines, "the pod to write on"
    )
    assert homes <= traces.of_all_nodes()

    deploy.install()
    deploy.wait()
    namespace.delete("pod", "writer")
    namespace.apply(pod("reader", {"/data": "data"}))
    namespace.wait_until_running("reader", timeout_s=240)
    assert int(namespace.shell("reader", "wc -l < /data/log")) > lines


def test_another_zone_is_taken_as_soon_as_the_nodes_labels_are_gone(installed: None) -> None:
    try:
        deploy.install("zone=zone-b")
        kube.wait_until(lambda: "topology value collision" in deploy.logs(), "kubelet to refuse the driver")
        remove_zones()
        deploy.wait()
        assert zones() == ["zone-b"] * 2
    finally:
        deploy.install()
        # A pod that was of this zone all along would not give its node the label back.
        kube.kubectl("--namespace", deploy.NAMESPACE, "rollout", "restart", "daemonset/orlop-node")
        kube.wait_until(are_of_zone_a_again, "the nodes to be of zone-a again", timeout_s=420)
        deploy.wait()
    assert zones() == ["zone-a"] * 2


def are_of_zone_a_again() -> bool:
    """Until its very end, a pod of the other zone may give its node the label of that zone."""
    remove_zones("--selector=topology.kubernetes.io/zone=zone-b")
    return zones() == ["zone-a"] * 2


def remove_zones(which: str = "--all") -> None:
    kube.kubectl("label", "nodes", which, "topology.kubernetes.io/zone-")


def zones() -> list[str]:
    """Of the nodes that have one."""
    path = "--output=jsonpath={.items[*].metadata.labels.topology\\.kubernetes\\.io/zone}"
    return kube.kubectl("get", "nodes", path).split()


def test_helm_test_asks_every_nodes_doctor(installed: None) -> None:
    deploy.install()
    deploy.wait()

    said = run("helm", "test", "orlop", "--namespace", deploy.NAMESPACE, "--timeout=240s", "--logs")

    assert said.count("Phase:          Succeeded") == 2


def test_who_does_not_use_helm_asks_the_drivers_pods(installed: None, minikube: None) -> None:
    """As docs/install.md has it."""
    said = kube.doctors("node")

    assert said.keys() == {one.name for one in NODES}
    for words in said.values():
        assert f"{kube.DRIVER} {csi_driver.__version__} answers" in words
        assert f"registers {kube.DRIVER}" in words


def test_helm_test_fails_where_no_driver_runs(installed: None) -> None:
    kube.kubectl("--namespace", deploy.NAMESPACE, "delete", "daemonset/orlop-node", "--cascade=foreground")
    try:
        with pytest.raises(RuntimeError, match="orlop-doctor"):
            run("helm", "test", "orlop", "--namespace", deploy.NAMESPACE, "--timeout=240s")
        said = kube.kubectl("--namespace", deploy.NAMESPACE, "logs", "orlop-doctor-0")
        assert "error" in said and "pods cannot get volumes" in said
    finally:
        deploy.install()
        deploy.wait()


def end_managed_pool(one: layout.Node) -> None:
    """As docs/operations.md tells it; the mount is the node's own, and has outlived the driver's pod."""
    # Whoever was in it may be a moment from its end; the last word is umount's own, if it is not.
    unmount = (
        "for _ in $(seq 600); do mountpoint -q /data/orlop/default || exit 0;"
        " umount /data/orlop/default 2>/dev/null || sleep 0.1; done; umount /data/orlop/default"
    )
    node.execute(one, "sh", "-c", unmount)
    associated = ("losetup", "--noheadings", "--output=NAME", "--associated", "/data/orlop/default.img")
    for device in node.execute(one, *associated).split():
        node.execute(one, "losetup", "--detach", device)
    node.execute(one, "rm", "-rf", "/data/orlop")


def standard_class(default: bool) -> Manifest:
    """minikube's own class, which nobody serves here."""
    standard = kube.storage_class("standard", {}, binding="Immediate")
    marked = {"storageclass.kubernetes.io/is-default-class": str(default).lower()}
    return standard | {
        "metadata": {"name": "standard", "annotations": marked},
        "provisioner": "k8s.io/minikube-hostpath",
    }


@pytest.fixture
def minikube(namespace: Namespace) -> Iterator[None]:
    """Orlop as minikube's users install it, with one command, in a cluster that has a default class already."""
    run("helm", "uninstall", "orlop", "--namespace", deploy.NAMESPACE, "--wait", "--timeout=240s")
    manifests = run("kubectl", "kustomize", MINIKUBE)
    name_image(next(word for word in manifests.split() if word.startswith("ghcr.io/")))
    kube.apply(standard_class(default=True))
    try:
        run("kubectl", "apply", "--kustomize", MINIKUBE)
        deploy.wait()
        yield
        namespace.clear()
        kube.wait_until(
            lambda: kube.kubectl("get", "persistentvolumes", "--output=name") == "", "the volumes to go"
        )
    finally:
        # Else Helm cannot install over it, and no later story has its driver.
        run("kubectl", "delete", "--kustomize", MINIKUBE, "--ignore-not-found", "--timeout=420s")
        deploy.make_namespace()
        kube.kubectl("delete", "storageclass", "standard", "--ignore-not-found")
        for one in layout.existing_nodes():
            end_managed_pool(one)


def of_the_default_class(name: str) -> Manifest:
    wanted = claim(name)
    del wanted["spec"]["storageClassName"]
    return wanted


def test_minikubes_manifests_work_as_they_stand(namespace: Namespace, minikube: None) -> None:
    for one in NODES:
        place = {"kubernetes.io/hostname": one.name}
        namespace.apply(
            of_the_default_class(one.name), pod(one.name, {"/data": one.name}, nodeSelector=place)
        )
    for one in NODES:
        namespace.wait_until_running(one.name)

        assert namespace.volume_of(one.name)["spec"]["storageClassName"] == "orlop"
        assert node.execute(one, "ls", "/data/orlop/default/volumes").strip() != ""


def stop_and_start() -> None:
    """minikube's driver `none`: everything that runs ends, nothing is unmounted."""
    cluster.stop()
    try:
        for one in NODES:
            node.execute(one, "mountpoint", "/data/orlop/default")
    finally:
        cluster.start_again()


def boot_anew() -> None:
    """minikube's virtual machines: nothing but what is on their disks is left."""
    for one in NODES:
        cluster.power_cut(one)


@pytest.mark.parametrize("restart", [stop_and_start, boot_anew])
def test_minikube_stop_and_start_lie_between_writing_and_reading(
    namespace: Namespace, minikube: None, restart: Callable[[], None]
) -> None:
    """Pods come back to their data, new ones find it too, and new volumes are made."""
    for one in NODES:
        place = {"kubernetes.io/hostname": one.name}
        namespace.apply(
            of_the_default_class(one.name), pod(one.name, {"/data": one.name}, nodeSelector=place)
        )
    for one in NODES:
        namespace.wait_until_running(one.name)
        namespace.shell(one.name, f"echo of {one.name} > /data/file; sync")

    restart()
    # `minikube start` marks its own class as the only default one; the one command again makes it Orlop's.
    kube.kubectl(
        "annotate", "--overwrite", "storageclass/orlop", "storageclass.kubernetes.io/is-default-class=false"
    )
    run("kubectl", "apply", "--kustomize", MINIKUBE)

    for one in NODES:
        kube.wait_until(
            lambda one=one: reads(namespace, one.name) == f"of {one.name}",  # type: ignore[misc]
            f"pod {one.name} to read what it wrote",
            timeout_s=420,
            tell=namespace.story,
        )
    deploy.wait()
    for one in NODES:
        namespace.delete("pod", one.name)
        namespace.apply(pod(one.name, {"/data": one.name}), of_the_default_class(f"more-{one.name}"))
        namespace.apply(pod(f"more-{one.name}", {"/data": f"more-{one.name}"}))
        for name in (one.name, f"more-{one.name}"):
            namespace.wait_until_running(name, timeout_s=240)
        assert reads(namespace, one.name) == f"of {one.name}"


def reads(namespace: Namespace, name: str) -> str:
    try:
        return namespace.shell(name, "cat /data/file")
    except kube.KubectlFailed as error:
        return str(error)
