# SPDX-License-Identifier: Apache-2.0
"""One client's calls on a driver that is killed again and again: repeated until they end as they must.

What may come back, for every call:

- the code that the caller expects (OK, or the error that a wrong call must get);
- UNAVAILABLE, if the call ran while the driver was down: it is repeated;
- ABORTED, if the same volume had a twin of this call under way: it is repeated. A volume belongs to one client at a
  time, and a killed driver forgets its locks, so nothing else can be the reason.

Anything else is a fault. Which calls are made is `volumes`' business.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
from google.protobuf.message import Message

from csi_driver.rpc.pb import csi_pb2_grpc as services

OK, ABORTED, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE
CALL_TIMEOUT_S = 120.0
CONVERGE_S = 240.0
# A channel notices the end a little later than the process, and the new socket at its next try; later on a machine that
# takes long to start a driver, for all clients connect at that moment.
NOTICE_S = 3.0
NOTICE_STARTS = 2.0
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


@dataclass
class Journal:
    """What all clients and the killer have seen. Times are of time.monotonic."""

    faults: list[str] = field(default_factory=list)
    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    downs: list[tuple[float, float]] = field(default_factory=list)
    """When the driver was killed, and when its socket was there again (inf: not yet)."""
    guard: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, text: str) -> None:
        with self.guard:
            self.faults.append(text)

    def count(self, method: str, code: grpc.StatusCode) -> None:
        with self.guard:
            self.codes[method, code.name] += 1

    def was_down(self, began: float, ended: float) -> bool:
        return any(
            began <= up + NOTICE_S + NOTICE_STARTS * (up - down) and ended >= down for down, up in self.downs
        )


class Caller:
    """A connection, and the patience for it."""

    def __init__(self, socket: Path, journal: Journal) -> None:
        self.journal = journal
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._stubs = (
            services.IdentityStub(self._channel),
            services.ControllerStub(self._channel),
            services.NodeStub(self._channel),
        )

    def close(self) -> None:
        self._channel.close()

    def call(
        self, method: str, request: Message, expected: grpc.StatusCode = OK, *, twin: bool = False
    ) -> Any:
        """The answer, once the call has ended as expected; None for an expected error or a fault.

        With a `twin` the same call is made twice at the same time, and then once more to see that it stays so.
        """
        if not twin:
            return self._repeat(method, request, expected, may_abort=False)
        other = threading.Thread(
            target=self._repeat, args=(method, request, expected), kwargs={"may_abort": True}
        )
        other.start()
        self._repeat(method, request, expected, may_abort=True)
        other.join()
        return self._repeat(method, request, expected, may_abort=False)

    def _repeat(self, method: str, request: Message, expected: grpc.StatusCode, *, may_abort: bool) -> Any:
        deadline = time.monotonic() + CONVERGE_S
        while True:
            began = time.monotonic()
            code, answer, said = self._once(method, request)
            self.journal.count(method, code)
            if code is expected:
                return answer
            excused = (code is UNAVAILABLE and self.journal.was_down(began, time.monotonic())) or (
                code is ABORTED and may_abort
            )
            if not excused or time.monotonic() > deadline:
                about = " ".join(str(request).split())[:300]
                self.journal.fault(f"{method}: {code.name} instead of {expected.name}: {said} [{about}]")
                return None
            time.sleep(0.02)

    def _once(self, method: str, request: Message) -> tuple[grpc.StatusCode, Any, str]:
        stub: Callable[..., Any] = next(
            getattr(stub, method) for stub in self._stubs if hasattr(stub, method)
        )
        try:
            return OK, stub(request, timeout=CALL_TIMEOUT_S), ""
        except grpc.RpcError as error:
            call = cast(grpc.Call, error)
            return call.code(), None, call.details() or ""
