# SPDX-License-Identifier: Apache-2.0
"""The socket: when it is there, what it may replace, and how serving ends."""

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from csi_driver.errors import ConfigurationError
from csi_driver.rpc.calls import Calls
from csi_driver.rpc.interceptor import Interceptor
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.server import Server, check_free, parse_endpoint
from tests.unit.wire import SERVICES, Client, Failure, directory


class Slow:
    """A servicer whose Probe waits for the test."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        self.entered.set()
        self.leave.wait(120)
        return pb.ProbeResponse()

    def GetPluginInfo(self, request: object, context: grpc.ServicerContext) -> pb.GetPluginInfoResponse:
        return pb.GetPluginInfoResponse(name="n")


@pytest.fixture
def base() -> Iterator[Path]:
    with directory() as path:
        yield path


def server_of(servicer: object, workers: int = 2) -> Server:
    return Server(Interceptor([(SERVICES["Identity"], servicer)], Calls()), workers, "test")


def stale(path: Path) -> None:
    """A socket that a dead process has left."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def asks(path: Path) -> str | Failure:
    client = Client(path)
    try:
        answer = client.call(pb.GetPluginInfoRequest(), timeout=5)
    finally:
        client.close()
    return answer if isinstance(answer, Failure) else str(answer.name)


# Endpoints


@pytest.mark.parametrize("text", ["unix:///a/b.sock", "unix:/a/b.sock", "/a/b.sock"])
def test_an_endpoint_is_a_path(text: str) -> None:
    assert parse_endpoint(text) == Path("/a/b.sock")


@pytest.mark.parametrize(
    "text", ["", "a/b", "unix:a", "unix://a/b", "tcp://1.2.3.4:5", "unix:///a/", "/a\0b", "unix:"]
)
def test_what_is_no_path_of_a_socket_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"unix:///run/orlop/csi\.sock"):
        parse_endpoint(text)


def test_a_path_that_the_kernel_cannot_take_is_refused() -> None:
    assert parse_endpoint("/" + "x" * 106).name == "x" * 106
    with pytest.raises(
        ConfigurationError, match="has 108 bytes; the kernel takes at most 107: use a shorter one"
    ):
        parse_endpoint("/" + "x" * 107)
    with pytest.raises(ConfigurationError, match="has 109 bytes"):
        parse_endpoint("/" + "ü" * 54)


# Appearing


def test_the_socket_answers_and_is_ours_alone(base: Path) -> None:
    server = server_of(Slow())

    server.listen(base / "csi.sock")

    try:
        status = (base / "csi.sock").stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert asks(base / "csi.sock") == "n"
        assert os.listdir(base) == ["csi.sock"]
    finally:
        server.stop(1)


def test_a_stale_socket_is_replaced(base: Path) -> None:
    stale(base / "csi.sock")
    server = server_of(Slow())

    server.listen(base / "csi.sock")

    try:
        assert asks(base / "csi.sock") == "n"
    finally:
        server.stop(1)


def test_a_living_socket_is_refused_and_left_alone(base: Path) -> None:
    first = server_of(Slow())
    first.listen(base / "csi.sock")
    try:
        with pytest.raises(ConfigurationError, match="another process answers there"):
            server_of(Slow()).listen(base / "csi.sock")

        assert asks(base / "csi.sock") == "n"
    finally:
        first.stop(1)


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_no_socket_is_left_alone(base: Path, kind: str) -> None:
    path = base / "csi.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "symlink":
            path.symlink_to(base / "elsewhere")

    with pytest.raises(ConfigurationError, match="something that is no socket is there"):
        server_of(Slow()).listen(path)

    assert os.listdir(base) == ["csi.sock"]


def test_a_directory_that_is_not_there_is_said_to_be(base: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"No such file or directory: is .*/missing there, and writable"
    ):
        server_of(Slow()).listen(base / "missing" / "csi.sock")


def test_nothing_there_is_free(base: Path) -> None:
    check_free(base / "csi.sock")


def test_what_died_as_it_made_the_socket_is_no_obstacle(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[Path] = []

    def die(path: Path, _target: Path) -> None:
        hidden.append(path.parent)
        raise OSError(errno.EIO, "dead")

    with monkeypatch.context() as patch, pytest.raises(ConfigurationError):
        patch.setattr(Path, "rename", die)
        server_of(Slow()).listen(base / "csi.sock")
    assert os.listdir(hidden[0]) == ["s"]
    server = server_of(Slow())

    server.listen(base / "csi.sock")

    assert os.listdir(base) == ["csi.sock"]
    server.stop(1)


def test_drivers_that_start_together_do_not_take_each_others_sockets(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each is process 1 of its container, and kubelet's directory of registrations is one for all.
    first, second = server_of(Slow()), server_of(Slow())
    rename = Path.rename

    def in_between(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        second.listen(base / "second.sock")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", in_between)
    first.listen(base / "first.sock")

    assert sorted(os.listdir(base)) == ["first.sock", "second.sock"]
    assert first.is_listening() and second.is_listening()
    assert (base / "first.sock").stat().st_ino != (base / "second.sock").stat().st_ino
    first.stop(1)
    second.stop(1)
    assert os.listdir(base) == []


# Ending


def test_the_socket_goes_with_the_server(base: Path) -> None:
    server = server_of(Slow())
    server.listen(base / "csi.sock")

    server.stop(1)

    assert not os.listdir(base)


def test_a_socket_that_another_put_there_is_not_removed(base: Path) -> None:
    server = server_of(Slow())
    server.listen(base / "csi.sock")
    assert server.is_listening()
    (base / "csi.sock").unlink()
    stale(base / "csi.sock")

    assert not server.is_listening()
    server.stop(1)

    assert os.listdir(base) == ["csi.sock"]


def test_a_call_under_way_may_end_and_a_new_one_is_refused(base: Path) -> None:
    slow = Slow()
    server = server_of(slow)
    server.listen(base / "csi.sock")
    client = Client(base / "csi.sock")
    answers: list[object] = []
    caller = threading.Thread(target=lambda: answers.append(client.call(pb.ProbeRequest(), timeout=120)))
    caller.start()
    assert slow.entered.wait(60)

    ending = threading.Thread(target=server.stop, args=(100,))
    ending.start()
    while (base / "csi.sock").exists():
        time.sleep(0.01)
    refused, end = client.call(pb.GetPluginInfoRequest(), timeout=2), time.monotonic() + 60
    while isinstance(refused, pb.GetPluginInfoResponse) and time.monotonic() < end:
        # It came before grpc was told, a moment after the socket is gone.
        time.sleep(0.01)
        refused = client.call(pb.GetPluginInfoRequest(), timeout=2)
    slow.leave.set()
    ending.join(60)
    caller.join(60)
    client.close()

    assert not ending.is_alive()
    # Which of them, grpc's timing decides; none means that the call was carried out.
    assert refused.code.name in ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
    assert answers == [pb.ProbeResponse()]


def test_stopping_does_not_wait_for_connections(base: Path) -> None:
    server = server_of(Slow())
    server.listen(base / "csi.sock")
    client = Client(base / "csi.sock")
    client.call(pb.GetPluginInfoRequest())
    begun = time.monotonic()

    server.stop(30)

    assert time.monotonic() - begun < 5
    client.close()


def test_a_call_that_does_not_end_is_given_up_after_the_grace(base: Path) -> None:
    slow = Slow()
    server = server_of(slow)
    server.listen(base / "csi.sock")
    client = Client(base / "csi.sock")
    caller = threading.Thread(target=client.call, args=(pb.ProbeRequest(),))
    caller.start()
    assert slow.entered.wait(60)
    begun = time.monotonic()

    server.stop(0.3)

    assert 0.3 <= time.monotonic() - begun < 60
    slow.leave.set()
    caller.join(60)
    client.close()
