# SPDX-License-Identifier: Apache-2.0
"""Machines of their own inside the second kernel: a network, mounts and a name each, and NFS servers on some of them.

A host is a set of namespaces, kept by one process. The rest of the second kernel is their router, and a client too.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tests.lab.disks import run

NUMBERS = itertools.count(1)
PORT = 2049
EXPORT_OPTIONS = "rw,no_root_squash,fsid=0,no_subtree_check,insecure"
GANESHA = """
NFS_CORE_PARAM { Protocols = 3, 4; mount_path_pseudo = true; Enable_NLM = false; Enable_RQUOTA = false;
    Enable_UDP = false; }
NFSV4 { Graceless = true; Lease_Lifetime = 10; RecoveryBackend = fs; Minor_Versions = 0, 1, 2; }
EXPORT_DEFAULTS { SecType = sys; Squash = no_root_squash; Access_Type = RW; Protocols = 3, 4; }
EXPORT { Export_Id = 1; Path = /export/share; Pseudo = /share; FSAL { Name = VFS; } }
LOG { Default_Log_Level = EVENT; }
"""


class Host:
    """Reached at `address`. Its /export is `export`, and what it keeps in /var/lib/nfs and /run is its own."""

    def __init__(self, export: Path | None = None) -> None:
        number = next(NUMBERS)
        self.export = export or Path("/nowhere")
        self.name = f"host{number}"
        self.address = f"10.77.{number}.2"
        self._gateway = f"10.77.{number}.1"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--propagation", "private", "sleep", "infinity"],
            start_new_session=True,
        )
        wait_for(lambda: os.readlink(f"/proc/{self._holder.pid}/ns/uts") != os.readlink("/proc/self/ns/uts"))
        self._connect()
        # Two clients of one name are one client to an NFSv4 server.
        self.run("hostname", self.name)
        for private in ("/var/lib/nfs", "/run/rpcbind"):
            self.run("mount", "-t", "tmpfs", "tmpfs", private)
        if export is not None:
            Path("/export").mkdir(exist_ok=True)
            self.run("mount", "--bind", export, "/export")

    def _connect(self) -> None:
        pid = str(self._holder.pid)
        run("ip", "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", pid)
        run("ip", "address", "add", f"{self._gateway}/30", "dev", self.name)
        run("ip", "link", "set", self.name, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", f"{self.address}/30", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "route", "add", "default", "via", self._gateway)
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def command(self, *words: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
        """The words of a command that runs there."""
        return ["nsenter", "-t", str(self._holder.pid), "-n", "-m", "-u", "--", *words]

    def run(self, *words: str | os.PathLike[str]) -> str:
        return run(*self.command(*words))

    def cut(self) -> None:
        """Pull its network plug."""
        run("ip", "link", "set", self.name, "down")

    def mend(self) -> None:
        run("ip", "link", "set", self.name, "up")

    def _network(self) -> str:
        return os.readlink(f"/proc/{self._holder.pid}/ns/net")

    @staticmethod
    def _processes(network: str) -> list[int]:
        """All that runs in it, the holder too."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/net") == network:
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Switch it off."""

    def remove(self) -> None:
        # What never started cannot be stopped, and its processes are to go all the same.
        with contextlib.suppress(AssertionError):
            self.stop()
        network = self._network()
        for pid in self._processes(network):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._holder.wait()
        # The next host's rpcbind wants a lock that this one's has; what waits for a dead server takes longer than we do.
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self._processes(network), 5)
        # Its end of the cable goes with the namespace, a moment later.
        subprocess.run(["ip", "link", "delete", self.name], capture_output=True, check=False)


class KernelServer(Host):
    """The kernel's own nfsd. Its threads are the kernel's: it can be stopped and cut off, not frozen."""

    def start(self) -> None:
        self.run("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        self.run("mkdir", "-p", "/run/rpc_pipefs", "/var/lib/nfs/nfsdcld", "/export/share")
        self.run("mount", "-t", "rpc_pipefs", "pipefs", "/run/rpc_pipefs")
        self.run("touch", "/var/lib/nfs/etab", "/var/lib/nfs/rmtab")
        self.run("rpcbind", "-w")
        self.run("exportfs", "-o", EXPORT_OPTIONS, "*:/export")
        self.run("rpc.mountd")
        # Remembers clients across restarts; in a namespace nfsd cannot do that by itself, and would not end its grace.
        self.run("nfsdcld")
        self._serve()

    def _serve(self) -> None:
        self.run("rpc.nfsd", "--lease-time", "10", "--grace-time", "10", "4")

    def stop(self) -> None:
        """End nfsd: clients are refused their connections."""
        self.run("rpc.nfsd", "0")

    def restart(self) -> None:
        self.run("exportfs", "-f")
        self._serve()

    def replace_export(self, export: Path) -> None:
        """Another filesystem in the place of the exported one, as after a restore: every file handle changes."""
        self.stop()
        self.run("exportfs", "-au")
        # By its device: a mount that was made outside since is not seen in there.
        enter_mounts = ["nsenter", "-t", str(self._holder.pid), "-m", "--"]
        image = run("findmnt", "-n", "-o", "SOURCE", export).strip()
        run(*enter_mounts, "mount", image, "/export")
        self.run("exportfs", "-o", EXPORT_OPTIONS, "*:/export")
        self.restart()


class GaneshaServer(Host):
    """nfs-ganesha, an ordinary program: it can be killed and frozen."""

    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = Path(f"/run/{self.name}")
        folder.mkdir(exist_ok=True)
        (folder / "ganesha.conf").write_text(GANESHA)
        self.run("mkdir", "-p", "/var/lib/nfs/ganesha", "/export/share", "/run/ganesha")
        self.run("sh", "-c", "pidof rpcbind || rpcbind -w")
        self._process = subprocess.Popen(
            self.command(
                *(
                    "ganesha.nfsd",
                    "-F",
                    "-f",
                    folder / "ganesha.conf",
                    "-L",
                    folder / "log",
                    "-p",
                    folder / "pid",
                )
            ),
            start_new_session=True,
        )
        wait_for(self.answers, 120)

    def answers(self) -> bool:
        try:
            socket.create_connection((self.address, PORT), 1).close()
        except OSError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        # nsenter is replaced by the server: one process, one pid.
        assert self._process is not None
        self._process.send_signal(number)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.start()


Server = TypeVar("Server", bound=KernelServer | GaneshaServer)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serving while the body runs; removed even if it never came up, for the next one needs what it has."""
    try:
        server.start()
        yield server
    finally:
        server.remove()


def processes() -> int:
    """How many there are, but for the kernel's own threads, which come and go."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += "\nPPid:\t2\n" not in (entry / "status").read_text()
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Until it holds; AssertionError if it never does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not so after {timeout_s} s: {condition}"
        time.sleep(0.02)
