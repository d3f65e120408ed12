# SPDX-License-Identifier: Apache-2.0
"""`orlop snapshots`, `snapshot`, `restore`, `clone` against a driver on a socket, run as a user runs them."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.unit.test_cli import orlop, process
from tests.unit.test_snapshots import Scene
from tests.unit.wire import directory, driver_over, memory_pool, serving

MIB = 1 << 20
CLAIM = {"csi.storage.k8s.io/pvc/name": "database", "csi.storage.k8s.io/pvc/namespace": "shop"}


class Here(Scene):
    """A driver, its configuration in a file, and the commands that ask it."""

    def orlop(self, *arguments: str) -> Result:
        return orlop(
            *arguments, "--endpoint", f"unix://{self.base}/csi.sock", "--config", self.base / "orlop.toml"
        )

    def json(self, *arguments: str) -> Any:
        done = self.orlop(*arguments, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)


@contextmanager
def serve(more: str = "") -> Iterator[Here]:
    with directory() as base:
        text = memory_pool(base / "mem", more=more)
        (base / "orlop.toml").write_text(text)
        with driver_over(text) as driver, serving(driver.handlers, base) as client:
            yield Here(client, base, driver)


@pytest.fixture
def here() -> Iterator[Here]:
    with serve() as made:
        yield made


def test_a_volume_goes_there_and_back(here: Here) -> None:
    volume = here.create("pvc-1", parameters=CLAIM)
    (here.data(volume.volume_id) / "file").write_text("mine")

    taken = here.json("snapshot", "shop/database", "before")
    restored = here.json("restore", taken["snapshot"], "back", "--size", "2Mi")
    cloned = here.json("clone", "pvc-1", "like-it", "--parameter", "mode=0700")

    assert (taken["name"], taken["size_bytes"]) == ("before", MIB)
    assert restored["size_bytes"] == 2 * MIB
    for made in (restored, cloned):
        assert (here.data(made["volume"]) / "file").read_text() == "mine"
    assert here.json("snapshot", volume.volume_id, "before") == taken
    for snapshot in (taken["snapshot"], "before"):
        assert here.json("restore", snapshot, "back", "--size", "2Mi") == restored
    (row,) = here.json("snapshots")["snapshots"]
    assert row["id"] == taken["snapshot"]
    assert (row["source"], row["claim"], row["pool"]) == (volume.volume_id, "shop/database", "mem")
    assert (row["ready"], row["size_bytes"], row["copied_bytes"]) == (True, MIB, None)
    assert abs(row["created_at"] - time.time()) < 60


def test_what_is_told_to_people(here: Here) -> None:
    volume = here.create("pvc-1", parameters=CLAIM)
    assert "There are no snapshots." in here.orlop("snapshots").stdout

    taken = here.orlop("snapshot", "pvc-1").stdout
    listed = here.orlop("snapshots").stdout
    cloned = here.orlop("clone", "pvc-1", "another").stdout

    snapshot_id = here.listed()[0]
    assert taken.startswith(f"ready {snapshot_id} (1 MiB)")
    assert f"{snapshot_id}\n    of shop/database, 1 MiB, ready\n    taken 20" in listed
    assert cloned.startswith("made mem-")
    assert "volumeHandle" in cloned
    assert volume.volume_id not in cloned


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("snapshot", "nothing"), "'nothing': no volume of this id, claim (namespace/name) or name"),
        (("snapshot", "twice"), "'twice': no volume"),
        (("snapshot", "shop/database"), "several volumes are called so"),
        (("clone", "one", "two", "--size", "big"), "--size: 'big' is not a size"),
        (("clone", "one", "two", "--size", "1Ki"), "OUT_OF_RANGE: capacity_range.required_bytes 1024"),
        (("clone", "one", "two", "--pool", "slow"), "INVALID_ARGUMENT: parameters.pool 'slow': no such pool"),
        (("clone", "one", "two", "--block"), "has no block volumes"),
        (("clone", "one", "two", "--parameter", "mode"), "--parameter 'mode': write KEY=VALUE"),
        (("clone", "one", "two", "--parameter", "colour=blue"), "unknown key 'colour'"),
        (("clone", "one", "other"), "ALREADY_EXISTS: name 'other'"),
        (("restore", "no-such-snapshot", "two"), "'no-such-snapshot': no snapshot of this id or name"),
        (("restore", "mem-00000000-" + 32 * "0", "two"), "a pool that this node does not have"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(here: Here, arguments: tuple[str, ...], words: str) -> None:
    here.create("one", parameters=CLAIM)
    here.create("other", parameters=CLAIM)

    done = here.orlop(*arguments)

    assert done.exit_code == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [("snapshots",), ("snapshot", "v"), ("restore", "s", "v"), ("clone", "v", "w")]
)
def test_without_a_driver_nothing_can_be_done(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = orlop(*arguments, "--endpoint", f"unix://{tmp_path}/none.sock")

    assert done.exit_code == 1
    assert "nobody answers" in done.stderr


def test_copies_that_take_long_are_waited_for_and_told_of() -> None:
    with serve(f"instant_copies = false\ncopy_bandwidth = {8 * MIB}") as here:
        volume = here.create("v", 64 * MIB)
        (here.data(volume.volume_id) / "file").write_bytes(os.urandom(32 * MIB))
        answers: list[Any] = []

        def ask() -> None:
            # A process of its own: what runs commands in this one runs one at a time.
            options = ("--endpoint", f"unix://{here.base}/csi.sock", "--json")
            answers.append(json.loads(process("snapshot", volume.volume_id, "s", *options).stdout))

        asking = threading.Thread(target=ask)
        asking.start()
        seen: list[Any] = []
        while asking.is_alive():
            seen.extend(here.json("snapshots")["snapshots"])
            time.sleep(0.2)
        asking.join()
        made = here.json("clone", "v", "c")

    copied = [row["copied_bytes"] for row in seen if not row["ready"]]
    assert len(set(copied)) > 1, seen
    assert copied == sorted(copied)
    assert max(copied) <= 32 * MIB
    assert answers[0]["size_bytes"] == made["size_bytes"] == 64 * MIB


def test_a_volume_that_is_being_copied_is_told_of_too() -> None:
    with serve(f"instant_copies = false\ncopy_bandwidth = {MIB}") as here:
        volume = here.create("v", 64 * MIB)
        (here.data(volume.volume_id) / "file").write_bytes(os.urandom(32 * MIB))
        here.clone("c", volume.volume_id, 64 * MIB)

        (copy,) = here.json("snapshots")["copies"]
        shown = here.orlop("snapshots").stdout

    assert copy["id"] == next(iter(here.driver.pools)).id_of("c")
    assert 0 < copy["copied_bytes"] < 32 * MIB
    assert f"{copy['id']}\n    a volume: " in shown
    assert "copied" in shown


def test_volumes_tell_what_their_class_says(here: Here) -> None:
    here.create("v", parameters=CLAIM, mutable_parameters={"retention": "24h"})
    here.create("plain")

    rows = {row["name"]: row["mutable"] for row in here.json("volumes")["volumes"]}
    shown = here.orlop("volumes").stdout

    assert rows == {"v": {"retention": "24h"}, "plain": {}}
    assert shown.count("    retention=24h\n") == 1
