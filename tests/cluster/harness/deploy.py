# SPDX-License-Identifier: Apache-2.0
"""Put the driver into the cluster as a user would: its image, a namespace, and the chart."""

from collections.abc import Sequence
from pathlib import Path

from tests.cluster.harness import cluster, driver_image, processes, programs
from tests.cluster.harness.processes import run

VALUES = Path(__file__).resolve().parent.parent / "values.yaml"
SHARED_VALUES = VALUES.with_name("values-shared.yaml")
CHART = driver_image.REPOSITORY / "deploy/helm/orlop"
SNAPSHOT_CONTROLLER = driver_image.REPOSITORY / "deploy/snapshot-controller.yaml"
IMAGE = "localhost/orlop:test"
NAMESPACE = "orlop"


def deploy() -> None:
    """Install the driver, or replace the one that is there by what the working tree has now."""
    cluster.load([driver_image.build(IMAGE)])
    make_namespace()
    install_snapshot_controller()
    install()
    # The image's name is the same each time: a new one is taken up by a new pod only.
    run("kubectl", "--namespace", NAMESPACE, "rollout", "restart", "daemonset/orlop-node")
    wait()
    print("the driver serves on every node", flush=True)


def make_namespace() -> None:
    if run("kubectl", "get", "namespace", NAMESPACE, "--ignore-not-found") == "":
        run("kubectl", "create", "namespace", NAMESPACE)
        run("kubectl", "label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=privileged")


def install_snapshot_controller() -> None:
    """What VolumeSnapshots of any driver need: their definitions, and the controller."""
    run("kubectl", "apply", "--server-side", "--filename", programs.snapshot_crds())
    kinds = ",".join(
        f"{file.stem.partition('_')[2]}.{file.name.partition('_')[0]}"
        for file in programs.snapshot_crds().iterdir()
    )
    # Not `kubectl wait`: that fails at once where a definition has no conditions yet.
    processes.wait_until(
        lambda: '"items"' in run("kubectl", "get", kinds, "--output=json", check=False),
        "the snapshots' definitions to be served",
        timeout_s=240,
    )
    run("kubectl", "apply", "--filename", SNAPSHOT_CONTROLLER)


def install(*values: str, files: Sequence[Path] = (VALUES,)) -> None:
    """Install or upgrade the chart with the tests' values, and further ones."""
    more: list[str | Path] = [word for file in files for word in ("--values", file)]
    more += [word for value in values for word in ("--set", value)]
    run("helm", "upgrade", "--install", "orlop", CHART, "--namespace", NAMESPACE, *more)


def install_both() -> None:
    """The driver for the nodes' own disks, and the one for what every node reaches."""
    install(files=(VALUES, SHARED_VALUES))


def wait(*further: str) -> None:
    """Wait for the driver, and for further workloads of its namespace."""
    own = ("daemonset/orlop-node", "deployment/orlop-resizer", *further)
    workloads = [(NAMESPACE, workload) for workload in own]
    for namespace, workload in [*workloads, ("kube-system", "deployment/snapshot-controller")]:
        try:
            run("kubectl", "--namespace", namespace, "rollout", "status", workload, "--timeout=420s")
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{logs()}") from error


def logs(lines: int = 20) -> str:
    """What the driver and its sidecars said last, on every node."""
    choice = [
        "--selector=app.kubernetes.io/instance=orlop",
        "--all-containers",
        "--prefix",
        f"--tail={lines}",
    ]
    return run("kubectl", "--namespace", NAMESPACE, "logs", *choice, check=False)
