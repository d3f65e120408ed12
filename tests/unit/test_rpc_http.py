# SPDX-License-Identifier: Apache-2.0
"""Probes of Kubernetes, and metrics."""

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.app import Driver
from csi_driver.errors import ConfigurationError
from csi_driver.rpc import metrics as metrics_module
from csi_driver.rpc.http import Http, Page, Routes, parse_address, probe, verdict
from csi_driver.rpc.metrics import Metrics
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.unit.wire import directory, driver_over, memory_pool, mount_capability, serving


@contextmanager
def http(routes: Routes, address: str = "127.0.0.1:0") -> Iterator[int]:
    server = Http(address, routes)
    server.start()
    try:
        yield server.port
    finally:
        server.stop()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metrics_of(driver: Driver) -> Metrics:
    return Metrics(
        driver.name, driver.info.node_id, driver.pools, driver.calls, driver.copier, driver.maintenance
    )


def value_of(page: str, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)
    assert found, f"{series} is not in\n{page}"
    return float(found[1])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":9808", ("", 9808)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:9808", ("::1", 9808)),
        ("host.example:1", ("host.example", 1)),
    ],
)
def test_an_address_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "9808", ":", ":x", ":65536", "::1:80", "a:-1", ":٣"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"like :9808 or 127\.0\.0\.1:9808"):
        parse_address(text)


def test_an_address_in_use_is_said_to_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match="Address already in use"):
            Http(f"127.0.0.1:{port}", {})


def test_pages_are_answered_by_their_path() -> None:
    with http({"/a": lambda: Page(b"A"), "/b": lambda: verdict("no disk")}) as port:
        assert get(port, "/a") == (200, "A")
        assert get(port, "/a?x=y") == (200, "A")
        assert get(port, "/b") == (503, "no disk\n")
        assert get(port, "/c") == (404, "there is /a, /b\n")


def test_any_address_is_listened_on() -> None:
    with http({"/a": lambda: Page(b"A")}, ":0") as port:
        assert get(port, "/a") == (200, "A")


def test_a_page_that_fails_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Page:
        raise OSError(5, "Input/output error")

    with http({"/a": fail}) as port:
        assert get(port, "/a") == (500, "it failed; the driver's log has the details\n")

    assert "Input/output error" in caplog.text


def test_clients_that_say_nothing_hold_up_nobody() -> None:
    with http({"/a": lambda: Page(b"A")}) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        try:
            assert get(port, "/a") == (200, "A")
        finally:
            for connection in silent:
                connection.close()


def test_a_probe_goes_through_the_socket() -> None:
    with directory() as base, driver_over(memory_pool(base / "pool")) as driver:
        with serving(driver.handlers, base):
            answered = probe(base / "csi.sock")
            (base / "csi.sock").unlink()
            removed = probe(base / "csi.sock")

        assert answered == ""
        assert removed.startswith(f"no answer to a Probe on {base}/csi.sock: UNAVAILABLE")


def test_metrics_tell_pools_and_volumes() -> None:
    config = 'node_id = "node-1"\n' + memory_pool(Path("{root}"), more='total = "1Gi"')
    with directory() as base, driver_over(config.replace("{root}", str(base / "pool"))) as driver:
        with serving(driver.handlers, base) as client:
            made = client.call(
                pb.CreateVolumeRequest(
                    name="one",
                    capacity_range=pb.CapacityRange(required_bytes=1 << 20),
                    volume_capabilities=[mount_capability()],
                    parameters={
                        "csi.storage.k8s.io/pvc/name": "claim",
                        "csi.storage.k8s.io/pvc/namespace": "space",
                    },
                )
            )
            page = metrics_of(driver).page().decode()

    place = '{node="node-1",pool="mem"}'
    volume = f'{{namespace="space",pool="mem",pvc="claim",volume="{made.volume.volume_id}"}}'
    assert value_of(page, f"orlop_pool_capacity_bytes{place}") == 1 << 30
    assert value_of(page, f"orlop_pool_available_bytes{place}") == (1 << 30) - (1 << 20)
    assert value_of(page, f"orlop_pool_promised_bytes{place}") == 1 << 20
    assert value_of(page, f"orlop_pool_reserved_bytes{place}") == 0
    assert value_of(page, f"orlop_pool_up{place}") == 1
    assert value_of(page, 'orlop_pool_volumes{pool="mem"}') == 1
    assert value_of(page, f"orlop_volume_capacity_bytes{volume}") == 1 << 20
    assert value_of(page, f"orlop_volume_used_bytes{volume}") == 1 << 20
    assert value_of(page, "orlop_volumes_left_out") == 0
    assert value_of(page, "orlop_node_loop_devices") >= 0
    assert value_of(page, "process_resident_memory_bytes") > 0
    assert "orlop_build_info{version=" in page


def test_metrics_count_calls_in_cumulated_buckets() -> None:
    with directory() as base, driver_over(memory_pool(base / "pool")) as driver:
        driver.calls.end(driver.calls.begin("/m"), "/m", "OK", 0.2)
        driver.calls.end(driver.calls.begin("/m"), "/m", "OK", 700)
        driver.calls.begin("/m")
        page = metrics_of(driver).page().decode()

    def bucket(bound: str) -> float:
        labels = f'driver_name="local.orlop.dev",grpc_status_code="OK",le="{bound}",method_name="/m"'
        return value_of(page, f"csi_plugin_operations_seconds_bucket{{{labels}}}")

    assert [bucket(bound) for bound in ("0.1", "0.25", "600.0", "+Inf")] == [0, 1, 1, 2]
    labels = '{driver_name="local.orlop.dev",grpc_status_code="OK",method_name="/m"}'
    assert value_of(page, f"csi_plugin_operations_seconds_count{labels}") == 2
    assert value_of(page, f"csi_plugin_operations_seconds_sum{labels}") == pytest.approx(700.2)
    assert value_of(page, 'orlop_calls_in_flight{method_name="/m"}') == 1


def test_metrics_tell_copies_and_freezes() -> None:
    with (
        directory() as base,
        driver_over(memory_pool(base / "pool", more="instant_copies = false")) as driver,
        serving(driver.handlers, base) as client,
    ):
        made = client.call(
            pb.CreateVolumeRequest(
                name="one",
                capacity_range=pb.CapacityRange(required_bytes=1 << 20),
                volume_capabilities=[mount_capability()],
            )
        ).volume
        (base / "pool" / "volumes" / made.volume_id / "data" / "file").write_bytes(b"x" * 5000)
        client.call(pb.CreateSnapshotRequest(name="s", source_volume_id=made.volume_id))
        driver.maintenance.failures["mem"] += 2
        driver.copier.freezer.counts[1] += 1
        driver.copier.freezer.total_s += 0.002
        page = metrics_of(driver).page().decode()

    assert value_of(page, 'orlop_copy_jobs{kind="snapshot",state="running"}') == 0
    assert value_of(page, 'orlop_copy_jobs_ended_total{kind="snapshot",result="done"}') == 1
    assert value_of(page, 'orlop_copy_jobs_ended_total{kind="clone",result="failed"}') == 0
    assert value_of(page, "orlop_copied_bytes_total") == 5000
    assert value_of(page, 'orlop_freeze_seconds_bucket{le="0.001"}') == 0
    assert value_of(page, 'orlop_freeze_seconds_bucket{le="0.0025"}') == 1
    assert value_of(page, "orlop_freeze_seconds_count") == 1
    assert value_of(page, "orlop_freeze_seconds_sum") == 0.002
    assert value_of(page, 'orlop_maintenance_failures_total{pool="mem"}') == 2


def test_volumes_are_told_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MOST_VOLUMES", 2)
    with directory() as base, driver_over(memory_pool(base / "pool")) as driver:
        with serving(driver.handlers, base) as client:
            for name in "abc":
                client.call(
                    pb.CreateVolumeRequest(
                        name=name,
                        volume_capabilities=[mount_capability()],
                        capacity_range=pb.CapacityRange(required_bytes=4096),
                    )
                )
            page = metrics_of(driver).page().decode()

    assert len(re.findall(r"^orlop_volume_used_bytes\{", page, re.MULTILINE)) == 2
    assert value_of(page, "orlop_volumes_left_out") == 1


def test_a_sick_volume_is_told_with_its_reason() -> None:
    with directory() as base, driver_over(memory_pool(base / "pool")) as driver:
        with serving(driver.handlers, base) as client:
            for name in ("well", "sick"):
                made = client.call(
                    pb.CreateVolumeRequest(
                        name=name,
                        volume_capabilities=[mount_capability()],
                        capacity_range=pb.CapacityRange(required_bytes=4096),
                    )
                )
            (base / "pool/volumes" / made.volume.volume_id / "volume.json").unlink()
            page = metrics_of(driver).page().decode()

    told = re.findall(r"^orlop_volume_condition\{(.*)\} 1.0$", page, re.MULTILINE)
    assert len(told) == 1
    assert f'volume="{made.volume.volume_id}"' in told[0]
    assert 'reason="RecordMissing",status="DATA_LOSS"' in told[0]


def test_a_pool_that_went_away_is_told() -> None:
    with directory() as base, driver_over(memory_pool(base / "pool")) as driver:
        (base / "pool").rename(base / "away")
        page = metrics_of(driver).page().decode()

    assert value_of(page, f'orlop_pool_up{{node="{driver.info.node_id}",pool="mem"}}') == 0
