# SPDX-License-Identifier: Apache-2.0
"""The API server itself validates every manifest that the repository offers, the standard sidecars' included."""

import pytest

from tests.cluster.harness import deploy
from tests.cluster.harness.processes import run
from tests.cluster.kube import EXAMPLES, Namespace, kubectl

DEPLOY = deploy.CHART.parents[1]


def validate(text: str) -> None:
    assert "(server dry run)" in kubectl(
        "apply", "--dry-run=server", "--validate=strict", "--filename=-", stdin=text
    )


@pytest.mark.parametrize(
    "directory",
    [
        *("kustomize/base", "kustomize/overlays/k0s", "kustomize/overlays/microk8s"),
        *(
            "kustomize/overlays/snapshots",
            "kustomize/shared",
            "kustomize/overlays/shared-directory",
            "minikube",
        ),
    ],
)
def test_kustomize_directories_are_valid(cluster: None, directory: str) -> None:
    validate(run("kubectl", "kustomize", DEPLOY / directory))


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("registration=sidecar", "liveness=sidecar", "snapshots.enabled=true"),
        ("shared.enabled=true", "shared.pools.a.backend=directory", "shared.pools.a.root=/srv/a"),
    ],
    ids=["own", "sidecars", "shared"],
)
def test_the_chart_is_valid(cluster: None, values: tuple[str, ...]) -> None:
    settings = [word for value in values for word in ("--set", value)]
    validate(run("helm", "template", "orlop", deploy.CHART, "--namespace=orlop", *settings))


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_examples_are_valid(namespace: Namespace, example: str) -> None:
    assert "(server dry run)" in namespace.kubectl(
        "apply", "--dry-run=server", "--validate=strict", f"--filename={EXAMPLES / example}"
    )
