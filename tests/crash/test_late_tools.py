# SPDX-License-Identifier: Apache-2.0
"""A killed driver's mkfs lives on, and may come late: it must not find the image that the next try is making."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.tracer import run_until
from tests.rig import KINDS, volume
from tests.scene import clean_place, in_pod, set_up

pytestmark = pytest.mark.crash

IMAGE = next(kind for kind in KINDS if kind.name == "image")
TIMEOUT_S = 20.0
# What it would format is opened once `begin` is there, and written to once `write` is.
LATE = """#!{python}
import os, sys, time
def wait(name):
    while not os.path.exists("{folder}/" + name): time.sleep(0.01)
wait("begin")
try:
    fd = os.open(next(word for word in sys.argv if "/staging/" in word), os.O_RDWR)
except FileNotFoundError:
    open("{folder}/missed", "w")
    sys.exit(1)
open("{folder}/found", "w")
wait("write")
os.pwrite(fd, bytes(1 << 20), 0)
open("{folder}/written", "w")
"""
# The next try's: done, but for its ending, until the late one has looked.
NEXT = """#!{python}
import os, subprocess, sys, time
subprocess.run(["{real}", *sys.argv[1:]], check=True)
open("{folder}/begin", "w")
while not os.path.exists("{folder}/missed") and not os.path.exists("{folder}/found"): time.sleep(0.01)
"""


def install(tool: str, text: str, place: Path, name: str) -> str:
    """A PATH on which `tool` is this script."""
    folder = place / name
    folder.mkdir()
    real = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    script = folder / tool
    script.write_text(text.format(python=sys.executable, folder=place, real=real))
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def await_file(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def test_late_mkfs_finds_nothing_to_format(monkeypatch: pytest.MonkeyPatch) -> None:
    with clean_place() as place, set_up(IMAGE, place) as scene:
        late = install("mkfs.ext4", LATE, place, "late")
        then = install("mkfs.ext4", NEXT, place, "next")

        def action() -> Callable[[], object]:
            os.environ["PATH"] = late
            rig = scene.open()
            return lambda: rig.controller.create_volume(volume("a", IMAGE.size_bytes))

        step = 1
        while not (outcome := run_until(action, step)).killed_after.endswith(("fork", "clone", "clone3")):
            assert not outcome.finished
            step += 1

        monkeypatch.setenv("PATH", then)
        rig = scene.open()
        volume_id = rig.controller.create_volume(volume("a", IMAGE.size_bytes)).id
        with in_pod(scene, rig, volume_id) as path:
            (path / "x").write_bytes(b"precious" * 4096)
        (place / "write").touch()
        if (place / "found").exists():
            await_file(place / "written")

        assert not (place / "found").exists()
        with in_pod(scene, rig, volume_id) as path:
            assert (path / "x").read_bytes() == b"precious" * 4096
        image = rig.pool.catalog.get(volume_id).path / "image"
        subprocess.run(["/usr/sbin/e2fsck", "-fn", image], check=True, capture_output=True)
