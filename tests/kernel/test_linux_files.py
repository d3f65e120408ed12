# SPDX-License-Identifier: Apache-2.0
import errno
import mmap
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.linux import files, syscall
from tests.conftest import require_tool
from tests.kernel.conftest import MIB, MakePool


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def ensure(dir_fd: int, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> os.stat_result:
    fd = files.ensure_directory(dir_fd, path, mode=mode, uid=uid, gid=gid)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


# ensure_directory


def test_missing_directories_appear_with_owner_and_mode_whatever_the_umask(scratch: Path) -> None:
    before = os.umask(0o077)
    try:
        with opened(scratch) as root:
            found = ensure(root, "a/b/c", mode=0o2775, uid=1234, gid=5678)
    finally:
        os.umask(before)

    assert found.st_ino == (scratch / "a/b/c").stat().st_ino
    for path in ("a", "a/b", "a/b/c"):
        status = (scratch / path).stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2775, 1234, 5678)


def test_existing_directories_are_left_as_they_are(scratch: Path) -> None:
    (scratch / "a").mkdir(mode=0o700)
    with opened(scratch) as root:
        ensure(root, "a/b", mode=0o777, uid=7)
        ensure(root, "a/b", mode=0o700, uid=8)

    assert (scratch / "a").stat().st_mode & 0o7777 == 0o700
    assert (scratch / "a").stat().st_uid == 0
    assert (scratch / "a/b").stat().st_mode & 0o7777 == 0o777
    assert (scratch / "a/b").stat().st_uid == 7
    assert os.listdir(scratch / "a") == ["b"]


@pytest.mark.parametrize("path", ["", ".", "./", "a/./b//", "ä/\udcff/ \n"])
def test_odd_but_honest_paths_work(scratch: Path, path: str) -> None:
    with opened(scratch) as root:
        found = ensure(root, path)

    assert found.st_ino == (scratch / path).stat().st_ino


@pytest.mark.parametrize("path", ["..", "a/..", "a/../b", "/a", "../" + "x"])
def test_a_path_that_leaves_is_refused(scratch: Path, path: str) -> None:
    (scratch / "a").mkdir()

    with opened(scratch) as root, pytest.raises(OSError) as caught:
        files.ensure_directory(root, path)

    assert caught.value.errno == errno.EXDEV
    assert os.listdir(scratch) == ["a"]


def test_a_symlink_on_the_way_or_at_the_end_is_refused(scratch: Path) -> None:
    (scratch / "real").mkdir()
    (scratch / "link").symlink_to("real")
    (scratch / "out").symlink_to("/tmp")
    (scratch / "dangling").symlink_to("nowhere")

    with opened(scratch) as root:
        for path in ("link", "link/x", "out/x", "dangling", "dangling/x", "real/../link"):
            with pytest.raises(OSError) as caught:
                files.ensure_directory(root, path)
            assert caught.value.errno in (errno.ELOOP, errno.EXDEV), path

    assert os.listdir(scratch / "real") == []
    assert not (scratch / "nowhere").exists()


def test_a_file_in_the_way_is_not_a_directory(scratch: Path) -> None:
    (scratch / "f").touch()
    os.mkfifo(scratch / "fifo")

    with opened(scratch) as root:
        for path in ("f", "f/x", "fifo", "fifo/x"):
            with pytest.raises(NotADirectoryError):
                files.ensure_directory(root, path)


def test_many_who_make_the_same_directory_get_the_same_one(scratch: Path) -> None:
    with opened(scratch) as root, ThreadPoolExecutor(16) as pool:
        for turn in range(10):
            found = list(pool.map(lambda _, path=f"t{turn}/a/b": ensure(root, path).st_ino, range(16)))
            assert len(set(found)) == 1

    assert all(os.listdir(scratch / f"t{turn}/a") == ["b"] for turn in range(10)), (
        "no temporary names are left"
    )


def test_a_symlink_swapped_in_during_the_walk_never_leads_out(scratch: Path, workshop: Path) -> None:
    """A pod that exchanges a directory and a symlink as fast as it can, while we make directories below it."""
    outside = workshop / "outside"
    outside.mkdir()
    (scratch / "d").mkdir()
    (scratch / "d/sub").mkdir()
    (scratch / "evil").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        with opened(scratch) as fd:
            while not stop.is_set():
                syscall.renameat2(fd, "d", fd, "evil", 2)  # RENAME_EXCHANGE

    attacker = threading.Thread(target=swap)
    attacker.start()
    outcomes = set()
    try:
        with opened(scratch) as root:
            for number in range(2000):
                try:
                    ensure(root, f"d/x{number % 50}/y")
                    outcomes.add("made")
                except OSError as error:
                    outcomes.add(errno.errorcode[error.errno or 0])
                    assert error.errno in (errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EAGAIN)
    finally:
        stop.set()
        attacker.join()

    assert os.listdir(outside) == []
    assert {"made", "ELOOP"} <= outcomes, "the race was run from both sides"


def test_a_directory_that_cannot_be_made_leaves_nothing(scratch: Path) -> None:
    with opened(scratch) as root, pytest.raises(OSError) as caught:
        files.ensure_directory(root, "a/" + "n" * 300)

    assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(scratch) in ([], ["a"])
    assert not (scratch / "a").exists() or os.listdir(scratch / "a") == []


def test_mounts_within_are_crossed_when_opening(ext4_pool: Path) -> None:
    (ext4_pool / "m").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", ext4_pool / "m"], check=True)

    with opened(ext4_pool) as root:
        found = ensure(root, "m/x")

    assert found.st_dev == (ext4_pool / "m").stat().st_dev != ext4_pool.stat().st_dev
    subprocess.run(["umount", ext4_pool / "m"], check=True)


# Space


def test_a_full_disk_is_enospc_and_the_old_file_stays(make_pool: MakePool) -> None:
    pool = make_pool("ext4", 16 * MIB)
    with opened(pool) as root:
        files.write_atomic(root, "f", b"old")
        with pytest.raises(OSError) as caught:
            files.write_atomic(root, "f", bytes(64 * MIB))

        assert caught.value.errno == errno.ENOSPC
        assert files.read(root, "f") == b"old"
    assert sorted(os.listdir(pool)) == ["f", "lost+found"]


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_allocated_bytes_are_there_and_punched_ones_are_not(make_pool: MakePool, fs_type: str) -> None:
    pool = make_pool(fs_type)
    with opened(pool / "f", os.O_RDWR | os.O_CREAT) as fd:
        files.allocate(fd, 0, 8 * MIB)
        assert os.fstat(fd).st_size == 8 * MIB
        assert files.allocated_bytes(fd) >= 8 * MIB
        assert os.pread(fd, 4096, 4 * MIB) == bytes(4096)

        os.pwrite(fd, b"x" * 4096, 4 * MIB)
        files.sync(fd)
        files.punch(fd, 2 * MIB, 4 * MIB)

        assert os.fstat(fd).st_size == 8 * MIB
        assert files.allocated_bytes(fd) <= 4 * MIB + 65536
        assert os.pread(fd, 4096, 4 * MIB) == bytes(4096)


def test_allocation_beyond_the_disk_is_enospc_not_emulated(make_pool: MakePool) -> None:
    pool = make_pool("ext4", 16 * MIB)
    with opened(pool / "f", os.O_RDWR | os.O_CREAT) as fd:
        with pytest.raises(OSError) as caught:
            files.allocate(fd, 0, 64 * MIB)

    assert caught.value.errno == errno.ENOSPC
    assert str(pool / "f") in str(caught.value)


def test_a_read_only_filesystem_is_told(ext4_pool: Path) -> None:
    assert not files.is_read_only(ext4_pool)

    subprocess.run(["mount", "-o", "remount,ro", ext4_pool], check=True)

    assert files.is_read_only(ext4_pool)
    with opened(ext4_pool) as root, pytest.raises(OSError) as caught:
        files.write_atomic(root, "f", b"")
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize(("fs_type", "reflink"), [("ext4", False), ("xfs", True), ("btrfs", True)])
def test_filesystem_and_its_reflinks_are_told(make_pool: MakePool, fs_type: str, reflink: bool) -> None:
    pool = make_pool(fs_type)
    before = sorted(os.listdir(pool))

    with opened(pool) as fd:
        assert files.filesystem_type(fd) == files.filesystem_type(pool) == fs_type
        assert files.supports_reflink(fd) is reflink
    assert sorted(os.listdir(pool)) == before


def test_xfs_without_reflinks_is_told(make_pool: MakePool) -> None:
    pool = make_pool("xfs", 0, "-m", "reflink=0")

    with opened(pool) as fd:
        assert not files.supports_reflink(fd)


def test_a_cloned_file_has_the_content_and_shares_the_space(btrfs_pool: Path) -> None:
    content = os.urandom(16 * MIB)
    (btrfs_pool / "a").write_bytes(content)
    os.sync()
    used = files.usage(btrfs_pool).used_bytes

    with opened(btrfs_pool / "a") as source, opened(btrfs_pool / "b", os.O_RDWR | os.O_CREAT) as target:
        files.clone_file(source, target)
        files.sync(target)

    assert (btrfs_pool / "b").read_bytes() == content
    assert files.usage(btrfs_pool).used_bytes - used < 4 * MIB


def test_cloning_where_it_cannot_be_done_is_an_error(ext4_pool: Path) -> None:
    (ext4_pool / "a").write_bytes(b"x" * 4096)

    with opened(ext4_pool / "a") as source, opened(ext4_pool / "b", os.O_RDWR | os.O_CREAT) as target:
        with pytest.raises(OSError) as caught:
            files.clone_file(source, target)

    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_direct_io_alignment_works_and_less_does_not(make_pool: MakePool, fs_type: str) -> None:
    pool = make_pool(fs_type)
    (pool / "f").write_bytes(bytes(65536))
    with opened(pool / "f") as fd:
        alignment = files.direct_io_alignment(fd)
    assert alignment in (512, 4096)

    with opened(pool / "f", os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 65536) as buffer:
        view = memoryview(buffer)
        try:
            assert os.preadv(fd, [view[:alignment]], alignment) == alignment
            with pytest.raises(OSError) as caught:
                os.preadv(fd, [view[:alignment]], alignment // 2)
        finally:
            view.release()
    assert caught.value.errno == errno.EINVAL


def test_direct_io_is_impossible_on_a_directory(scratch: Path) -> None:
    with opened(scratch) as fd:
        assert files.direct_io_alignment(fd) is None


# remove_tree


def remove(parent: Path, name: str) -> None:
    with opened(parent) as fd:
        files.remove_tree(fd, name)


def test_a_missing_tree_is_removed_already(scratch: Path) -> None:
    remove(scratch, "missing")


def test_files_links_fifos_and_devices_go(scratch: Path, workshop: Path) -> None:
    outside = workshop / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    tree = scratch / "t"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/f").write_text("x")
    os.link(tree / "a/f", tree / "a/hard")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "null", 0o20666, os.makedev(1, 3))
    (tree / "out").symlink_to(outside)
    (tree / "a/root").symlink_to("/")
    (tree / "dangling").symlink_to("nowhere")

    remove(scratch, "t")

    assert os.listdir(scratch) == []
    assert os.listdir(outside) == ["keep"]


@pytest.mark.parametrize("kind", ["file", "symlink", "fifo"])
def test_a_tree_that_is_no_directory_goes_itself(scratch: Path, kind: str) -> None:
    (scratch / "keep").mkdir()
    match kind:
        case "file":
            (scratch / "t").touch()
        case "symlink":
            (scratch / "t").symlink_to("keep")
        case "fifo":
            os.mkfifo(scratch / "t")

    remove(scratch, "t")

    assert os.listdir(scratch) == ["keep"]


def test_a_tree_of_ten_thousand_levels_goes_with_few_descriptors(scratch: Path) -> None:
    fd = os.open(scratch, os.O_RDONLY)
    for _ in range(10_000):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("f", os.O_CREAT, dir_fd=fd))
    os.close(fd)

    remove(scratch, "d")

    assert os.listdir(scratch) == []


def test_long_names_that_are_not_utf8_go(scratch: Path) -> None:
    (scratch / "t").mkdir()
    with opened(scratch / "t") as fd:
        for byte in (0x01, 0x0A, 0x20, 0x2D, 0x5C, 0x80, 0xC3, 0xFF):
            name = bytes([byte]) * 255
            os.mkdir(os.fsdecode(name), dir_fd=fd)
            os.close(os.open(os.fsdecode(name) + "/" + os.fsdecode(name), os.O_CREAT, dir_fd=fd))

    remove(scratch, "t")

    assert os.listdir(scratch) == []


def test_wide_directories_go(scratch: Path) -> None:
    (scratch / "t").mkdir()
    for number in range(5000):
        (scratch / f"t/d{number}").mkdir()
        (scratch / f"t/f{number}").touch()
    for number in range(0, 5000, 7):
        (scratch / f"t/d{number}/x").touch()

    remove(scratch, "t")

    assert os.listdir(scratch) == []


def test_immutable_and_append_only_things_go(scratch: Path) -> None:
    require_tool("chattr")
    tree = scratch / "t"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/f").touch()
    (tree / "a/g").touch()
    (tree / "a/link").symlink_to("f")
    subprocess.run(["chattr", "+i", tree / "a/f"], check=True)
    subprocess.run(["chattr", "+a", tree / "a/g", tree / "a/b"], check=True)
    subprocess.run(["chattr", "+i", tree / "a"], check=True)
    subprocess.run(["chattr", "+i", tree], check=True)

    remove(scratch, "t")

    assert os.listdir(scratch) == []


def test_an_immutable_parent_that_is_not_ours_is_an_error_or_is_cleared(scratch: Path) -> None:
    """The directory that holds the tree is the pool's own; if someone made it append-only, the tree still goes."""
    require_tool("chattr")
    (scratch / "t").mkdir()
    subprocess.run(["chattr", "+a", scratch], check=True)

    remove(scratch, "t")

    assert os.listdir(scratch) == []


@pytest.fixture
def mounted_inside(workshop: Path, scratch: Path) -> Iterator[Path]:
    """t/a/m is a mount point with a file in it, and t is full of other things."""
    tree = scratch / "t"
    (tree / "a/m").mkdir(parents=True)
    for number in range(20):
        (tree / f"f{number}").touch()
    subprocess.run(["mount", "-t", "tmpfs", "none", tree / "a/m"], check=True)
    (tree / "a/m/precious").write_text("x")
    yield tree
    subprocess.run(["umount", tree / "a/m"], check=True)


def refuses_whole(parent: Path, name: str) -> OSError:
    tree = parent / name
    before = sorted(os.fspath(path) for path in tree.rglob("*"))
    with pytest.raises(OSError) as caught:
        remove(parent, name)
    assert caught.value.errno == errno.EBUSY
    assert sorted(os.fspath(path) for path in tree.rglob("*")) == before, "nothing has been removed"
    return caught.value


def test_a_tree_with_a_mount_inside_is_refused_before_anything_goes(
    scratch: Path, mounted_inside: Path
) -> None:
    error = refuses_whole(scratch, "t")

    assert f"still mounted inside: {mounted_inside}/a/m" in str(error)


def test_a_tree_that_is_a_mount_point_is_refused(scratch: Path, mounted_inside: Path) -> None:
    refuses_whole(mounted_inside / "a", "m")


def test_a_bind_of_the_tree_upon_itself_is_a_mount(scratch: Path) -> None:
    (scratch / "t").mkdir()
    (scratch / "t/f").touch()
    subprocess.run(["mount", "--bind", scratch / "t", scratch / "t"], check=True)

    refuses_whole(scratch, "t")

    subprocess.run(["umount", scratch / "t"], check=True)


def test_a_file_with_a_mount_on_it_is_a_mount(scratch: Path) -> None:
    (scratch / "t").mkdir()
    (scratch / "t/f").touch()
    subprocess.run(["mount", "--bind", "/dev/null", scratch / "t/f"], check=True)

    refuses_whole(scratch, "t")

    subprocess.run(["umount", scratch / "t/f"], check=True)


def test_a_mount_reached_by_another_path_is_a_mount(scratch: Path, workshop: Path) -> None:
    """The pool is bound elsewhere too, and something is mounted on the tree over there."""
    other = workshop / "other"
    other.mkdir()
    (scratch / "t/m").mkdir(parents=True)
    (scratch / "t/f").touch()
    subprocess.run(["mount", "--bind", scratch, other], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", other / "t/m"], check=True)

    refuses_whole(scratch, "t")

    subprocess.run(["umount", other / "t/m"], check=True)
    subprocess.run(["umount", other], check=True)


def test_mounts_of_neighbours_with_a_like_name_do_not_matter(scratch: Path) -> None:
    (scratch / "t").mkdir()
    (scratch / "t2").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", scratch / "t2"], check=True)

    remove(scratch, "t")

    assert os.listdir(scratch) == ["t2"]
    subprocess.run(["umount", scratch / "t2"], check=True)


def test_a_bind_of_the_tree_elsewhere_does_not_matter(scratch: Path, workshop: Path) -> None:
    """Whether the tree is shown to somebody is for the caller to ask (`mount.mounts_of`)."""
    other = workshop / "other"
    other.mkdir()
    (scratch / "t/d").mkdir(parents=True)
    subprocess.run(["mount", "--bind", scratch / "t", other], check=True)

    remove(scratch, "t")

    assert os.listdir(scratch) == []
    subprocess.run(["umount", other], check=True)


def test_two_who_remove_the_same_tree_both_succeed(scratch: Path) -> None:
    for number in range(300):
        (scratch / f"t/{number}/x").mkdir(parents=True)
        (scratch / f"t/{number}/f").touch()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: remove(scratch, "t"), range(2)))

    assert os.listdir(scratch) == []


def test_a_read_only_filesystem_is_an_error(ext4_pool: Path) -> None:
    (ext4_pool / "t/d").mkdir(parents=True)
    subprocess.run(["mount", "-o", "remount,ro", ext4_pool], check=True)

    with pytest.raises(OSError) as caught:
        remove(ext4_pool, "t")

    assert caught.value.errno == errno.EROFS
    assert (ext4_pool / "t/d").is_dir()
