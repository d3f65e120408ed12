# SPDX-License-Identifier: Apache-2.0
"""Databases under load are recovered from each snapshot, with every row that was committed before it."""

import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.model import MIB, Source, SourceKind, TopologyRequirement
from tests.conftest import require_tool
from tests.rig import SHARING, Rig, volume, wait_until
from tests.scene import Scene, clean_place, in_pod, set_up

SNAPSHOTS = 10


@pytest.fixture
def scene() -> Iterator[Scene]:
    with clean_place() as place, set_up(SHARING[0], place, 8 << 30) as scene:
        yield scene


def snapshots_under_load(
    rig: Rig, volume_id: str, write: Callable[[int], None], *, interval_s: float = 0.3
) -> list[tuple[str, int]]:
    """Snapshot ids, each with the last row that was committed before it was begun."""
    ending = threading.Event()
    committed = [0]
    failures: list[BaseException] = []

    def load() -> None:
        try:
            number = 0
            while not ending.is_set():
                number += 1
                write(number)
                committed[0] = number
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    writer = threading.Thread(target=load)
    writer.start()
    taken: list[tuple[str, int]] = []
    try:
        for number in range(SNAPSHOTS):
            time.sleep(interval_s)
            # On a slow disk that was no load yet.
            wait_until(lambda: committed[0] >= 2 * len(taken) + 2 or bool(failures))
            least = committed[0]
            made = rig.snapshots.create(f"s{number}", volume_id, {}, TopologyRequirement())
            assert made.ready
            taken.append((made.record.id, least))
    finally:
        ending.set()
        writer.join()
    assert not failures, failures
    assert taken[-1][1] > SNAPSHOTS, "no load"
    return taken


def restore(rig: Rig, snapshot_id: str) -> str:
    source = Source(SourceKind.SNAPSHOT, snapshot_id)
    request = replace(volume(f"r-{snapshot_id}", 512 * MIB), source=source)
    return rig.controller.create_volume(request).id


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite(scene: Scene, journal: str) -> None:
    rig = scene.open()
    origin = rig.controller.create_volume(volume("db", 512 * MIB)).id
    with in_pod(scene, rig, origin) as pod:
        with sqlite3.connect(pod / "db") as made:
            made.execute(f"pragma journal_mode={journal}")
            made.execute("create table rows (number integer primary key, filler text)")
        made.close()
        opened: list[sqlite3.Connection] = []

        def write(number: int) -> None:
            # A connection is its thread's own.
            if not opened:
                opened.append(sqlite3.connect(pod / "db", check_same_thread=False))
                opened[0].execute("pragma synchronous=full")
            with opened[0]:
                opened[0].execute("insert into rows values (?, ?)", (number, "x" * 500))

        taken = snapshots_under_load(rig, origin, write)
        opened[0].close()

    for snapshot_id, least in taken:
        with in_pod(scene, rig, restore(rig, snapshot_id), "restored") as pod:
            database = sqlite3.connect(pod / "db")
            assert database.execute("pragma integrity_check").fetchone() == ("ok",)
            count, last = database.execute("select count(*), max(number) from rows").fetchone()
            database.close()
        assert count == last >= least


def postgres() -> Path:
    """Where its programs are, as Debian installs them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        require_tool("postgres-of-the-Debian-package-postgresql")
    return found[-1].parent


class Postgres:
    """A server over a directory, reached by its socket there."""

    def __init__(self, programs: Path, data: Path, sockets: Path) -> None:
        self._programs = programs
        self._data = data
        self._sockets = sockets

    def _run(self, *argv: str | Path) -> str:
        command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=120)
        assert done.returncode == 0, (argv, done.stderr, done.stdout)
        return done.stdout

    def initialise(self) -> None:
        self._run(self._programs / "initdb", "-D", self._data, "--auth=trust", "--no-instructions")

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self._sockets} -c shared_buffers=16MB"
        log = self._sockets / "log"
        self._run(self._programs / "pg_ctl", "-D", self._data, "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self._run(self._programs / "pg_ctl", "-D", self._data, "-w", "-m", "fast", "stop")

    def ask(self, query: str) -> str:
        return self._run(
            self._programs / "psql", "-h", self._sockets, "-d", "postgres", "-Atqc", query
        ).strip()


def test_postgresql(scene: Scene) -> None:
    programs = postgres()
    require_tool("setpriv")
    rig = scene.open()
    origin = rig.controller.create_volume(volume("db", 512 * MIB)).id
    sockets = scene.place / "sockets"
    sockets.mkdir(mode=0o777)
    scene.place.chmod(0o755)
    shutil.chown(sockets, "postgres")
    with in_pod(scene, rig, origin) as pod:
        (pod / "data").mkdir(mode=0o700)
        shutil.chown(pod / "data", "postgres")
        server = Postgres(programs, pod / "data", sockets)
        server.initialise()
        server.start()
        try:
            server.ask("create table rows (number integer primary key, filler text)")
            taken = snapshots_under_load(
                rig,
                origin,
                lambda number: _ignore(server.ask(f"insert into rows values ({number}, repeat('x', 500))")),
                interval_s=1.0,
            )
        finally:
            server.stop()

    for snapshot_id, least in taken:
        with in_pod(scene, rig, restore(rig, snapshot_id), "restored") as pod:
            (pod / "data" / "postmaster.pid").unlink()
            server = Postgres(programs, pod / "data", sockets)
            server.start()
            try:
                count, last = server.ask("select count(*), max(number) from rows").split("|")
            finally:
                server.stop()
        assert int(count) == int(last) >= least


def _ignore(_answer: str) -> None:
    return None
