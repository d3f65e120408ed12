# SPDX-License-Identifier: Apache-2.0
"""Managed pools on real files and devices: made, found again, grown, and never over what could be somebody's data."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from csi_driver import backing, config
from csi_driver.backing import identity, making
from csi_driver.cli.doctor.pools import look_at_pool
from csi_driver.config import PoolConfig
from csi_driver.errors import ConfigurationError, ResourceExhausted
from csi_driver.linux import holes, mount
from csi_driver.model import GIB, MIB, Source, SourceKind, StorageStatus, TopologyRequirement
from tests.conftest import require_tool
from tests.kernel.conftest import MakePool
from tests.kernel.node_scene import Scene
from tests.rig import Rig, open_rig, unmount, volume

SIZE = 512 * MIB


@dataclass
class Place:
    """Where a managed pool is tried: its root, and what it lies in."""

    path: Path
    target: Path
    is_device: bool = False

    @property
    def root(self) -> Path:
        return self.path / "mounts" / "fast"

    def pool(
        self,
        fs_type: str = "xfs",
        size: int = SIZE,
        *,
        name: str = "fast",
        backend: str = "image",
        more: str = "",
    ) -> PoolConfig:
        where = f'device = "{self.target}"' if self.is_device else f'file = "{self.target}", size = {size}'
        text = f'[pools.{name}]\nbackend = "{backend}"\nroot = "{self.root}"\nreserved = 0\n'
        text += f'backing = {{ {where}, filesystem = "{fs_type}"{more} }}\n'
        parsed = config.parse(text).pools[name]
        if self.is_device:  # the tests' own devices have their nodes where the machine's are
            assert parsed.backing is not None
        return parsed

    def plain(self) -> PoolConfig:
        return config.parse(f'[pools.fast]\nroot = "{self.root}"\n').pools["fast"]

    def loops(self) -> list[str]:
        return devices_of(self.target)

    def reboot(self) -> None:
        """What a reboot leaves: files and disks."""
        while mount.find_mounted(self.root):
            unmount(self.root)
        for device in [] if self.is_device else self.loops():
            subprocess.run(["losetup", "--detach", device], check=True)


def devices_of(image: Path) -> list[str]:
    done = subprocess.run(
        ["losetup", "--noheadings", "--output=NAME", "--associated", image],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


@pytest.fixture
def place(workshop: Path) -> Iterator[Place]:
    require_tool("mkfs.xfs", "mkfs.btrfs", "losetup")
    made = Place(workshop, workshop / "host" / "fast.img")
    yield made
    made.reboot()


@pytest.fixture
def disk(workshop: Path) -> Iterator[Place]:
    """A device of its own, blank."""
    require_tool("mkfs.xfs", "mkfs.btrfs", "losetup")
    image = workshop / "disk.img"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    done = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    made = Place(workshop, Path(done.stdout.strip()), is_device=True)
    yield made
    made.reboot()
    subprocess.run(["losetup", "--detach", made.target], check=True)


def what_is_mounted(root: Path) -> list[tuple[str, str]]:
    return [(one.fs_type, one.source) for one in mount.mounts() if one.target == str(root)]


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_a_file_is_made_mounted_and_found_again(place: Place, fs_type: str) -> None:
    pool = place.pool(fs_type)

    assert backing.ensure(pool) is not None

    device = place.loops()
    assert what_is_mounted(place.root) == [(fs_type, device[0])]
    found = place.target.stat()
    assert (found.st_size, found.st_mode & 0o777) == (SIZE, 0o600)
    assert found.st_blocks * 512 < SIZE / 4, "sparse"
    assert place.root.stat().st_mode & 0o777 == 0o700
    (place.root / "kept").write_text("yes")
    for _ in range(2):
        backing.ensure(pool)
    assert what_is_mounted(place.root) == [(fs_type, device[0])]
    assert place.loops() == device

    place.reboot()
    assert [path.name for path in place.root.iterdir()] == ["backing.json"]
    backing.ensure(pool)
    assert (place.root / "kept").read_text() == "yes"
    assert len(what_is_mounted(place.root)) == len(place.loops()) == 1
    assert os.listdir(place.target.parent) == [place.target.name]


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_a_device_is_made_mounted_and_found_again(disk: Place, fs_type: str) -> None:
    pool = disk.pool(fs_type)

    backing.ensure(pool)
    (disk.root / "kept").write_text("yes")
    backing.ensure(pool)

    assert what_is_mounted(disk.root) == [(fs_type, str(disk.target))]
    disk.reboot()
    backing.ensure(pool)
    assert (disk.root / "kept").read_text() == "yes"
    disk.reboot()
    check = {"xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}[fs_type]
    subprocess.run([*check, disk.target], check=True, capture_output=True)


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_a_larger_size_grows_file_device_and_filesystem_while_it_is_in_use(
    place: Place, fs_type: str
) -> None:
    backing.ensure(place.pool(fs_type))
    before = os.statvfs(place.root)
    open_file = open(place.root / "open", "w")

    backing.ensure(place.pool(fs_type, 2 * SIZE))

    after = os.statvfs(place.root)
    assert after.f_blocks * after.f_frsize - before.f_blocks * before.f_frsize > SIZE * 0.95
    open_file.close()
    place.reboot()
    backing.ensure(place.pool(fs_type, 3 * SIZE))
    grown = os.statvfs(place.root)
    assert grown.f_blocks * grown.f_frsize > 2.8 * SIZE
    with pytest.raises(ConfigurationError, match=rf"size {SIZE}: the pool has {3 * SIZE} bytes already"):
        backing.ensure(place.pool(fs_type))


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_a_device_that_was_grown_grows_its_filesystem(disk: Place, fs_type: str) -> None:
    backing.ensure(disk.pool(fs_type))
    os.truncate(disk.path / "disk.img", 2 * SIZE)
    subprocess.run(["losetup", "--set-capacity", disk.target], check=True)

    backing.ensure(disk.pool(fs_type))

    grown = os.statvfs(disk.root)
    assert grown.f_blocks * grown.f_frsize > 1.8 * SIZE


def content(place: Place) -> bytes:
    """All that is not a hole, of the file or of what lies behind the device."""
    path = place.path / "disk.img" if place.is_device else place.target
    with open(place.target, "rb") as device, open(path, "rb") as file:
        os.fsync(device.fileno())
        ranges = list(holes.data_ranges(file.fileno(), SIZE))
        parts = [os.pread(file.fileno(), end - start, start).rstrip(b"\0") for start, end in ranges]
    return b"|".join(part for part in parts if part)


FOREIGN = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "swap": ["mkswap"],
}
# What is left where a partition table has been wiped, or where a format keeps its mark at the end.
ODDLY_PLACED = {
    "a filesystem in a partition": ("ext4", MIB),
    "a filesystem in a late partition": ("btrfs", 130 * MIB),
}
MAGICS = {
    "crypto_LUKS": (0, b"LUKS\xba\xbe"),
    "LVM2_member": (512, b"LABELONE"),
    "gpt": (512, b"EFI PART"),
    "linux_raid_member": (SIZE - 8192, b"\xfc\x4e\x2b\xa9"),
    "data of no known format": (
        SIZE - 256 * 1024 + 128 * 1024,
        b"\x0c\xb1\xba\0",
    ),  # ZFS, its last label alone
}


@pytest.mark.parametrize("what", [*FOREIGN, *MAGICS, *ODDLY_PLACED, "first", "last", "middle"])
@pytest.mark.parametrize("kind", ["file", "device"])
def test_what_could_be_somebodys_is_never_formatted(place: Place, disk: Place, kind: str, what: str) -> None:
    here = place if kind == "file" else disk
    if kind == "file":
        here.target.parent.mkdir()
        with open(here.target, "wb") as file:
            file.truncate(SIZE)
    if what in FOREIGN:
        require_tool(FOREIGN[what][0])
        subprocess.run([*FOREIGN[what], here.target], check=True, capture_output=True)
    elif what in ODDLY_PLACED:
        fs_type, start = ODDLY_PLACED[what]
        require_tool(FOREIGN[fs_type][0])
        part = here.path / "part.img"
        with open(part, "wb") as file:
            file.truncate(SIZE - start - 2 * MIB)
        subprocess.run([*FOREIGN[fs_type], part], check=True, capture_output=True)
        with open(part, "rb") as source, open(here.target, "r+b") as file:
            for begin, end in list(holes.data_ranges(source.fileno(), SIZE)):
                os.pwrite(file.fileno(), os.pread(source.fileno(), end - begin, begin), start + begin)
    elif what in MAGICS:
        offset, magic = MAGICS[what]
        with open(here.target, "r+b") as file:
            os.pwrite(file.fileno(), magic, offset)
    else:
        offset = {"first": 700_000, "last": SIZE - 5, "middle": SIZE // 2}[what]
        with open(here.target, "r+b") as file:
            file.seek(offset)
            file.write(b"data")
    before = content(here)

    with pytest.raises(ConfigurationError) as refusal:
        backing.ensure(here.pool())

    said = what if what in FOREIGN or what in MAGICS else "data of no known format"
    assert str(here.target) in str(refusal.value)
    assert f"holds {said}" in str(refusal.value)
    assert "blkdiscard" in str(refusal.value) or "remove it" in str(refusal.value)
    assert content(here) == before
    assert what_is_mounted(here.root) == []


def test_a_device_is_blank_after_what_the_refusal_says(disk: Place) -> None:
    require_tool("blkdiscard")
    subprocess.run(["mkfs.ext4", "-q", "-F", disk.target], check=True, capture_output=True)
    with pytest.raises(ConfigurationError) as refusal:
        backing.ensure(disk.pool())
    command = str(refusal.value).split("`")[1].split()

    subprocess.run(command, check=True)

    backing.ensure(disk.pool())


@pytest.mark.parametrize("leads", [True, False])
def test_a_file_that_is_a_symbolic_link_is_refused_and_stays(place: Place, leads: bool) -> None:
    real = place.path / "real.img"
    place.target.parent.mkdir()
    place.target.symlink_to(real)
    if leads:
        with open(real, "wb") as file:
            file.truncate(SIZE)

    with pytest.raises(ConfigurationError, match="is a symbolic link"):
        backing.ensure(place.pool())

    assert place.target.is_symlink()
    assert real.exists() == leads
    assert not leads or real.stat().st_blocks == 0


def test_a_blank_file_that_somebody_else_has_as_a_device_is_refused(place: Place) -> None:
    place.target.parent.mkdir()
    with open(place.target, "wb") as file:
        file.truncate(SIZE)
    subprocess.run(["losetup", "--find", place.target], check=True)
    try:
        with pytest.raises(ConfigurationError, match=r"is attached as /dev/loop\d+"):
            backing.ensure(place.pool())
    finally:
        for device in place.loops():
            subprocess.run(["losetup", "--detach", device], check=True)
    assert content(place) == b""


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
@pytest.mark.parametrize("kind", ["file", "device"])
def test_what_was_cut_is_not_mended_with_zeros(place: Place, disk: Place, kind: str, fs_type: str) -> None:
    here = place if kind == "file" else disk
    backing.ensure(here.pool(fs_type))
    (here.root / "kept").write_text("yes")
    here.reboot()
    image = here.target if kind == "file" else here.path / "disk.img"
    os.truncate(image, SIZE - 64 * MIB)
    if kind == "device":
        subprocess.run(["losetup", "--set-capacity", here.target], check=True)

    with pytest.raises(ConfigurationError, match=rf"has been cut: its {fs_type} needs \d+ bytes more"):
        backing.ensure(here.pool(fs_type))

    assert image.stat().st_size == SIZE - 64 * MIB
    assert what_is_mounted(here.root) == []


def test_another_pools_filesystem_is_refused(place: Place) -> None:
    backing.ensure(place.pool(name="fast"))
    place.reboot()

    with pytest.raises(ConfigurationError, match=r"holds xfs with the uuid .*, which Orlop has not made"):
        backing.ensure(place.pool(name="slow"))


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_pool_is_not_mounted_at_a_second_root(place: Place, disk: Place, kind: str, fs_type: str) -> None:
    here = disk if kind == "device" else place
    pool = here.pool(fs_type)
    backing.ensure(pool)
    second = replace(pool, root=here.path / "other" / "fast")
    assert second.backing is not None
    if not here.is_device:
        second = replace(second, backing=replace(second.backing, size_bytes=2 * SIZE))

    with pytest.raises(ConfigurationError, match=f"is mounted at {here.root} already"):
        backing.ensure(second)

    assert what_is_mounted(second.root) == []
    assert here.is_device or here.target.stat().st_size == SIZE
    backing.ensure(pool)


def test_a_device_in_use_is_refused(disk: Place) -> None:
    holder = os.open(disk.target, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(ConfigurationError, match="is in use"):
            backing.ensure(disk.pool())
    finally:
        os.close(holder)
    with open(disk.target, "rb") as file:
        assert not any(file.read(MIB))


def test_the_kind_of_filesystem_cannot_be_changed(place: Place) -> None:
    backing.ensure(place.pool("xfs"))

    with pytest.raises(ConfigurationError, match="holds the pool as xfs"):
        backing.ensure(place.pool("btrfs"))


def test_a_directory_with_something_in_it_is_not_covered(place: Place) -> None:
    place.root.mkdir(parents=True)
    (place.root / "pool.json").write_text("{}")

    with pytest.raises(ConfigurationError, match=r"it would hide 'pool.json'"):
        backing.ensure(place.pool())

    assert not place.target.exists()


def test_something_else_at_the_root_is_told(place: Place) -> None:
    backing.ensure(place.pool())
    subprocess.run(["mount", "-t", "tmpfs", "none", place.root], check=True)

    with pytest.raises(
        ConfigurationError, match="a filesystem of kind tmpfs is mounted there, not the pool's own"
    ):
        backing.ensure(place.pool())


def test_a_filesystem_that_is_gone_is_not_replaced_by_a_new_one(place: Place) -> None:
    backing.ensure(place.pool())
    place.target.unlink()
    with pytest.raises(ConfigurationError, match="is missing, and yet something is mounted"):
        backing.ensure(place.pool())
    unmount(place.root)
    for device in [line.split(":")[0] for line in _all_loops() if str(place.target) in line]:
        subprocess.run(["losetup", "--detach", device], check=True)

    with pytest.raises(
        ConfigurationError, match=r"is missing, though the filesystem of the pool \(uuid .*bring it back"
    ):
        backing.ensure(place.pool())

    assert not place.target.exists()
    (place.root / "backing.json").unlink()
    backing.ensure(place.pool())


def _all_loops() -> list[str]:
    return subprocess.run(
        ["losetup", "--all"], check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_another_filesystem_of_a_pool_so_named_is_not_taken_for_it(place: Place) -> None:
    backing.ensure(place.pool())
    place.reboot()
    place.target.rename(place.target.with_name("first.img"))
    first = place.root / "backing.json"
    record = first.read_bytes()
    first.unlink()
    backing.ensure(place.pool())
    place.reboot()
    first.write_bytes(record)

    with pytest.raises(ConfigurationError, match="holds another one"):
        backing.ensure(place.pool())


def test_without_its_backing_a_managed_pool_does_not_begin_anew_beneath_its_mount(place: Place) -> None:
    backing.ensure(place.pool())
    assert backing.ensure(place.plain()) is None, "mounted, it is a pool like any other"
    place.reboot()

    with pytest.raises(ConfigurationError, match=r"managed pool 'fast' .*configure its backing again"):
        backing.ensure(place.plain())


def test_a_blank_file_is_used_as_it_is(place: Place) -> None:
    place.target.parent.mkdir()
    with open(place.target, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 400 * MIB)
    inode = place.target.stat().st_ino

    backing.ensure(place.pool())

    assert (place.target.stat().st_ino, place.target.stat().st_size) == (inode, SIZE)
    (place.root / "kept").write_text("yes")
    place.reboot()
    subprocess.run(["xfs_repair", "-n", place.target], check=True, capture_output=True)


def test_nothing_of_what_a_device_held_shows_through(disk: Place) -> None:
    """mkfs zeroes the log by a call that leaves holes in a file: the device must get the zeros."""
    with open(disk.target, "r+b") as file:
        for offset in range(2 * MIB, SIZE - 2 * MIB, 8 * MIB):
            file.seek(offset)
            file.write(os.urandom(2 * MIB))
    pool = disk.pool()
    with pytest.raises(ConfigurationError, match="data of no known format"):
        backing.ensure(pool)
    assert pool.backing is not None
    fd = os.open(disk.target, os.O_RDWR)
    try:
        making.fill(fd, "fast", pool.backing, disk.path)
    finally:
        os.close(fd)

    backing.ensure(pool)

    (disk.root / "kept").write_text("yes")
    disk.reboot()
    subprocess.run(["xfs_repair", "-n", disk.target], check=True, capture_output=True)


def test_half_made_is_made_anew_unless_somebody_came_after(disk: Place) -> None:
    uuid = identity.new_uuid("fast")
    with open(disk.target, "r+b") as file:
        file.write(identity.mark("fast", uuid))
        file.seek(64 * MIB)
        file.write(b"half of it")
    with pytest.raises(ConfigurationError, match="half-made filesystem of pool 'fast'"):
        backing.ensure(disk.pool(name="slow"))

    backing.ensure(disk.pool())

    assert uuid_of(disk.target) not in (None, uuid)
    disk.reboot()
    with open(disk.target, "r+b") as file:
        file.write(bytes(4096) + bytes(60 * 1024) + bytes(MIB))
    subprocess.run(["mkswap", disk.target], check=True, capture_output=True)
    with open(disk.target, "r+b") as file:
        file.write(identity.mark("fast", uuid))
    with pytest.raises(ConfigurationError, match="holds swap"):
        backing.ensure(disk.pool())


def uuid_of(target: Path) -> object:
    fd = os.open(target, os.O_RDONLY)
    try:
        return identity.look(fd, "fast").uuid
    finally:
        os.close(fd)


@contextmanager
def small_host(place: Place, make_pool: MakePool, size_bytes: int) -> Iterator[Path]:
    host = make_pool("ext4", size_bytes)
    place.target = host / "fast.img"
    yield host
    place.reboot()


def test_a_host_without_room_for_the_metadata_is_told_and_left_clean(
    place: Place, make_pool: MakePool
) -> None:
    with small_host(place, make_pool, 32 * MIB) as host:
        with pytest.raises(
            ConfigurationError, match=r"no room for what a new xfs itself takes .* bytes are free in"
        ):
            backing.ensure(place.pool())
        with pytest.raises(ConfigurationError, match=r"cannot have .* bytes: No space left"):
            backing.ensure(place.pool(more=", preallocate = true"))

        assert [path.name for path in host.iterdir()] == ["lost+found"]


def test_a_preallocated_file_has_all_its_blocks_and_keeps_them(place: Place) -> None:
    pool = place.pool(more=", preallocate = true")
    with open_rig(pool) as rig:
        assert place.target.stat().st_blocks * 512 >= SIZE
        rig.controller.create_volume(volume("v", 64 * MIB))
        rig.controller.delete_volume(rig.pool.id_of("v"))
        rig.settle()
        os.sync()

        assert place.target.stat().st_blocks * 512 >= SIZE
        assert rig.pool.store().free_bytes == rig.backend.store().free_bytes


def test_deleted_volumes_give_their_space_back_to_the_host(place: Place) -> None:
    with open_rig(place.pool()) as rig:
        made = rig.controller.create_volume(volume("v", 64 * MIB))
        image = rig.pool.catalog.root / "volumes" / made.id / "image"
        with open(image, "r+b") as file:
            file.write(os.urandom(48 * MIB))
            os.fsync(file.fileno())
        full = place.target.stat().st_blocks * 512

        rig.controller.delete_volume(made.id)
        rig.settle()

        # XFS frees what was deleted in the background, and discards it behind that.
        deadline = time.monotonic() + 20
        while place.target.stat().st_blocks * 512 >= full - 40 * MIB:
            assert time.monotonic() < deadline, "the host has got nothing back"
            os.sync()
            time.sleep(0.1)


def capacity(rig: Rig) -> int:
    return rig.controller.capacity((), {}, None).available_bytes


def test_the_room_is_that_of_the_hosts_disk_where_that_is_less(place: Place, make_pool: MakePool) -> None:
    with small_host(place, make_pool, 300 * MIB) as host, open_rig(place.pool(size=2 * GIB)) as rig:
        free = os.statvfs(host)
        room = free.f_bavail * free.f_frsize
        first = capacity(rig)
        assert 0.7 * room < first <= room
        rig.controller.create_volume(volume("v", 64 * MIB))
        assert abs(first - 64 * MIB - capacity(rig)) < 4 * MIB, (
            "promised, though the host has given nothing yet"
        )
        with pytest.raises(ResourceExhausted):
            rig.controller.create_volume(volume("w", 400 * MIB))

        with open(host / "others", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - 32 * MIB)
        rig.settle()

        assert capacity(rig) == 0
        entries = {(entry.status, entry.reason) for entry in rig.node.storage_health()}
        assert (StorageStatus.STORAGE_DEGRADED, "PoolFastHostFull") in entries
        (host / "others").unlink()


def test_a_lost_backing_makes_its_own_pool_sick_and_no_other(place: Place) -> None:
    other = config.parse(f'[pools.plain]\nroot = "{place.path}/plain"\n').pools["plain"]
    with open_rig(place.pool(), other) as rig:
        kept = place.target.with_name("moved.img")
        place.target.rename(kept)
        assert [entry.reason for entry in rig.node.storage_health()] == [
            "PoolFastBackingMissing",
            "PoolFastFull",
        ]
        kept.rename(place.target)
        rig.settle()
        assert rig.node.storage_health() == []

        subprocess.run(["umount", "--lazy", place.root], check=True)

        assert [entry.reason for entry in rig.node.storage_health()] == ["PoolFastMissing"]
        with pytest.raises(ResourceExhausted):
            rig.controller.create_volume(volume("v", 32 * MIB, pool="fast"))
        rig.controller.create_volume(volume("v", 32 * MIB, pool="plain"))


def test_snapshots_are_instant_on_a_managed_pool_over_ext4(place: Place, make_pool: MakePool) -> None:
    with small_host(place, make_pool, GIB):
        scene = Scene.make(
            place.path,
            place.root,
            f'backend = "image"\nbacking = {{ file = "{place.target}", size = "2Gi" }}',
        )
        made = scene.create("v", 256 * MIB)
        pod = scene.run(made)
        (pod / "kept").write_bytes(os.urandom(64 * MIB))
        snapshot = scene.rig.snapshots.create("s", made.id, {}, TopologyRequirement())
        assert snapshot.ready
        assert scene.rig.backend.features.instant_copies
        before = (pod / "kept").read_bytes()
        (pod / "kept").write_bytes(b"changed")
        source = Source(SourceKind.SNAPSHOT, snapshot.record.id)
        restored = scene.rig.controller.create_volume(replace(volume("copy", 256 * MIB), source=source))

        scene.restart()
        again = scene.run(restored, "again")

        assert (again / "kept").read_bytes() == before
        scene.end(restored, "again")
        scene.end(made)
        scene.rig.close()


def in_a_pod(place: Place) -> None:
    """`ensure` in mounts of its own, which propagate as those of a pod with Bidirectional do; it ends at once."""
    text = f'[pools.fast]\nroot = "{place.root}"\nbacking = {{ file = "{place.target}", size = {SIZE} }}\n'
    code = f"from csi_driver import backing, config; backing.ensure(config.parse({text!r}).pools['fast'])"
    command = ["unshare", "--mount", "--propagation=unchanged", sys.executable, "-c", code]
    subprocess.run(command, check=True, capture_output=True)


def test_the_mount_is_the_nodes_and_outlives_the_pod(place: Place) -> None:
    above = place.root.parent
    above.mkdir()
    subprocess.run(["mount", "--bind", above, above], check=True)
    subprocess.run(["mount", "--make-shared", above], check=True)
    try:
        in_a_pod(place)
        assert len(what_is_mounted(place.root)) == len(place.loops()) == 1
        (place.root / "kept").write_text("yes")

        in_a_pod(place)

        assert len(what_is_mounted(place.root)) == len(place.loops()) == 1
        place.reboot()
        in_a_pod(place)
        assert (place.root / "kept").read_text() == "yes"
    finally:
        place.reboot()
        unmount(above)


def diagnosis(pool: PoolConfig) -> tuple[set[str], str]:
    findings = list(look_at_pool(pool))
    return {finding.level for finding in findings}, "\n".join(finding.what for finding in findings)


def test_the_doctor_knows_managed_pools(place: Place, make_pool: MakePool) -> None:
    levels, said = diagnosis(place.pool())
    assert levels == {"ok"}
    assert "is not there: the driver makes the pool's xfs there" in said
    place.root.mkdir(parents=True)
    (place.root / "other").touch()
    assert "it would hide 'other'" in diagnosis(place.pool())[1]
    (place.root / "other").unlink()
    backing.ensure(place.pool())
    levels, said = diagnosis(place.pool())
    assert "holds the pool's own xfs, uuid 6f726c6f-70" in said
    assert "reflink): yes" in said
    assert "error" not in levels
    assert "error" in diagnosis(place.pool("btrfs"))[0]
    place.reboot()

    with small_host(place, make_pool, 300 * MIB):
        levels, said = diagnosis(place.pool(size=2 * GIB))
        assert "2 GiB of 2 GiB still to come" in said
        assert "warning" in levels
        assert "error" in diagnosis(place.pool(size=2 * GIB, more=", preallocate = true"))[0]


def test_staged_volumes_go_on_over_a_restart_and_need_no_second_loop(place: Place) -> None:
    scene = Scene.make(
        place.path, place.root, f'backend = "image"\nbacking = {{ file = "{place.target}", size = {SIZE} }}'
    )
    made = scene.create("v", 64 * MIB)
    pod = scene.run(made)
    (pod / "kept").write_text("yes")
    devices = place.loops()

    scene.restart()

    assert place.loops() == devices
    assert (pod / "kept").read_text() == "yes"
    scene.end(made)
    scene.delete(made)
    scene.rig.close()
    assert place.loops() == devices, "a volume's end is none of the pool's own device"


@pytest.mark.parametrize(("backend", "fs_type"), [("directory", "xfs"), ("btrfs", "btrfs")])
def test_other_backends_have_their_sizes_enforced_there(place: Place, backend: str, fs_type: str) -> None:
    pool = place.pool(fs_type, backend=backend)
    try:
        rig = open_rig(pool)
    except ConfigurationError as error:
        if "no XFS quotas" in str(error):
            pytest.skip(str(error))
        raise
    with rig:
        assert rig.backend.features.enforces_capacity
        rig.controller.create_volume(volume("v", 64 * MIB))
