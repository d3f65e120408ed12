# SPDX-License-Identifier: Apache-2.0
"""An administrator looks at the driver's metrics; the chart's alerts ask for none that it has not."""

import re

import yaml

from tests.cluster import kube
from tests.cluster.harness import deploy, node
from tests.cluster.harness.layout import Node
from tests.cluster.harness.processes import run

# Words of an expression that are no metrics.
LANGUAGE = {"sum", "and", "increase", "min_over_time"}


def metrics_of(one: Node) -> str:
    """The driver's page, as the node sees it."""
    choice = ["--selector=app.kubernetes.io/component=node", f"--field-selector=spec.nodeName={one.name}"]
    address = kube.kubectl(
        "--namespace=orlop", "get", "pods", *choice, "--output=jsonpath={.items[0].status.podIP}"
    )
    return node.execute(one, "busybox", "wget", "-qO-", f"http://{address}:9808/metrics")


def alerts() -> dict[str, str]:
    """The expression of each alert that the chart renders."""
    only = ("--set", "monitoring.rules=true", "--show-only", "templates/monitoring.yaml")
    rendered = run("helm", "template", "orlop", deploy.CHART, *only)
    (group,) = yaml.safe_load(rendered)["spec"]["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def test_alerts_ask_for_metrics_that_the_driver_has(cluster: None) -> None:
    page = metrics_of(Node(1))

    for alert, expression in alerts().items():
        bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|(by|on) \([^)]*\)", "", expression)
        names = set(re.findall(r"[a-z]\w+", bare)) - LANGUAGE
        assert names, alert
        for name in names:
            assert f"# TYPE {name.removesuffix('_count')} " in page, f"{alert}: {name}"


def test_a_pools_numbers_are_told_for_each_node(cluster: None) -> None:
    for one in (Node(1), Node(2)):
        page = metrics_of(one)

        assert f'orlop_pool_up{{node="{one.name}",pool="fast"}} 1.0' in page
        assert re.search(
            r'csi_plugin_operations_seconds_count\{.*method_name="/csi.v1.Identity/GetPluginInfo".*\}', page
        )
