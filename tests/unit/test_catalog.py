# SPDX-License-Identifier: Apache-2.0
"""Homes and records on disk."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csi_driver.catalog import Catalog, Home
from csi_driver.errors import Aborted, ConfigurationError, Error, NotFound
from csi_driver.identity import SCHEMA
from csi_driver.model import AccessType, Record, VolumeId, name_hash


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(tmp_path / "pool", "memory")
    yield catalog
    catalog.close()


def id_in(catalog: Catalog, name: str = "pvc-1", pool: str = "p") -> str:
    return str(VolumeId(pool, catalog.tag, name_hash(name)))


def record_of(volume_id: str, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "id": volume_id,
        "name": "pvc-1",
        "size_bytes": 4096,
        "access_type": AccessType.MOUNT,
        "parameters": {"pool": "p"},
        "created_at": 1.5,
    }
    return Record(**(fields | changes))


def commit(catalog: Catalog, name: str = "pvc-1") -> Home:
    volume_id = id_in(catalog, name)
    return catalog.commit(catalog.begin(volume_id), record_of(volume_id))


def test_new_pool_is_laid_out(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "pool"

    with_parents = Catalog.open(root, "memory")
    with_parents.close()

    assert {path.name for path in root.iterdir()} == {
        "groups",
        "lock",
        "pool.json",
        "snapshots",
        "staging",
        "trash",
        "volumes",
    }
    assert json.loads((root / "pool.json").read_text())["backend"] == "memory"
    assert (root / "volumes").stat().st_mode & 0o777 == 0o700


def test_pool_keeps_its_tag(tmp_path: Path) -> None:
    first = Catalog.open(tmp_path, "memory")
    tag = first.tag
    first.close()

    second = Catalog.open(tmp_path, "memory")
    second.close()

    assert second.tag == tag


def test_second_user_of_a_pool_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = Catalog.open(tmp_path, "memory")

    with pytest.raises(ConfigurationError, match="another process uses this pool"):
        Catalog.open(tmp_path, "memory")

    first.close()
    Catalog.open(tmp_path, "memory").close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"schema": 99, "uuid": "x", "backend": "memory"}, "newer version .*schema 99"),
        ({"schema": 1, "uuid": "x", "backend": "image"}, "backend 'image'.*says 'memory'"),
        ("{", "damaged"),
    ],
)
def test_pool_of_another_kind_is_refused_and_let_go(tmp_path: Path, content: object, said: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "pool.json").write_text(text)

    for _ in range(2):  # The lock is not kept by the refusal.
        with pytest.raises(ConfigurationError, match=said):
            Catalog.open(tmp_path, "memory")

    assert (tmp_path / "pool.json").read_text() == text


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigurationError, match="cannot be opened or made"):
        Catalog.open(tmp_path / "file", "memory")


def test_refusal_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "pool.json").write_text("{")
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(ConfigurationError):
        Catalog.open(tmp_path, "memory")

    assert len(os.listdir("/proc/self/fd")) == before


def test_volume_exists_from_its_commit_on_and_not_before(catalog: Catalog) -> None:
    volume_id = id_in(catalog)

    staged = catalog.begin(volume_id)
    assert catalog.find(volume_id) is None
    assert catalog.ids() == []

    home = catalog.commit(staged, record_of(volume_id))
    assert catalog.find(volume_id) == home
    assert catalog.ids() == [volume_id]
    assert list(catalog.staged()) == []
    assert catalog.read(home) == record_of(volume_id)


def test_unknown_volume_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        catalog.get(id_in(catalog))


@pytest.mark.parametrize(
    "volume_id", ["", ".", "..", "../volumes", "/etc", "a/b", "p-00000000-" + "0" * 32, "\0", "p"]
)
def test_what_is_no_id_of_this_pool_is_never_looked_for(catalog: Catalog, volume_id: str) -> None:
    (catalog.root / "volumes" / "p").mkdir()

    assert catalog.find(volume_id) is None
    assert catalog.ids() == []


def test_ids_come_in_order(catalog: Catalog) -> None:
    for number in range(20):
        commit(catalog, f"pvc-{number}")

    ids = catalog.ids()

    assert ids == sorted(ids)
    assert len(ids) == 20


def test_listing_while_volumes_come(catalog: Catalog) -> None:
    commit(catalog, "a")
    assert len(catalog.ids()) == 1

    commit(catalog, "b")

    assert len(catalog.ids()) == 2


def test_committing_over_a_volume_is_refused(catalog: Catalog) -> None:
    home = commit(catalog)

    with pytest.raises(FileExistsError):
        catalog.commit(catalog.begin(home.id), record_of(home.id))

    assert catalog.read(home) == record_of(home.id)


def test_staged_twice_is_refused(catalog: Catalog) -> None:
    catalog.begin(id_in(catalog))

    with pytest.raises(FileExistsError):
        catalog.begin(id_in(catalog))


def test_leftover_in_staging_is_found_and_removed(catalog: Catalog) -> None:
    staged = catalog.begin(id_in(catalog))
    (staged.path / "data").mkdir()
    (staged.path / "data" / "x").touch()

    assert [home.id for home in catalog.staged()] == [staged.id]
    assert catalog.find_staged(staged.id) == staged
    catalog.remove(staged)

    assert list(catalog.staged()) == []
    assert catalog.find_staged(staged.id) is None


def test_trash_takes_a_volume_out_of_existence_with_its_files(catalog: Catalog) -> None:
    home = commit(catalog)

    trashed = catalog.trash(home)

    assert catalog.find(home.id) is None
    assert catalog.read(trashed) == record_of(home.id)
    [(found, when)] = catalog.trashed()
    assert found == trashed
    assert abs(when - trashed.path.stat().st_ctime) < 60


def test_same_volume_can_be_in_the_trash_twice(catalog: Catalog) -> None:
    catalog.trash(commit(catalog))
    catalog.trash(commit(catalog))

    assert len(list(catalog.trashed())) == 2


def test_what_need_not_be_kept_was_deleted_long_ago(catalog: Catalog) -> None:
    catalog.trash(commit(catalog), keep=False)

    [(_, when)] = catalog.trashed()
    assert when < 1e9


def test_volumes_are_never_removed(catalog: Catalog) -> None:
    home = commit(catalog)

    with pytest.raises(Error, match="only staging and trash"):
        catalog.remove(home)

    assert catalog.find(home.id) == home


def test_update_keeps_what_this_version_does_not_know(catalog: Catalog) -> None:
    home = commit(catalog)
    path = home.path / "volume.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": {"calm": True}}))

    catalog.update(home, size_bytes=8192)

    content = json.loads(path.read_text())
    assert content["mood"] == {"calm": True}
    assert content["size_bytes"] == 8192
    assert catalog.read(home).size_bytes == 8192


def test_record_is_readable_by_a_person(catalog: Catalog) -> None:
    home = commit(catalog)
    catalog.update(home, size_bytes=8192)

    assert (home.path / "volume.json").read_text().count("\n") > 5


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ('{"schema": 2, "future": 1}', ConfigurationError, "newer version .*schema 2"),
        ("", Error, "damaged"),
        ("[]", Error, "damaged"),
        ("\x00\xff", Error, "damaged"),
        ('{"schema": 1}', Error, "damaged.*id"),
        ('{"schema": 1, "id": 5}', Error, "damaged"),
    ],
)
def test_unreadable_record_says_why(catalog: Catalog, content: str, kind: type[Error], said: str) -> None:
    home = commit(catalog)
    (home.path / "volume.json").write_bytes(content.encode("latin-1"))

    with pytest.raises(Error, match=said) as refused:
        catalog.read(home)

    assert type(refused.value) is kind
    assert home.id in str(refused.value)


def test_home_without_record_is_not_found(catalog: Catalog) -> None:
    home = commit(catalog)
    (home.path / "volume.json").unlink()

    with pytest.raises(NotFound, match="no record"):
        catalog.read(home)


def test_record_is_not_read_through_a_symlink(catalog: Catalog, tmp_path: Path) -> None:
    home = commit(catalog)
    elsewhere = tmp_path / "elsewhere"
    (home.path / "volume.json").rename(elsewhere)
    (home.path / "volume.json").symlink_to(elsewhere)

    with pytest.raises(OSError, match=r"volume\.json"):
        catalog.read(home)


def test_home_opens_nothing_outside(catalog: Catalog) -> None:
    home = commit(catalog)
    (home.path / "data").symlink_to("/etc")

    for path in ("data/hostname", "../../pool.json", "data"):
        with pytest.raises(OSError, match=r"."):
            home.open(path)


def test_replaced_root_is_noticed(catalog: Catalog) -> None:
    assert catalog.is_present()

    catalog.root.rename(catalog.root.with_name("moved"))
    assert not catalog.is_present()

    catalog.root.mkdir()
    assert not catalog.is_present()


def test_drivers_that_share_a_pool_keep_out_of_each_other_s_staging(tmp_path: Path) -> None:
    one, two = (Catalog.open(tmp_path / "pool", "memory", exclusive=False) for _ in range(2))
    assert one.tag == two.tag
    volume_id = id_in(one)
    staged = one.begin(volume_id)

    for call in (two.find_staged, two.begin):
        with pytest.raises(Aborted, match="another driver"):
            call(volume_id)
    with pytest.raises(Aborted, match="another driver"):
        two.remove(two.placed(volume_id, volume_id, "staging"))
    one.commit(staged, record_of(volume_id))

    assert two.find(volume_id) is not None and two.find_staged(volume_id) is None
    assert two.take(volume_id) and not one.take(volume_id)
    one.close()
    two.close()


def test_a_home_that_cannot_be_begun_is_nobody_s(tmp_path: Path) -> None:
    one, two = (Catalog.open(tmp_path / "pool", "memory", exclusive=False) for _ in range(2))
    volume_id = id_in(one)
    (tmp_path / "pool/staging" / volume_id).mkdir()

    with pytest.raises(FileExistsError):
        one.begin(volume_id)

    assert two.find_staged(volume_id) is not None
    one.close()
    two.close()


def test_what_a_driver_that_died_was_making_is_the_next_one_s(tmp_path: Path) -> None:
    one, two = (Catalog.open(tmp_path / "pool", "memory", exclusive=False) for _ in range(2))
    volume_id = id_in(one)
    one.begin(volume_id)

    one.close()

    left = two.find_staged(volume_id)
    assert left is not None
    two.remove(left)
    two.commit(two.begin(volume_id), record_of(volume_id))
    assert two.take(volume_id)
    two.close()
