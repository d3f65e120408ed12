# SPDX-License-Identifier: Apache-2.0
"""The leak check itself: it must see what tests can leave behind."""

import os
import subprocess
from pathlib import Path

from tests.kernel.conftest import look, sweep


def test_every_kind_of_leak_is_seen_and_swept(kernel_base: Path, workshop: Path) -> None:
    place = workshop / "place"
    place.mkdir()
    before = look(place)
    image, target = place / "image", place / "odd \\040\tname"
    image.write_bytes(bytes(1 << 20))
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
    loop = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    child = subprocess.Popen(["sleep", "60"])
    fd = os.open(image, os.O_RDONLY)

    leaked = look(place).beyond(before)
    child.kill()
    child.wait()
    os.close(fd)
    sweep(place)

    kinds = [line.partition(":")[0] for line in leaked]
    assert kinds == ["mounts", "loops", "children", "descriptors", "entries", "entries"]
    assert leaked[1] == f"loops: {loop.stdout.strip()} {image}"
    assert look(place).beyond(before) == []


def test_other_users_of_the_machine_are_not_looked_at(kernel_base: Path, workshop: Path) -> None:
    place, elsewhere = workshop / "place", workshop / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    before = look(place)

    subprocess.run(["mount", "-t", "tmpfs", "none", elsewhere], check=True)

    assert look(place).beyond(before) == []
