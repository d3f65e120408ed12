# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for a pool's catalog and backend, whose work is done in a child: for stores that may hang.

A dead file server holds whoever asks it. So a pool on one is opened by a child (`apart_worker`), and each method that
touches the store is called there, with a deadline; `linux.remote` kills the child when it is late, and says when the
server may be asked again. A kill is what a crash is, and every method may be repeated after one. Nothing is asked when
the driver starts: a server that is away then makes its own pool's calls fail, and nothing else.

Both sides are this program: values go over as pickles, homes by their names, for each side has its own descriptors.
"""

import io
import logging
import math
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from csi_driver.backends.base import PAYLOAD_IMAGE, Backend, Features, Store
from csi_driver.catalog import VOLUMES, Catalog, Home
from csi_driver.config import PoolConfig
from csi_driver.errors import ConfigurationError, Unavailable
from csi_driver.linux.copy import Transfer
from csi_driver.linux.export import GONE
from csi_driver.linux.remote import Breaker, Lane, Task, Worker
from csi_driver.model import (
    AccessType,
    GroupRecord,
    Parameters,
    Record,
    SizeLimits,
    SnapshotRecord,
    VolumeSpec,
)

log = logging.getLogger(__name__)

WORKER: Final = "csi_driver.apart_worker"
STORE_S: Final = 5.0
"""How old the numbers of the store may get, unless newer ones of a volume with a size are put beside them."""

DONE, FAILED, LATER, STEP = b"=", b"!", b"+", b"?"
"""How a child's message begins: a result, an exception, "not done yet", or the bytes that a copy is about to move."""

FindHome = Callable[[str, str, str, str], Home]


@dataclass(frozen=True, slots=True)
class Order:
    """What a child is to do: a method of its catalog or its backend."""

    target: str
    method: str
    arguments: tuple[Any, ...] = ()
    named: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """What a child is told first. `tag`: the pool that it must find there; "" for any, or none."""

    config: PoolConfig
    tag: str
    claims: tuple[str, ...] = ()
    """What the child before it had claimed, and lost with its life: calls are at it yet."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What it found."""

    tag: str
    features: Features


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a child may take, in seconds."""

    open_s: float = 20.0
    """To mount and open the pool."""
    call_s: float = 15.0
    copy_s: float = 60.0
    """For the next step of a copy, or for the writing of what is left at its end."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[str, ...] | None:
        match value:
            case Home():
                return "home", value.id, value.name, value.area, str(value.area_path)
            case Transfer():
                return ("transfer",)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, find_home: FindHome, transfer: Transfer | None) -> None:
        super().__init__(io.BytesIO(content))
        self._find_home = find_home
        self._transfer = transfer

    def persistent_load(self, stands_for: tuple[str, ...]) -> object:
        kind, *words = stands_for
        return self._transfer if kind == "transfer" else self._find_home(*words)


def encode(value: object) -> bytes:
    """For the other side."""
    content = io.BytesIO()
    _Pickler(content, pickle.HIGHEST_PROTOCOL).dump(value)
    return content.getvalue()


def decode(content: bytes, find_home: FindHome, transfer: Transfer | None = None) -> Any:
    """From the other side."""
    return _Unpickler(content, find_home, transfer).load()


class Child:
    """The pool's child: opens the pool, and does what is asked of it. Copies, which take long, have their own."""

    def __init__(self, config: PoolConfig, breaker: Breaker, deadlines: Deadlines) -> None:
        self._config = config
        self._deadlines = deadlines
        self._breaker = breaker
        self._lane = Lane(breaker, WORKER, self._begin_first)
        # Who opens the pool may have to mount it: one at a time.
        self._opening = threading.Lock()
        self._guard = threading.Lock()
        self._spare: Lane | None = None
        self.opened: Opened | None = None
        self.claims: set[str] = set()
        """What is to be claimed for as long as this stands, whichever child does it."""

    @property
    def problem(self) -> str:
        """Why the server is not asked now; ""."""
        return self._breaker.problem()

    def do(self, order: Order) -> Any:
        """The method's result, or what it raises.

        Raises:
            Unavailable: the server does not answer, or the pool cannot be opened.
        """
        while True:
            said = self._ask(
                self._lane, Task(f"{order.target}.{order.method}", encode(order), self._deadlines.call_s)
            )
            if said[:1] != LATER:
                return self._result(self._lane, said)

    def copy(self, order: Order, transfer: Transfer | None) -> Any:
        """The same for what may take long, beside everything else; `transfer` sees how it goes."""

        def step(said: bytes) -> bytes | None:
            if said[:1] != STEP:
                return None
            if transfer is not None:
                transfer.advance(int(said[1:]))
            return b"go on"

        look = transfer.check if transfer is not None else lambda: None
        lane = self._spare_lane()
        try:
            task = Task(f"{order.target}.{order.method}", encode(order), self._deadlines.copy_s, step, look)
            return self._result(lane, self._ask(lane, task))
        finally:
            self._give_back(lane)

    def find_opened(self) -> Opened:
        """What the child found when it opened the pool."""
        if self.opened is None:
            self.do(Order("catalog", "is_present"))
        assert self.opened is not None, "no child answers before it has opened the pool"
        return self.opened

    def close(self) -> None:
        """End it."""
        self._lane.drop()
        with self._guard:
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.drop()

    def _spare_lane(self) -> Lane:
        with self._guard:
            lane, self._spare = self._spare, None
        return lane or Lane(self._breaker, WORKER, self._begin)

    def _give_back(self, lane: Lane) -> None:
        # One stays, for a start takes a third of a second, and each copy has two orders.
        with self._guard:
            before, self._spare = self._spare, lane
        if before is not None:
            before.drop()

    def _ask(self, lane: Lane, task: Task) -> bytes:
        try:
            return lane.do(task).content
        except (ConfigurationError, OSError) as error:
            raise Unavailable(f"pool {self._config.name!r}: {error}") from error

    def _begin_first(self, worker: Worker) -> None:
        self._begin(worker, tuple(self.claims))

    def _begin(self, worker: Worker, claims: tuple[str, ...] = ()) -> None:
        end = time.monotonic() + self._deadlines.open_s
        if not self._opening.acquire(timeout=self._deadlines.open_s):
            raise TimeoutError
        try:
            opening = Opening(self._config, self.opened.tag if self.opened else "", claims)
            worker.tell(encode(opening), end)
            said = worker.hear(end, lambda: None).content
        finally:
            self._opening.release()
        found = decode(said[1:], _named)
        if said[:1] == FAILED:
            raise found
        self.opened = found

    def _result(self, lane: Lane, said: bytes) -> Any:
        result = decode(said[1:], _named)
        if said[:1] != FAILED:
            return result
        if isinstance(result, OSError) and result.errno in GONE:
            # What is open there is of no use any more. A new child mounts the export anew.
            lane.drop()
            raise Unavailable(
                f"pool {self._config.name!r}: {self._breaker.name} does not know what was open any more ({result}): "
                "repeat, and it is mounted anew"
            ) from result
        raise result


def _named(home_id: str, name: str, area: str, area_path: str) -> Home:
    return Home(home_id, name, area, -1, Path(area_path))


class ApartCatalog:
    """`catalog.Catalog`, elsewhere. What is not written out here is simply done by the child."""

    def __init__(self, config: PoolConfig, child: Child) -> None:
        self.root = config.root
        self._child = child

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return _method(self._child, "catalog", method, Catalog)

    @property
    def tag(self) -> str:
        """The pool's; known from the first time that it was opened.

        Raises:
            Unavailable: it never was, and cannot be.
        """
        return self._child.find_opened().tag

    def is_present(self) -> bool:
        """Whether the pool can be used now."""
        try:
            return bool(self._child.do(Order("catalog", "is_present")))
        except Unavailable as error:
            log.debug("not present: %s", error)
            return False

    def home(self, volume_id: str) -> Home:
        """Does not look."""
        return _named(volume_id, volume_id, VOLUMES, str(self.root / VOLUMES))

    def begin(self, volume_id: str) -> Home:
        """A home in staging; it stays claimed though the child dies, if nobody else claims it before there is another."""
        home = cast(Home, self._child.do(Order("catalog", "begin", (volume_id,))))
        self._child.claims.add(volume_id)
        return home

    def claim(self, home_id: str) -> None:
        """The same for what is claimed."""
        self._child.do(Order("catalog", "claim", (home_id,)))
        self._child.claims.add(home_id)

    def commit(self, home: Home, record: Record | SnapshotRecord | GroupRecord) -> Home:
        """Ends that."""
        self._child.claims.discard(home.id)
        return cast(Home, self._child.do(Order("catalog", "commit", (home, record))))

    def abandon(self, home_id: str) -> None:
        """Ends that, also if the server is not asked."""
        self._child.claims.discard(home_id)
        self._child.do(Order("catalog", "abandon", (home_id,)))

    def close(self) -> None:
        """End the child."""
        self._child.close()


class ApartBackend:
    """`backends.base.Backend`, elsewhere. What needs no store is done here, by `local`."""

    def __init__(self, local: Backend, child: Child) -> None:
        self._local = local
        self._child = child
        self._store: tuple[float, Store] | None = None
        self._guard = threading.Lock()
        self._counts = 0
        """How often something that volumes have written was asked for."""

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return _method(self._child, "backend", method, Backend)

    @property
    def features(self) -> Features:
        """As the child found them, or as they are configured."""
        return self._child.opened.features if self._child.opened else self._local.features

    def check(self) -> None:
        """Not now: a child does it whenever it opens the pool."""

    def parse(self, parameters: Mapping[str, str], access_type: AccessType, fs_type: str) -> Parameters:
        """Asks no store."""
        return self._local.parse(parameters, access_type, fs_type)

    def size_limits(self, access_type: AccessType, parameters: Parameters) -> SizeLimits:
        """Asks no store."""
        return self._local.size_limits(access_type, parameters)

    def promised_bytes(self, size_bytes: int, parameters: Parameters) -> int:
        """Asks no store."""
        return self._local.promised_bytes(size_bytes, parameters)

    def limits_problem(self) -> str:
        """Asks no store."""
        return self._local.limits_problem()

    def make(self, home: Home, spec: VolumeSpec) -> None:
        """By a child of its own if it is an image, which takes its time."""
        self._do(Order("backend", "make", (home, spec)))

    def grow(self, home: Home, size_bytes: int) -> int:
        """The same."""
        return cast(int, self._do(Order("backend", "grow", (home, size_bytes))))

    def _do(self, order: Order) -> Any:
        if self._local.features.payload == PAYLOAD_IMAGE:
            return self._child.copy(order, None)
        return self._child.do(order)

    def copy(self, home: Home, source: Home, spec: VolumeSpec, transfer: Transfer, *, share: bool) -> None:
        """By a child of its own."""
        order = Order("backend", "copy", (home, source, spec, transfer), {"share": share})
        self._child.copy(order, transfer)

    def finish(self, home: Home, spec: VolumeSpec) -> None:
        """By a child of its own: it may have much to write."""
        self._child.copy(Order("backend", "finish", (home, spec)), None)

    def written_bytes(self, home: Home, *, shared: bool = False) -> int:
        """What is free is to be asked anew after that: added to older numbers, what was written since counts twice."""
        written = cast(int, self._child.do(Order("backend", "written_bytes", (home,), {"shared": shared})))
        if self._local.features.enforces_capacity:
            with self._guard:
                self._counts += 1
                if self._store is not None:
                    self._store = -math.inf, self._store[1]
        return written

    def store(self) -> Store:
        """As it was a moment ago; as it was last known while the server does not answer."""
        known = self._store
        if known is not None and (time.monotonic() - known[0] < STORE_S or self._child.problem):
            return known[1]
        counts = self._counts
        try:
            found = cast(Store, self._child.do(Order("backend", "store")))
        except Unavailable:
            if known is None:
                raise
            return known[1]
        with self._guard:
            # What was counted meanwhile may be newer.
            self._store = time.monotonic() if counts == self._counts else -math.inf, found
        return found


def stand_ins(
    config: PoolConfig, local: Backend, breaker: Breaker, deadlines: Deadlines | None = None
) -> tuple[Catalog, Backend]:
    """For a pool whose store may hang."""
    child = Child(config, breaker, deadlines or Deadlines())
    return cast(Catalog, ApartCatalog(config, child)), cast(Backend, ApartBackend(local, child))


def _method(child: Child, target: str, method: str, kind: type) -> Callable[..., Any]:
    # Copying an object, for one, looks for methods that are nobody's.
    if method.startswith("_") or not callable(getattr(kind, method, None)):
        raise AttributeError(f"{kind.__name__} has no method {method!r}")
    return lambda *arguments, **named: child.do(Order(target, method, arguments, named))
