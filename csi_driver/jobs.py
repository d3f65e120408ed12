# SPDX-License-Identifier: Apache-2.0
"""Copies that take longer than a call may: they go on behind it, a few at a time, and their end is kept for a repeat.

Kept in memory only: a restart drops what is half made, and the repeat begins anew. What a copy is, `copies` says.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from csi_driver.errors import Aborted
from csi_driver.linux.copy import Stopped, Transfer
from csi_driver.model import Record, SnapshotRecord, SourceKind

log = logging.getLogger(__name__)

FAILURE_KEPT_S = 3600.0
"""How long a failure is kept for a repeat; sidecars repeat within minutes, unless the claim was deleted meanwhile."""


class Job:
    """One copy in the background, by the id of what it makes."""

    def __init__(self, record: Record | SnapshotRecord, transfer: Transfer) -> None:
        self.record = record
        self.transfer = transfer
        self.failure: BaseException | None = None
        self.is_waiting = True
        """Whether others run, and it has not begun."""
        self.future: Future[None] | None = None
        """Its turn, if it has to wait for one."""
        self._ended = threading.Event()
        self._ended_at = 0.0
        self._held = ExitStack()
        self._has_let_go = False
        self._keeping = threading.Lock()

    @property
    def kind(self) -> str:
        """What it makes: a snapshot, a restore or a clone."""
        return kind_of(self.record)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet (it may be waiting for its turn)."""
        return not self._ended.is_set()

    def is_forgotten(self, now: float) -> bool:
        """Whether it ended so long ago (time.monotonic) that nobody will ask how."""
        return self._ended.is_set() and now - self._ended_at > FAILURE_KEPT_S

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within so long."""
        return self._ended.wait(timeout_s)

    def keep(self, held: ExitStack) -> None:
        """Have it let go of these (locks) when it ends; at once, if it has."""
        with self._keeping:
            if not self._has_let_go:
                self._held.push(held)
                return
        held.close()

    def let_go(self) -> None:
        """Said by whoever runs it, when nothing is copied any more."""
        with self._keeping:
            self._has_let_go = True
        self._held.close()

    def end(self, failure: BaseException | None) -> None:
        """Said by whoever runs it."""
        self.failure = failure
        self._ended_at = time.monotonic()
        self._ended.set()

    def progress(self) -> str:
        """For a message: how far it is."""
        if not self.transfer.total_bytes:
            return f"{self.transfer.done_bytes} bytes copied"
        return f"{self.transfer.done_bytes} of {self.transfer.total_bytes} bytes copied"


@dataclass(frozen=True, slots=True)
class Counts:
    """The background copies of a driver, by kind and by how they stand or ended."""

    copying: Counter[tuple[str, str]]
    """(kind, "running" or "waiting") to how many, now."""
    ended: Counter[tuple[str, str]]
    """(kind, "done", "failed" or "stopped") to how many, since the start."""
    copied_bytes: int
    """Moved since the start, also by copies that are not in the background."""


class Jobs:
    """The background copies of one driver; at most `workers` run at once, the others wait.

    Without workers each runs in the call that begins it.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="copy") if workers else None
        self._guard = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._ended: Counter[tuple[str, str]] = Counter()
        self._copied_bytes = 0
        self._ending = False

    def start(self, record: Record | SnapshotRecord, transfer: Transfer, work: Callable[[], None]) -> Job:
        """Run `work`."""
        job = Job(record, transfer)
        now = time.monotonic()
        with self._guard:
            if self._ending:
                raise Aborted("the driver is stopping: repeat when it is back")
            for old in [made_id for made_id, one in self._jobs.items() if one.is_forgotten(now)]:
                del self._jobs[old]
            self._jobs[record.id] = job
        if self._pool is None:
            self._run(job, work)
            return job
        try:
            job.future = self._pool.submit(self._run, job, work)
        except RuntimeError as error:
            with self._guard:
                del self._jobs[record.id]
            raise Aborted(f"the copy cannot begin now: {error}: repeat") from error
        return job

    def find(self, made_id: str) -> Job | None:
        """The job that makes this, or that failed to and has not told anybody yet."""
        with self._guard:
            return self._jobs.get(made_id)

    def find_name(self, name: str, kind: type[Record] | type[SnapshotRecord]) -> Job | None:
        """The same, by the name that the volume or snapshot has for Kubernetes."""
        with self._guard:
            jobs = list(self._jobs.values())
        return next((job for job in jobs if isinstance(job.record, kind) and job.record.name == name), None)

    def all(self) -> list[Job]:
        """The jobs that run or wait."""
        with self._guard:
            return [job for job in self._jobs.values() if job.is_running]

    def counts(self) -> Counts:
        """What there is to count."""
        with self._guard:
            running = [job for job in self._jobs.values() if job.is_running]
            copying = Counter((job.kind, "waiting" if job.is_waiting else "running") for job in running)
            moved = self._copied_bytes + sum(job.transfer.done_bytes for job in running)
            return Counts(copying, self._ended.copy(), moved)

    def add_copied(self, transfer: Transfer) -> None:
        """Count what a copy has moved that was no job."""
        with self._guard:
            self._copied_bytes += transfer.done_bytes

    def take_failure(self, made_id: str) -> None:
        """Raise what a job for this has ended in, once: the next call begins anew."""
        with self._guard:
            job = self._jobs.get(made_id)
            if job is None or job.is_running:
                return
            del self._jobs[made_id]
        if job.failure is not None:
            raise job.failure

    def call_off(self, made_id: str) -> bool:
        """Have a job end soon without a result; whether there is one still running."""
        job = self.find(made_id)
        if job is None:
            return False
        job.transfer.stop()
        if self._cancel(job):
            # It waits for its turn, and shall not keep its locks until then.
            self._run(job, lambda: None)
        if not job.wait(1.0):
            return True
        with self._guard:
            self._jobs.pop(made_id, None)
        return False

    def end(self) -> None:
        """Have all end soon, and begin no more: what is half made is removed."""
        with self._guard:
            self._ending = True
        for job in self.all():
            job.transfer.stop()

    def stop(self, timeout_s: float) -> bool:
        """The same, and wait for it; False: one has not ended in time (it syncs, or removes what it made)."""
        self.end()
        deadline = time.monotonic() + timeout_s
        ended = all(job.wait(max(0.0, deadline - time.monotonic())) for job in self.all())
        if self._pool is not None:
            self._pool.shutdown(wait=ended)
        return ended

    def _cancel(self, job: Job) -> bool:
        """Whether its turn was taken from it now: to one caller, for a future says yes each time."""
        with self._guard:
            return job.future is not None and not job.future.cancelled() and job.future.cancel()

    def _run(self, job: Job, work: Callable[[], None]) -> None:
        failure: BaseException | None = None
        result = "done"
        job.is_waiting = False
        try:
            try:
                job.transfer.check()
                work()
            finally:
                job.let_go()
        except Stopped as error:
            result = "stopped"
            failure = Aborted(f"{job.record.id!r}: {error}: repeat, and it begins anew")
        except Exception as error:  # noqa: BLE001 - told to the next call, as if it had happened there
            result = "failed"
            failure = error
            log.error("copy %s failed: %s", job.record.id, error)
        with self._guard:
            if failure is None:
                self._jobs.pop(job.record.id, None)
            self._ended[job.kind, result] += 1
            self._copied_bytes += job.transfer.done_bytes
            job.end(failure)


def kind_of(record: Record | SnapshotRecord) -> str:
    """What a copy with this record is called."""
    if isinstance(record, SnapshotRecord):
        return "snapshot"
    return "clone" if record.source_kind is SourceKind.VOLUME else "restore"
