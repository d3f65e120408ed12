# SPDX-License-Identifier: Apache-2.0
"""What a user does with kubectl, as functions; and the manifests that tests need over and over.

Every wait has an end, and its failure shows the objects' events. Not its business: the cluster itself.
"""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.harness import node, processes
from tests.cluster.harness.images import BUSYBOX_IMAGE
from tests.cluster.harness.layout import Node
from tests.cluster.harness.processes import environment

Manifest = dict[str, Any]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DRIVER = "local.orlop.dev"
NODE_KEY = f"topology.{DRIVER}/node"


class KubectlFailed(Exception):
    """kubectl said no; the message is what it said."""


def kubectl(*arguments: str, stdin: str | None = None, timeout_s: float = 300) -> str:
    done = subprocess.run(
        ["kubectl", *arguments],
        input=stdin,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise KubectlFailed(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def apply(*manifests: Manifest) -> None:
    """Apply objects that belong to no namespace."""
    kubectl("apply", "--filename=-", stdin=_bundle(manifests))


def wait_until(
    is_so: Callable[[], bool], what: str, timeout_s: float = 180, tell: Callable[[], str] = str
) -> None:
    """Wait for `is_so`; when it does not come, fail with what `tell` has to say.

    A refusal is "not yet": API server, etcd and kubelet have their moments, the more so after a test has killed one.
    """
    refusal = ""

    def is_so_by_now() -> bool:
        nonlocal refusal
        try:
            return is_so()
        except KubectlFailed as error:
            refusal = f"{error}\n"
            return False

    try:
        processes.wait_until(is_so_by_now, what, timeout_s)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{refusal}{tell()}") from error


class Namespace:
    """One namespace, and a user in front of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def apply(self, *manifests: Manifest) -> None:
        self.kubectl("apply", "--filename=-", stdin=_bundle(manifests))

    def apply_example(self, name: str) -> None:
        self.kubectl("apply", f"--filename={EXAMPLES / name}")

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return kubectl(f"--namespace={self.name}", *arguments, stdin=stdin)

    def get(self, kind: str, name: str) -> Manifest:
        found: Manifest = json.loads(self.kubectl("get", kind, name, "--output=json"))
        return found

    def select(self, kind: str, selector: str = "") -> list[Manifest]:
        found: list[Manifest] = json.loads(
            self.kubectl("get", kind, f"--selector={selector}", "--output=json")
        )["items"]
        return found

    def exists(self, kind: str, name: str) -> bool:
        return self.kubectl("get", kind, name, "--ignore-not-found", "--output=name") != ""

    def delete(self, kind: str, name: str) -> None:
        self.kubectl("delete", kind, name, "--grace-period=1", "--wait", "--timeout=240s")

    def clear(self) -> None:
        """Delete all that uses volumes, and wait for it; quicker than to wait for the namespace itself to go."""
        kinds = "deployments,statefulsets,daemonsets,jobs,pods,volumesnapshots,persistentvolumeclaims"
        self.kubectl("delete", kinds, "--all", "--grace-period=1", "--wait", "--timeout=240s")

    def shell(self, pod: str, script: str, container: str | None = None) -> str:
        """Run a script in the pod; raises with its words if it fails."""
        where = [pod] if container is None else [pod, f"--container={container}"]
        return self.kubectl("exec", *where, "--", "sh", "-c", script).strip()

    def refusal(self, pod: str, script: str, container: str | None = None) -> str:
        """Run a script that must fail; what it said."""
        try:
            self.shell(pod, script, container)
        except KubectlFailed as error:
            return str(error)
        raise AssertionError(f"this should have been refused in pod {pod}: {script}")

    def wait_until_running(self, pod: str, timeout_s: float = 180) -> None:
        wait_until(lambda: self._is_ready(pod), f"pod {pod} to run", timeout_s, self.story)

    def wait_until_it_says(self, pod: str, script: str, words: str, container: str | None = None) -> None:
        """For what a container writes at its start: Ready says no more than that its command has begun."""
        said = ""

        def is_so() -> bool:
            nonlocal said
            try:
                said = self.shell(pod, script, container)
            except KubectlFailed as error:
                said = str(error)
            return said == words

        wait_until(is_so, f"{script!r} in pod {pod} to say {words!r}", tell=lambda: f"{said}\n{self.story()}")

    def wait_until_phase(self, kind: str, name: str, phase: str, timeout_s: float = 180) -> None:
        def is_so() -> bool:
            return bool(self.get(kind, name)["status"].get("phase") == phase)

        wait_until(is_so, f"{kind} {name} to be {phase}", timeout_s, self.story)

    def wait_until_snapshot_is_ready(self, name: str, timeout_s: float = 180) -> None:
        def is_so() -> bool:
            return bool(self.get("volumesnapshot", name).get("status", {}).get("readyToUse"))

        wait_until(is_so, f"snapshot {name} to be ready", timeout_s, self.story)

    def wait_for_event(self, name: str, words: str, timeout_s: float = 180) -> str:
        """The message of an event about the object `name` that contains `words`."""
        found: list[str] = []

        def is_so() -> bool:
            found.extend(text for text in self.events(name) if words in text)
            return bool(found)

        wait_until(is_so, f"an event about {name} with {words!r}", timeout_s, self.story)
        return found[0]

    def events(self, name: str) -> list[str]:
        listed = self.kubectl(
            "get", "events", f"--field-selector=involvedObject.name={name}", "--output=json"
        )
        return [str(event["message"]) for event in json.loads(listed)["items"]]

    def node_of(self, pod: str) -> str:
        return str(self.get("pod", pod)["spec"]["nodeName"])

    def find_on_node(self, pod: str, path: str) -> list[str]:
        """Where `path` is in a volume (its directory `data`) staged on the pod's node: what the pod itself may not see."""
        one = Node(int(self.node_of(pod).removeprefix("node")))
        places = node.execute(
            one, "sh", "-c", f"ls -d /var/lib/kubelet/plugins/kubernetes.io/csi/{DRIVER}/*/globalmount"
        )
        found = (f"{place}/data/{path}" for place in places.split())
        return [
            file for file in found if node.execute(one, "sh", "-c", f"[ -e '{file}' ] && echo yes || true")
        ]

    def volume_of(self, claim: str) -> Manifest:
        """The PersistentVolume that the claim is bound to."""
        return self.get("persistentvolume", self.get("persistentvolumeclaim", claim)["spec"]["volumeName"])

    def story(self) -> str:
        """What a user would look at when something does not come about."""
        objects = self._look("pods,persistentvolumeclaims,volumesnapshots", "--output=wide")
        return objects + self._look("events", "--sort-by=.lastTimestamp")

    def _look(self, *what: str) -> str:
        """A refusal is told like the rest: it must not hide the failure, and not every cluster has snapshots."""
        try:
            return self.kubectl("get", *what)
        except KubectlFailed as error:
            return f"{error}\n"

    def _is_ready(self, pod: str) -> bool:
        if not self.exists("pod", pod):
            return False
        conditions = self.get("pod", pod)["status"].get("conditions", [])
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def in_each_driver(component: str, *command: str) -> dict[str, str]:
    """Run a command in each of the driver's own pods; what it says, by their nodes; KubectlFailed if it fails."""
    choice = [f"--selector=app.kubernetes.io/component={component}", "--field-selector=status.phase=Running"]
    listed = json.loads(kubectl("--namespace=orlop", "get", "pods", *choice, "--output=json"))["items"]
    return {
        one["spec"]["nodeName"]: kubectl(
            "--namespace=orlop", "exec", one["metadata"]["name"], "--container=driver", "--", *command
        )
        for one in listed
        if "deletionTimestamp" not in one["metadata"]
    }


def doctors(component: str) -> dict[str, str]:
    """What `orlop doctor` says in each of them; KubectlFailed if it finds an error."""
    # 1: warnings, which are to be read.
    return in_each_driver(component, "sh", "-c", "orlop doctor --running || [ $? -eq 1 ]")


def drain(name: str) -> None:
    """Send the node's pods away. Call it inside the `try` that uncordons: it cordons first, and may fail after that."""
    choice = ("--ignore-daemonsets", "--delete-emptydir-data", "--force")
    kubectl("drain", name, *choice, "--timeout=240s")


def claim(name: str, size: str = "1Gi", storage_class: str = "csi-disk", **spec: object) -> Manifest:
    wanted = {
        "storageClassName": storage_class,
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": size}},
    }
    return _object("v1", "PersistentVolumeClaim", name, spec=wanted | spec)


def pod(
    name: str,
    mounts: Mapping[str, str],
    command: str = "exec sleep 3600",
    block: bool = False,
    **spec: object,
) -> Manifest:
    """A pod of one container; `mounts` says which claim is at which path (with `block`, at which device)."""
    container: Manifest = {"name": "main", "image": BUSYBOX_IMAGE, "command": ["sh", "-c", command]}
    if block:
        container["volumeDevices"] = [{"name": one, "devicePath": path} for path, one in mounts.items()]
    else:
        container["volumeMounts"] = [{"name": one, "mountPath": path} for path, one in mounts.items()]
    volumes = [{"name": one, "persistentVolumeClaim": {"claimName": one}} for one in mounts.values()]
    wanted = {"terminationGracePeriodSeconds": 1, "containers": [container], "volumes": volumes}
    return _object("v1", "Pod", name, spec=wanted | spec)


def snapshot(name: str, of: str, snapshot_class: str = "orlop") -> Manifest:
    wanted = {"volumeSnapshotClassName": snapshot_class, "source": {"persistentVolumeClaimName": of}}
    return _object("snapshot.storage.k8s.io/v1", "VolumeSnapshot", name, spec=wanted)


def from_snapshot(name: str) -> Manifest:
    """A claim's `dataSource`."""
    return {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": name}


def from_claim(name: str) -> Manifest:
    return {"kind": "PersistentVolumeClaim", "name": name}


def storage_class(
    name: str, parameters: Mapping[str, str], binding: str = "WaitForFirstConsumer"
) -> Manifest:
    return _object(
        "storage.k8s.io/v1",
        "StorageClass",
        name,
        provisioner=DRIVER,
        parameters=dict(parameters),
        volumeBindingMode=binding,
        reclaimPolicy="Delete",
        allowVolumeExpansion=True,
    )


def _bundle(manifests: Sequence[Manifest]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})


def _object(version: str, kind: str, name: str, **rest: object) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **rest}
