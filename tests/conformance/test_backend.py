# SPDX-License-Identifier: Apache-2.0
"""What `backends.base.Backend` says, method by method, held against every backend."""

import os
import stat

import pytest

from csi_driver.backends.base import Device, Directory
from csi_driver.catalog import Home
from csi_driver.errors import InvalidArgument
from csi_driver.identity import SCHEMA
from csi_driver.model import MIB, AccessMode, AccessType, Parameters, Record, VolumeSpec
from csi_driver.provision import parse_parameters
from tests.rig import Rig, capability, volume
from tests.scene import Scene, in_pod


def record_of(rig: Rig, name: str, size_bytes: int, parameters: Parameters) -> Record:
    return Record(
        schema=SCHEMA,
        id=rig.pool.id_of(name),
        name=name,
        size_bytes=size_bytes,
        access_type=AccessType.MOUNT,
        fs_type=parameters.fs_type,
    )


def make_staged(rig: Rig, scene: Scene, name: str = "a", **parameters: str) -> tuple[Home, VolumeSpec]:
    parsed = parse_parameters(rig.pool, parameters, (capability(),))
    spec = VolumeSpec(scene.kind.size_bytes, AccessType.MOUNT, parsed)
    home = rig.pool.catalog.begin(rig.pool.id_of(name))
    rig.backend.make(home, spec)
    return home, spec


def make_volume(rig: Rig, scene: Scene, name: str = "a", **parameters: str) -> tuple[Home, Record]:
    home, spec = make_staged(rig, scene, name, **parameters)
    record = record_of(rig, name, spec.size_bytes, spec.parameters)
    return rig.pool.catalog.commit(home, record), record


def enforced(rig: Rig, size_bytes: int) -> int:
    """What a backend says where it enforces sizes; 0 (unknown) where it does not."""
    return size_bytes if rig.backend.features.enforces_capacity else 0


def test_features_name_modes_for_each_access_type(scene: Scene) -> None:
    features = scene.open().backend.features

    assert AccessType.MOUNT in features.access_types
    assert AccessMode.SINGLE_NODE_WRITER in features.access_modes
    assert bool(features.block_access_modes) == (AccessType.BLOCK in features.access_types)


def test_check_may_be_repeated(scene: Scene) -> None:
    rig = scene.open()
    before = rig.backend.features

    rig.backend.check()

    assert rig.backend.features == before


def test_limits_allow_a_small_volume_in_whole_multiples(scene: Scene) -> None:
    rig = scene.open()

    for access_type in rig.backend.features.access_types:
        parameters = rig.backend.parse({}, access_type, "")
        limits = rig.backend.size_limits(access_type, parameters)
        assert 0 < limits.minimum_bytes <= scene.kind.size_bytes <= limits.maximum_bytes
        assert limits.minimum_bytes % limits.multiple_bytes == 0
        assert limits.multiple_bytes % 512 == 0


def test_unknown_parameters_name_the_known(scene: Scene) -> None:
    rig = scene.open()

    with pytest.raises(InvalidArgument, match=r"'colour'.*fsType.*gid.*mode.*pool.*subPath.*type.*uid"):
        rig.backend.parse({"colour": "red"}, AccessType.MOUNT, "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "8"),
        ("mode", "77777"),
        ("mode", ""),
        ("uid", "root"),
        ("uid", "4294967295"),
        ("gid", "-1"),
        ("subPath", "/x"),
        ("subPath", "a/../b"),
        ("fsType", "ntfs"),
        ("fsType", "../ext4"),
    ],
)
def test_bad_values_are_named(scene: Scene, key: str, value: str) -> None:
    rig = scene.open()

    with pytest.raises(InvalidArgument) as refused:
        rig.backend.parse({key: value}, AccessType.MOUNT, "")

    assert key in str(refused.value)
    assert repr(value) in str(refused.value)


def test_parameters_are_read(scene: Scene) -> None:
    parsed = scene.open().backend.parse(
        {"mode": "2770", "uid": "0", "gid": "4294967294", "subPath": "a/${pvc.metadata.name}"},
        AccessType.MOUNT,
        "",
    )

    assert (parsed.mode, parsed.uid, parsed.gid) == (0o2770, 0, 4294967294)
    assert parsed.sub_path == "a/${pvc.metadata.name}"


def test_two_filesystems_are_one_too_many(scene: Scene) -> None:
    with pytest.raises(InvalidArgument, match="'ext4'"):
        scene.open().backend.parse({"fsType": "ext4"}, AccessType.MOUNT, "xfs")


def test_made_payload_has_exactly_the_size(scene: Scene) -> None:
    rig = scene.open()

    home, record = make_volume(rig, scene)

    assert rig.backend.size_bytes(home) == enforced(rig, record.size_bytes)


def test_room_that_is_taken_was_promised(scene: Scene) -> None:
    rig = scene.open()
    parameters = rig.backend.parse({}, AccessType.MOUNT, "")
    size = scene.kind.size_bytes

    home, _ = make_volume(rig, scene)

    promised = rig.backend.promised_bytes(size, parameters)
    assert promised == enforced(rig, size)
    written = rig.backend.written_bytes(home)
    # The filesystem's own bookkeeping of a file may come on top.
    assert 0 <= written <= promised + 64 * 1024
    assert (written >= size) == scene.kind.written_at_once


def test_store_is_the_pools_filesystem(scene: Scene) -> None:
    store = scene.open().backend.store()

    assert 0 < store.free_bytes <= store.total_bytes
    if scene.mounted is not None:
        found = os.statvfs(scene.mounted)
        assert store.total_bytes == found.f_blocks * found.f_frsize


def test_grown_payload_is_as_large_as_asked_and_never_shrinks(scene: Scene) -> None:
    rig = scene.open()
    home, record = make_volume(rig, scene)
    size = record.size_bytes

    assert rig.backend.grow(home, 2 * size) == enforced(rig, 2 * size)
    assert rig.backend.grow(home, size) == enforced(rig, 2 * size)
    assert rig.backend.grow(home, 2 * size) == enforced(rig, 2 * size)

    assert rig.backend.size_bytes(home) == enforced(rig, 2 * size)


def test_attachment_is_found_again_until_it_is_undone(scene: Scene) -> None:
    rig = scene.open()
    home, record = make_volume(rig, scene)
    if scene.filesystem is None and os.geteuid() != 0:
        pytest.skip("needs root")

    for _ in range(2):
        with rig.backend.attach(home, record) as one, rig.backend.attach(home, record) as other:
            match (one, other):
                case (Directory(), Directory()):
                    assert os.path.sameopenfile(one.fd, other.fd)
                    assert stat.S_ISDIR(os.fstat(one.fd).st_mode)
                case (Device(), Device()):
                    assert (one.path, one.number) == (other.path, other.number)
                    assert os.stat(one.path).st_rdev == one.number
                case _:
                    pytest.fail("a backend attaches a volume in one way")
        found = rig.backend.find_attached(home, record)
        assert found is not None
        with found:
            assert type(found) is type(one)
        rig.backend.detach(home)
        rig.backend.detach(home)


def test_what_uses_a_volume_is_seen(real_scene: Scene) -> None:
    real_scene.leave_out_clients("what uses a volume is on other machines")
    rig = real_scene.open()
    used, unused = (make_volume(rig, real_scene, name)[0] for name in "ab")

    with in_pod(real_scene, rig, used.id):
        assert set(rig.backend.holders([used, unused])) == {used.id}
        assert rig.backend.holders([unused]) == {}
    assert rig.backend.holders([used, unused]) == {}
    assert rig.backend.holders([]) == {}


def test_stats_are_of_the_volume(real_scene: Scene) -> None:
    rig = real_scene.open()
    home, record = make_volume(rig, real_scene)

    with in_pod(real_scene, rig, home.id) as path:
        before = rig.node.stats(home.id, str(path))
        (path / "x").write_bytes(os.urandom(4 * MIB))
        os.sync()
        after = rig.node.stats(home.id, str(path))

    for stats in (before, after):
        assert 0 <= stats.used_bytes <= stats.total_bytes
        assert 0 <= stats.available_bytes <= stats.total_bytes
        if rig.backend.features.enforces_capacity:
            assert stats.total_bytes <= record.size_bytes
            assert stats.total_bytes > record.size_bytes * 0.6  # a journal takes its part
    # A server's filesystem holds some room ready for a file that a client may go on writing.
    assert 4 * MIB <= after.used_bytes - before.used_bytes <= (21 if real_scene.kind.served else 5) * MIB
    assert before.available_bytes - after.available_bytes >= 3 * MIB


def test_fresh_volume_is_empty_and_has_owner_and_mode(real_scene: Scene) -> None:
    rig = real_scene.open()
    plain, _ = make_volume(rig, real_scene, "plain")
    asked = rig.controller.create_volume(
        volume("asked", real_scene.kind.size_bytes, mode="2770", uid="1000", gid="2000")
    )

    with in_pod(real_scene, rig, plain.id) as path:
        found = path.stat()
        assert list(path.iterdir()) == []
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o755, 0, 0)
    with in_pod(real_scene, rig, asked.id) as path:
        found = path.stat()
        assert list(path.iterdir()) == []
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o2770, 1000, 2000)


def test_new_volume_is_healthy(scene: Scene) -> None:
    rig = scene.open()
    home, record = make_volume(rig, scene)

    assert rig.backend.health(home, record) == []


def test_lost_payload_is_told(scene: Scene) -> None:
    rig = scene.open()
    home, record = make_volume(rig, scene)
    rig.backend.clear(home)
    for path in home.path.iterdir():
        if path.name != "volume.json":
            path.rmdir() if path.is_dir() else path.unlink()

    [entry] = [entry for entry in rig.backend.health(home, record) if entry.status == "DATA_LOSS"]

    assert home.id in entry.message


@pytest.mark.parametrize("times", [1, 2])
def test_cleared_home_can_be_removed_and_made_anew(scene: Scene, times: int) -> None:
    rig = scene.open()
    home, _ = make_staged(rig, scene)
    free = rig.backend.store().free_bytes

    for _ in range(times):
        rig.backend.clear(home)
    rig.pool.catalog.remove(home)

    assert rig.backend.store().free_bytes >= free
    make_staged(rig, scene)


def test_clearing_an_empty_home_is_fine(scene: Scene) -> None:
    rig = scene.open()
    home = rig.pool.catalog.begin(rig.pool.id_of("a"))

    rig.backend.clear(home)
    rig.pool.catalog.remove(home)

    assert list(rig.pool.catalog.staged()) == []


def test_payload_moves_with_its_home(scene: Scene) -> None:
    rig = scene.open()
    home, record = make_volume(rig, scene)

    trashed = rig.pool.catalog.trash(home)

    assert rig.backend.size_bytes(trashed) == enforced(rig, record.size_bytes)
    rig.backend.clear(trashed)
    rig.pool.catalog.remove(trashed)
    assert not trashed.path.exists()
