# SPDX-License-Identifier: Apache-2.0
import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.linux import filesystem, loop, run
from csi_driver.linux.filesystem import FILESYSTEMS
from tests.conftest import require_tool
from tests.kernel.conftest import MIB

CAP_SYS_RESOURCE = 24


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def make_image(path: Path, size_bytes: int, *, thick: bool = True) -> Path:
    with open(path, "wb") as file:
        file.truncate(size_bytes)
        if thick:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    return path


@contextmanager
def mounted(image: Path, target: Path, options: str = "") -> Iterator[tuple[int, loop.Loop]]:
    """(descriptor of the mounted root, its loop device)."""
    target.mkdir(exist_ok=True)
    with opened(image) as fd:
        device = loop.attach(fd, sector_size=4096)
    try:
        extra = ["-o", options] if options else []
        subprocess.run(["mount", *extra, device.path, target], check=True)
        try:
            with opened(target) as root:
                yield root, device
        finally:
            subprocess.run(["umount", target], check=True)
    finally:
        loop.detach(device)


@pytest.fixture(params=list(FILESYSTEMS))
def fs_type(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    require_tool(FILESYSTEMS[name].tool)
    return name


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def require_online_growth(fs_type: str) -> None:
    effective = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
    )
    if fs_type == "ext4" and not int(effective.split()[1], 16) >> CAP_SYS_RESOURCE & 1:
        # Not `unavailable`: nothing can be installed against it, and the lab tier runs these where it can be had.
        pytest.skip("ext4 grows online only with CAP_SYS_RESOURCE, which this machine withholds")


def test_the_smallest_image_is_made_mounted_and_holds_a_file(fs_type: str, scratch: Path) -> None:
    image = make_image(scratch / "image", FILESYSTEMS[fs_type].minimum_bytes)

    filesystem.make(fs_type, image)

    with opened(image) as fd:
        assert filesystem.detect(fd) == fs_type
        assert not filesystem.is_blank(fd)
    with mounted(image, scratch / "mnt"):
        (scratch / "mnt/f").write_bytes(b"x" * MIB)
        assert (scratch / "mnt/f").read_bytes() == b"x" * MIB


def test_a_smaller_ext4_has_no_journal_and_a_smaller_xfs_is_refused(scratch: Path) -> None:
    """Why the minima are what they are."""
    require_tool("dumpe2fs", "mkfs.xfs")
    small = make_image(scratch / "small", FILESYSTEMS["ext4"].minimum_bytes - MIB)
    filesystem.make("ext4", small)
    assert "has_journal" not in run.run(["dumpe2fs", "-h", small], timeout_s=10)
    least = make_image(scratch / "least", FILESYSTEMS["ext4"].minimum_bytes)
    filesystem.make("ext4", least)
    assert "has_journal" in run.run(["dumpe2fs", "-h", least], timeout_s=10)

    with pytest.raises(run.CommandFailed, match="larger than 300MB"):
        filesystem.make("xfs", make_image(scratch / "x", FILESYSTEMS["xfs"].minimum_bytes - MIB, thick=False))


def test_a_thick_image_stays_thick(fs_type: str, scratch: Path) -> None:
    size = max(512 * MIB, FILESYSTEMS[fs_type].minimum_bytes)
    image = make_image(scratch / "image", size)

    filesystem.make(fs_type, image)

    assert blocks(image) >= size
    assert image.stat().st_size == size


def test_a_thin_image_stays_thin(fs_type: str, scratch: Path) -> None:
    image = make_image(scratch / "image", 1024 * MIB, thick=False)

    filesystem.make(fs_type, image)

    assert image.stat().st_size == 1024 * MIB
    assert blocks(image) < 80 * MIB


def test_an_old_filesystem_in_the_file_is_replaced(fs_type: str, scratch: Path) -> None:
    image = make_image(scratch / "image", 512 * MIB, thick=False)
    filesystem.make("btrfs" if fs_type == "ext4" else "ext4", image)

    filesystem.make(fs_type, image)

    with opened(image) as fd:
        assert filesystem.detect(fd) == fs_type
    with mounted(image, scratch / "mnt"):
        said = run.run(["stat", "-f", "-c", "%T", scratch / "mnt"], timeout_s=5).strip()
        assert said == {"ext4": "ext2/ext3"}.get(fs_type, fs_type)


def test_inode_tables_are_taken_for_zero_only_where_the_image_is(scratch: Path) -> None:
    """Otherwise the kernel would be told that stale bytes are an initialised inode table."""
    require_tool("dumpe2fs")
    fresh = make_image(scratch / "fresh", 256 * MIB)
    filesystem.make("ext4", fresh)
    dirty = make_image(scratch / "dirty", 256 * MIB)
    with opened(dirty, os.O_WRONLY) as fd:
        os.pwrite(fd, b"\xff" * MIB, 100 * MIB)
    filesystem.make("ext4", dirty)

    tables = [run.run(["dumpe2fs", image], timeout_s=10) for image in (fresh, dirty)]

    assert "ITABLE_ZEROED" in tables[0]
    # The first group's table is always written; the others are left for the kernel to zero.
    assert tables[1].count("ITABLE_ZEROED") < tables[0].count("ITABLE_ZEROED")
    subprocess.run(["e2fsck", "-f", "-n", dirty], check=True, capture_output=True)


OPTIONS = {
    "ext4": [
        "-i 65536 -I 512", "-N 5000", "-m 1.5", "-G 32", "-J size=8", "-L name", "-T largefile",
        "-E stride=16,stripe_width=32", "-E stripe-width=32", "-E packed_meta_blocks=1", "-E num_backup_sb=1 -O sparse_super2",
        "-E resize=9000000", "-O ^metadata_csum,fast_commit", "-O project,quota", "-O 64bit,^flex_bg", "-O casefold",
        "-O encrypt,verity", "-O inline_data,ea_inode,large_dir", "-O orphan_file,metadata_csum_seed", "-O stable_inodes,^resize_inode",
    ],
    "xfs": [
        "-m finobt=1,rmapbt=1,reflink=1", "-m bigtime=1,inobtcount=1", "-d agcount=2", "-d agsize=1g", "-d su=64k,sw=2",
        "-d sunit=128,swidth=256", "-i size=1024,maxpct=50,sparse=1", "-n size=8k,ftype=1", "-l size=128m", "-l sunit=64", "-L name",
    ],
    "btrfs": [
        "-m single -d single", "--metadata dup --data dup", "-n 16k", "--nodesize 32768", "-s 4096", "--sectorsize 4k", "--csum xxhash",
        "--checksum blake2", "-M -n 4096", "--mixed -n 4k", "-O ^no-holes,extref", "-O skinny-metadata", "-L name",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [(kind, line) for kind, lines in OPTIONS.items() for line in lines], ids=str
)
def test_what_the_allow_list_accepts_mkfs_accepts_too(options: tuple[str, str], scratch: Path) -> None:
    fs_type, line = options
    require_tool(FILESYSTEMS[fs_type].tool)
    image = make_image(scratch / "image", 4096 * MIB, thick=False)

    filesystem.make(fs_type, image, filesystem.parse_options(fs_type, line))

    with opened(image) as fd:
        assert filesystem.detect(fd) == fs_type


def test_every_allowed_option_has_been_tried() -> None:
    tried = {(kind, word) for kind, lines in OPTIONS.items() for line in lines for word in line.split()}

    assert {(kind, option) for kind, one in FILESYSTEMS.items() for option in one.options} <= tried


def test_options_join_our_own_instead_of_replacing_them(scratch: Path) -> None:
    """mke2fs heeds the last -E alone: without nodiscard it would punch all holes into a thick image."""
    require_tool("dumpe2fs")
    image = make_image(scratch / "image", 256 * MIB)

    filesystem.make(
        "ext4", image, ["-E", "stride=16", "-E", "stripe_width=32", "-O", "^64bit", "-O", "fast_commit"]
    )

    said = run.run(["dumpe2fs", "-h", image], timeout_s=10)
    assert "RAID stride:              16" in said
    assert "RAID stripe width:        32" in said
    assert "fast_commit" in said and "64bit" not in said
    assert blocks(image) >= 256 * MIB


def test_a_failure_carries_what_the_tool_said(fs_type: str, scratch: Path) -> None:
    tiny = make_image(scratch / "tiny", 8192)

    with pytest.raises(run.CommandFailed, match=FILESYSTEMS[fs_type].tool) as caught:
        filesystem.make(fs_type, tiny)

    said = {"ext4": "Not enough space", "xfs": "too small", "btrfs": "too small"}[fs_type]
    assert said in str(caught.value).partition("failed with exit code 1: ")[2]
    assert "usage" not in str(caught.value).lower()


def test_a_missing_image_is_an_error_and_is_not_made(fs_type: str, scratch: Path) -> None:
    with pytest.raises((FileNotFoundError, run.CommandFailed)):
        filesystem.make(fs_type, scratch / "missing")

    assert not (scratch / "missing").exists()


def test_an_image_on_a_full_disk_is_an_error(make_pool: object, ext4_pool: Path) -> None:
    """A thin image whose pool is full: mkfs must say so, not lie."""
    image = make_image(ext4_pool / "image", 1024 * MIB, thick=False)
    with open(ext4_pool / "fill", "wb") as fill, pytest.raises(OSError):
        os.posix_fallocate(fill.fileno(), 0, 1024 * MIB)
    free = os.statvfs(ext4_pool).f_bavail
    if free:
        with open(ext4_pool / "rest", "wb") as rest:
            os.posix_fallocate(rest.fileno(), 0, free * 4096 - 65536)

    with pytest.raises(run.CommandFailed):
        filesystem.make("btrfs", image)


def test_growth_takes_place_while_mounted_and_in_use(fs_type: str, scratch: Path) -> None:
    require_online_growth(fs_type)
    size = max(256 * MIB, FILESYSTEMS[fs_type].minimum_bytes)
    image = make_image(scratch / "image", size, thick=False)
    filesystem.make(fs_type, image)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            (scratch / f"mnt/f{number % 4}").write_bytes(os.urandom(MIB))
            number += 1

    with mounted(image, scratch / "mnt") as (root, device):
        before = os.statvfs(root)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            os.truncate(image, 2 * size)
            loop.refresh_size(device)
            actual = filesystem.grow(fs_type, root, 2 * size)
        finally:
            stop.set()
            writer.join()
        after = os.statvfs(root)

    assert actual == 2 * size
    assert after.f_blocks * after.f_frsize > 1.8 * before.f_blocks * before.f_frsize


def test_growth_to_what_it_is_already_or_less_changes_nothing(fs_type: str, scratch: Path) -> None:
    size = max(256 * MIB, FILESYSTEMS[fs_type].minimum_bytes)
    image = make_image(scratch / "image", size, thick=False)
    filesystem.make(fs_type, image)

    with mounted(image, scratch / "mnt") as (root, _):
        before = os.statvfs(root)[:5]
        sizes = [filesystem.grow(fs_type, root, wanted) for wanted in (size, size - MIB, 1, 0, size + 1)]

        assert sizes == [size] * 5
        assert os.statvfs(root)[:3] == before[:3]


def test_growth_rounds_down_and_tells_what_it_became(fs_type: str, scratch: Path) -> None:
    require_online_growth(fs_type)
    size = max(256 * MIB, FILESYSTEMS[fs_type].minimum_bytes)
    image = make_image(scratch / "image", size, thick=False)
    filesystem.make(fs_type, image)

    with mounted(image, scratch / "mnt") as (root, device):
        os.truncate(image, size + 100 * MIB)
        loop.refresh_size(device)
        odd = size + 99 * MIB + 12_345
        actual = filesystem.grow(fs_type, root, odd)

        assert odd - 64 * MIB < actual <= odd
        assert filesystem.grow(fs_type, root, actual) == actual


def test_growth_beyond_the_device_is_an_error(fs_type: str, scratch: Path) -> None:
    require_online_growth(fs_type)
    size = max(256 * MIB, FILESYSTEMS[fs_type].minimum_bytes)
    image = make_image(scratch / "image", size, thick=False)
    filesystem.make(fs_type, image)

    with mounted(image, scratch / "mnt") as (root, _):
        with pytest.raises(OSError) as caught:
            filesystem.grow(fs_type, root, 4 * size)
        assert filesystem.grow(fs_type, root, size) == size

    assert caught.value.errno in (errno.EINVAL, errno.EFBIG, errno.ENOSPC, errno.EIO)


def test_ext4_without_the_capability_says_which(scratch: Path) -> None:
    image = make_image(scratch / "image", 256 * MIB, thick=False)
    filesystem.make("ext4", image)
    script = (
        "import os, sys; from csi_driver.linux import filesystem;"
        "filesystem.grow('ext4', os.open(sys.argv[1], os.O_RDONLY), 512 << 20)"
    )
    require_tool("setpriv")

    with mounted(image, scratch / "mnt") as (_, device):
        os.truncate(image, 512 * MIB)
        loop.refresh_size(device)
        without = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
        done = subprocess.run(
            [*without, "python3", "-c", script, scratch / "mnt"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )

    assert "ext4 grows only with CAP_SYS_RESOURCE" in done.stderr


def test_a_read_only_mount_does_not_grow(fs_type: str, scratch: Path) -> None:
    size = max(256 * MIB, FILESYSTEMS[fs_type].minimum_bytes)
    image = make_image(scratch / "image", size, thick=False)
    filesystem.make(fs_type, image)
    os.truncate(image, 2 * size)

    with mounted(image, scratch / "mnt", "ro") as (root, _):
        with pytest.raises(OSError) as caught:
            filesystem.grow(fs_type, root, 2 * size)
        assert filesystem.grow(fs_type, root, size) == size

    assert caught.value.errno in (errno.EROFS, errno.EPERM)


def test_a_frozen_filesystem_takes_no_writes_until_it_is_thawed(fs_type: str, scratch: Path) -> None:
    image = make_image(scratch / "image", 512 * MIB, thick=False)
    filesystem.make(fs_type, image)
    written = threading.Event()

    def write() -> None:
        (scratch / "mnt/f").write_text("x")
        written.set()

    with mounted(image, scratch / "mnt") as (root, _):
        filesystem.freeze(root)
        writer = threading.Thread(target=write)
        writer.start()
        waited = written.wait(0.3)
        with pytest.raises(OSError) as again:
            filesystem.freeze(root)
        filesystem.thaw(root)
        writer.join(60)
        with pytest.raises(OSError) as thawed:
            filesystem.thaw(root)

    assert not waited and written.is_set()
    assert (again.value.errno, thawed.value.errno) == (errno.EBUSY, errno.EINVAL)


def test_a_sound_filesystem_has_no_errors(fs_type: str, scratch: Path) -> None:
    image = make_image(scratch / "image", 512 * MIB, thick=False)
    filesystem.make(fs_type, image)

    with mounted(image, scratch / "mnt") as (_, device):
        assert filesystem.error_count(fs_type, device.device) == 0
    assert filesystem.error_count(fs_type, device.device) == 0, "not mounted any more"


def test_errors_of_ext4_are_counted(scratch: Path) -> None:
    require_tool("debugfs")
    image = make_image(scratch / "image", 64 * MIB)
    filesystem.make("ext4", image)
    with mounted(image, scratch / "mnt"):
        (scratch / "mnt/d").mkdir()
        (scratch / "mnt/d/f").touch()
    # Overwrite the directory's block: its checksum no longer holds.
    where = run.run(["debugfs", "-R", "bmap /d 0", image], timeout_s=10).strip()
    with opened(image, os.O_WRONLY) as fd:
        os.pwrite(fd, b"\xff" * 4096, int(where) * 4096)

    with mounted(image, scratch / "mnt", "errors=continue") as (_, device):
        with pytest.raises(OSError):
            os.stat(scratch / "mnt/d/f")
        # The kernel writes the count into the superblock in its own time.
        deadline = time.monotonic() + 60
        while not filesystem.error_count("ext4", device.device):
            assert time.monotonic() < deadline, "no error is counted"
            time.sleep(0.01)


def test_errors_of_btrfs_are_counted(scratch: Path) -> None:
    require_tool("mkfs.btrfs")
    image = make_image(scratch / "image", 512 * MIB, thick=False)
    filesystem.make("btrfs", image, ["-d", "single"])
    marker = b"a quite unmistakable line of text\n" * 4000
    with mounted(image, scratch / "mnt"):
        (scratch / "mnt/f").write_bytes(marker)
    content = image.read_bytes()
    at = content.index(marker[:4096])
    with opened(image, os.O_WRONLY) as fd:
        os.pwrite(fd, b"\0" * 4096, at)

    with mounted(image, scratch / "mnt") as (_, device):
        with pytest.raises(OSError):
            (scratch / "mnt/f").read_bytes()
        assert filesystem.error_count("btrfs", device.device) > 0


def test_the_size_of_a_device_is_told(scratch: Path) -> None:
    image = make_image(scratch / "image", 5 * MIB)
    with opened(image) as fd:
        device = loop.attach(fd)
    try:
        with opened(device.path) as fd:
            assert filesystem.device_size(fd) == 5 * MIB
            assert filesystem.is_blank(fd)
    finally:
        loop.detach(device)


def test_signatures_are_found_on_a_device_with_4k_sectors(scratch: Path) -> None:
    image = make_image(scratch / "image", 64 * MIB)
    filesystem.make("ext4", image)
    with opened(image) as fd:
        device = loop.attach(fd, sector_size=4096)
    try:
        with opened(device.path) as fd:
            assert filesystem.detect(fd) == "ext4"
    finally:
        loop.detach(device)


@pytest.mark.parametrize(
    ("argv", "name"),
    [(["mkfs.ext2", "-q", "-F"], "ext2"), (["mkfs.ext3", "-q", "-F"], "ext3"), (["mkswap"], "swap")],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_other_tools_make_is_known(scratch: Path, argv: list[str], name: str) -> None:
    require_tool(argv[0])
    image = make_image(scratch / "image", 64 * MIB)

    run.run([*argv, image], timeout_s=20)

    with opened(image) as fd:
        assert filesystem.detect(fd) == name
