# SPDX-License-Identifier: Apache-2.0
"""etcd, API server, controller manager and scheduler: plain processes of the machine."""

import json
import urllib.request

from tests.cluster.harness import layout, processes
from tests.cluster.harness.processes import run

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
PKI = layout.PKI


def start_network() -> None:
    run("ip", "link", "add", layout.BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{layout.BRIDGE_ADDRESS}/24", "dev", layout.BRIDGE)
    run("ip", "address", "add", f"{layout.API_ADDRESS}/32", "dev", layout.BRIDGE)
    run("ip", "link", "set", layout.BRIDGE, "up")


def start_api() -> None:
    layout.ETCD_DATA.mkdir(parents=True, exist_ok=True)
    _write_audit_policy()
    processes.start("etcd", ["etcd", *_etcd_flags()])
    # The API server gives up where etcd is not there within 20 s.
    processes.wait_until(_etcd_answers, "etcd to answer", timeout_s=240)
    processes.start("kube-apiserver", ["kube-apiserver", *_api_server_flags()])


def _etcd_answers() -> bool:
    try:
        with urllib.request.urlopen(f"{layout.ETCD_URL}/health", timeout=5) as answer:
            return b"true" in answer.read()
    except OSError:
        return False


def wait_for_api() -> None:
    processes.wait_until(_api_is_ready, "the API server to be ready", timeout_s=240)


def start_controllers() -> None:
    processes.start(
        "kube-controller-manager",
        [
            "kube-controller-manager",
            f"--kubeconfig={PKI}/controller-manager.kubeconfig",
            "--bind-address=127.0.0.1",
            "--secure-port=12357",
            "--leader-elect=false",
            "--profiling=false",
            "--use-service-account-credentials=true",
            f"--root-ca-file={PKI}/ca.crt",
            f"--service-account-private-key-file={PKI}/service-accounts.key",
            # With the default limits the default service account takes 5 s to appear.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        ],
    )
    processes.start(
        "kube-scheduler",
        [
            "kube-scheduler",
            f"--kubeconfig={PKI}/scheduler.kubeconfig",
            "--bind-address=127.0.0.1",
            "--secure-port=12359",
            "--leader-elect=false",
            "--profiling=false",
        ],
    )


def _api_is_ready() -> bool:
    for name in ("etcd", "kube-apiserver"):
        if processes.find(name) is None:
            raise RuntimeError(f"{name} has ended")
    return run("kubectl", "get", "--raw", "/readyz", check=False) == "ok"


def _etcd_flags() -> list[str]:
    return [
        f"--data-dir={layout.ETCD_DATA}",
        "--unsafe-no-fsync",
        "--log-level=warn",
        f"--listen-client-urls={layout.ETCD_URL}",
        f"--advertise-client-urls={layout.ETCD_URL}",
        f"--listen-peer-urls={layout.ETCD_PEER_URL}",
        f"--initial-advertise-peer-urls={layout.ETCD_PEER_URL}",
        f"--initial-cluster=default={layout.ETCD_PEER_URL}",
    ]


def _api_server_flags() -> list[str]:
    return [
        f"--etcd-servers={layout.ETCD_URL}",
        f"--bind-address={layout.API_ADDRESS}",
        "--secure-port=443",
        f"--advertise-address={layout.BRIDGE_ADDRESS}",
        f"--service-cluster-ip-range={layout.SERVICE_NETWORK}",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        f"--client-ca-file={PKI}/ca.crt",
        f"--kubelet-client-certificate={PKI}/admin.crt",
        f"--kubelet-client-key={PKI}/admin.key",
        # exec and logs: by default a node is dialled by its host name, which nobody resolves here.
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={PKI}/service-accounts.pub",
        f"--service-account-signing-key-file={PKI}/service-accounts.key",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--profiling=false",
        f"--audit-policy-file={layout.AUDIT_POLICY}",
        f"--audit-log-path={layout.LOGS}/audit.log",
        "--audit-log-maxsize=100",
        "--audit-log-maxbackup=5",
    ]


def _write_audit_policy() -> None:
    """Who asks for what, of everybody but the administrator: the benchmark counts requests by it."""
    rules = [{"level": "None", "userGroups": ["system:masters"]}, {"level": "Metadata"}]
    stages = ["RequestReceived", "ResponseStarted"]
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": stages, "rules": rules}
    layout.AUDIT_POLICY.write_text(json.dumps(policy))
