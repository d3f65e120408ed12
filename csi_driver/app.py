# SPDX-License-Identifier: Apache-2.0
"""The composition root: from a configuration to a driver that answers, and `orlop serve`, which runs one.

Every object is made here, by hand, and handed what it needs. Semantics are none of this module's business.
"""

import argparse
import gc
import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from csi_driver import apart, backends, backing, modify
from csi_driver import config as configuration
from csi_driver.backends.base import PAYLOAD_IMAGE
from csi_driver.catalog import Catalog
from csi_driver.config import SHARED_BACKENDS, Config, PoolConfig
from csi_driver.controller import Controller
from csi_driver.copies import CLOSE_S, Copier
from csi_driver.errors import ConfigurationError
from csi_driver.groups import Groups
from csi_driver.health import Health
from csi_driver.jobs import Jobs
from csi_driver.linux import memory
from csi_driver.linux.exports import Exports
from csi_driver.linux.freeze import Freezer
from csi_driver.linux.remote import Servers
from csi_driver.linux.signals import Stopping
from csi_driver.locks import Locks
from csi_driver.maintenance import Maintenance
from csi_driver.metadata import ChangedBlocks
from csi_driver.model import DriverFeatures, NodeInfo
from csi_driver.node import Node
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.rpc import logs
from csi_driver.rpc.calls import Calls
from csi_driver.rpc.interceptor import Interceptor
from csi_driver.rpc.pb import csi_pb2
from csi_driver.rpc.registration import Registration
from csi_driver.rpc.server import Server, parse_endpoint
from csi_driver.rpc.servicers import ControllerService, GroupService, Identity, MetadataService, NodeService
from csi_driver.snapshots import Snapshots

log = logging.getLogger(__name__)

NODE_ID_VARIABLES = ("NODE_ID", "KUBE_NODE_NAME", "NODE_NAME")
EXPORTS_DIR = Path("/run/orlop/exports")
"""Where a driver of scope "shared" has the exports that its node's pods use."""
DEFAULT_KUBELET_DIR = Path("/var/lib/kubelet")
MOUNT_MAX = Path("/proc/sys/fs/mount-max")
LEAST_CLOSE_S = 2.0
"""What background work always gets to end in, in seconds."""

# What a segment's value may be: it becomes a node's label.
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver that could answer; nothing runs yet."""

    name: str
    info: NodeInfo
    pools: Pools
    maintenance: Maintenance
    copier: Copier
    calls: Calls
    handlers: Interceptor

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """End what goes on in the background, and let other processes have the pools.

        Returns: whether all ended in time; if not, pools are let go by the process's end.
        """
        if not self.copier.close(timeout_s) or self.maintenance.is_at_work():
            return False
        for pool in self.pools:
            pool.close()
        return True


class _Countdown:
    """What is left of the time that an orderly end may take, from the first look on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = math.inf

    def left(self) -> float:
        """In seconds."""
        now = time.monotonic()
        self._deadline = min(self._deadline, now + self._seconds)
        return max(0.0, self._deadline - now)


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `orlop serve`, with the environment in it."""

    config: Path
    endpoint: str
    node_id: str
    driver_name: str
    role: configuration.Role
    kubelet_dir: Path | None
    kubelet_endpoint: str
    http: str
    log_level: str
    log_format: logs.Format


def build(config: Config) -> Driver:
    """Open the pools and put a driver together over them.

    Raises:
        ConfigurationError: a pool cannot be used, or the node's identity cannot be told to Kubernetes.
    """
    with ExitStack() as undo:
        opened = {}
        servers = Servers()
        undo.callback(servers.close)
        for name, pool_config in config.pools.items() if config.role != "node" else ():
            opened[name] = _open_pool(pool_config, servers, undo)
        pools = Pools(opened, config.default_pool, config.retired_tags, config.elsewhere)
        copier = Copier(Jobs(config.copy_jobs), Freezer(config.freeze_timeout_s))
        # First: what is half made tells that something may be frozen, also to the next start, if this one fails.
        copier.adopt(pools)
        for pool in pools.near([]):
            pool.adopt()
        modify.adopt(pools)
        features = _features(config, pools)
        info = _node_info(config, features)
        locks, health, calls = Locks(), Health(pools), Calls()
        groups = Groups(pools, locks, copier, info.segments)
        groups.adopt()
        snapshots = Snapshots(pools, locks, copier, info.segments)
        controller = Controller(
            pools, locks, health, copier, info.segments, expands=features.grows_in_controller
        )
        # Volumes that every node reaches are mounted by what their context says, as on nodes that have no pools.
        exports = _exports(config, servers, info.node_id) if config.scope == "shared" else None
        if exports is None:
            node = Node(pools, locks, health, info)
        else:
            # Nor does what a controller does with a volume meanwhile concern its mounts.
            node = Node(Pools({}), Locks(), health, info, exports)
        services = csi_pb2.DESCRIPTOR.services_by_name
        handlers = Interceptor(
            [
                (services["Identity"], Identity(config.driver_name, features)),
                (services["Controller"], ControllerService(controller, snapshots, features, info.node_id)),
                (services["GroupController"], GroupService(groups)),
                (services["SnapshotMetadata"], _metadata(config, features, pools, locks)),
                (services["Node"], NodeService(node, features)),
            ],
            calls,
        )
        undo.pop_all()
        return Driver(
            config.driver_name, info, pools, Maintenance(pools, groups.sweep), copier, calls, handlers
        )


def serve(arguments: Sequence[str]) -> int:
    """`orlop serve`: run a driver until SIGTERM. Returns the exit code; 2 is a configuration that cannot be used."""
    options = parse_arguments(arguments, os.environ)
    # Before there are threads. One heap for twenty threads that share one interpreter's lock saves 1 MB.
    memory.share_arenas(1)
    logs.set_up(options.log_level, options.log_format)
    stopping = Stopping()
    try:
        config = _overridden(configuration.load(options.config), options, os.environ)
        endpoint = parse_endpoint(options.endpoint)
        driver = build(config)
        return _run(driver, config, options, endpoint, stopping)
    except ConfigurationError as error:
        sys.stderr.write(f"orlop: {error}\n")
        return 2


def parse_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """The options of `orlop serve`; exits with a usage message if they are wrong."""
    parser = _parser(environment)
    given = parser.parse_args(arguments)
    if not given.endpoint:
        parser.error(
            "--endpoint (or CSI_ENDPOINT) is missing: say where to listen, like unix:///run/orlop/csi.sock"
        )
    return Options(**vars(given))


def _run(driver: Driver, config: Config, options: Options, endpoint: Path, stopping: Stopping) -> int:
    server = Server(driver.handlers, config.workers, "call")
    # One for all steps: together they must fit into what Kubernetes gives a pod (30 s).
    time_to_end = _Countdown(config.drain_timeout_s)
    with ExitStack() as running:
        # Last in, first out: kubelet is told first, the pools are let go last.
        running.callback(_let_go, driver, time_to_end)
        registration = _registration(driver, options)
        server.listen(endpoint)
        running.callback(_drain, server, driver, time_to_end)
        driver.maintenance.start()
        running.callback(driver.maintenance.stop)
        if options.http:
            running.callback(_serve_http(driver, config.workers, options.http, endpoint, registration))
        if registration is not None:
            running.callback(registration.stop)
            registration.start()
        log.info(
            "serving",
            extra={"fields": {"driver": driver.name, "node_id": driver.info.node_id, "endpoint": endpoint}},
        )
        # What is there now stays: later collections need not look at it.
        gc.collect()
        gc.freeze()
        stopping.wait()
        time_to_end.left()
        # Before calls are waited for: copies take longest, and their repeats begin anew.
        driver.copier.jobs.end()
        log.info("stopping", extra={"fields": {"calls": len(driver.calls.running())}})
    log.info("stopped")
    return 0


def _drain(server: Server, driver: Driver, time_to_end: _Countdown) -> None:
    server.stop(time_to_end.left())
    left = driver.calls.running()
    if left:
        log.error(
            "calls did not end in time: left to the next start", extra={"fields": {"methods": ",".join(left)}}
        )
        # Their threads cannot be stopped, and a pool must not be let go while one of them works in it.
        logging.shutdown()
        os._exit(1)


def _let_go(driver: Driver, time_to_end: _Countdown) -> None:
    if not driver.close(max(LEAST_CLOSE_S, time_to_end.left())):
        log.warning("background work did not end in time: the next start does it")
        # An orderly end all the same: nobody waits for it, and it is made to be killed at any moment.
        logging.shutdown()
        os._exit(0)


def _open_pool(config: PoolConfig, servers: Servers, undo: ExitStack) -> Pool:
    if config.shared:
        # Opened when it is first wanted: its server may be away, and the others' volumes do not wait for it.
        local = backends.create(config)
        apart_pool = Pool(config, *apart.stand_ins(config, local, servers.breaker(local.features.server)))
        undo.callback(apart_pool.close)
        return apart_pool
    mounted = backing.ensure(config)
    backing.check_mounted(config)
    backend = backends.create(config)
    # First, lest a pool that cannot work here leaves its mark in the directory.
    backend.check()
    catalog = Catalog.open(config.root, config.backend)
    undo.callback(catalog.close)
    return Pool(config, catalog, backend, mounted)


def _features(config: Config, pools: Pools) -> DriverFeatures:
    features = [pool.backend.features for pool in pools]
    grows = any(one.grows for one in features)
    return DriverFeatures(
        # A node of what all reach has no pools to ask: where a directory is staged, nothing is done.
        stages=config.scope == "shared" or any(one.stages for one in features),
        grows_in_controller=grows and (config.expansion == "controller" or config.scope == "shared"),
        has_blocks=any(one.payload == PAYLOAD_IMAGE and not one.server for one in features),
        # Also after the controller has grown the payload: the filesystem in it is grown where it is mounted.
        grows_on_node=grows or config.scope == "shared",
        shared=config.scope == "shared",
        hands_out=any(one.one_node for one in features),
    )


def _exports(config: Config, servers: Servers, node_id: str) -> Exports:
    roots = {name: pool.root for name, pool in config.pools.items() if pool.backend not in SHARED_BACKENDS}
    return Exports(EXPORTS_DIR / config.driver_name, servers, roots=roots, node=node_id)


def _metadata(config: Config, features: DriverFeatures, pools: Pools, locks: Locks) -> object:
    if not features.has_blocks:
        return object()  # each of its methods is refused
    return MetadataService(ChangedBlocks(pools, locks, most=max(1, config.workers // 4)))


def _node_info(config: Config, features: DriverFeatures) -> NodeInfo:
    node_id = config.node_id or socket.gethostname()
    segments = {
        f"topology.{config.driver_name}/node": node_id,
        "topology.kubernetes.io/region": config.region,
        "topology.kubernetes.io/zone": config.zone,
    }
    if config.scope == "shared":
        segments = {}
    for key, value in segments.items():
        if value and not _LABEL.fullmatch(value):
            raise ConfigurationError(
                f"{key} {value!r}: becomes a node's label: at most 63 letters, digits, '-', '_' and '.', the first "
                "and the last one a letter or digit (set --node-id, or region and zone in the configuration)"
            )
    return NodeInfo(
        node_id=node_id,
        max_volumes=config.max_volumes_per_node or _most_volumes(features),
        segments={key: value for key, value in segments.items() if value},
    )


def _most_volumes(features: DriverFeatures) -> int:
    """How many volumes a node can hold, by the kernel's bound on mounts; 0 (no limit known) if it tells none.

    A volume takes one mount for its pod, and one where it is staged; half of them are left to everybody else. Loop
    devices set no bound: the kernel makes as many as are asked for.
    """
    try:
        mounts = int(MOUNT_MAX.read_text())
    except (OSError, ValueError):
        return 0
    return mounts // 2 // (2 if features.stages else 1)


def _overridden(config: Config, options: Options, environment: Mapping[str, str]) -> Config:
    from_environment = next((environment[name] for name in NODE_ID_VARIABLES if environment.get(name)), "")
    return replace(
        config,
        node_id=options.node_id or from_environment or config.node_id,
        driver_name=options.driver_name or config.driver_name,
        role=options.role,
    )


def _registration(driver: Driver, options: Options) -> Registration | None:
    if options.kubelet_dir is None:
        return None
    default = options.kubelet_dir / "plugins" / driver.name / "csi.sock"
    endpoint = parse_endpoint(options.kubelet_endpoint or str(default))
    return Registration(options.kubelet_dir, driver.name, str(endpoint))


def _serve_http(
    driver: Driver, workers: int, address: str, endpoint: Path, registration: Registration | None
) -> Callable[[], None]:
    # Loaded for those who ask for it: it is a tenth of the driver's memory.
    from csi_driver.rpc import http
    from csi_driver.rpc.metrics import Metrics

    metrics = Metrics(
        driver.name, driver.info.node_id, driver.pools, driver.calls, driver.copier, driver.maintenance
    )

    def not_alive() -> str:
        problem = http.probe(endpoint)
        return "" if driver.calls.are_getting_on(workers) else problem

    def not_ready() -> str:
        missing = [pool.name for pool in driver.pools if not (pool.is_apart or pool.is_present())]
        if missing:
            return f"pool {', '.join(missing)}: its directory is not there any more: is its disk mounted?"
        problem = registration.problem() if registration else ""
        return problem and f"not registered with kubelet: {problem}"

    server = http.Http(
        address,
        {
            "/healthz": lambda: http.verdict(not_alive()),
            "/readyz": lambda: http.verdict(not_ready()),
            "/metrics": lambda: http.Page(metrics.page(), content_type=http.PROMETHEUS),
        },
    )
    server.start()
    return server.stop


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orlop serve",
        description="Run the driver: answer CSI on a unix socket until SIGTERM. A second SIGTERM does not wait for calls.",
        epilog="The node's id is --node-id, else NODE_ID, KUBE_NODE_NAME or NODE_NAME of the environment, else node_id "
        "of the configuration, else the host name.",
    )
    add = parser.add_argument
    add(
        "--config", metavar="FILE", type=Path,
        default=environment.get("ORLOP_CONFIG") or configuration.DEFAULT_PATH,
        help="the configuration (ORLOP_CONFIG; now %(default)s)",
    )  # fmt: skip
    add(
        "--endpoint", metavar="SOCKET", default=environment.get("CSI_ENDPOINT", ""),
        help="where to listen: unix:///path or /path (CSI_ENDPOINT)",
    )  # fmt: skip
    add("--node-id", metavar="NAME", default="", help="this node's name in Kubernetes")
    add("--driver-name", metavar="NAME", default="", help="the driver's name, instead of the configuration's")
    add(
        "--role", choices=("all", "node"), default="all",
        help="node: mount what pods use and leave the pools alone, for scope = \"shared\" (%(default)s)",
    )  # fmt: skip
    add(
        "--kubelet-dir", metavar="DIR", type=Path,
        help=f"register with the kubelet of this directory (usually {DEFAULT_KUBELET_DIR}); without it, a registrar must",
    )  # fmt: skip
    add(
        "--kubelet-endpoint", metavar="SOCKET", default="",
        help="the CSI socket as kubelet sees it (now KUBELET-DIR/plugins/DRIVER-NAME/csi.sock)",
    )  # fmt: skip
    add(
        "--http", metavar="ADDRESS", default="",
        help="serve /healthz, /readyz and /metrics here, like :9808 or 127.0.0.1:9808 (off)",
    )  # fmt: skip
    add("--log-level", choices=logs.LEVELS, default="info", help="(%(default)s)")
    add("--log-format", choices=("text", "json"), default="text", help="(%(default)s)")
    return parser
