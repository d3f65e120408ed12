# SPDX-License-Identifier: Apache-2.0
"""A cluster with the driver in it, a namespace for each test, and the check that nothing stays behind.

The cluster is not started here: `make test-cluster` does, and `tests/cluster/cluster deploy` puts the
driver into it.
"""

import secrets
from collections.abc import Iterator

import pytest

from tests.cluster import traces
from tests.cluster.harness import layout
from tests.cluster.kube import EXAMPLES, KubectlFailed, Namespace, kubectl, wait_until
from tests.conftest import unavailable


@pytest.fixture(scope="session")
def cluster() -> None:
    """A cluster that answers, with the driver on every node, and the class that most tests use."""
    if not layout.KUBECONFIG.exists():
        unavailable("no cluster: `make test-cluster` starts one")
    try:
        kubectl(
            "--namespace=orlop", "rollout", "status", "daemonset/orlop-node", "--timeout=420s", timeout_s=450
        )
    except KubectlFailed as error:
        unavailable(f"the driver is not in the cluster: {error}")
    kubectl("apply", f"--filename={EXAMPLES / 'storageclass-csi-disk.yaml'}")


@pytest.fixture
def namespace(cluster: None) -> Iterator[Namespace]:
    """A fresh namespace; after the test nothing of it is left, in the cluster or on any node."""
    one = Namespace(f"story-{secrets.token_hex(3)}")
    kubectl("create", "namespace", one.name)
    # Without it no pod is let in; a controller makes it, a moment later.
    wait_until(lambda: one.exists("serviceaccount", "default"), "the namespace's default account")
    before = traces.of_all_nodes()
    yield one
    one.clear()
    kubectl("delete", "namespace", one.name, "--wait=false")
    wait_until(
        lambda: traces.of_all_nodes() <= before,
        "volumes, loop devices and mounts of the test to be gone",
        timeout_s=600,  # as long as a burst of claims may take to be bound
        tell=lambda: "\n".join(sorted(traces.of_all_nodes() - before)),
    )
