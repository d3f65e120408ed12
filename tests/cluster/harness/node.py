# SPDX-License-Identifier: Apache-2.0
"""A node: namespaces of this machine (mount, pid, uts, ipc, net) with containerd and kubelet inside.

Not its business: the control plane, and removing what a dead node left (cleanup.py does).
"""

import json
import os
import time
from pathlib import Path

from tests.cluster.harness import layout, processes
from tests.cluster.harness.layout import Node
from tests.cluster.harness.processes import run

NODE_INIT = Path(__file__).with_name("node-init")
PAUSE_IMAGE = "localhost/pause:1"


def start(node: Node) -> None:
    """Start the node's namespaces and containerd; kubelet waits for `allow_kubelet`."""
    (node.directory / "log").mkdir(parents=True, exist_ok=True)
    (node.directory / "kubelet-may-start").unlink(missing_ok=True)
    _write_configuration(node)
    disks = [_make_disk(node, disk) for disk in layout.DISKS]
    disks.append(f"{shared_device()}={layout.SHARED_DISK.mount_point}")
    _connect(node)
    _make_cgroups(node)
    parent = processes.start(
        node.name, [*_enter_new_namespaces(node), NODE_INIT, *_init_arguments(node), *disks]
    )
    processes.remember(f"{node.name}-init", _wait_for_child(parent))
    processes.wait_until(lambda: _containerd_answers(node), f"containerd of {node.name}", timeout_s=240)


def shared_device() -> str:
    """The one block device over the disk that all nodes have, so that the kernel takes it for one filesystem."""
    columns = ["--noheadings", "--output", "NAME"]
    return run("losetup", *columns, "--associated", layout.SHARED_IMAGE).strip()


def allow_kubelet(node: Node) -> None:
    (node.directory / "kubelet-may-start").touch()


def stop_agents(node: Node) -> None:
    """kubelet and every container end, as `minikube stop` ends them; what they mounted stays mounted."""
    (node.directory / "kubelet-may-start").unlink(missing_ok=True)
    kill(node, "^kubelet ")
    _end_containers(node, "SIGTERM")
    deadline = time.monotonic() + 5
    while _tasks(node) and time.monotonic() < deadline:
        time.sleep(0.2)

    def ended() -> bool:
        # Again and again: one whose start containerd was still at runs only afterwards.
        _end_containers(node, "SIGKILL")
        return not _tasks(node)

    processes.wait_until(ended, f"the containers of {node.name} to end", timeout_s=240)


def _end_containers(node: Node, signal: str) -> None:
    for task in _tasks(node):
        run(*_ctr(node), "tasks", "kill", "--signal", signal, task, check=False)


def _tasks(node: Node) -> list[str]:
    rows = run(*_ctr(node), "tasks", "list").splitlines()[1:]
    return [row.split()[0] for row in rows if row.split()[-1] == "RUNNING"]


def _ctr(node: Node) -> list[str]:
    return [*enter(node), "ctr", "--namespace", "k8s.io"]


def execute(node: Node, *command: str) -> str:
    return run(*enter(node), *command)


def enter(node: Node) -> list[str]:
    """The words that, put before a command, run it inside the node."""
    pid = processes.find(f"{node.name}-init")
    if pid is None:
        raise RuntimeError(f"{node.name} does not run")
    return ["nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--"]


def kill(node: Node, command_line: str) -> int:
    """SIGKILL to the node's processes whose command line matches; how many there were.

    They are looked up in the node's own PID namespace, so that nothing else on the machine is ever meant.
    """
    pids = run(*enter(node), "pgrep", "--full", command_line, check=False).split()
    for pid in pids:
        run(*enter(node), "kill", "-KILL", pid, check=False)
    return len(pids)


def find_processes(node: Node, *words: str) -> list[int]:
    """The node's processes, as the machine numbers them, whose command line has these words in a row."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command_line = (directory / "cmdline").read_bytes()
            groups = (directory / "cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if "\0".join(words).encode() in command_line and f"/{layout.CGROUP}/{node.name}/" in groups:
            found.append(int(directory.name))
    return found


def path_of(node: Node, path: str) -> Path:
    """What the node has at `path`, as a path of the machine."""
    pid = processes.find(f"{node.name}-init")
    if pid is None:
        raise RuntimeError(f"{node.name} does not run")
    return Path(f"/proc/{pid}/root{path}")


def load_image(node: Node, archive: Path) -> None:
    execute(node, "ctr", "--namespace", "k8s.io", "images", "import", os.fspath(archive.resolve()))


def cgroup_directories(node: Node) -> list[Path]:
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():  # cgroup v2
        return [top / layout.CGROUP / node.name]
    return [path.parent / layout.CGROUP / node.name for path in top.glob("*/cgroup.procs")]


def _make_cgroups(node: Node) -> None:
    """kubelet's cgroupRoot, which must exist in every hierarchy."""
    for group in cgroup_directories(node):
        group.mkdir(parents=True, exist_ok=True)
        controllers = group.parents[1] / "cgroup.controllers"
        if controllers.exists():  # cgroup v2: a group has what those above it hand down
            wanted = " ".join(f"+{name}" for name in controllers.read_text().split())
            for above in (group.parents[1], group.parent):
                (above / "cgroup.subtree_control").write_text(wanted)


def _enter_new_namespaces(node: Node) -> list[str]:
    new = ["--mount", "--propagation=private", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"]
    return ["nsenter", f"--net=/run/netns/{node.network_namespace}", "unshare", *new]


def _init_arguments(node: Node) -> list[str]:
    return [
        node.name,
        node.address,
        os.fspath(node.directory),
        os.fspath(layout.PKI),
        " ".join(layout.PLACES),
    ]


def _wait_for_child(parent: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    processes.wait_until(
        lambda: bool(children.read_text().strip()), "the node's first process", timeout_s=240
    )
    return int(children.read_text().split()[0])


def _containerd_answers(node: Node) -> bool:
    return "Server:" in run(*enter(node), "ctr", "version", check=False)


def _make_disk(node: Node, disk: layout.Disk) -> str:
    image = node.directory / f"disk-{disk.name}.img"
    if not image.exists():  # a restarted node keeps its disks
        make_image(image, disk)
    return f"{image}={disk.mount_point}"


def make_image(image: Path, disk: layout.Disk) -> None:
    run("truncate", f"--size={disk.size}", image)
    run(f"mkfs.{disk.filesystem}", "-q", image)


def _connect(node: Node) -> None:
    """A network namespace with a cable to the bridge."""
    if Path(f"/run/netns/{node.network_namespace}").exists():
        return
    inside = ["ip", "-netns", node.network_namespace]
    run("ip", "netns", "add", node.network_namespace)
    peer = ["peer", "name", "eth0", "netns", node.network_namespace]
    run("ip", "link", "add", node.interface, "type", "veth", *peer)
    run("ip", "link", "set", node.interface, "master", layout.BRIDGE, "up")
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "address", "add", f"{node.address}/24", "dev", "eth0")
    run(*inside, "link", "set", "eth0", "up")
    run(*inside, "route", "add", "default", "via", layout.BRIDGE_ADDRESS)


def _write_configuration(node: Node) -> None:
    (node.directory / "cni").mkdir(exist_ok=True)
    (node.directory / "cni/10-bridge.conflist").write_text(json.dumps(_pod_network(node)))
    (node.directory / "containerd.toml").write_text(_containerd_configuration(node))
    (node.directory / "kubelet.json").write_text(json.dumps(_kubelet_configuration(node)))


def _pod_network(node: Node) -> dict[str, object]:
    addresses = {"ranges": [[{"subnet": node.pod_network}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    plugins = [bridge | {"ipam": {"type": "host-local"} | addresses}, ports]
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}


def _containerd_configuration(node: Node) -> str:
    return f"""\
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true  # works without CAP_SYS_RESOURCE, where runc would fail obscurely
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{layout.CNI_PLUGINS}"]
  conf_dir = "{node.directory}/cni"
"""


def _kubelet_configuration(node: Node) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "failSwapOn": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.CGROUP}/{node.name}",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{layout.PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "resolvConf": "",
        # A mounted volume is expanded at the pod's next sync; by default that is a minute away.
        "syncFrequency": "5s",
        # A driver that a test kills again and again is not to wait for longer and longer in between.
        "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},
        # As many as the node has addresses for: a benchmark starts a hundred beside what runs anyhow.
        "maxPods": 250,
        # The machine's disk is no concern of the cluster's: evict nothing, collect no image.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    }
