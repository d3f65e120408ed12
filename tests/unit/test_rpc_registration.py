# SPDX-License-Identifier: Apache-2.0
"""Registration with kubelet, played by the test."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from csi_driver.errors import ConfigurationError
from csi_driver.rpc.pb import api_pb2 as pb
from csi_driver.rpc.pb.api_pb2_grpc import RegistrationStub
from csi_driver.rpc.registration import REGISTRY, Registration
from tests.unit.wire import directory

NAME = "local.orlop.dev"
ENDPOINT = "/var/lib/kubelet/plugins/local.orlop.dev/csi.sock"


@pytest.fixture
def kubelet() -> Iterator[Path]:
    with directory() as path:
        (path / REGISTRY).mkdir()
        yield path


@contextmanager
def registering(kubelet: Path) -> Iterator[Registration]:
    registration = Registration(kubelet, NAME, ENDPOINT, watch_s=0.05)
    registration.start()
    try:
        yield registration
    finally:
        registration.stop()


@contextmanager
def stub(kubelet: Path) -> Iterator[RegistrationStub]:
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(f"unix:{kubelet / REGISTRY / NAME}-reg.sock", options=options) as channel:
        yield RegistrationStub(channel)


def eventually(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("did not come true in 10 s")


def test_kubelet_is_told_what_and_where_the_driver_is(kubelet: Path) -> None:
    with registering(kubelet), stub(kubelet) as plugin:
        info = plugin.GetInfo(pb.InfoRequest())

    assert info == pb.PluginInfo(type="CSIPlugin", name=NAME, endpoint=ENDPOINT, supported_versions=["1.0.0"])


def test_the_driver_is_registered_when_kubelet_says_so(kubelet: Path) -> None:
    with registering(kubelet) as registration, stub(kubelet) as plugin:
        before = registration.problem()
        plugin.NotifyRegistrationStatus(pb.RegistrationStatus(plugin_registered=True))

        assert before == "kubelet has not asked for it yet"
        assert registration.problem() == ""


def test_a_refusal_is_an_error_in_the_log(kubelet: Path, caplog: pytest.LogCaptureFixture) -> None:
    with registering(kubelet) as registration, stub(kubelet) as plugin:
        plugin.NotifyRegistrationStatus(pb.RegistrationStatus(error="driver name taken"))

        assert registration.problem() == "kubelet refused it: driver name taken"
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.__dict__["fields"] == {"error": "driver name taken"}


def test_the_socket_goes_with_the_driver(kubelet: Path) -> None:
    with registering(kubelet):
        assert os.listdir(kubelet / REGISTRY) == [f"{NAME}-reg.sock"]

    assert not os.listdir(kubelet / REGISTRY)


def test_a_socket_that_vanished_is_made_again(kubelet: Path) -> None:
    path = kubelet / REGISTRY / f"{NAME}-reg.sock"
    with registering(kubelet) as registration:
        with stub(kubelet) as plugin:
            plugin.NotifyRegistrationStatus(pb.RegistrationStatus(plugin_registered=True))
        path.unlink()

        eventually(path.exists)

        assert registration.problem() == "kubelet has not asked for it yet"
        with stub(kubelet) as plugin:
            assert plugin.GetInfo(pb.InfoRequest()).name == NAME


def test_kubelets_directory_may_come_later(kubelet: Path) -> None:
    (kubelet / REGISTRY).rmdir()
    with registering(kubelet) as registration:
        assert "is kubelet's directory mounted here" in registration.problem()
        (kubelet / REGISTRY).mkdir()

        eventually((kubelet / REGISTRY / f"{NAME}-reg.sock").exists)

        with stub(kubelet) as plugin:
            assert plugin.GetInfo(pb.InfoRequest()).name == NAME


def test_a_second_driver_of_this_name_is_refused(kubelet: Path) -> None:
    with registering(kubelet), pytest.raises(ConfigurationError, match="another process answers there"):
        Registration(kubelet, NAME, ENDPOINT).start()


def test_a_path_too_long_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="at most 107"):
        Registration(Path("/" + "x" * 80), NAME, ENDPOINT)
