# SPDX-License-Identifier: Apache-2.0
"""A pool whose store may hang, in a child: it does all that a pool does, and a child that hangs is nobody's trouble."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver import apart, backends
from csi_driver.apart import Deadlines, Order
from csi_driver.backends.base import Store
from csi_driver.catalog import Home
from csi_driver.errors import AlreadyExists, NotFound, ResourceExhausted, Unavailable
from csi_driver.linux.remote import Breaker
from csi_driver.model import MIB, Source, SourceKind, TopologyRequirement, VolumeRequest, VolumeSpec
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from tests.rig import KINDS, Rig, configure, volume, wait_until

DEADLINES = Deadlines(open_s=60.0, call_s=30.0, copy_s=30.0)


@pytest.fixture
def breaker() -> Breaker:
    return Breaker("files.example.org")


@pytest.fixture
def rig(tmp_path: Path, breaker: Breaker) -> Iterator[Rig]:
    with open_apart(tmp_path / "p", breaker) as made:
        yield made


def open_apart(root: Path, breaker: Breaker) -> Rig:
    configured = configure(KINDS[0], root, extra='server = "files.example.org"\n')
    catalog, backend = apart.stand_ins(configured, backends.create(configured), breaker, DEADLINES)
    return Rig(Pools({"p": Pool(configured, catalog, backend)}))


def children() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and b"apart_worker" in words:
            found.append(int(entry.name))
    return found


def kill(child: int) -> None:
    """Kill it; it is dead when this returns, and its parent has yet to see that."""
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


def test_volumes_are_made_listed_copied_and_deleted(rig: Rig, tmp_path: Path) -> None:
    made = rig.controller.create_volume(volume("a", 16 * MIB))
    assert rig.controller.create_volume(volume("a", 16 * MIB)) == made
    (tmp_path / "p/volumes" / made.id / "data/file").write_text("content")

    snapshot = rig.snapshots.create("s", made.id, {}, TopologyRequirement())
    source = Source(SourceKind.SNAPSHOT, snapshot.record.id)
    asked = volume("b", 16 * MIB)
    clone = rig.controller.create_volume(
        VolumeRequest(asked.name, asked.capabilities, asked.capacity_range, asked.parameters, source=source)
    )
    assert (tmp_path / "p/volumes" / clone.id / "data/file").read_text() == "content"
    listed, _ = rig.controller.list_volumes(0, "")
    assert {one.id for one in listed} == {made.id, clone.id}

    for one in (made, clone):
        rig.controller.delete_volume(one.id)
        rig.controller.delete_volume(one.id)
    rig.snapshots.delete(snapshot.record.id)
    rig.settle()
    assert not os.listdir(tmp_path / "p/volumes") and not os.listdir(tmp_path / "p/trash")
    assert len(children()) == 2  # one for copies


def test_errors_arrive_as_they_were_raised(rig: Rig) -> None:
    rig.controller.create_volume(volume("a", 16 * MIB))

    with pytest.raises(AlreadyExists):
        rig.controller.create_volume(volume("a", 32 * MIB))
    with pytest.raises(NotFound):
        rig.controller.get_volume(rig.pool.id_of("none"))
    with pytest.raises(ResourceExhausted):
        rig.controller.create_volume(volume("b", 4096 * MIB))


def test_nothing_is_opened_before_it_is_wanted(rig: Rig, tmp_path: Path) -> None:
    assert not children() and not (tmp_path / "p").exists()


def test_what_volumes_have_written_is_never_put_beside_older_numbers_of_the_store(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.controller.create_volume(volume("a", 16 * MIB))
    child, free = rig.pool.backend._child, [1 << 30]  # type: ignore[attr-defined]
    real = child.do

    def do(order: Order) -> object:
        match order.method:
            case "store":
                return Store(2 << 30, free[0])
            case "written_bytes":
                return (1 << 30) - free[0]
        return real(order)

    monkeypatch.setattr(child, "do", do)
    rig.pool.refresh()
    before = rig.pool.room()
    free[0] -= 16 * MIB  # the volume writes all it may
    rig.pool.refresh()
    assert rig.pool.room() == before


def test_numbers_of_the_store_that_a_count_has_overtaken_are_not_kept(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = rig.pool.catalog.home(rig.controller.create_volume(volume("a", 16 * MIB)).id)
    backend, asked = rig.pool.backend, []
    child = backend._child  # type: ignore[attr-defined]
    real = child.do

    def do(order: Order) -> object:
        found = real(order)
        if order.method == "store":
            asked.append(found)
            if len(asked) == 1:
                backend.written_bytes(home)
        return found

    backend.written_bytes(home)
    monkeypatch.setattr(child, "do", do)
    for _ in range(3):
        backend.store()
    assert len(asked) == 2


def test_a_child_that_hangs_is_killed_and_its_server_left_alone(
    rig: Rig, breaker: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.controller.create_volume(volume("a", 16 * MIB))
    (child,) = children()
    os.kill(child, signal.SIGSTOP)

    with monkeypatch.context() as patch:
        hurried = replace(DEADLINES, call_s=0.5)
        patch.setattr(rig.pool.catalog._child, "_deadlines", hurried)  # type: ignore[attr-defined]
        with pytest.raises(Unavailable, match=r"did not end within 0\.5 s: its process is in do_signal_stop"):
            rig.controller.get_volume(rig.pool.id_of("a"))
    assert not children()
    for _ in range(20):
        with pytest.raises(Unavailable, match="asked again in"):
            rig.controller.get_volume(rig.pool.id_of("a"))
    assert not children() and not rig.pool.is_present() and rig.pool.room() == 0
    entries = rig.health.of_volume(rig.pool, rig.pool.catalog.home(rig.pool.id_of("a")))
    assert [entry.status.name for entry in entries] == ["INACCESSIBLE"]

    time.sleep(2.1)
    assert rig.controller.get_volume(rig.pool.id_of("a")).id
    assert breaker.problem() == ""


def test_a_child_that_dies_in_a_call_is_replaced(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", 16 * MIB))
    (child,) = children()
    kill(child)

    assert rig.controller.get_volume(made.id).id == made.id


def test_another_filesystem_in_the_pool_s_place_is_not_taken_for_it(rig: Rig, tmp_path: Path) -> None:
    rig.controller.create_volume(volume("a", 16 * MIB))
    (tmp_path / "p").rename(tmp_path / "away")
    (tmp_path / "p").mkdir()
    (child,) = children()
    kill(child)

    with pytest.raises(Unavailable, match="not that of the pool"):
        rig.controller.create_volume(volume("b", 16 * MIB))
    assert not os.listdir(tmp_path / "p")


def test_two_drivers_that_find_an_empty_export_make_one_pool(tmp_path: Path, breaker: Breaker) -> None:
    with open_apart(tmp_path / "p", breaker) as one, open_apart(tmp_path / "p", breaker) as two:
        assert one.pool.catalog.tag == two.pool.catalog.tag


def test_what_is_being_made_outlives_a_child(
    rig: Rig, tmp_path: Path, breaker: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = rig.pool.backend.make

    def interrupted(home: Home, spec: VolumeSpec) -> None:
        make(home, spec)
        for child in children():
            kill(child)
        assert rig.pool.is_present()  # as maintenance asks every ten seconds
        with open_apart(tmp_path / "p", breaker) as two:
            two.settle()

    monkeypatch.setattr(rig.pool.backend, "make", interrupted, raising=False)
    made = rig.controller.create_volume(volume("a", 16 * MIB))

    with open_apart(tmp_path / "p", breaker) as two:
        assert two.pool.catalog.take(made.id)  # no child of the first one's has it yet


def test_a_child_ends_with_its_driver(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from csi_driver.linux.remote import Worker; "
        "worker = Worker.start('csi_driver.apart_worker', 'x'); print(worker.pid, flush=True); time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    child = int(driver.stdout.readline())
    time.sleep(0.5)
    driver.kill()
    driver.wait()
    driver.stdout.close()

    assert wait_until(lambda: not Path(f"/proc/{child}").exists()), "it goes on without anybody"
