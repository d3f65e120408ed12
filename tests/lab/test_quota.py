# SPDX-License-Identifier: Apache-2.0
"""The `directory` backend over real project quotas of ext4 and XFS: sizes that hold, ids that never meet."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from csi_driver.backends.projects import BYTES_PER_INODE, FIRST_ID, LAST_ID
from csi_driver.config import PoolConfig
from csi_driver.errors import ConfigurationError, ResourceExhausted
from csi_driver.linux import quota
from csi_driver.model import MIB, AccessType, CapacityRange, HealthStatus, Parameters, VolumeSpec
from tests.lab.disks import Disk
from tests.rig import Kind, Rig, configure, open_rig, published, volume

T = TypeVar("T")
SIZE = 20 * MIB
# The home, its record and the directories' own blocks are counted too.
OVERHEAD = MIB // 2
QUOTA = Kind("directory", "directory")
AT_THE_LIMIT = {"ext4": "EDQUOT", "xfs": "ENOSPC"}

# Writes MiB by MiB until it may not, and says how much it was and why. Without CAP_SYS_RESOURCE, like any pod.
WRITER = """
import errno, os, sys
written = 0
try:
    with open(sys.argv[1], "wb", buffering=0) as file:
        while written < int(sys.argv[2]):
            written += file.write(bytes(1 << 18))
        os.fsync(file.fileno())
    print(written, "")
except OSError as error:
    print(written, errno.errorcode[error.errno])
"""
TOUCHER = """
import errno, sys
made = 0
try:
    while True:
        open(f"{sys.argv[1]}/{made}", "x").close()
        made += 1
except OSError as error:
    print(made, errno.errorcode[error.errno])
"""
AS_USER = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
WITHOUT_CAPABILITY = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]


@dataclass(frozen=True)
class Place:
    """A filesystem with project quotas, and a pool's configuration on it."""

    fs_type: str
    disk: Disk
    config: PoolConfig

    def id_of(self, path: Path) -> int:
        return asked(path, quota.project)

    def usage(self, project_id: int) -> quota.ProjectUsage:
        return asked(self.disk.target, lambda fd: quota.get(fd, project_id))

    def is_free(self, project_id: int) -> bool:
        """Whether nothing uses the id, in a moment at the latest: XFS removes files in the background."""
        for _ in range(600):
            if self.usage(project_id) == quota.ProjectUsage(0, 0, 0, 0):
                return True
            time.sleep(0.1)
        return False


def asked(path: Path, question: Callable[[int], T]) -> T:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return question(fd)
    finally:
        os.close(fd)


@pytest.fixture(params=["ext4", "xfs"])
def place(request: pytest.FixtureRequest, make_disk: Callable[..., Disk]) -> Place:
    fs_type = request.param
    disk = make_disk("ext4-prjquota" if fs_type == "ext4" else fs_type, "prjquota")
    return Place(fs_type, disk, configure(QUOTA, disk.target / "pool"))


@pytest.fixture
def rig(place: Place) -> Iterator[Rig]:
    with open_rig(place.config) as opened:
        yield opened


def write(path: Path, size_bytes: int, *, privileged: bool = False) -> tuple[int, str]:
    argv = [sys.executable, "-c", WRITER, os.fspath(path), str(size_bytes)]
    done = subprocess.run(
        argv if privileged else [*WITHOUT_CAPABILITY, *argv], capture_output=True, text=True, check=True
    )
    written, _, error = done.stdout.strip().partition(" ")
    return int(written), error


def touch(directory: Path) -> tuple[int, str]:
    """Make empty files until there may be no more; how many, and why."""
    argv = [*WITHOUT_CAPABILITY, sys.executable, "-c", TOUCHER, os.fspath(directory)]
    made, error = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    return int(made), error


def publish(rig: Rig, name: str, target: Path, size_bytes: int = SIZE) -> str:
    volume_id = rig.controller.create_volume(volume(name, size_bytes)).id
    rig.node.publish(published(volume_id, target, None))
    return volume_id


def home_of(rig: Rig, volume_id: str) -> Path:
    return rig.pool.catalog.get(volume_id).path


def test_a_volume_is_as_large_as_it_says(place: Place, rig: Rig, tmp_path: Path) -> None:
    publish(rig, "one", tmp_path / "one")
    publish(rig, "two", tmp_path / "two")

    written, error = write(tmp_path / "one/file", 2 * SIZE)
    assert error == AT_THE_LIMIT[place.fs_type]
    assert SIZE - OVERHEAD <= written <= SIZE
    # The neighbour has all of its own room.
    assert write(tmp_path / "two/file", SIZE - OVERHEAD) == (SIZE - OVERHEAD, "")

    (tmp_path / "one/file").unlink()
    assert write(tmp_path / "one/again", SIZE - OVERHEAD) == (SIZE - OVERHEAD, "")


def test_root_passes_the_limit_on_ext4_only(place: Place, rig: Rig, tmp_path: Path) -> None:
    volume_id = publish(rig, "one", tmp_path / "one")

    written, error = write(tmp_path / "one/file", 2 * SIZE, privileged=True)

    if place.fs_type == "ext4":
        # CAP_SYS_RESOURCE, which containers do not have by default, is beyond quotas there. It is counted.
        assert (written, error) == (2 * SIZE, "")
        assert rig.node.stats(volume_id, str(tmp_path / "one")).used_bytes >= 2 * SIZE
        assert rig.node.stats(volume_id, str(tmp_path / "one")).available_bytes == 0
    else:
        assert error == "ENOSPC"
        assert written <= SIZE


def test_the_limit_is_what_df_shows(place: Place, rig: Rig, tmp_path: Path) -> None:
    volume_id = publish(rig, "one", tmp_path / "one")
    write(tmp_path / "one/file", 5 * MIB)

    shown = os.statvfs(tmp_path / "one")
    told = rig.node.stats(volume_id, str(tmp_path / "one"))

    assert shown.f_blocks * shown.f_frsize == SIZE == told.total_bytes
    assert abs(shown.f_bavail * shown.f_frsize - told.available_bytes) <= 64 * 1024
    assert 5 * MIB <= told.used_bytes <= 5 * MIB + OVERHEAD
    assert told.used_bytes + told.available_bytes == SIZE
    assert told.used_inodes >= 2 and told.available_inodes > 0


def test_a_volume_grows_while_it_is_used(place: Place, rig: Rig, tmp_path: Path) -> None:
    volume_id = publish(rig, "one", tmp_path / "one")
    write(tmp_path / "one/file", 2 * SIZE)

    grown = rig.node.expand(volume_id, str(tmp_path / "one"), "", CapacityRange(2 * SIZE))

    assert grown == 2 * SIZE
    shown = os.statvfs(tmp_path / "one")
    assert shown.f_blocks * shown.f_frsize == 2 * SIZE
    written, error = write(tmp_path / "one/more", 2 * SIZE)
    assert error == AT_THE_LIMIT[place.fs_type]
    assert SIZE - OVERHEAD <= written <= SIZE + OVERHEAD
    assert rig.pool.space.promised() == 2 * SIZE


def test_every_volume_has_an_id_of_its_own_that_is_free_after_it(place: Place, rig: Rig) -> None:
    ids = [rig.controller.create_volume(volume(f"v{number}", MIB)).id for number in range(20)]
    project_ids = [place.id_of(home_of(rig, volume_id)) for volume_id in ids]

    assert len(set(project_ids)) == 20
    assert all(FIRST_ID <= project_id <= LAST_ID for project_id in project_ids)
    assert [place.usage(project_id).limit_bytes for project_id in project_ids] == [MIB] * 20
    for volume_id in ids:
        rig.controller.delete_volume(volume_id)
        # Its files are still there, so is its id.
    assert all(place.usage(project_id).used_inodes for project_id in project_ids)
    rig.settle()
    assert all(place.is_free(project_id) for project_id in project_ids)


def test_two_volumes_whose_ids_meet_are_kept_apart(place: Place, rig: Rig) -> None:
    first, second = colliding_names(rig)
    one = rig.controller.create_volume(volume(first, MIB)).id
    two = rig.controller.create_volume(volume(second, 2 * MIB)).id
    taken = place.id_of(home_of(rig, one))

    assert place.id_of(home_of(rig, two)) == taken + 1
    assert place.usage(taken).limit_bytes == MIB
    assert place.usage(taken + 1).limit_bytes == 2 * MIB

    # In the trash an id is still taken; after that it is not.
    rig.controller.delete_volume(one)
    again = rig.controller.create_volume(volume(first, MIB)).id
    assert place.id_of(home_of(rig, again)) == taken + 2
    rig.controller.delete_volume(again)
    rig.settle()
    assert place.is_free(taken)
    again = rig.controller.create_volume(volume(first, MIB)).id
    assert place.id_of(home_of(rig, again)) == taken


def colliding_names(rig: Rig) -> tuple[str, str]:
    """Two volume names that want the same project id (of 2**30: some ten thousand names have such a pair)."""
    seen: dict[int, str] = {}
    for number in range(1_000_000):
        name = f"name-{number}"
        wanted = int(rig.pool.id_of(name)[-8:], 16) % (LAST_ID - FIRST_ID + 1)
        if wanted in seen and wanted != LAST_ID - FIRST_ID:
            return seen[wanted], name
        seen[wanted] = name
    raise AssertionError("a million names without a collision")


def test_limits_and_usage_outlive_a_remount_and_a_restart(place: Place, tmp_path: Path) -> None:
    with open_rig(place.config) as rig:
        volume_id = publish(rig, "one", tmp_path / "one")
        write(tmp_path / "one/file", 5 * MIB)
        rig.node.unpublish(volume_id, str(tmp_path / "one"))
    place.disk.unmount()
    place.disk.mount("prjquota")

    with open_rig(place.config) as rig:
        assert rig.controller.create_volume(volume("one", SIZE)).id == volume_id
        assert rig.controller.get_volume(volume_id).size_bytes == SIZE
        assert rig.pool.space.promised() == SIZE
        rig.node.publish(published(volume_id, tmp_path / "one", None))
        assert rig.node.stats(volume_id, str(tmp_path / "one")).used_bytes >= 5 * MIB
        written, error = write(tmp_path / "one/more", 2 * SIZE)
        assert error == AT_THE_LIMIT[place.fs_type]
        assert written <= SIZE - 5 * MIB


def test_what_a_dead_build_left_frees_its_id_at_the_next_start(place: Place) -> None:
    with open_rig(place.config) as rig:
        volume_id = rig.pool.id_of("one")
        home = rig.pool.catalog.begin(volume_id)
        rig.backend.make(home, VolumeSpec(SIZE, AccessType.MOUNT, Parameters()))
        project_id = place.id_of(home.path)
        assert place.usage(project_id).limit_bytes == SIZE

    with open_rig(place.config) as rig:
        assert not list(rig.pool.catalog.staged())
        rig.settle()
        assert place.is_free(project_id)
        assert rig.controller.create_volume(volume("one", SIZE)).id == volume_id


def test_a_build_that_died_between_id_and_limit_is_made_anew(place: Place, rig: Rig) -> None:
    volume_id = rig.pool.id_of("one")
    home = rig.pool.catalog.begin(volume_id)
    wanted = FIRST_ID + int(volume_id[-8:], 16) % (LAST_ID - FIRST_ID + 1)
    asked(home.path, lambda fd: quota.set_project(fd, wanted))

    rig.controller.create_volume(volume("one", SIZE))

    # The id that the dead one took may still be in use for a moment; then it is another one.
    taken = place.id_of(home_of(rig, volume_id))
    assert taken in (wanted, wanted + 1)
    assert place.usage(taken).limit_bytes == SIZE
    assert taken == wanted or place.is_free(wanted)


def test_creates_that_together_exceed_the_pool_fail_but_for_those_that_fit(place: Place, rig: Rig) -> None:
    room = rig.controller.capacity((), {}, None).available_bytes
    fits = room // SIZE

    def create(number: int) -> bool:
        try:
            rig.controller.create_volume(volume(f"v{number}", SIZE))
        except ResourceExhausted:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        made = sum(threads.map(create, range(fits + 10)))

    assert made == fits
    assert len(rig.pool.catalog.ids()) == fits
    assert not list(rig.pool.catalog.staged())


def test_empty_files_cannot_fill_the_pool(place: Place, rig: Rig, tmp_path: Path) -> None:
    volume_id = publish(rig, "one", tmp_path / "one")

    made, error = touch(tmp_path / "one")

    assert error == AT_THE_LIMIT[place.fs_type]
    # Three are the home, its record and the directory.
    assert made == SIZE // BYTES_PER_INODE - 3
    assert os.statvfs(tmp_path / "one").f_files == SIZE // BYTES_PER_INODE
    told = rig.node.stats(volume_id, str(tmp_path / "one"))
    assert (told.total_inodes, told.available_inodes) == (SIZE // BYTES_PER_INODE, 0)
    rig.node.expand(volume_id, str(tmp_path / "one"), "", CapacityRange(2 * SIZE))
    assert os.statvfs(tmp_path / "one").f_files == 2 * SIZE // BYTES_PER_INODE


def test_a_file_s_owner_can_take_it_out_of_the_quota(place: Place, rig: Rig, tmp_path: Path) -> None:
    """A limit of the kernel, told in the documents: project quotas hold against accident, not against malice."""
    volume_id = rig.controller.create_volume(volume("one", SIZE, uid="1000")).id
    rig.node.publish(published(volume_id, tmp_path / "one", None))
    tmp_path.parent.parent.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    tmp_path.chmod(0o755)

    subprocess.run([*AS_USER, "chattr", "-p", "0", tmp_path / "one"], check=True)
    written, error = write(tmp_path / "one/file", 2 * SIZE)

    assert (written, error) == (2 * SIZE, "")
    # What the volume's size is, is asked of its home all the same.
    told = rig.node.stats(volume_id, str(tmp_path / "one"))
    assert told.total_bytes == SIZE


def test_a_volume_from_before_enforcement_never_claims_a_size(place: Place, tmp_path: Path) -> None:
    lax = configure(Kind("lax", "directory", options="enforce_capacity = false\n"), place.config.root)
    with open_rig(lax) as rig:
        volume_id = rig.controller.create_volume(volume("one", SIZE)).id
        assert rig.controller.get_volume(volume_id).size_bytes == 0

    with open_rig(place.config) as rig:
        entries = rig.node.volume_health(volume_id)
        assert [(entry.status, entry.reason) for entry in entries] == [
            (HealthStatus.DEGRADED, "SizeNotEnforced")
        ]
        rig.node.publish(published(volume_id, tmp_path / "one", None))
        rig.node.expand(volume_id, str(tmp_path / "one"), "", CapacityRange(2 * SIZE))
        assert rig.controller.get_volume(volume_id).size_bytes == 0


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("ext4", "", "tune2fs -O project,quota"),
        ("ext4-prjquota", "", "counted but not enforced"),
        ("xfs", "", "mount it with -o prjquota"),
        ("xfs", "pqnoenforce", "counted but not enforced"),
        ("btrfs", "", "use ext4 or xfs"),
    ],
)
def test_a_filesystem_that_does_not_enforce_is_refused(
    make_disk: Callable[..., Disk], kind: str, options: str, said: str
) -> None:
    disk = make_disk(kind, options)

    with pytest.raises(ConfigurationError, match=said):
        open_rig(configure(QUOTA, disk.target / "pool"))


def test_a_root_that_belongs_to_a_project_is_refused(place: Place) -> None:
    place.config.root.mkdir()
    fd = os.open(place.config.root, os.O_RDONLY | os.O_DIRECTORY)
    quota.set_project(fd, 7)
    os.close(fd)

    with pytest.raises(ConfigurationError, match="belongs to project 7"):
        open_rig(place.config)
