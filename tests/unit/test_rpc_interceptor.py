# SPDX-License-Identifier: Apache-2.0
"""What happens around every call: codes, one line of log, counts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import pytest

from csi_driver import errors
from csi_driver.rpc.calls import BUCKETS_S, Calls
from csi_driver.rpc.interceptor import Interceptor
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.unit.wire import SERVICES, Client, Failure, directory, mount_capability, serving

DELETE = "/csi.v1.Controller/DeleteVolume"


class Raising:
    """A servicer whose DeleteVolume fails in a way of the test's choice."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: grpc.ServicerContext) -> NoReturn:
        raise self._error


class Answering:
    """A servicer that answers."""

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        return pb.ProbeResponse()

    def NodePublishVolume(self, request: Any, context: grpc.ServicerContext) -> pb.NodePublishVolumeResponse:
        return pb.NodePublishVolumeResponse()


@contextmanager
def controller(servicer: object) -> Iterator[tuple[Client, Calls]]:
    calls = Calls()
    names = ("Identity", "Controller", "Node")
    with directory() as base:
        handlers = Interceptor([(SERVICES[name], servicer) for name in names], calls)
        with serving(handlers, base) as client:
            yield client, calls


def fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = record.__dict__["fields"]
    return found


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FailedPrecondition("volume 'v': in use"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.Aborted("volume 'v': in use"), grpc.StatusCode.ABORTED),
        (errors.Error("volume 'v': in use"), grpc.StatusCode.INTERNAL),
    ],
)
def test_an_error_is_answered_with_its_code_and_its_sentence(error: Exception, code: grpc.StatusCode) -> None:
    with controller(Raising(error)) as (client, _):
        assert client.call(pb.DeleteVolumeRequest(volume_id="v")) == Failure(code, "volume 'v': in use")


def test_what_nobody_foresaw_is_internal_with_a_sentence_and_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), controller(Raising(ZeroDivisionError("by 0"))) as (client, _):
        failure = client.call(pb.DeleteVolumeRequest(volume_id="v"))

    assert failure.code is grpc.StatusCode.INTERNAL
    assert (
        failure.message
        == "DeleteVolume: unexpected ZeroDivisionError: by 0; the driver's log has the details"
    )
    assert caplog.records[0].levelno == logging.ERROR
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("text", ["ü" * 5000, "\x00\x01\n\r", "日本" * 3000, "%" * 9000])
def test_any_text_arrives_as_a_message(text: str) -> None:
    with controller(Raising(errors.NotFound(text))) as (client, _):
        failure = client.call(pb.DeleteVolumeRequest(volume_id="v"))

    assert failure.code is grpc.StatusCode.NOT_FOUND
    assert failure.message[:2] == text[:2]


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"])
def test_bytes_that_are_no_request_are_an_invalid_argument(raw: bytes) -> None:
    with controller(Raising(errors.Error("never reached"))) as (client, _):
        failure = client.raw(DELETE, raw)

    assert isinstance(failure, Failure)
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.message == "DeleteVolume: the request is not such a message, or its text is not UTF-8"


def test_a_method_that_is_not_offered_is_unimplemented_with_a_sentence() -> None:
    with controller(Answering()) as (client, _):
        failure = client.call(pb.CreateSnapshotRequest(name="s"))

    assert failure.code is grpc.StatusCode.UNIMPLEMENTED
    assert failure.message.startswith("CreateSnapshot: this driver, as it is configured, does not offer it")


@pytest.mark.parametrize(
    "path", ["/csi.v1.GroupController/GroupControllerGetCapabilities", "/x/y", "/", "/ü/日"]
)
def test_what_is_no_method_is_unimplemented_with_a_sentence(path: str) -> None:
    with controller(Answering()) as (client, calls):
        failure = client.raw(path, b"")
        counted = list(calls.snapshot())

    assert isinstance(failure, Failure)
    assert failure.code is grpc.StatusCode.UNIMPLEMENTED
    assert failure.message
    # One name for all of them: strangers do not make metrics grow. (Some, grpc itself does not let through.)
    assert counted in ([], [("unknown", "Unimplemented")])


def test_a_call_is_one_line_that_says_what_it_was_about(caplog: pytest.LogCaptureFixture) -> None:
    request = pb.NodePublishVolumeRequest(
        volume_id="v-1", target_path="/t", staging_target_path="/s", volume_capability=mount_capability()
    )

    with caplog.at_level(logging.INFO), controller(Answering()) as (client, _):
        client.call(request)

    (record,) = caplog.records
    assert record.getMessage() == "NodePublishVolume"
    assert record.levelno == logging.INFO
    logged = dict(fields(record))
    assert 0 < logged.pop("ms") < 10_000
    assert logged == {"volume_id": "v-1", "target_path": "/t", "staging_target_path": "/s", "code": "OK"}


def test_a_refused_call_is_one_line_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), controller(Raising(errors.NotFound("no v"))) as (client, _):
        client.call(pb.DeleteVolumeRequest(volume_id="v"))

    (record,) = caplog.records
    assert record.exc_info is None
    assert (fields(record)["code"], fields(record)["error"]) == ("NotFound", "no v")


def test_polls_are_logged_at_debug_only(caplog: pytest.LogCaptureFixture) -> None:
    with controller(Answering()) as (client, _):
        with caplog.at_level(logging.INFO):
            client.call(pb.ProbeRequest())
            assert not caplog.records
        with caplog.at_level(logging.DEBUG):
            client.call(pb.ProbeRequest())
            assert [record.getMessage() for record in caplog.records] == ["Probe"]


def test_calls_are_counted_by_method_and_code() -> None:
    with controller(Raising(errors.InvalidArgument("x"))) as (client, calls):
        client.call(pb.DeleteVolumeRequest())
        client.call(pb.DeleteVolumeRequest())

        series = calls.snapshot()[DELETE, "InvalidArgument"]
        assert sum(series.counts) == 2
        assert series.seconds > 0
        assert calls.running() == []


def test_a_call_under_way_is_known() -> None:
    calls = Calls()

    number = calls.begin("/a")

    assert calls.running() == ["/a"]
    calls.end(number, "/a", "OK", 0.3)
    assert calls.running() == []
    assert calls.snapshot()["/a", "OK"].counts[BUCKETS_S.index(0.5)] == 1


def test_calls_get_on_while_all_workers_are_busy_and_calls_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    numbers = [calls.begin("m") for _ in range(3)]
    assert not calls.are_getting_on(3), "none has ended yet"

    calls.end(numbers.pop(), "m", "OK", 0.1)

    assert calls.are_getting_on(2)
    assert not calls.are_getting_on(3), "a worker is free, and would have answered"
    monkeypatch.setattr("csi_driver.rpc.calls.BUSY_S", 0.0)
    assert not calls.are_getting_on(2), "the last end was long ago"
