# SPDX-License-Identifier: Apache-2.0
"""What of a volume can change has a class too, and the claim may name another one."""

import json

from csi_driver.catalog import RECORD_FILE
from tests.cluster import kube
from tests.cluster.harness import layout, node
from tests.cluster.kube import Manifest, Namespace, claim, pod


def attributes_class(name: str, **parameters: str) -> Manifest:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "VolumeAttributesClass",
        "metadata": {"name": name},
        "driverName": kube.DRIVER,
        "parameters": parameters,
    }


def retention(namespace: Namespace, name: str, where: str) -> str:
    handle = namespace.volume_of(name)["spec"]["csi"]["volumeHandle"]
    (one,) = [one for one in layout.existing_nodes() if one.name == where]
    record = json.loads(node.execute(one, "cat", f"/var/lib/orlop/fast/volumes/{handle}/{RECORD_FILE}"))
    return str(record["mutable"]["retention"])


def test_a_claim_s_attributes_change_while_its_pod_runs(namespace: Namespace) -> None:
    """On the node whose csi-resizer leads, for it asks the driver beside it: see docs/limitations.md."""
    # Seconds: what the other node's claim was, it stays, and nothing is to be left of it after the test.
    kube.apply(attributes_class("kept", retention="2s"), attributes_class("not-kept", retention="1s"))
    homes = [one.name for one in layout.existing_nodes()]
    for home in homes:
        namespace.apply(
            claim(home, volumeAttributesClassName="kept"),
            pod(home, {"/data": home}, nodeSelector={"kubernetes.io/hostname": home}),
        )
    for home in homes:
        namespace.wait_until_running(home)
        assert retention(namespace, home, home) == "2s"

    wanted = '{"spec": {"volumeAttributesClassName": "not-kept"}}'
    for home in homes:
        namespace.kubectl("patch", "persistentvolumeclaim", home, "--type=merge", "--patch", wanted)

    def changed() -> list[str]:
        found = {home: namespace.get("persistentvolumeclaim", home)["status"] for home in homes}
        return [
            home
            for home, status in found.items()
            if status.get("currentVolumeAttributesClassName") == "not-kept"
        ]

    kube.wait_until(lambda: changed() != [], "a claim to have its class", tell=namespace.story)
    for home in changed():
        assert retention(namespace, home, home) == "1s"
        assert namespace.get("pod", home)["status"]["containerStatuses"][0]["restartCount"] == 0
