# SPDX-License-Identifier: Apache-2.0
"""A driver that should be running: whether its socket answers, whether kubelet knows it, and kubelet's directory."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from csi_driver.cli.client import TIMEOUT_S, CallFailed, connected, refusals, target_of
from csi_driver.cli.doctor.finding import Finding, error, ok, warning
from csi_driver.linux import mount
from csi_driver.linux.mount import Mount
from csi_driver.rpc.pb import api_pb2, api_pb2_grpc
from csi_driver.rpc.pb import csi_pb2 as pb

DRIVER, KUBELET = "driver", "kubelet"
QUICK_S = 1.0
Problem = Callable[[str, str, str, str], Finding]


def look_at_driver(endpoint: str, *, expected: bool) -> Iterator[Finding]:
    """Whether somebody answers there, and is ready; an error if not, where one is `expected`."""
    problem = error if expected else warning
    try:
        # Where one is expected, the node may only be busy.
        with connected(endpoint, TIMEOUT_S if expected else QUICK_S) as client:
            with refusals("GetPluginInfo"):
                info = client.identity.GetPluginInfo(pb.GetPluginInfoRequest(), timeout=TIMEOUT_S)
            yield ok(DRIVER, f"{info.name} {info.vendor_version} answers at {endpoint}")
            with refusals("Probe"):
                probe = client.identity.Probe(pb.ProbeRequest(), timeout=TIMEOUT_S)
            if not probe.ready.value:
                yield problem(DRIVER, "says that it is not ready", "calls will be refused", "see its log")
    except CallFailed as failure:
        yield problem(
            DRIVER,
            str(failure),
            "pods cannot get volumes"
            if expected
            else "if a driver should be running here, pods cannot get volumes",
            "start it (orlop serve), or name its socket with --endpoint",
        )


def look_at_kubelet(directory: Path, driver_name: str, *, expected: bool) -> Iterator[Finding]:
    """Kubelet's directory: there, shared, and with the driver's registration, whose lack is an error where one is `expected`."""
    problem = error if expected else warning
    if not directory.is_dir():
        yield problem(
            KUBELET,
            f"{directory} is not here",
            "on a node of a cluster, volumes are mounted beneath it; elsewhere it does not matter",
            "name it with --kubelet-dir (k0s, microk8s and others have another); in a container, mount it from the host",
        )
        return
    yield from _look_at_propagation(directory)
    yield from _look_at_registration(directory / "plugins_registry", driver_name, problem)


def _look_at_propagation(directory: Path) -> Iterator[Finding]:
    holder = _mount_of(directory)
    if holder is None:
        yield warning(
            KUBELET,
            f"the mount of {directory} was not found",
            "propagation is not known",
            "look with findmnt",
        )
    elif holder.shared:
        yield ok(KUBELET, f"{directory}: mounts made there are seen by others (shared)")
    else:
        yield warning(
            KUBELET,
            f"{directory}: its mount ({holder.target}) is not shared",
            "in a container, what the driver mounts there is seen by no pod; on a plain host it does not matter",
            "in the driver's pod: mountPropagation Bidirectional; on the host: mount --make-rshared /",
        )


def _mount_of(directory: Path) -> Mount | None:
    """The mount that a directory lies in: the last one whose target is the longest above it."""
    real = os.path.realpath(directory)
    above = [
        one for one in mount.mounts() if real == one.target or real.startswith(f"{one.target.rstrip('/')}/")
    ]
    return max(reversed(above), key=lambda one: len(one.target), default=None)


def _look_at_registration(registry: Path, driver_name: str, problem: Problem) -> Iterator[Finding]:
    sockets = sorted(registry.glob(f"*{driver_name}*.sock")) if registry.is_dir() else []
    if not sockets:
        yield problem(
            KUBELET,
            f"{registry}: no socket of {driver_name}",
            "kubelet does not know the driver, and calls it for no pod",
            "run orlop serve with --kubelet-dir, or a node-driver-registrar beside it",
        )
    for socket in sockets:
        yield _registration(socket, driver_name)


def _registration(socket: Path, driver_name: str) -> Finding:
    try:
        with grpc.insecure_channel(target_of(str(socket))) as channel, refusals("GetInfo"):
            stub = api_pb2_grpc.RegistrationStub(channel)
            info = stub.GetInfo(api_pb2.InfoRequest(), timeout=TIMEOUT_S)
    except CallFailed as failure:
        return error(
            KUBELET,
            f"{socket}: does not answer ({failure.message})",
            "kubelet cannot take the driver in; perhaps it is the socket of one that is dead",
            "restart the driver",
        )
    if info.name != driver_name:
        return warning(
            KUBELET, f"{socket}: is {info.name}'s", f"{driver_name} was looked for", "see its configuration"
        )
    return ok(KUBELET, f"{socket}: registers {info.name}, which answers at {info.endpoint}")
