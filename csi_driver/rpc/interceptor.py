# SPDX-License-Identifier: Apache-2.0
"""What happens around every call, once for all: parsing, one line of log, the count, and errors becoming codes.

Servicers neither log nor catch. No field that may hold a secret is ever looked at here: the log gets the names in
`LOGGED` and nothing else of a request.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from csi_driver.errors import InvalidArgument, Unimplemented
from csi_driver.rpc.calls import Calls
from csi_driver.rpc.status import Status, shorten, status_of

log = logging.getLogger(__name__)

LOGGED = (
    "name",
    "volume_id",
    "source_volume_id",
    "snapshot_id",
    "base_snapshot_id",
    "target_snapshot_id",
    "group_snapshot_id",
    "node_id",
    "staging_target_path",
    "target_path",
    "volume_path",
    "volume_publish_path",
)
"""The fields of requests that say what a call is about."""

QUIET = frozenset(
    {
        "Probe",
        "GetPluginInfo",
        "GetPluginCapabilities",
        "ControllerGetCapabilities",
        "GroupControllerGetCapabilities",
        "NodeGetCapabilities",
        "GetCapacity",
        # Kubernetes polls these, per volume.
        "NodeGetVolumeStats",
        "NodeGetVolumeHealth",
        "NodeGetStorageHealth",
        "ControllerListVolumeHealth",
    }
)
"""Logged at debug while they succeed."""

LOGGED_BYTES = 256

_OK = grpc.StatusCode.OK
_CANCELLED = grpc.StatusCode.CANCELLED

NAMES = {code: "OK" if code is _OK else code.name.title().replace("_", "") for code in grpc.StatusCode}
"""Codes as Go's programs write them in logs and metrics: `InvalidArgument`."""

Behaviour = Callable[[Any, grpc.ServicerContext], Message | Iterator[Message]]


@dataclass(frozen=True, slots=True)
class _Method:
    path: str
    """As it is called on the wire, and in metrics."""
    name: str
    logged: tuple[str, ...]
    parse: Callable[[bytes], Message | None]
    behaviour: Behaviour
    streams: bool = False
    """It answers with any number of messages."""


class Interceptor(grpc.GenericRpcHandler):
    """The handlers of some services. A method that its servicer does not have is UNIMPLEMENTED, with a sentence."""

    def __init__(self, services: Iterable[tuple[ServiceDescriptor, object]], calls: Calls) -> None:
        self._calls = calls
        methods = [_method(method, servicer) for service, servicer in services for method in service.methods]
        self._handlers = {method.path: self._handler(method) for method in methods}
        # One for all, so that strangers cannot grow the metrics.
        self._unknown = self._handler(_Method("unknown", "unknown", (), lambda raw: None, _refuse_unknown))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """grpc asks for the handler of each call."""
        return self._handlers.get(handler_call_details.method, self._unknown)

    def _handler(self, method: _Method) -> "grpc.RpcMethodHandler[bytes, bytes]":
        # Without serializers grpc passes bytes through: a message that cannot be read or written fails in `_call`.
        if method.streams:
            return grpc.unary_stream_rpc_method_handler(partial(self._stream, method))
        return grpc.unary_unary_rpc_method_handler(partial(self._call, method))

    def _stream(self, method: _Method, raw: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        begun = time.perf_counter()
        number = self._calls.begin(method.path)
        request: Message | None = None
        code = _CANCELLED
        try:
            request = _parsed(method, raw)
            for answer in cast("Iterator[Message]", method.behaviour(request, context)):
                yield answer.SerializeToString()
            code = _OK
        except Exception as error:  # noqa: BLE001 - as in `_call`
            status = status_of(error, method.name)
            code = status.code
            _log_failure(method, request, status, time.perf_counter() - begun, error)
        finally:
            # Also when the caller has gone away in the middle, which closes this generator.
            seconds = self._end(number, method, code, begun)
        if code is _OK:
            log.info(method.name, extra={"fields": _fields(method, request, code, seconds)})
            return
        context.abort(code, status.message)

    def _call(self, method: _Method, raw: bytes, context: grpc.ServicerContext) -> bytes:
        begun = time.perf_counter()
        number = self._calls.begin(method.path)
        request: Message | None = None
        try:
            request = _parsed(method, raw)
            answer = cast("Message", method.behaviour(request, context)).SerializeToString()
        except Exception as error:  # noqa: BLE001 - the one place where the errors of calls become answers
            status = status_of(error, method.name)
            seconds = self._end(number, method, status.code, begun)
            _log_failure(method, request, status, seconds, error)
        else:
            seconds = self._end(number, method, _OK, begun)
            level = logging.DEBUG if method.name in QUIET else logging.INFO
            if log.isEnabledFor(level):
                log.log(level, method.name, extra={"fields": _fields(method, request, _OK, seconds)})
            return answer
        context.abort(status.code, status.message)

    def _end(self, number: int, method: _Method, code: grpc.StatusCode, begun: float) -> float:
        seconds = time.perf_counter() - begun
        self._calls.end(number, method.path, NAMES[code], seconds)
        return seconds


def path_of(method: MethodDescriptor) -> str:
    """What a method is called on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


def _method(method: MethodDescriptor, servicer: object) -> _Method:
    return _Method(
        path=path_of(method),
        name=method.name,
        logged=tuple(field for field in LOGGED if field in method.input_type.fields_by_name),
        parse=GetMessageClass(method.input_type).FromString,
        behaviour=getattr(servicer, method.name, None) or _refusal(method.name),
        streams=method.server_streaming,
    )


def _parsed(method: _Method, raw: bytes) -> Message | None:
    try:
        return method.parse(raw)
    except DecodeError as error:
        raise InvalidArgument(
            f"{method.name}: the request is not such a message, or its text is not UTF-8"
        ) from error


def _log_failure(
    method: _Method, request: Message | None, status: Status, seconds: float, error: Exception
) -> None:
    fields = _fields(method, request, status.code, seconds) | {"error": status.message}
    if status.is_our_fault:
        log.error(method.name, extra={"fields": fields}, exc_info=error)
    else:
        log.info(method.name, extra={"fields": fields})


def _fields(
    method: _Method, request: Message | None, code: grpc.StatusCode, seconds: float
) -> dict[str, object]:
    fields: dict[str, object] = {}
    if request is not None:
        for name in method.logged:
            value = getattr(request, name)
            if value:
                fields[name] = shorten(value, LOGGED_BYTES)
    fields["code"] = NAMES[code]
    fields["ms"] = round(seconds * 1000, 3)
    return fields


def _refusal(method: str) -> Behaviour:
    def refuse(_request: Message, _context: grpc.ServicerContext) -> NoReturn:
        raise Unimplemented(
            f"{method}: this driver, as it is configured, does not offer it (see its capabilities)"
        )

    return refuse


def _refuse_unknown(_request: Message | None, _context: grpc.ServicerContext) -> NoReturn:
    raise Unimplemented(
        "this driver has no such method or service: it speaks CSI 1.13 (see its capabilities)"
    )
