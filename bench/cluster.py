# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.cluster`: from a claim to a running pod, against the same pod with an emptyDir, in one run on one
cluster. `make bench-cluster` starts the cluster; this only uses it, and leaves it as it was.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import expenses
from bench.expenses import Reading
from bench.kubernetes import Api, Moments, Object
from bench.report import Report, Row, machine
from tests.cluster import kube
from tests.cluster.harness import deploy, layout

OUTPUT = Path(__file__).parents[1] / ".cache" / "bench" / "cluster.json"
NAMESPACE = "bench"
NODE = layout.Node(1)
EMPTY, LATE, IMMEDIATE = KINDS = ("emptyDir", "claim", "claim, Immediate")
CLASSES = {LATE: "bench-late", IMMEDIATE: "bench-immediate"}
STAGES = ("posted", "selected", "volume", "bound", "scheduled", "running")
Times = dict[str, dict[str, float]]  # by pod and stage


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument(
        "--single", type=int, default=20, help="pods of each kind, one at a time (%(default)s)"
    )
    parser.add_argument("--burst", type=int, default=100, help="pods at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="bursts of each kind (%(default)s)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="this kind alone, beside emptyDir")
    parser.add_argument("--pool", default="fast", help="the pool (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], help="a value of the chart, to compare settings"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the machine-readable file (%(default)s)")
    return parser.parse_args()


class Bench:
    """Batches of pods, each of one kind."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.moments = Moments(api, NAMESPACE)
        self._made = 0

    def batch(self, kind: str, count: int) -> tuple[Times, Reading]:
        """Start `count` pods at once, wait until all run, and clear them away; when each was where, and the cost."""
        names = [f"p{self._made + number}" for number in range(count)]
        self._made += count
        before = expenses.read(self.api, NODE)
        with ThreadPoolExecutor(8) as workers:
            list(workers.map(lambda name: self._post(name, kind), names))
        self.moments.wait(names, "running", timeout_s=900)
        cost = expenses.difference(expenses.read(self.api, NODE), before)
        self._clear(names, kind)
        return {name: dict(self.moments.of[name]) for name in names}, cost

    def _post(self, name: str, kind: str) -> None:
        place = f"/api/v1/namespaces/{NAMESPACE}"
        self.moments.note(name, "posted")
        if kind != EMPTY:
            wanted = kube.claim(name, "64Mi", CLASSES[kind])
            self.api.request("POST", f"{place}/persistentvolumeclaims", wanted)
        self.api.request("POST", f"{place}/pods", _pod(name, kind))

    def _clear(self, names: list[str], kind: str) -> None:
        place = f"/api/v1/namespaces/{NAMESPACE}"
        self.api.request(
            "DELETE", f"{place}/pods", {"gracePeriodSeconds": 0, "kind": "DeleteOptions", "apiVersion": "v1"}
        )
        self.api.request("DELETE", f"{place}/persistentvolumeclaims")
        self.moments.wait(names, "gone", timeout_s=600)
        if kind != EMPTY:
            self.moments.wait(names, "volume gone", timeout_s=600)
        time.sleep(3)  # kubelet tears down what is left of the pods


def _pod(name: str, kind: str) -> Object:
    pod = kube.pod(name, {"/data": name}, nodeSelector={"kubernetes.io/hostname": NODE.name})
    pod["spec"]["automountServiceAccountToken"] = False
    if kind == EMPTY:
        pod["spec"]["volumes"] = [{"name": name, "emptyDir": {}}]
    return pod


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def to_running(times: Times) -> list[float]:
    return [one["running"] - one["posted"] for one in times.values()]


def compare(title: str, report: Report, found: dict[str, Times], target: float | None) -> None:
    """p50 and p99 of each kind, and their ratio to emptyDir's."""
    floor = to_running(found[EMPTY])
    rows = []
    for kind, times in found.items():
        took = to_running(times)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            measured = quantile(took, share)
            rows.append(Row(kind, f"{name} of {len(took)}", measured, "s"))
            if kind != EMPTY:
                bound = target if name == "p50" and kind == LATE else None
                ratio = measured / quantile(floor, share)
                rows.append(Row(kind, f"{name} / emptyDir's", ratio, "x", bound))
    report.add(title, rows, found)


def tell_stages(title: str, report: Report, found: dict[str, Times]) -> None:
    """Where the time goes: the median moment of each stage, as seen from the API."""
    rows = []
    for kind, times in found.items():
        for stage in STAGES[1:]:
            passed = [one[stage] - one["posted"] for one in times.values() if stage in one]
            if passed:
                rows.append(Row(kind, f"{stage} after", statistics.median(passed), "s"))
    report.add(f"{title}: stages, p50", rows)


def tell_costs(report: Report, costs: dict[str, list[Reading]], pods: int) -> None:
    """Time in the driver and in kubelet's volume code, and requests to the API server, for each pod of a burst."""
    times, requests = [], []
    for kind, readings in costs.items():
        count = pods * len(readings)
        for what in sorted({name for one in readings for name in one.spans}):
            spans = [one.spans[what] for one in readings if what in one.spans]
            seconds = sum(span.seconds for span in spans) / sum(span.count for span in spans)
            calls = sum(span.count for span in spans) / count
            times.append(Row(kind, what, seconds * 1000, "ms a call", note=f"{calls:.1f} calls a pod"))
        total = sum((one.requests for one in readings), start=type(readings[0].requests)())
        requests.append(Row(kind, "all", total.total() / count, "a pod"))
        requests += [
            Row(kind, who, number / count, "a pod")
            for who, number in total.most_common()
            if number >= count / 20
        ]
    report.add("burst: time in driver and kubelet", times)
    report.add("burst: time of processors", tell_processors(costs, pods))
    report.add("burst: requests to the API server", requests)


def tell_processors(costs: dict[str, list[Reading]], pods: int) -> list[Row]:
    rows = []
    for kind, readings in costs.items():
        seconds: Counter[str] = Counter()
        for (program, _), spent in (item for one in readings for item in one.processors.items()):
            seconds[program] += spent  # type: ignore[assignment]
        count = pods * len(readings)
        rows.append(Row(kind, "all", sum(seconds.values()) / count * 1000, "ms a pod"))
        rows += [Row(kind, name, spent / count * 1000, "ms a pod") for name, spent in seconds.most_common()]
    return rows


def tell_memory(title: str, report: Report, api: Api) -> None:
    found = expenses.memory_by_container(api, NODE, deploy.NAMESPACE)
    rows = [Row("memory", name, size, "MiB") for name, size in sorted(found.items())]
    report.add(title, [*rows, Row("memory", "all on the node", sum(found.values()), "MiB")])


def prepare(pool: str, values: list[str]) -> None:
    # As the chart has it, where the tests are in a hurry.
    deploy.install("sidecars.capacityPollInterval=30s", *values)
    deploy.wait()
    kube.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        kube.storage_class(CLASSES[LATE], {"pool": pool}),
        kube.storage_class(CLASSES[IMMEDIATE], {"pool": pool}, "Immediate") | _only_here(),
    )


def _only_here() -> Object:
    expression = {"key": kube.NODE_KEY, "values": [NODE.name]}
    return {"allowedTopologies": [{"matchLabelExpressions": [expression]}]}


def remove() -> None:
    kube.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=300s", timeout_s=310)
    kube.kubectl("delete", "storageclass", *CLASSES.values(), "--ignore-not-found")


def measure(bench: Bench, report: Report, arguments: argparse.Namespace) -> None:
    kinds = [kind for kind in KINDS if not arguments.kind or kind in (EMPTY, *arguments.kind)]
    bench.batch(EMPTY, 1), bench.batch(LATE, 1)  # the first of each finds nothing warm
    tell_memory("memory before", report, bench.api)
    single: dict[str, Times] = {kind: {} for kind in kinds}
    for _ in range(arguments.single):
        for kind in kinds:
            single[kind] |= bench.batch(kind, 1)[0]
    if arguments.single:
        compare("one at a time", report, single, target=None)
        tell_stages("one at a time", report, single)
    burst: dict[str, Times] = {kind: {} for kind in kinds}
    costs: dict[str, list[Reading]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind in kinds:
            times, cost = bench.batch(kind, arguments.burst)
            burst[kind] |= times
            costs[kind].append(cost)
    compare(f"burst of {arguments.burst}", report, burst, target=1.3)
    tell_stages(f"burst of {arguments.burst}", report, burst)
    tell_costs(report, costs, arguments.burst)
    tell_memory("memory after", report, bench.api)


def main() -> int:
    arguments = parse_arguments()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    report = Report()
    prepare(arguments.pool, arguments.set)
    try:
        measure(Bench(Api()), report, arguments)
    finally:
        remove()
        deploy.install()
    report.write(arguments.output)
    report.print_end(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
