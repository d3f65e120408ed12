# SPDX-License-Identifier: Apache-2.0
"""The programs of the cluster, built from Go modules into a cache outside the clone.

The versions are those of the wrapper modules under tools/, whose go.sum files pin every byte; a hash
of those files names the cache, so that an upgrade never meets an old program. Not its business:
running the programs.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / "tools"
CSI = "github.com/kubernetes-csi"
HELM_VERSION = "v3.22.0"


@dataclass(frozen=True)
class Program:
    name: str
    module: str  # folder below tools/
    package: str


PROGRAMS = (
    Program("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
    Program("containerd", "containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
    Program(
        "containerd-shim-runc-v2",
        "containerd",
        "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
    ),
    Program("ctr", "containerd", "github.com/containerd/containerd/v2/cmd/ctr"),
    Program("kube-apiserver", "kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver"),
    Program("kube-controller-manager", "kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    Program("kube-scheduler", "kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler"),
    Program("kubelet", "kubernetes", "k8s.io/kubernetes/cmd/kubelet"),
    Program("kubectl", "kubernetes", "k8s.io/kubernetes/cmd/kubectl"),
    Program("csi-provisioner", "kubernetes", f"{CSI}/external-provisioner/v6/cmd/csi-provisioner"),
    Program("csi-resizer", "kubernetes", f"{CSI}/external-resizer/v2/cmd/csi-resizer"),
    Program("csi-attacher", "kubernetes", f"{CSI}/external-attacher/v4/cmd/csi-attacher"),
    Program("csi-snapshotter", "kubernetes", f"{CSI}/external-snapshotter/v8/cmd/csi-snapshotter"),
    Program("snapshot-controller", "kubernetes", f"{CSI}/external-snapshotter/v8/cmd/snapshot-controller"),
)


@functools.cache
def cache_directory() -> Path:
    digest = hashlib.sha256()
    for file in sorted(TOOLS.glob("*/go.*")):
        digest.update(file.read_bytes())
    for flags in (*map(_version_flags, PROGRAMS), _helm_version_flags()):
        digest.update(flags.encode())
    root = os.environ.get("ORLOP_CLUSTER_CACHE", os.fspath(Path.home() / ".cache/orlop/cluster"))
    return Path(root) / digest.hexdigest()[:16]


def bin_directory() -> Path:
    return cache_directory() / "bin"


def module_version(module: str, path: str) -> str:
    """The version that tools/<module>/go.mod requires of the module `path`."""
    text = (TOOLS / module / "go.mod").read_text()
    found = re.search(rf"^\s*(?:require )?{re.escape(path)} (v\S+)", text, re.MULTILINE)
    if found is None:
        raise LookupError(f"tools/{module}/go.mod does not require {path}")
    return found[1]


def build_all() -> None:
    """Build what is not in the cache yet; a program appears there whole or not at all."""
    missing = [program for program in PROGRAMS if not (bin_directory() / program.name).exists()]
    bin_directory().mkdir(parents=True, exist_ok=True)
    if missing:
        print(f"building {len(missing)} programs into {bin_directory()} (about 17 minutes on 2 cores, once)")
    for program in missing:
        _build(program)
    if not (bin_directory() / "helm").exists():
        _install_helm()
    if not snapshot_crds().exists():
        _copy_snapshot_crds()


def snapshot_crds() -> Path:
    return cache_directory() / "snapshot-crds"


def _build(program: Program) -> None:
    unfinished = bin_directory() / f".{program.name}.unfinished"
    command = ["go", "build", "-v", "-trimpath", "-ldflags", f"-s -w {_version_flags(program)}"]
    command += ["-o", os.fspath(unfinished), program.package]
    _run_with_progress(program.name, command, TOOLS / program.module, {"CGO_ENABLED": "0"})
    unfinished.rename(bin_directory() / program.name)


def _version_flags(program: Program) -> str:
    """Kubernetes' programs say v0.0.0-master unless told; kubectl and the API server compare versions."""
    if program.package.startswith(CSI):
        return f"-X main.version={module_version(program.module, program.package.partition('/cmd/')[0])}"
    if not program.package.startswith("k8s.io/kubernetes/"):
        return ""
    version = module_version("kubernetes", "k8s.io/kubernetes")
    major, minor, _ = version.removeprefix("v").split(".")
    base = "k8s.io/component-base/version"
    values = {f"{base}.gitVersion": version, f"{base}.gitMajor": major, f"{base}.gitMinor": minor}
    values["k8s.io/client-go/pkg/version.gitVersion"] = version
    return " ".join(f"-X {name}={value}" for name, value in values.items())


def _install_helm() -> None:
    package = f"helm.sh/helm/v3/cmd/helm@{HELM_VERSION}"
    target = cache_directory() / "helm-install"
    command = ["go", "install", "-v", "-trimpath", "-ldflags", f"-s -w {_helm_version_flags()}", package]
    _run_with_progress("helm", command, cache_directory(), {"CGO_ENABLED": "0", "GOBIN": os.fspath(target)})
    (target / "helm").rename(bin_directory() / "helm")
    target.rmdir()


def _helm_version_flags() -> str:
    """Untold, helm takes itself for one of Kubernetes 1.20, and refuses charts that want a newer one."""
    minor = module_version("kubernetes", "k8s.io/kubernetes").split(".")[1]
    helm, lint = "helm.sh/helm/v3/internal/version", "helm.sh/helm/v3/pkg/lint/rules"
    values = {f"{helm}.version": HELM_VERSION}
    for place in (lint, "helm.sh/helm/v3/pkg/chartutil"):
        values |= {f"{place}.k8sVersionMajor": "1", f"{place}.k8sVersionMinor": minor}
    return " ".join(f"-X {name}={value}" for name, value in values.items())


def _copy_snapshot_crds() -> None:
    """The definitions travel in the Go module of the snapshot API's client."""
    query = ["go", "list", "-m", "-json", f"{CSI}/external-snapshotter/client/v8"]
    listed = subprocess.run(query, cwd=TOOLS / "kubernetes", check=True, capture_output=True, text=True)
    source = Path(json.loads(listed.stdout)["Dir"]) / "config/crd"
    unfinished = cache_directory() / ".snapshot-crds.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for file in source.glob("*snapshot*.yaml"):
        shutil.copyfile(file, unfinished / file.name)  # the module cache is read-only: copy no modes
    unfinished.rename(snapshot_crds())


def _run_with_progress(
    name: str, command: list[str], folder: Path, extra_environment: dict[str, str]
) -> None:
    """Run a Go command, saying now and then how far it is; its whole output goes to a log."""
    log = cache_directory() / "log" / f"build-{name}.log"
    log.parent.mkdir(exist_ok=True)
    started = said = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | extra_environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            time.sleep(0.5)
            if time.monotonic() - said > 15:
                said = time.monotonic()
                print(f"  {name}: {_lines(log)} packages compiled, {said - started:.0f} s", flush=True)
    if process.returncode != 0:
        sys.stderr.write(log.read_text()[-4000:])
        raise SystemExit(f"building {name} failed; the whole log is {log}")
    print(f"  {name}: built in {time.monotonic() - started:.0f} s", flush=True)


def _lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
