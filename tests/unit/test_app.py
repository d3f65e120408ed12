# SPDX-License-Identifier: Apache-2.0
"""The composition root, and `orlop serve` as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver import app
from csi_driver.config import Config, parse
from csi_driver.errors import ConfigurationError
from csi_driver.model import DriverFeatures
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.unit.wire import Client, directory, driver_over, memory_pool

REPOSITORY = Path(__file__).parents[2]
BARE = {"PATH": os.environ["PATH"]}


@pytest.fixture
def base() -> Iterator[Path]:
    with directory() as path:
        (path / "config.toml").write_text('node_id = "node-1"\n' + memory_pool(path / "pool"))
        yield path


def command(base: Path, *more: str) -> list[str]:
    required = ["--config", str(base / "config.toml"), "--endpoint", f"unix://{base}/csi.sock"]
    return [sys.executable, "-m", "csi_driver", "serve", *required, *more]


def run(base: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A serve that is expected to give up."""
    return subprocess.run(
        command(base, *more), cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )


@contextmanager
def served(base: Path, *more: str) -> Iterator["subprocess.Popen[str]"]:
    """A serve that answers."""
    process = subprocess.Popen(command(base, *more), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        until_answered(process, base / "csi.sock")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until_answered(process: "subprocess.Popen[str]", address: Path | int) -> None:
    """Until somebody accepts connections at a socket or a port."""
    family, where = (
        (socket.AF_UNIX, str(address))
        if isinstance(address, Path)
        else (socket.AF_INET, ("127.0.0.1", address))
    )
    for _ in range(2000):
        with socket.socket(family) as client:
            try:
                client.connect(where)
            except OSError:
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
                continue
            return
    raise AssertionError("no connection after 20 s")


def stop(process: "subprocess.Popen[str]") -> tuple[int, str]:
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    return process.returncode, log


# Building


def overridden(environment: Mapping[str, str], *arguments: str, node_id: str = "") -> Config:
    options = app.parse_arguments(["--endpoint", "/e", *arguments], environment)
    return app._overridden(replace(parse(memory_pool(Path("/p"))), node_id=node_id), options, environment)


def test_the_nodes_id_comes_from_the_nearest_place() -> None:
    everywhere = {"NODE_ID": "a", "KUBE_NODE_NAME": "b", "NODE_NAME": "c"}

    assert overridden(everywhere, "--node-id", "flag", node_id="file").node_id == "flag"
    assert overridden(everywhere, node_id="file").node_id == "a"
    assert overridden({"KUBE_NODE_NAME": "b", "NODE_NAME": "c"}).node_id == "b"
    assert overridden({"NODE_ID": "", "NODE_NAME": "c"}).node_id == "c"
    assert overridden({}, node_id="file").node_id == "file"


def test_a_node_without_an_id_is_called_like_its_host(base: Path) -> None:
    with driver_over(memory_pool(base / "pool")) as driver:
        assert driver.info.node_id == socket.gethostname()


def test_the_drivers_name_may_be_another() -> None:
    assert overridden({}, "--driver-name", "x.example.org").driver_name == "x.example.org"


def test_the_environment_says_where(base: Path) -> None:
    options = app.parse_arguments([], {"ORLOP_CONFIG": "/c.toml", "CSI_ENDPOINT": "unix:///e"})

    assert (options.config, options.endpoint) == (Path("/c.toml"), "unix:///e")
    assert app.parse_arguments(["--endpoint", "/e"], {}).config == Path("/etc/orlop/config.toml")


def test_topology_has_what_is_configured(base: Path) -> None:
    with driver_over('node_id = "n"\nzone = "z"\n' + memory_pool(base / "pool")) as driver:
        assert driver.info.segments == {
            "topology.local.orlop.dev/node": "n",
            "topology.kubernetes.io/zone": "z",
        }


@pytest.mark.parametrize("node_id", ["-n", "n" * 64, "a b", "a/b", "ü"])
def test_an_id_that_can_be_no_label_is_refused(base: Path, node_id: str) -> None:
    with pytest.raises(ConfigurationError, match="becomes a node's label"):
        app.build(replace(parse(memory_pool(base / "pool")), node_id=node_id))


@pytest.mark.parametrize("key", ["region", "zone"])
def test_a_place_that_can_be_no_label_is_refused(base: Path, key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"topology.kubernetes.io/{key} 'a b'"):
        app.build(parse(f'{key} = "a b"\n' + memory_pool(base / "pool")))


def test_a_driver_that_could_not_be_built_lets_go_of_its_pools(base: Path) -> None:
    good = memory_pool(base / "pool")
    with pytest.raises(ConfigurationError, match="no such backend"):
        app.build(parse(good + f'[pools.bad]\nbackend = "tape"\nroot = "{base}/bad"\n'))

    with driver_over(good) as driver:
        assert [pool.name for pool in driver.pools] == ["mem"]


def test_a_pool_is_one_drivers(base: Path) -> None:
    config = memory_pool(base / "pool")
    with driver_over(config), pytest.raises(ConfigurationError, match="another process uses this pool"):
        app.build(parse(config))


def test_a_pool_that_must_be_mounted_is_refused_while_it_is_not(base: Path) -> None:
    with pytest.raises(ConfigurationError, match="mounted = true"):
        app.build(parse(memory_pool(base / "pool", more="mounted = true")))


def test_what_grows_where_is_the_configurations_choice(base: Path) -> None:
    config = parse(memory_pool(base / "pool"))
    driver = app.build(config)
    try:
        on_node = app._features(config, driver.pools)
        in_controller = app._features(replace(config, expansion="controller"), driver.pools)
    finally:
        driver.close()

    assert (on_node.grows_in_controller, on_node.grows_on_node) == (False, True)
    assert (in_controller.grows_in_controller, in_controller.grows_on_node) == (True, True)


def test_a_node_holds_as_many_volumes_as_the_kernel_allows_mounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MOUNT_MAX", tmp_path / "mount-max")
    plain = DriverFeatures(stages=False, grows_in_controller=False, grows_on_node=False)

    assert app._most_volumes(plain) == 0
    (tmp_path / "mount-max").write_text("100000\n")
    assert app._most_volumes(plain) == 50_000
    assert app._most_volumes(replace(plain, stages=True)) == 25_000


# Serving


def test_help_explains_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "csi_driver", "serve", "--help"],
        cwd=REPOSITORY, env=BARE, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip

    options = ("config", "endpoint", "node-id", "driver-name", "kubelet-dir", "kubelet-endpoint", "http")
    for option in (*options, "log-level", "log-format"):
        assert f"--{option}" in done.stdout


def test_serving_loads_nothing_of_the_command_line() -> None:
    code = (
        "import sys, csi_driver.app, csi_driver.rpc.http, csi_driver.rpc.metrics, csi_driver.__main__\n"
        "print(*(set(sys.modules) & {'typer', 'rich', 'click', 'csi_driver.cli'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout.strip() == ""


def test_prometheus_is_loaded_only_for_those_who_scrape() -> None:
    code = "import sys, csi_driver.app; print('prometheus_client' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout.strip() == "False"


def test_a_driver_serves_until_it_is_told_to_stop(base: Path) -> None:
    with served(base, "--log-format", "json") as process:
        client = Client(base / "csi.sock")
        info = client.call(pb.GetPluginInfoRequest())
        client.close()
        code, log = stop(process)

    assert info.name == "local.orlop.dev"
    assert code == 0
    assert [json.loads(line)["message"] for line in log.splitlines()] == ["serving", "stopping", "stopped"]
    assert not (base / "csi.sock").exists()


def test_a_second_driver_on_the_pool_is_refused(base: Path) -> None:
    with served(base):
        done = run(base, "--endpoint", f"{base}/other.sock")

    assert done.returncode == 2
    assert "another process uses this pool" in done.stderr


def test_the_http_pages(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with served(base, "--http", f"127.0.0.1:{port}") as process:
        # HTTP comes second: the socket waits for nothing.
        until_answered(process, port)
        pages = {}
        for page in ("healthz", "readyz", "metrics"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=10) as answer:
                pages[page] = answer.read().decode()
        code, _ = stop(process)

    assert (pages["healthz"], pages["readyz"]) == ("ok\n", "ok\n")
    assert 'method_name="/csi.v1.Identity/Probe"' in pages["metrics"]
    assert code == 0


def test_a_driver_registers_itself(base: Path) -> None:
    (base / "kubelet" / "plugins_registry").mkdir(parents=True)
    with served(base, "--kubelet-dir", str(base / "kubelet")) as process:
        # The driver answers before it registers, and the socket is made under a hidden name.
        deadline = time.monotonic() + 10
        registered: list[str] = []
        while registered != ["local.orlop.dev-reg.sock"] and time.monotonic() < deadline:
            registered = os.listdir(base / "kubelet" / "plugins_registry")
            time.sleep(0.01)
        code, _ = stop(process)

    assert registered == ["local.orlop.dev-reg.sock"]
    assert os.listdir(base / "kubelet" / "plugins_registry") == []
    assert code == 0


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        (None, (), "cannot be read"),
        ("pools = 3", (), "Expected `object`"),
        ("[pools.mem]\nbackend = 'tape'\nroot = '/nowhere'", (), "no such backend; known:"),
        ("[pools.mem]\nbackend = 'memory'\nroot = '{base}/pool'", ("--endpoint", "x"), "endpoint 'x'"),
        ("[pools.mem]\nbackend = 'memory'\nroot = '{base}/pool'", ("--http", "x"), "HTTP address 'x'"),
        (
            "[pools.mem]\nbackend = 'memory'\nroot = '{base}/pool'",
            ("--kubelet-dir", "/" + "x" * 99),
            "at most 107",
        ),
    ],
)
def test_a_wrong_configuration_is_one_sentence(
    base: Path, config: str | None, more: tuple[str, ...], words: str
) -> None:
    (base / "config.toml").unlink()
    if config is not None:
        # A root that cannot be made would be another sentence.
        (base / "config.toml").write_text(
            config.replace("{base}", str(base)).replace("/nowhere", f"{base}/x")
        )

    done = run(base, *more)

    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("orlop: ")]
    assert done.returncode == 2
    assert words in sentence
    assert "Traceback" not in done.stderr
    assert not (base / "csi.sock").exists()


def test_without_an_endpoint_the_usage_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "csi_driver", "serve"],
        cwd=REPOSITORY, env=BARE, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert "--endpoint (or CSI_ENDPOINT) is missing" in done.stderr


# Ending in the middle of a call

STUCK = """
import sys, threading
from dataclasses import replace
from pathlib import Path
from csi_driver import app
from csi_driver.config import load
from csi_driver.rpc import logs
from csi_driver.rpc.interceptor import Interceptor
from csi_driver.linux.signals import Stopping
from csi_driver.rpc.pb import csi_pb2

class Stuck:
    def Probe(self, request, context):
        Path(sys.argv[2]).touch()
        threading.Event().wait()

stopping = Stopping()
options = app.parse_arguments(sys.argv[3:], {})
logs.set_up("info", "text")
config = load(options.config)
driver = app.build(config)
services = csi_pb2.DESCRIPTOR.services_by_name
stuck = replace(driver, handlers=Interceptor([(services["Identity"], Stuck())], driver.calls))
sys.exit(app._run(stuck, replace(config, drain_timeout_s=float(sys.argv[1])), options, Path(options.endpoint), stopping))
"""


@contextmanager
def stuck_in_a_call(base: Path, drain_timeout_s: float) -> Iterator["subprocess.Popen[str]"]:
    """A driver in which a call will never end."""
    entered, endpoint = base / "entered", base / "csi.sock"
    arguments = [
        str(drain_timeout_s),
        str(entered),
        "--config",
        str(base / "config.toml"),
        "--endpoint",
        str(endpoint),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *arguments], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    client = None
    try:
        until_answered(process, endpoint)
        client = Client(endpoint)
        caller = threading.Thread(target=client.call, args=(pb.ProbeRequest(), 20))
        caller.start()
        while not entered.exists():
            time.sleep(0.01)
        yield process
        caller.join(20)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        if client is not None:
            client.close()


def test_a_call_that_does_not_end_is_left_to_the_next_start(base: Path) -> None:
    with stuck_in_a_call(base, drain_timeout_s=0.5) as process:
        code, log = stop(process)

    assert code == 1
    assert "calls did not end in time" in log
    assert "methods=/csi.v1.Identity/Probe" in log
    with driver_over((base / "config.toml").read_text()) as driver:
        assert [pool.name for pool in driver.pools] == ["mem"]


def test_the_second_signal_does_not_wait(base: Path) -> None:
    with stuck_in_a_call(base, drain_timeout_s=60) as process:
        process.send_signal(signal.SIGTERM)
        while (base / "csi.sock").exists():
            time.sleep(0.01)
        begun = time.monotonic()
        code, _ = stop(process)

    assert code == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 10
