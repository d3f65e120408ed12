# SPDX-License-Identifier: Apache-2.0
"""Several clients at once, each a process of its own, so that none of them waits for another's interpreter."""

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from bench.client import Client, Kind, Places


@dataclass(frozen=True)
class Task:
    """What each client does: whole lives of volumes, or only their making; for a time, or so many of them."""

    kind: Kind
    name: str
    seconds: float = 0.0
    count: int = 0
    keep: bool = False


@dataclass(frozen=True)
class Done:
    """What the clients did together."""

    volumes: int
    seconds: float
    cpu_s: float
    """Processor time of all clients."""

    @property
    def per_second(self) -> float:
        return self.volumes / self.seconds


class Workers:
    """Clients of one socket, connected and waiting for tasks. Close it (or leave its `with`)."""

    def __init__(self, socket: Path, folder: Path, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, socket, folder, f"w{number}"), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)

    def run(self, task: Task) -> Done:
        """All of them do the task at once; RuntimeError if one fails."""
        began = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(task)
        answers: Sequence[tuple[int, float, str]] = [pipe.recv() for pipe in self._pipes]
        seconds = time.perf_counter() - began
        for _, _, failure in answers:
            if failure:
                raise RuntimeError(failure)
        return Done(sum(answer[0] for answer in answers), seconds, sum(answer[1] for answer in answers))


def _work(pipe: Connection, socket: Path, folder: Path, name: str) -> None:
    client = Client(socket)
    places = Places.make(folder, name)
    pipe.send("ready")
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        began = os.times()
        try:
            done, failure = _do(task, client, places, name), ""
        except Exception as error:  # noqa: BLE001 - it is told to the parent, which raises
            done, failure = 0, f"{name}: {error}"
        ended = os.times()
        pipe.send((done, ended.user - began.user + ended.system - began.system, failure))


def _do(task: Task, client: Client, places: Places, name: str) -> int:
    deadline = time.perf_counter() + task.seconds
    done = 0
    while done < task.count or time.perf_counter() < deadline:
        volume = f"{task.name}-{name}-{done}"
        if task.keep:
            client.create(task.kind, volume)
        else:
            client.lifecycle(task.kind, volume, places)
        done += 1
    return done
