# SPDX-License-Identifier: Apache-2.0
"""What `/metrics` says, read when it is asked: calls, pools, volumes, loop devices.

Loaded only where the driver serves HTTP: prometheus-client costs memory and time at the start.
"""

import logging
import time
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from csi_driver import __version__
from csi_driver.copies import Copier
from csi_driver.errors import Error
from csi_driver.health import Health
from csi_driver.linux import freeze, loop
from csi_driver.maintenance import Maintenance
from csi_driver.model import Record
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.rpc.calls import BUCKETS_S, Calls

log = logging.getLogger(__name__)

MOST_VOLUMES = 2000
"""Volumes told one by one in a scrape; and no more than can be looked at in:"""
MOST_SECONDS = 2.0


class Metrics:
    """The metrics of one driver."""

    def __init__(
        self,
        driver_name: str,
        node_id: str,
        pools: Pools,
        calls: Calls,
        copier: Copier,
        maintenance: Maintenance,
    ) -> None:
        self._driver_name = driver_name
        self._node_id = node_id
        self._pools = pools
        self._calls = calls
        self._health = Health(pools)
        self._copier = copier
        self._maintenance = maintenance
        # Not the library's own: that one is the whole process's.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """prometheus-client's protocol."""
        info = GaugeMetricFamily(
            "orlop_build_info", "1; the labels say which build this is", labels=["version"]
        )
        info.add_metric([__version__], 1)
        yield info
        yield from self._of_calls()
        yield from self._of_pools()
        yield from self._of_copies()
        yield from self._of_volumes()
        yield from self._of_loops()

    def _of_calls(self) -> Iterator[Metric]:
        histogram = HistogramMetricFamily(
            "csi_plugin_operations_seconds",
            "Container Storage Interface operation duration with gRPC error code status total",
            labels=["driver_name", "method_name", "grpc_status_code"],
        )
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        for (method, code), series in sorted(self._calls.snapshot().items(), key=lambda item: item[0]):
            buckets = list(zip(bounds, accumulate(series.counts), strict=True))
            histogram.add_metric([self._driver_name, method, code], buckets, series.seconds)
        yield histogram
        running = GaugeMetricFamily("orlop_calls_in_flight", "Calls under way", labels=["method_name"])
        methods = self._calls.running()
        for method in sorted(set(methods)):
            running.add_metric([method], methods.count(method))
        yield running

    def _of_pools(self) -> Iterator[Metric]:
        up = self._gauge("orlop_pool_up", "1 while the pool's directory is there", "pool", "node")
        capacity = self._gauge("orlop_pool_capacity_bytes", "Size of the pool's filesystem", "pool", "node")
        available = self._gauge("orlop_pool_available_bytes", "Room for new volumes", "pool", "node")
        reserved = self._gauge("orlop_pool_reserved_bytes", "What volumes never get", "pool", "node")
        promised = self._gauge(
            "orlop_pool_promised_bytes",
            "What volumes may take in the end, the trash included",
            "pool",
            "node",
        )
        volumes = self._gauge("orlop_pool_volumes", "Volumes in the pool", "pool")
        for pool in self._pools:
            place = [pool.name, self._node_id]
            up.add_metric(place, pool.is_present())
            try:
                total = pool.backend.store().total_bytes
                capacity.add_metric(place, total)
                available.add_metric(place, pool.room())
                reserved.add_metric(place, pool.config.reserved.of(total))
                promised.add_metric(place, pool.space.promised())
                volumes.add_metric([pool.name], len(pool.catalog.ids()))
            except (OSError, Error) as error:
                log.warning("metrics of pool %s: %s", pool.name, error)
        failures = CounterMetricFamily(
            "orlop_maintenance_failures",
            "How often removing what was deleted, or counting what is written, did not work",
            labels=["pool"],
        )
        for pool in self._pools:
            failures.add_metric([pool.name], self._maintenance.failures[pool.name])
        yield from (up, capacity, available, reserved, promised, volumes, failures)

    def _of_copies(self) -> Iterator[Metric]:
        counts = self._copier.jobs.counts()
        jobs = self._gauge("orlop_copy_jobs", "Copies in the background now", "kind", "state")
        ended = CounterMetricFamily(
            "orlop_copy_jobs_ended", "Copies in the background that have ended", labels=["kind", "result"]
        )
        for kind in ("snapshot", "restore", "clone"):
            for state in ("running", "waiting"):
                jobs.add_metric([kind, state], counts.copying[kind, state])
            for result in ("done", "failed", "stopped"):
                ended.add_metric([kind, result], counts.ended[kind, result])
        copied = CounterMetricFamily(
            "orlop_copied_bytes",
            "Bytes that copies have moved; what is shared is not",
            value=counts.copied_bytes,
        )
        freezer = self._copier.freezer
        bounds = [*map(str, freeze.BUCKETS_S), "+Inf"]
        frozen = HistogramMetricFamily(
            "orlop_freeze_seconds",
            "How long filesystems were held still for copies of one moment",
            buckets=list(zip(bounds, accumulate(freezer.counts), strict=True)),
            sum_value=freezer.total_s,
        )
        yield from (jobs, ended, copied, frozen)

    def _of_volumes(self) -> Iterator[Metric]:
        labels = ("volume", "pool", "pvc", "namespace")
        capacity = self._gauge("orlop_volume_capacity_bytes", "The volume's size", *labels)
        used = self._gauge("orlop_volume_used_bytes", "What the volume has taken of its pool", *labels)
        sick = self._gauge(
            "orlop_volume_condition",
            "1 for each thing that is wrong with a volume",
            *labels,
            "status",
            "reason",
        )
        left_out = GaugeMetricFamily(
            "orlop_volumes_left_out",
            f"Volumes that this scrape leaves out: it tells of {MOST_VOLUMES}, and of what {MOST_SECONDS:g} s allow",
        )
        deadline = time.monotonic() + MOST_SECONDS
        told = missed = 0
        for pool, volume_id in self._ids():
            if told >= MOST_VOLUMES or time.monotonic() > deadline:
                missed += 1
                continue
            told += 1
            found = _volume(pool, volume_id)
            values = [volume_id, pool.name, "", ""]
            if found is not None:
                record, size, written = found
                values[2:] = [record.pvc_name, record.pvc_namespace]
                capacity.add_metric(values, size)
                used.add_metric(values, written)
            for entry in self._health.of_volume(pool, pool.catalog.home(volume_id)):
                sick.add_metric([*values, entry.status, entry.reason], 1)
        left_out.add_metric([], missed)
        yield from (capacity, used, sick, left_out)

    def _of_loops(self) -> Iterator[Metric]:
        try:
            attached = len(loop.all())
        except OSError:
            return  # not ours to look at here, or none in this kernel: the health of volumes tells what matters
        yield GaugeMetricFamily(
            "orlop_node_loop_devices", "Attached loop devices of this node, whoever's", value=attached
        )

    def _ids(self) -> Iterator[tuple[Pool, str]]:
        for pool in self._pools:
            try:
                ids = pool.catalog.ids()
            except (OSError, Error):
                continue  # told by orlop_pool_up
            yield from ((pool, volume_id) for volume_id in ids)

    def _gauge(self, name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, help_text, labels=labels)


def _volume(pool: Pool, volume_id: str) -> tuple[Record, int, int] | None:
    """Record, size and what is written; None for one that went away, or is damaged (which the health calls tell)."""
    home = pool.catalog.home(volume_id)
    try:
        record = pool.catalog.read(home)
        return record, pool.size_bytes(home) or record.size_bytes, pool.backend.written_bytes(home)
    except (OSError, Error):
        return None
