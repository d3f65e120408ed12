# SPDX-License-Identifier: Apache-2.0
"""`preallocate = "zeroed"`: every block of a thick image is written when it is made, and the volume is none the worse."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.linux import files
from csi_driver.model import Source, SourceKind, TopologyRequirement
from tests.kernel.conftest import MakePool
from tests.rig import Kind, Rig, configure, open_rig, volume

MIB = 1 << 20
ZEROED = Kind("zeroed", "image", options='preallocate = "zeroed"\n')
ALLOCATED = Kind("allocated", "image")


def _unwritten_bytes(image: Path) -> int:
    """Bytes in extents that filefrag calls unwritten."""
    said = subprocess.run(["filefrag", "-v", "-b1", image], check=True, capture_output=True, text=True).stdout
    lengths = [line.split(":")[3] for line in said.splitlines() if "unwritten" in line]
    return sum(int(length) for length in lengths)


def _image(rig: Rig, volume_id: str) -> Path:
    return rig.pool.catalog.get(volume_id).path / "image"


@pytest.mark.parametrize(
    "kind, unwritten", ((ZEROED, False), (ALLOCATED, True)), ids=lambda value: str(value)
)
def test_blocks_of_a_thick_image_are_written_as_the_pool_says(
    scratch: Path, kind: Kind, unwritten: bool
) -> None:
    with open_rig(configure(kind, scratch / "pool")) as rig:
        made = rig.controller.create_volume(volume("v", 64 * MIB))
        image = _image(rig, made.id)

        assert (_unwritten_bytes(image) > 32 * MIB) is unwritten
        assert image.stat().st_blocks * 512 >= 64 * MIB
        checked = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


def test_growth_is_zeroed_too_and_a_thin_volume_is_not(scratch: Path) -> None:
    with open_rig(configure(ZEROED, scratch / "pool")) as rig:
        thick = rig.controller.create_volume(volume("thick", 32 * MIB))
        thin = rig.controller.create_volume(volume("thin", 32 * MIB, provisioning="thin"))

        home = rig.pool.catalog.get(thick.id)
        rig.pool.grow(home, rig.pool.catalog.read(home), 64 * MIB)

        assert _image(rig, thick.id).stat().st_size == 64 * MIB
        assert _unwritten_bytes(_image(rig, thick.id)) == 0
        assert _image(rig, thin.id).stat().st_blocks * 512 < 16 * MIB


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
@pytest.mark.parametrize("kind", (ZEROED, ALLOCATED), ids=lambda kind: str(kind.name))
def test_a_copy_of_a_thick_volume_is_as_thick(make_pool: MakePool, fs_type: str, kind: Kind) -> None:
    with open_rig(configure(kind, make_pool(fs_type, 1024 * MIB) / "pool")) as rig:
        origin = rig.controller.create_volume(volume("v", 32 * MIB))
        taken = rig.snapshots.create("s", origin.id, {}, TopologyRequirement()).record.id
        copies = [
            rig.controller.create_volume(replace(volume(name, size), source=source)).id
            for name, source in (
                ("restored", Source(SourceKind.SNAPSHOT, taken)),
                ("cloned", Source(SourceKind.VOLUME, origin.id)),
            )
            for size in (32 * MIB, 48 * MIB)
            for name in (f"{name}-{size}",)
        ]
        thin = volume("thin", 48 * MIB, provisioning="thin")
        sparse = rig.controller.create_volume(replace(thin, source=Source(SourceKind.SNAPSHOT, taken)))

        for made in copies:
            image = _image(rig, made)
            assert image.stat().st_blocks * 512 >= image.stat().st_size
            assert (_unwritten_bytes(image) == 0) is (kind is ZEROED)
        assert _image(rig, sparse.id).stat().st_blocks * 512 < 44 * MIB


def test_zeros_are_written_only_where_nothing_is(scratch: Path) -> None:
    fd = os.open(scratch / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        files.allocate(fd, 0, 16 * MIB)
        os.pwrite(fd, b"first", 0)
        os.pwrite(fd, b"middle", 8 * MIB + 12345)
        os.pwrite(fd, b"outside", 15 * MIB)

        files.write_zeros(fd, 0, 12 * MIB)

        os.fsync(fd)
        content = os.pread(fd, 16 * MIB, 0)
        assert content[:5] == b"first"
        assert content[8 * MIB + 12345 :][:6] == b"middle"
        assert content[15 * MIB :][:7] == b"outside"
        assert sum(content) == sum(b"firstmiddleoutside")
        unwritten = _unwritten_bytes(scratch / "file")
        assert 3 * MIB <= unwritten <= 4 * MIB
    finally:
        os.close(fd)
