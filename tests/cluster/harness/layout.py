# SPDX-License-Identifier: Apache-2.0
"""Where everything of the cluster is: files, addresses, names. Nothing is done here."""

import os
from dataclasses import dataclass
from pathlib import Path

# Unix socket paths are limited to 107 bytes: keep it short.
ROOT = Path(os.environ.get("ORLOP_CLUSTER_DIR", "/var/tmp/orlop-cluster"))
PKI = ROOT / "pki"
LOGS = ROOT / "log"
PIDS = ROOT / "pids"
KUBECONFIG = PKI / "admin.kubeconfig"
AUDIT_POLICY = ROOT / "audit-policy.json"
MACHINE_BEFORE = ROOT / "machine-before.json"
# The store of a throw-away cluster belongs into memory: etcd waits for the disk at every write.
ETCD_DATA = Path("/dev/shm/orlop-cluster-etcd") if Path("/dev/shm").is_dir() else ROOT / "etcd"

BRIDGE = "orlop0"
BRIDGE_ADDRESS = "10.250.0.1"
SERVICE_NETWORK = "10.96.0.0/16"
# The first address of the service network is the ClusterIP of the service `kubernetes`. The API server
# listens on this very address on the bridge, so that pods reach it without kube-proxy or DNS.
API_ADDRESS = "10.96.0.1"
ETCD_URL = "http://127.0.0.1:12379"
ETCD_PEER_URL = "http://127.0.0.1:12380"
CGROUP = "orlop-cluster"
CNI_PLUGINS = Path("/usr/lib/cni")


# Where a node sees a directory of its own instead of the machine's.
PLACES = (
    "/var/lib/kubelet",
    "/var/lib/containerd",
    "/var/lib/cni",
    "/var/lib/orlop",
    "/var/log",
    "/data",
)


@dataclass(frozen=True)
class Disk:
    """A disk of a node: a sparse file behind a loop device, as large for the driver as a real one."""

    name: str
    filesystem: str
    size: str
    mount_point: str


DISKS = (
    Disk("ext4", "ext4", "24G", "/var/lib/orlop/fast"),
    Disk("btrfs", "btrfs", "8G", "/var/lib/orlop/shared"),
)

# One for all nodes, which have it mounted at the same path: what a cluster filesystem is to real ones.
SHARED_DISK = Disk("shared", "ext4", "16G", "/data/team")
SHARED_IMAGE = ROOT / "disk-shared.img"


@dataclass(frozen=True)
class Node:
    number: int

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def directory(self) -> Path:
        return ROOT / self.name

    @property
    def address(self) -> str:
        return f"10.250.0.{10 + self.number}"

    @property
    def pod_network(self) -> str:
        return f"10.244.{self.number}.0/24"

    @property
    def network_namespace(self) -> str:
        return f"orlop-{self.name}"

    @property
    def interface(self) -> str:
        """The machine's end of the cable whose other end is the node's eth0."""
        return f"orlop-n{self.number}"


def existing_nodes() -> list[Node]:
    numbers = (path.name.removeprefix("node") for path in ROOT.glob("node[0-9]*"))
    return [Node(int(number)) for number in sorted(numbers)]
