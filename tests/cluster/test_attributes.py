# SPDX-License-Identifier: Apache-2.0
"""What of a volume can change has a class too, and the claim may name another one."""

import json

from csi_driver.catalog import RECORD_FILE
from tests.cluster import kube
from tests.cluster.harness import deploy, layout, node
from tests.cluster.kube import Manifest, Namespace, claim, pod

LEASE = "external-resizer-local-orlop-dev"


def attributes_class(name: str, **parameters: str) -> Manifest:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "VolumeAttributesClass",
        "metadata": {"name": name},
        "driverName": kube.DRIVER,
        "parameters": parameters,
    }


def node_of_the_resizer() -> str:
    """Where csi-resizer asks the driver: see docs/limitations.md."""
    orlop = Namespace(deploy.NAMESPACE)
    return orlop.node_of(orlop.get("lease", LEASE)["spec"]["holderIdentity"])


def retention(namespace: Namespace, name: str, where: str) -> str:
    handle = namespace.volume_of(name)["spec"]["csi"]["volumeHandle"]
    (one,) = [one for one in layout.existing_nodes() if one.name == where]
    record = json.loads(node.execute(one, "cat", f"/var/lib/orlop/fast/volumes/{handle}/{RECORD_FILE}"))
    return str(record["mutable"]["retention"])


def test_a_claim_s_attributes_change_while_its_pod_runs(namespace: Namespace) -> None:
    kube.apply(attributes_class("kept", retention="24h"), attributes_class("not-kept", retention="1s"))
    where = node_of_the_resizer()
    namespace.apply(
        claim("data", volumeAttributesClassName="kept"),
        pod("app", {"/data": "data"}, nodeSelector={"kubernetes.io/hostname": where}),
    )
    namespace.wait_until_running("app")
    assert retention(namespace, "data", where) == "24h"

    wanted = '{"spec": {"volumeAttributesClassName": "not-kept"}}'
    namespace.kubectl("patch", "persistentvolumeclaim", "data", "--type=merge", "--patch", wanted)

    def current() -> object:
        return namespace.get("persistentvolumeclaim", "data")["status"].get(
            "currentVolumeAttributesClassName"
        )

    kube.wait_until(lambda: current() == "not-kept", "the claim to have its class", tell=namespace.story)
    assert retention(namespace, "data", where) == "1s"
    assert namespace.get("pod", "app")["status"]["containerStatuses"][0]["restartCount"] == 0
