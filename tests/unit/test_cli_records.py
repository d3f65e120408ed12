# SPDX-License-Identifier: Apache-2.0
"""Reading a pool beside a running driver: what is there is told, what is damaged is told, nothing is changed."""

from pathlib import Path

import msgspec
import pytest

from csi_driver.catalog import Catalog
from csi_driver.cli import places, records
from csi_driver.cli.doctor.finding import Level
from csi_driver.cli.doctor.pools import look_at_pool
from csi_driver.config import PoolConfig
from csi_driver.model import AccessType, Record, VolumeId, name_hash


class Pool:
    """A pool on disk, made as the driver makes it, and held open as a driver holds it."""

    def __init__(self, root: Path) -> None:
        self.config = PoolConfig("fast", "directory", root, options={"enforce_capacity": False})
        self.catalog = Catalog.open(root, "directory")

    def add(self, name: str) -> str:
        volume_id = str(VolumeId("fast", self.catalog.tag, name_hash(name)))
        home = self.catalog.begin(volume_id)
        (home.path / "data").mkdir()
        record = Record(
            schema=1,
            id=volume_id,
            name=name,
            size_bytes=4096,
            access_type=AccessType.MOUNT,
            pvc_namespace="web",
            pvc_name=f"claim-{name}",
        )
        self.catalog.commit(home, record)
        return volume_id

    def record_file(self, volume_id: str) -> Path:
        return self.config.root / "volumes" / volume_id / "volume.json"

    def problems(self) -> list[str]:
        return [finding.what for finding in look_at_pool(self.config) if finding.level is Level.ERROR]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool")


def tree(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(root.rglob("*"))}


def test_records_are_read_while_a_driver_holds_the_pool(pool: Pool) -> None:
    volume_id = pool.add("one")

    contents = records.read_pool(pool.config)

    assert contents.problem == ""
    (home,) = contents.homes
    assert (home.id, home.problem) == (volume_id, "")
    assert home.record is not None
    assert home.record.pvc_name == "claim-one"


def test_a_pool_that_is_not_made_yet_is_told(tmp_path: Path) -> None:
    config = PoolConfig("fast", "image", tmp_path)

    assert "no pool yet" in records.read_pool(config).problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "volume.json"), (b'{"schema": 1}', "missing required field"), (None, "is missing")],
)
def test_a_damaged_record_is_told_and_the_others_are_read(
    pool: Pool, content: bytes | None, expected: str
) -> None:
    damaged, whole = pool.add("damaged"), pool.add("whole")
    pool.record_file(damaged).unlink()
    if content is not None:
        pool.record_file(damaged).write_bytes(content)

    homes = {home.id: home for home in records.read_pool(pool.config).homes}

    assert expected in homes[damaged].problem
    assert homes[damaged].record is None
    assert homes[whole].problem == ""


def test_a_record_of_a_newer_version_is_told(pool: Pool) -> None:
    volume_id = pool.add("one")
    raw = msgspec.json.decode(pool.record_file(volume_id).read_bytes(), type=dict[str, object])
    pool.record_file(volume_id).write_bytes(msgspec.json.encode(raw | {"schema": 99}))

    (home,) = records.read_pool(pool.config).homes

    assert "newer version" in home.problem


def test_doctor_finds_nothing_wrong_with_a_whole_pool(pool: Pool) -> None:
    pool.add("one")

    assert pool.problems() == []


def test_doctor_tells_damage_and_leftovers(pool: Pool) -> None:
    volume_id = pool.add("one")
    (pool.config.root / "volumes" / volume_id / "data").rmdir()
    pool.catalog.begin("fast-half-made")

    assert any("neither image nor data" in problem for problem in pool.problems())
    warnings = [finding for finding in look_at_pool(pool.config) if finding.level is Level.WARNING]
    assert any("fast-half-made" in finding.what for finding in warnings)


def test_doctor_leaves_a_pool_as_it_is(pool: Pool) -> None:
    pool.add("one")
    before = tree(pool.config.root)

    list(look_at_pool(pool.config))

    assert tree(pool.config.root) == before


def test_doctor_says_what_to_do_about_everything_that_is_not_well(pool: Pool) -> None:
    pool.record_file(pool.add("one")).write_bytes(b"{")

    findings = [finding for finding in look_at_pool(pool.config) if finding.level is not Level.OK]

    assert findings
    assert all(finding.why and finding.remedy for finding in findings)


def test_doctor_tells_a_root_that_is_not_mounted(tmp_path: Path) -> None:
    config = PoolConfig("fast", "image", tmp_path, mounted=True)

    (finding,) = look_at_pool(config)

    assert finding.level is Level.ERROR
    assert "nothing is mounted there" in finding.what


def test_a_volume_that_is_mounted_nowhere_has_no_places(pool: Pool) -> None:
    volume_id = pool.add("one")

    found = places.find(records.read_pool(pool.config).homes)[volume_id]

    assert (found.published, found.staged, found.devices) == ([], [], [])
