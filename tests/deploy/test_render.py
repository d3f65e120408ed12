# SPDX-License-Identifier: Apache-2.0
"""The chart and the kustomize files say the same, and what they say keeps the project's rules."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver import app
from csi_driver import config as configuration
from csi_driver.backends import btrfs, directory, nfs, nfs_image
from csi_driver.backends.image import ImageOptions
from tests.cluster.harness import programs
from tests.conftest import unavailable

pytestmark = pytest.mark.cluster  # helm and kubectl are among the cluster's programs

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm/orlop"
SNAPSHOT_CONTROLLER = DEPLOY / "snapshot-controller.yaml"
K0S = "/var/lib/k0s/kubelet"
MICROK8S = "/var/snap/microk8s/common/var/lib/kubelet"
MONITORING = ("monitoring.podMonitor=true", "monitoring.rules=true", "monitoring.labels.release=prometheus")
SHARED = ("shared.enabled=true", "local.enabled=false")
DIRECTORIES = (
    *("shared.pools.team.backend=directory", "shared.pools.team.root=/mnt/team"),
    *("shared.pools.team.mounted=true", "shared.pools.team.enforce_capacity=false"),
)
ALL_SIDECARS = ("registration=sidecar", "liveness=sidecar", "snapshots.enabled=true")

Objects = dict[tuple[str, str], dict[str, Any]]


def tool(name: str) -> str:
    path = shutil.which(name, path=f"{programs.bin_directory()}:{os.environ['PATH']}")
    return path or unavailable(f"{name} not found; `make cluster` builds it")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(text: str) -> Objects:
    documents = [document for document in yaml.safe_load_all(text) if document]
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def chart(*values: str) -> Objects:
    settings = [word for value in ("namespace.create=true", *values) for word in ("--set", value)]
    template = [tool("helm"), "template", "orlop", os.fspath(CHART), "--namespace", "orlop", "--no-hooks"]
    return parse(run(*template, *settings))


def kustomize(directory: str) -> Objects:
    """The rendered objects, with the ConfigMap called as in the chart instead of by its hash."""
    text = run(tool("kubectl"), "kustomize", os.fspath(DEPLOY / directory))
    return parse(re.sub(r"(orlop(?:-shared)?-config)-[a-z0-9]{10}\b", r"\1", text))


def normal(objects: Objects) -> Objects:
    """Without what may differ: order where it means nothing, and how a changed configuration restarts the driver."""
    for document in objects.values():
        if document["kind"] == "ConfigMap":
            document["data"]["config.toml"] = settings_of(document)
        pod = document.get("spec", {}).get("template", {})
        pod.get("metadata", {}).get("annotations", {}).pop("orlop.dev/config", None)
        for item in [pod.get("spec", {}), *pod.get("spec", {}).get("containers", [])]:
            item.get("volumes", []).sort(key=lambda volume: volume["name"])
            item.get("volumeMounts", []).sort(key=lambda mount: mount["name"])
    return objects


def settings_of(config_map: dict[str, Any]) -> list[str]:
    """The lines that say something: an unset region is as good as none."""
    lines = config_map["data"]["config.toml"].splitlines()
    return [line for line in lines if line and not line.startswith("#") and not line.endswith('= ""')]


@pytest.mark.parametrize(
    ("directory", "values"),
    [
        ("kustomize/base", ()),
        ("kustomize/shared", SHARED),
        ("kustomize/overlays/shared-directory", (*SHARED, *DIRECTORIES)),
        ("kustomize/overlays/snapshots", ("snapshots.enabled=true",)),
        ("kustomize/overlays/k0s", (f"kubeletDir={K0S}",)),
        ("kustomize/overlays/microk8s", (f"kubeletDir={MICROK8S}",)),
        (
            "minikube",
            (
                *("pools.default.backend=image", "pools.default.root=/data/orlop/default"),
                *("pools.default.backing.file=/data/orlop/default.img", "pools.default.backing.size=50Gi"),
                "pools.default.backing.filesystem=xfs",
                "resizer.replicas=1",
                *("storageClasses[0].name=orlop", "storageClasses[0].default=true"),
            ),
        ),
    ],
)
def test_kustomize_says_what_the_chart_says(directory: str, values: tuple[str, ...]) -> None:
    ours, theirs = normal(kustomize(directory)), normal(chart(*values))

    assert ours.keys() == theirs.keys()
    for key, document in theirs.items():
        assert ours[key] == document, key


def test_the_kubelet_directory_is_one_value() -> None:
    text = yaml.safe_dump_all(chart(f"kubeletDir={K0S}").values())

    assert "/var/lib/kubelet" not in text


def containers(objects: Objects) -> dict[str, dict[str, Any]]:
    pods = [
        document["spec"]["template"]["spec"]
        for document in objects.values()
        if "template" in document.get("spec", {})
    ]
    return {container["name"]: container for pod in pods for container in pod["containers"]}


@pytest.mark.parametrize("values", [(), SHARED])
def test_only_the_driver_is_privileged_and_no_root_filesystem_is_writable(values: tuple[str, ...]) -> None:
    found = containers(chart(*ALL_SIDECARS, *values))

    for name, container in found.items():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True, name
        if name != "driver":
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
    assert [name for name, one in found.items() if one["securityContext"].get("privileged")] == ["driver"]


@pytest.mark.parametrize("values", [(), SHARED])
def test_every_container_asks_for_resources_and_pulls_only_when_absent(values: tuple[str, ...]) -> None:
    for name, container in containers(chart(*ALL_SIDECARS, *values)).items():
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name
        assert container["imagePullPolicy"] == "IfNotPresent", name


def test_managed_pools_share_the_directories_that_the_driver_mounts_in() -> None:
    found = chart(
        *("pools.a.root=/data/a", "pools.a.backing.file=/data/a.img", "pools.a.backing.size=1Gi"),
        *("pools.b.root=/data/b", "pools.b.backing.file=/disks/b.img", "pools.b.backing.size=1Gi"),
        *("pools.c.root=/srv/c", "pools.c.backing.device=/dev/sdb", "pools.d.root=/srv/d"),
    )
    paths = {
        mount["mountPath"]: mount.get("mountPropagation")
        for mount in containers(found)["driver"]["volumeMounts"]
        if mount["name"].startswith(("pool-", "backing-"))
    }
    config = tomllib.loads(found["ConfigMap", "orlop-config"]["data"]["config.toml"])

    assert paths == {
        "/data": "Bidirectional",
        "/disks": "HostToContainer",
        "/srv": "Bidirectional",
        "/srv/d": "HostToContainer",
    }
    assert config["pools"]["b"]["backing"] == {"file": "/disks/b.img", "size": "1Gi"}
    assert config["pools"]["c"]["backing"] == {"device": "/dev/sdb"}


def test_a_pool_that_must_be_mounted_is_seen_from_above() -> None:
    """Its root as a volume of its own would always be a mount point in the pod, mounted on the node or not."""
    found = chart(
        *("pools.a.root=/mnt/a", "pools.a.mounted=true", "pools.b.root=/mnt/b", "pools.b.mounted=true"),
        *(
            "pools.c.root=/data/c",
            "pools.c.mounted=true",
            "pools.d.root=/data/d",
            "pools.d.backing.device=/dev/sdb",
        ),
    )
    paths = {
        mount["mountPath"]: mount["mountPropagation"]
        for mount in containers(found)["driver"]["volumeMounts"]
        if mount["name"].startswith("pool-")
    }

    assert paths == {"/mnt": "HostToContainer", "/data": "Bidirectional"}


def test_the_standard_sidecars_are_a_switch() -> None:
    assert containers(chart()).keys() == {"driver", "csi-provisioner", "csi-resizer"}
    assert containers(chart(*ALL_SIDECARS)).keys() == {
        *("driver", "csi-provisioner", "csi-resizer"),
        *("csi-snapshotter", "node-driver-registrar", "liveness-probe"),
    }
    assert not any("--kubelet-dir" in word for word in containers(chart(*ALL_SIDECARS))["driver"]["args"])


def test_sidecars_have_the_versions_that_the_cluster_tests_run() -> None:
    modules = {"csi-provisioner": "external-provisioner/v6", "csi-resizer": "external-resizer/v2"}
    modules |= {"csi-snapshotter": "external-snapshotter/v8"}
    found = containers(chart("snapshots.enabled=true"))
    modules["csi-attacher"] = "external-attacher/v4"
    attaching = chart(*SHARED, "shared.attach=true")["Deployment", "orlop-shared-controller"]
    found |= {one["name"]: one for one in attaching["spec"]["template"]["spec"]["containers"]}

    for name, module in modules.items():
        version = programs.module_version("kubernetes", f"{programs.CSI}/{module}")
        assert found[name]["image"] == f"registry.k8s.io/sig-storage/{name}:{version}"
    version = programs.module_version("kubernetes", f"{programs.CSI}/{modules['csi-snapshotter']}")
    assert f"snapshot-controller:{version}\n" in SNAPSHOT_CONTROLLER.read_text()


def test_monitoring_is_a_switch_and_is_found_by_its_labels() -> None:
    kinds = {"PodMonitor", "PrometheusRule"}
    assert not {kind for kind, _ in chart()} & kinds

    found = {kind: document for (kind, _), document in chart(*MONITORING).items() if kind in kinds}

    assert found.keys() == kinds
    for document in found.values():
        assert document["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {one["name"] for one in containers(chart())["driver"]["ports"]}
    (group,) = found["PrometheusRule"]["spec"]["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in {"warning", "critical"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_both_drivers_stand_side_by_side() -> None:
    pool = ("shared.pools.team.backend=nfs", "shared.pools.team.server=files", "shared.pools.team.path=/team")
    both = chart("shared.enabled=true", *pool, "shared.storageClasses[0].name=team")
    alone, local = chart(*SHARED, *pool, "shared.storageClasses[0].name=team"), chart()

    assert both.keys() == alone.keys() | local.keys()
    assert alone.keys() & local.keys() == {("Namespace", "orlop")}
    for key in local:
        assert both[key] == local[key]
    config = configuration.parse(both["ConfigMap", "orlop-shared-config"]["data"]["config.toml"])
    assert (config.scope, config.driver_name) == ("shared", "shared.orlop.dev")
    assert config.pools["team"].root == Path("/run/orlop/pools/team")
    assert both["StorageClass", "team"]["provisioner"] == config.driver_name


def test_the_shared_driver_s_mounts_outlive_its_pods_and_one_controller_works_at_a_time() -> None:
    found = chart(*SHARED, "snapshots.enabled=true")
    node = found["DaemonSet", "orlop-shared-node"]["spec"]["template"]["spec"]
    controller = found["Deployment", "orlop-shared-controller"]["spec"]

    assert node["hostNetwork"] is True and "serviceAccountName" not in node
    mounts = {mount["name"]: mount for mount in node["containers"][0]["volumeMounts"]}
    assert mounts["exports"]["mountPath"] == "/run/orlop" == os.fspath(app.EXPORTS_DIR.parent)
    assert mounts["exports"]["mountPropagation"] == mounts["kubelet"]["mountPropagation"] == "Bidirectional"
    assert controller["replicas"] == 2
    sidecars = controller["template"]["spec"]["containers"][1:]
    assert [one["name"] for one in sidecars] == ["csi-provisioner", "csi-resizer", "csi-snapshotter"]
    assert all("--leader-election" in one["args"] for one in sidecars)


def test_volumes_of_the_shared_driver_are_attached_if_that_is_wanted() -> None:
    def verbs(found: Objects, resource: str) -> set[str]:
        rules = found["ClusterRole", "orlop-shared-controller"]["rules"]
        return {verb for rule in rules if resource in rule["resources"] for verb in rule["verbs"]}

    plain, attaching = chart(*SHARED), chart(*SHARED, "shared.attach=true")

    for found, wanted in ((plain, False), (attaching, True)):
        assert found["CSIDriver", "shared.orlop.dev"]["spec"]["attachRequired"] is wanted
        deployment = found["Deployment", "orlop-shared-controller"]["spec"]["template"]["spec"]
        assert ("csi-attacher" in [one["name"] for one in deployment["containers"]]) is wanted
        # The provisioner looks at them in any case, once a driver says that it attaches.
        assert {"get", "list", "watch"} <= verbs(found, "volumeattachments")
        assert ("patch" in verbs(found, "volumeattachments")) is wanted
        assert verbs(found, "volumeattachments/status") == ({"patch"} if wanted else set())


def test_controllers_and_nodes_see_the_directories_that_every_node_has_mounted() -> None:
    more = ("shared.pools.plain.backend=directory", "shared.pools.plain.root=/srv/plain")
    found = chart(*SHARED, *DIRECTORIES, *more)

    for kind, name in (("DaemonSet", "orlop-shared-node"), ("Deployment", "orlop-shared-controller")):
        pod = found[kind, name]["spec"]["template"]["spec"]
        mounts = {one["name"]: one for one in pod["containers"][0]["volumeMounts"]}
        volumes = {one["name"]: one.get("hostPath") for one in pod["volumes"]}
        # That a filesystem is mounted is seen from above only; and no node makes a directory in its place.
        for pool, path in (("pool-team", "/mnt"), ("pool-plain", "/srv/plain")):
            assert mounts[pool]["mountPath"] == path
            assert mounts[pool]["mountPropagation"] == "HostToContainer"
            assert volumes[pool] == {"path": path, "type": "Directory"}
    config = configuration.parse(found["ConfigMap", "orlop-shared-config"]["data"]["config.toml"])
    assert (config.pools["team"].mounted, config.pools["plain"].mounted) == (True, False)


def test_only_controllers_see_what_the_server_that_they_run_on_exports() -> None:
    exported = ("backend=nfs", "server=files", "path=/team", "root=/srv/team", "on_server=true")
    found = chart(*SHARED, *(f"shared.pools.team.{one}" for one in exported))

    node, controller = (
        found[kind, name]["spec"]["template"]["spec"]
        for kind, name in (("DaemonSet", "orlop-shared-node"), ("Deployment", "orlop-shared-controller"))
    )
    mounts = [one for one in controller["containers"][0]["volumeMounts"] if one["mountPath"] == "/srv/team"]
    volumes = {one["name"]: one for one in controller["volumes"]}
    assert volumes[mounts[0]["name"]]["hostPath"] == {"path": "/srv/team", "type": "Directory"}
    assert "/srv/team" not in str(node)
    config = configuration.parse(found["ConfigMap", "orlop-shared-config"]["data"]["config.toml"])
    assert config.pools["team"].options["on_server"] is True


@pytest.mark.parametrize(("values", "count"), [((), 4), (SHARED, 2), (("shared.enabled=true",), 6)])
def test_no_object_grants_a_wildcard_or_secrets(values: tuple[str, ...], count: int) -> None:
    roles = [
        document
        for (kind, _), document in chart(*ALL_SIDECARS, *values).items()
        if kind in ("Role", "ClusterRole")
    ]

    assert len(roles) == count
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
            assert "secrets" not in rule["resources"]
            # Each node's provisioner knows its own node from the driver, and the shared driver has no topology.
            assert not {"nodes", "csinodes"} & set(rule["resources"])


@pytest.mark.parametrize(("name", "values"), [("node", ()), ("shared-controller", SHARED)])
def test_the_snapshotter_may_read_all_that_it_waits_for_at_its_start(
    name: str, values: tuple[str, ...]
) -> None:
    """One kind that it must not list, and it takes no snapshot at all."""
    rules = chart(*values, "snapshots.enabled=true")["ClusterRole", f"orlop-{name}"]["rules"]

    readable = {
        kind for rule in rules if {"list", "watch"} <= set(rule["verbs"]) for kind in rule["resources"]
    }

    kinds = {
        f"{kind}{what}"
        for kind in ("volumesnapshot", "volumegroupsnapshot")
        for what in ("contents", "classes")
    }
    assert kinds <= readable


def test_every_right_says_who_needs_it() -> None:
    for template in ("rbac-node.yaml", "rbac-resizer.yaml", "rbac-shared.yaml"):
        lines = (CHART / "templates" / template).read_text().splitlines()
        rules = [index for index, line in enumerate(lines) if line.strip().startswith("- apiGroups")]
        assert rules
        for index in rules:
            comment = lines[index - 1].strip()
            assert comment.startswith("# "), lines[index + 1]


def test_the_schema_knows_the_keys_that_a_configuration_may_have() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    of_backends = {
        "pools": (ImageOptions, directory._Options, btrfs._Options),
        "shared.pools": (nfs._Options, nfs_image._Options, directory._Options),
    }
    common = set(configuration._Pool.__struct_fields__)
    for where, kinds in of_backends.items():
        keys = common | {key for kind in kinds for key in kind.__struct_fields__}
        # What is on a server has no filesystem of its own.
        keys -= {"backing"} if where == "shared.pools" else set()
        pools = schema
        for name in where.split("."):
            pools = pools["properties"][name]
        (pool,) = pools["patternProperties"].values()
        assert set(pool["properties"]) == keys, where
    # The rest are values of the chart's own, or differ from node to node.
    others = {"pools", "driver_name", "scope", "node_id"}
    settings = schema["definitions"]["settings"]["properties"]
    assert set(settings) == set(configuration._File.__struct_fields__) - others


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("kubletDir=/x", "kubletDir"),
        ("pools.Fast.root=/x", "Fast"),
        ("pools.fast.backend=zfs", "backend"),
        ("pools.fast.root=relative", "root"),
        ("pools.fast.root=/a/b,pools.fast.backing.device=sdb", "device"),
        ("pools.fast.root=/a/b,pools.fast.backing.file=/a/f", "size"),
        ("pools.fast.root=/fast,pools.fast.backing.device=/dev/sdb", "another directory than /"),
        ("pools.fast.root=/fast,pools.fast.mounted=true", "another directory than /"),
        ("registration=both", "registration"),
        ("shared.pools.team.backend=image", "backend"),
        ("shared.pools.team.backend=directory", "root"),
        ("shared.pools.team.backend=nfs", "server"),
        (
            "shared.pools.team.backend=nfs,shared.pools.team.server=a,shared.pools.team.path=/a,shared.pools.team.on_server=true",
            "root",
        ),
        (
            "shared.enabled=true,shared.pools.team.backend=directory,shared.pools.team.root=/team,shared.pools.team.mounted=true",
            "another directory than /",
        ),
        ("shared.node.httpport=1", "httpport"),
        ("storageClasses[0].volumeBindingMode=Later", "volumeBindingMode"),
        ("snapshots.classes[0].deletionPolicy=Never", "deletionPolicy"),
        ("pools.fast.root=/a/b,pools.fast.retention_=24h", "retention_"),
        ("shared.pools.team.backend=nfs,shared.pools.team.server_=a", "server_"),
        ("config.drain_timeouts=1s", "drain_timeouts"),
        ("config.region=here", "region"),
        ("shared.config.workers_=2", "workers_"),
    ],
)
def test_a_wrong_value_is_refused_by_name(value: str, complaint: str) -> None:
    command = [tool("helm"), "template", "orlop", os.fspath(CHART), "--set", value]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert complaint in done.stderr
