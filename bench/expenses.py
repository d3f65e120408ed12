# SPDX-License-Identifier: Apache-2.0
"""What a stretch of a cluster's life cost: time by the driver's and kubelet's own metrics, processors by /proc, requests by
the audit log, memory by kubelet's statistics. What happens in that stretch is not this module's business.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.kubernetes import Api
from tests.cluster.harness import layout, node
from tests.cluster.harness.layout import Node

_SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
DRIVER = "csi_plugin_operations_seconds"
KUBELET = "csi_operations_seconds"
STORAGE = "storage_operation_duration_seconds"
# As the kernel names processes: fifteen characters.
PROGRAMS = {
    "etcd",
    "kube-apiserver",
    "kube-controller",
    "kube-scheduler",
    "kubelet",
    "containerd",
    "containerd-shim",
}
CONTAINERS = {"orlop", "csi-provisioner", "csi-resizer", "csi-snapshotter", "snapshot-contro"}


@dataclass(frozen=True)
class Span:
    """How often something was done, and how long that took altogether."""

    count: float = 0
    seconds: float = 0

    def __sub__(self, earlier: "Span") -> "Span":
        return Span(self.count - earlier.count, self.seconds - earlier.seconds)


@dataclass(frozen=True)
class Reading:
    """All counters at one moment."""

    spans: dict[str, Span]  # "driver CreateVolume", "kubelet NodePublishVolume", "kubelet volume_mount"
    requests: Counter[str]  # by who asked
    processors: dict[tuple[str, int], float]  # seconds of each process of the cluster, by program and number


def read(api: Api, one: Node) -> Reading:
    metrics = api.text(f"/api/v1/nodes/{one.name}/proxy/metrics")
    spans = _spans(_driver_page(api, one), DRIVER, "driver") | _spans(metrics, KUBELET, "kubelet")
    spans |= _spans(metrics, STORAGE, "kubelet", label="operation_name")
    return Reading(spans, _requests(), _processors())


def difference(later: Reading, earlier: Reading) -> Reading:
    spans = {name: span - earlier.spans.get(name, Span()) for name, span in later.spans.items()}
    processors = {key: seconds - earlier.processors.get(key, 0) for key, seconds in later.processors.items()}
    requests = later.requests - earlier.requests
    return Reading({name: span for name, span in spans.items() if span.count}, requests, processors)


def memory_by_container(api: Api, one: Node, namespace: str) -> dict[str, float]:
    """MiB of the working set of each container of the namespace on the node, as kubelet tells it."""
    summary = json.loads(api.text(f"/api/v1/nodes/{one.name}/proxy/stats/summary?only_cpu_and_memory=true"))
    return {
        container["name"]: container["memory"]["workingSetBytes"] / 2**20
        for pod in summary["pods"]
        if pod["podRef"]["namespace"] == namespace
        for container in pod.get("containers", [])
    }


def _driver_page(api: Api, one: Node) -> str:
    """From within the node: only there pods have addresses that lead somewhere."""
    selector = "labelSelector=app.kubernetes.io/component%3Dnode"
    pods = api.request("GET", f"/api/v1/namespaces/orlop/pods?{selector}")["items"]
    (address,) = [pod["status"]["podIP"] for pod in pods if pod["spec"]["nodeName"] == one.name]
    return node.execute(one, "busybox", "wget", "-qO-", f"http://{address}:9808/metrics")


def _spans(page: str, metric: str, who: str, label: str = "method_name") -> dict[str, Span]:
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for name, labels, value in _SAMPLE.findall(page):
        fields = dict(_LABEL.findall(labels))
        if fields.get("driver_name", "local.orlop.dev") != "local.orlop.dev" or label not in fields:
            continue
        what = f"{who} {fields[label].rpartition('/')[2]}"
        if name == f"{metric}_count":
            counts[what] += float(value)  # type: ignore[assignment]
        elif name == f"{metric}_sum":
            seconds[what] += float(value)  # type: ignore[assignment]
    return {what: Span(count, seconds[what]) for what, count in counts.items()}


def _processors() -> dict[tuple[str, int], float]:
    """Processor time so far of the cluster's programs, with the children that they waited for (runc, mkfs)."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            text = (directory / "stat").read_text()
            group = (directory / "cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        name = text.partition("(")[2].rpartition(")")[0]
        if name in PROGRAMS or (name in CONTAINERS and layout.CGROUP in group):
            ticks = sum(map(int, text.rpartition(")")[2].split()[11:15]))
            found[name, int(directory.name)] = ticks / os.sysconf("SC_CLK_TCK")
    return found


def _requests() -> Counter[str]:
    """Requests so far, by the program that made them; the benchmark's own are not in the log."""
    found: Counter[str] = Counter()
    for file in layout.LOGS.glob("audit*.log"):
        with file.open() as lines:
            found.update(_who(json.loads(line)) for line in lines if line.endswith("}\n"))
    return found


def _who(entry: dict[str, dict[str, str] | str]) -> str:
    agent = str(entry.get("userAgent", "")).partition("/")[0]
    user = entry["user"]
    name = str(user["username"]) if isinstance(user, dict) else ""
    return agent if agent.startswith(("csi-", "kube", "snapshot")) else name.rpartition(":")[2]
