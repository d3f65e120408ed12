# SPDX-License-Identifier: Apache-2.0
"""What needs no root and no particular filesystem. The rest is in tests/kernel/test_linux_files.py."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.linux import files


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = files.open_directory(tmp_path)
    yield fd
    os.close(fd)


def test_a_directory_is_not_opened_through_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    with pytest.raises(NotADirectoryError):
        files.open_directory(tmp_path / "link")


def test_what_lies_beneath_is_opened_close_on_exec(root: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/f").write_text("x")

    fd = files.open_beneath(root, "a/f")

    try:
        assert os.read(fd, 9) == b"x"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("../x", errno.EXDEV),
        ("a/../../x", errno.EXDEV),
        ("/etc/passwd", errno.EXDEV),
        ("link/f", errno.ELOOP),
        ("a/inner", errno.ELOOP),
        ("loop", errno.ELOOP),
        ("missing", errno.ENOENT),
        ("a/f/x", errno.ENOTDIR),
        ("a/" + "n" * 256, errno.ENAMETOOLONG),
    ],
)
def test_nothing_else_is_opened(root: int, tmp_path: Path, path: str, code: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/f").write_text("x")
    (tmp_path / "a/inner").symlink_to("f")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(OSError) as caught:
        files.open_beneath(root, path)

    assert caught.value.errno == code
    assert caught.value.filename == path
    assert "openat2" in str(caught.value)


def test_a_nul_in_a_path_is_refused(root: int) -> None:
    # A C string would end there, and name something else.
    with pytest.raises((ValueError, OSError)):
        files.open_beneath(root, "a\0b")


def test_an_atomic_write_replaces_whole_and_leaves_nothing_else(root: int, tmp_path: Path) -> None:
    files.write_atomic(root, "f", b"one" * 100_000)
    files.write_atomic(root, "f", b"two", mode=0o640)

    assert files.read(root, "f") == b"two"
    assert (tmp_path / "f").stat().st_mode & 0o7777 == 0o640
    assert os.listdir(tmp_path) == ["f"]


def test_a_new_file_is_written_whole_and_never_over_another(root: int, tmp_path: Path) -> None:
    files.write_new(root, "f", b"one" * 100_000, mode=0o640)

    with pytest.raises(FileExistsError):
        files.write_new(root, "f", b"two")
    assert files.read(root, "f") == b"one" * 100_000
    assert (tmp_path / "f").stat().st_mode & 0o7777 == 0o640


def test_readers_of_an_atomic_write_see_one_or_the_other(root: int) -> None:
    files.write_atomic(root, "f", b"a" * 5000)
    done = threading.Event()
    seen: set[bytes] = set()

    def watch() -> None:
        while not done.is_set():
            seen.add(files.read(root, "f"))

    reader = threading.Thread(target=watch)
    reader.start()
    for number in range(50):
        files.write_atomic(root, "f", (b"b" if number % 2 else b"c") * (4000 + number))
    done.set()
    reader.join()

    assert all(len(content) >= 4000 and len(set(content)) == 1 for content in seen)


def test_a_failed_write_leaves_the_old_file_alone(root: int, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").touch()

    with pytest.raises(OSError):
        files.write_atomic(root, "d", b"x")

    assert os.listdir(tmp_path) == ["d"]


def test_an_atomic_write_replaces_a_symlink_and_not_what_it_points_at(root: int, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "f").symlink_to("target")

    files.write_atomic(root, "f", b"new")

    assert (tmp_path / "target").read_bytes() == b"keep"
    assert files.read(root, "f") == b"new"


def test_reading_tells_missing_from_unreadable(root: int, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")

    with pytest.raises(FileNotFoundError):
        files.read(root, "missing")
    with pytest.raises(IsADirectoryError):
        files.read(root, "d")
    with pytest.raises(OSError, match="symbolic links"):
        files.read(root, "link")


def test_a_fifo_in_a_files_place_does_not_hang_the_reader(root: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")

    assert files.read(root, "f") == b""


def test_an_empty_and_a_large_file_are_read_whole(root: int) -> None:
    large = os.urandom(3_000_001)
    files.write_atomic(root, "empty", b"")
    files.write_atomic(root, "large", large)

    assert files.read(root, "empty") == b""
    assert files.read(root, "large") == large


def test_rename_never_replaces(root: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")

    with pytest.raises(FileExistsError) as caught:
        files.rename(root, "a", root, "b")
    with pytest.raises(FileExistsError):
        files.rename(root, "a", root, "dangling")
    with pytest.raises(FileNotFoundError):
        files.rename(root, "missing", root, "c")
    files.rename(root, "a", root, "c")

    assert (caught.value.filename, caught.value.filename2) == ("a", "b")
    assert sorted(os.listdir(tmp_path)) == ["b", "c", "dangling"]


def test_rename_of_a_directory_into_itself_is_the_kernels_error(root: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    with pytest.raises(OSError) as caught:
        files.rename(root, "a", root, "a/b")

    assert caught.value.errno == errno.EINVAL
    assert os.listdir(tmp_path) == ["a"]


def test_a_lock_is_held_once_and_until_its_descriptor_is_closed(root: int) -> None:
    first = files.lock(root, "lock")
    assert first is not None

    assert files.lock(root, "lock") is None
    os.close(first)
    again = files.lock(root, "lock")

    assert again is not None
    os.close(again)


def test_a_lock_is_not_taken_through_a_symlink(root: int, tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("/tmp/elsewhere")

    with pytest.raises(OSError, match="symbolic links"):
        files.lock(root, "lock")


def test_usage_is_that_of_the_filesystem(root: int, tmp_path: Path) -> None:
    usage = files.usage(root)

    there = os.statvfs(tmp_path)
    assert usage.total_bytes == there.f_blocks * there.f_frsize
    assert 0 < usage.used_bytes <= usage.total_bytes
    assert usage.free_bytes <= usage.total_bytes - usage.used_bytes
    assert usage.total_inodes == there.f_files
    assert files.usage(tmp_path).total_bytes == usage.total_bytes
    assert usage.read_only is files.is_read_only(tmp_path) is False


def test_errors_of_space_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.usage(tmp_path / "missing")

    assert caught.value.filename == os.fspath(tmp_path / "missing")


def test_well_known_filesystems_are_named() -> None:
    assert files.filesystem_type(Path("/proc")) == "proc"
    assert files.filesystem_type(Path("/sys")) == "sysfs"
    assert files.filesystem_type(Path("/dev/shm")) == "tmpfs"


def test_an_unknown_filesystem_is_its_number() -> None:
    fd = os.memfd_create("x")
    pipe = os.pipe()
    try:
        assert files.filesystem_type(fd) == "tmpfs"
        assert files.filesystem_type(pipe[0]) == "0x50495045"
    finally:
        for one in (fd, *pipe):
            os.close(one)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_tree_is_removed_by_its_single_name_only(root: int, tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").mkdir()

    with pytest.raises(OSError) as caught:
        files.remove_tree(root, name)

    assert caught.value.errno == errno.EINVAL
    assert (tmp_path / "a/b").is_dir()
