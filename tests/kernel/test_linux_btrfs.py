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

from csi_driver.linux import btrfs, files
from tests.kernel.conftest import MIB


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def root(btrfs_pool: Path) -> Iterator[int]:
    with opened(btrfs_pool) as fd:
        yield fd


def create(path: Path) -> int:
    """Make a subvolume; its id."""
    with opened(path.parent) as parent:
        btrfs.create_subvolume(parent, path.name)
    with opened(path) as fd:
        return btrfs.subvolume_id(fd)


def fill(path: Path, size_bytes: int) -> int:
    """Write until that much is there or the limit says no; the bytes that were taken, all on disk."""
    written = 0
    with open(path, "wb", buffering=0) as file:
        try:
            while written < size_bytes:
                written += file.write(os.urandom(MIB))
                os.fsync(file.fileno())
        except OSError as error:
            assert error.errno in (errno.EDQUOT, errno.ENOSPC)
    return written


def test_a_subvolume_is_one_and_a_directory_is_none(root: int, btrfs_pool: Path) -> None:
    number = create(btrfs_pool / "v")
    (btrfs_pool / "v/d").mkdir()
    (btrfs_pool / "d").mkdir()

    with (
        opened(btrfs_pool / "v") as v,
        opened(btrfs_pool / "v/d") as inside,
        opened(btrfs_pool / "d") as plain,
    ):
        assert [btrfs.is_subvolume(fd) for fd in (root, v, inside, plain)] == [True, True, False, False]
        assert btrfs.subvolume_id(v) == btrfs.subvolume_id(inside) == number
        assert btrfs.subvolume_id(root) == btrfs.subvolume_id(plain) == 5


def test_elsewhere_nothing_is_a_subvolume(ext4_pool: Path) -> None:
    with opened(ext4_pool) as fd:
        assert not btrfs.is_subvolume(fd)
        with pytest.raises(OSError) as caught:
            btrfs.create_subvolume(fd, "v")
        assert caught.value.errno == errno.ENOTTY
        with pytest.raises(OSError):
            btrfs.subvolume_id(fd)


def test_a_name_that_is_taken_is_an_error(root: int, btrfs_pool: Path) -> None:
    create(btrfs_pool / "v")

    with pytest.raises(FileExistsError):
        btrfs.create_subvolume(root, "v")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "n" * 256])
def test_a_name_that_is_no_single_component_is_refused(root: int, btrfs_pool: Path, name: str) -> None:
    for call in (btrfs.create_subvolume, btrfs.delete_subvolume):
        with pytest.raises(OSError) as caught:
            call(root, name)
        assert caught.value.errno == errno.EINVAL
    assert os.listdir(btrfs_pool) == []


@pytest.mark.parametrize("name", [b"\xff\xfe \n", b"n" * 255, "größe".encode(), b"-x"])
def test_names_of_any_bytes_work(root: int, btrfs_pool: Path, name: bytes) -> None:
    text = os.fsdecode(name)
    btrfs.create_subvolume(root, text)
    with opened(btrfs_pool / text) as fd:
        btrfs.snapshot(fd, root, text[:-1] + "s", readonly=True)

    assert len(os.listdir(os.fsencode(btrfs_pool))) == 2
    btrfs.delete_subvolume(root, text)
    btrfs.delete_subvolume(root, text[:-1] + "s")
    assert os.listdir(btrfs_pool) == []


def test_a_deleted_subvolume_goes_with_its_content_and_missing_is_fine(root: int, btrfs_pool: Path) -> None:
    number = create(btrfs_pool / "v")
    (btrfs_pool / "v/f").write_bytes(b"x" * MIB)
    assert btrfs.subvolume_exists(root, number)

    btrfs.delete_subvolume(root, "v")
    btrfs.delete_subvolume(root, "v")

    assert os.listdir(btrfs_pool) == []
    assert not btrfs.subvolume_exists(root, number)


def test_a_directory_or_file_is_not_deleted_as_a_subvolume(root: int, btrfs_pool: Path) -> None:
    (btrfs_pool / "d").mkdir()
    (btrfs_pool / "f").touch()

    for name in ("d", "f"):
        with pytest.raises(OSError):
            btrfs.delete_subvolume(root, name)
        assert not btrfs.delete_if_subvolume(root, name)

    assert sorted(os.listdir(btrfs_pool)) == ["d", "f"]


def test_a_snapshot_has_the_content_and_goes_its_own_way(root: int, btrfs_pool: Path) -> None:
    create(btrfs_pool / "v")
    (btrfs_pool / "v/f").write_text("before")

    with opened(btrfs_pool / "v") as fd:
        btrfs.snapshot(fd, root, "s", readonly=True)
        btrfs.snapshot(fd, root, "w")
    (btrfs_pool / "v/f").write_text("after")
    (btrfs_pool / "w/g").write_text("own")

    assert (btrfs_pool / "s/f").read_text() == (btrfs_pool / "w/f").read_text() == "before"
    with pytest.raises(OSError) as caught:
        (btrfs_pool / "s/f").write_text("no")
    assert caught.value.errno == errno.EROFS
    assert not (btrfs_pool / "v/g").exists()


def test_a_read_only_subvolume_can_be_made_writable_and_be_deleted(root: int, btrfs_pool: Path) -> None:
    create(btrfs_pool / "v")
    with opened(btrfs_pool / "v") as fd:
        btrfs.set_readonly(fd, True)
        btrfs.set_readonly(fd, True)
        with pytest.raises(OSError):
            (btrfs_pool / "v/f").touch()
        btrfs.set_readonly(fd, False)
        (btrfs_pool / "v/f").touch()
        btrfs.set_readonly(fd, True)

    btrfs.delete_subvolume(root, "v")

    assert os.listdir(btrfs_pool) == []


def test_a_subvolume_moves_with_its_directory_and_alone(root: int, btrfs_pool: Path) -> None:
    """Homes are renamed from staging/ to volumes/ and to trash/, their subvolumes in them."""
    for area in ("staging", "volumes"):
        (btrfs_pool / area).mkdir()
    (btrfs_pool / "staging/id").mkdir()
    number = create(btrfs_pool / "staging/id/data")
    (btrfs_pool / "staging/id/data/f").write_text("x")

    with opened(btrfs_pool / "staging") as old, opened(btrfs_pool / "volumes") as new:
        files.rename(old, "id", new, "id")
        with opened(btrfs_pool / "volumes/id") as home:
            files.rename(home, "data", new, "alone")
    other = create(btrfs_pool / "other")
    os.rename(btrfs_pool / "volumes/alone", btrfs_pool / "other/nested")

    with opened(btrfs_pool / "other/nested") as fd:
        assert btrfs.subvolume_id(fd) == number != other
    assert (btrfs_pool / "other/nested/f").read_text() == "x"


# remove_tree on btrfs


def test_a_tree_with_nested_and_read_only_subvolumes_goes(root: int, btrfs_pool: Path) -> None:
    """A pod may make subvolumes and read-only snapshots in its volume, without any privilege."""
    (btrfs_pool / "t/d").mkdir(parents=True)
    create(btrfs_pool / "t/v")
    (btrfs_pool / "t/v/d/e").mkdir(parents=True)
    create(btrfs_pool / "t/v/d/nested")
    create(btrfs_pool / "t/v/d/nested/deeper")
    (btrfs_pool / "t/v/d/nested/deeper/f").write_text("x")
    with (
        opened(btrfs_pool / "t/v") as v,
        opened(btrfs_pool / "t/v/d/e") as e,
        opened(btrfs_pool / "t/d") as d,
    ):
        btrfs.snapshot(v, e, "snapshot", readonly=True)
        btrfs.snapshot(v, d, "writable")
    with opened(btrfs_pool / "t/v/d/nested") as nested:
        btrfs.set_readonly(nested, True)
    with opened(btrfs_pool / "t/v") as v:
        btrfs.set_readonly(v, True)

    files.remove_tree(root, "t")

    assert os.listdir(btrfs_pool) == []


def test_a_tree_that_is_a_subvolume_itself_goes(root: int, btrfs_pool: Path) -> None:
    create(btrfs_pool / "v")
    create(btrfs_pool / "v/nested")
    (btrfs_pool / "v/f").touch()

    files.remove_tree(root, "v")

    assert os.listdir(btrfs_pool) == []


def test_a_mount_in_a_nested_subvolume_refuses_the_whole_tree(root: int, btrfs_pool: Path) -> None:
    create(btrfs_pool / "v")
    create(btrfs_pool / "v/nested")
    (btrfs_pool / "v/nested/m").mkdir()
    (btrfs_pool / "v/f").touch()
    subprocess.run(["mount", "-t", "tmpfs", "none", btrfs_pool / "v/nested/m"], check=True)

    with pytest.raises(OSError) as caught:
        files.remove_tree(root, "v")

    subprocess.run(["umount", btrfs_pool / "v/nested/m"], check=True)
    assert caught.value.errno == errno.EBUSY
    assert (btrfs_pool / "v/f").exists()


# Quotas


def simple_quotas() -> bool:
    return Path("/sys/fs/btrfs/features/simple_quota").exists()


@pytest.fixture(params=["qgroup", "simple"])
def limited(request: pytest.FixtureRequest, root: int) -> int:
    """The pool's root, with quotas of that kind."""
    if request.param == "simple" and not simple_quotas():
        pytest.skip("simple quotas came with kernel 6.7")
    btrfs.enable_quota(root, request.param)
    assert btrfs.quota_mode(root) == request.param
    return root


def test_quotas_are_off_at_first_and_stay_as_they_were_made(root: int) -> None:
    assert btrfs.quota_mode(root) == "off"
    btrfs.enable_quota(root, "qgroup")
    assert btrfs.quota_mode(root) == "qgroup"

    btrfs.enable_quota(root)

    assert btrfs.quota_mode(root) == "qgroup"
    btrfs.wait_rescan(root)
    assert not btrfs.is_inconsistent(root)


def test_without_quotas_limits_are_an_error_and_usage_unknown(root: int, btrfs_pool: Path) -> None:
    number = create(btrfs_pool / "v")

    with pytest.raises(OSError) as caught:
        btrfs.set_limit(root, number, MIB)
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(FileNotFoundError):
        btrfs.usage(root, number)
    btrfs.remove_qgroup(root, number)


def test_a_subvolume_holds_its_limit_and_no_more_and_its_neighbour_more(
    limited: int, btrfs_pool: Path
) -> None:
    number, neighbour = create(btrfs_pool / "v"), create(btrfs_pool / "n")
    btrfs.set_limit(limited, number, 20 * MIB)

    taken = fill(btrfs_pool / "v/f", 40 * MIB)

    assert 17 * MIB <= taken <= 20 * MIB
    assert fill(btrfs_pool / "n/f", 40 * MIB) == 40 * MIB
    os.sync()
    referenced, exclusive, limit = btrfs.usage(limited, number)
    assert taken <= referenced <= 20 * MIB
    assert exclusive <= referenced
    assert limit == 20 * MIB
    assert btrfs.usage(limited, neighbour)[2] is None


def test_a_higher_limit_lets_more_in_and_none_everything(limited: int, btrfs_pool: Path) -> None:
    number = create(btrfs_pool / "v")
    btrfs.set_limit(limited, number, 10 * MIB)
    assert fill(btrfs_pool / "v/f", 40 * MIB) <= 10 * MIB

    btrfs.set_limit(limited, number, 20 * MIB)
    assert 6 * MIB <= fill(btrfs_pool / "v/g", 40 * MIB) <= 11 * MIB

    btrfs.set_limit(limited, number, 0)
    assert btrfs.usage(limited, number)[2] is None
    assert fill(btrfs_pool / "v/h", 40 * MIB) == 40 * MIB


def test_what_is_deleted_can_be_written_again(limited: int, btrfs_pool: Path) -> None:
    number = create(btrfs_pool / "v")
    btrfs.set_limit(limited, number, 20 * MIB)
    assert fill(btrfs_pool / "v/f", 40 * MIB) <= 20 * MIB

    (btrfs_pool / "v/f").unlink()
    os.sync()

    assert fill(btrfs_pool / "v/g", 12 * MIB) == 12 * MIB


def test_a_clone_counts_what_it_shares_with_full_qgroups_only(limited: int, btrfs_pool: Path) -> None:
    """The price of simple quotas, which the documents must tell: a clone's limit is for what it writes itself."""
    create(btrfs_pool / "v")
    fill(btrfs_pool / "v/f", 16 * MIB)
    with opened(btrfs_pool / "v") as fd:
        btrfs.snapshot(fd, limited, "c")
    with opened(btrfs_pool / "c") as fd:
        clone = btrfs.subvolume_id(fd)
    os.sync()

    referenced, exclusive, _ = btrfs.usage(limited, clone)

    if btrfs.quota_mode(limited) == "qgroup":
        assert referenced >= 16 * MIB > exclusive
    else:
        assert referenced < MIB


def test_the_qgroup_of_a_living_subvolume_stays_and_of_no_subvolume_is_gone(
    limited: int, btrfs_pool: Path
) -> None:
    number = create(btrfs_pool / "v")
    fill(btrfs_pool / "v/f", MIB)
    os.sync()

    if btrfs.quota_mode(limited) == "simple":
        with pytest.raises(OSError) as caught:
            btrfs.remove_qgroup(limited, number)
        assert caught.value.errno == errno.EBUSY
    btrfs.remove_qgroup(limited, 999_999)

    assert number in btrfs.qgroup_numbers(limited, 0)


def test_quotas_live_through_a_remount(limited: int, btrfs_pool: Path) -> None:
    mode = btrfs.quota_mode(limited)
    number = create(btrfs_pool / "v")
    btrfs.set_limit(limited, number, 20 * MIB)
    btrfs.commit(limited)
    options = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE", btrfs_pool], check=True, capture_output=True, text=True
    ).stdout.strip()
    second = btrfs_pool.parent / "second"
    second.mkdir()

    with opened(btrfs_pool) as before:
        assert btrfs.usage(before, number)[2] == 20 * MIB
    subprocess.run(["mount", options, second], check=True)
    with opened(second) as again:
        assert btrfs.quota_mode(again) == mode
        assert btrfs.usage(again, number)[2] == 20 * MIB
    subprocess.run(["umount", second], check=True)


def test_what_waits_in_the_kernel_holds_up_no_other_thread(root: int, btrfs_pool: Path) -> None:
    subprocess.run(["fsfreeze", "--freeze", btrfs_pool], check=True)
    # Not by this process, in which nothing might move.
    thaw = subprocess.Popen(["sh", "-c", f"sleep 5; fsfreeze --unfreeze {btrfs_pool}"])
    try:
        making = threading.Thread(target=btrfs.create_subvolume, args=(root, "v"))
        making.start()
        time.sleep(0.2)

        assert making.is_alive(), "this thread goes on while that one waits for the thaw"
    finally:
        thaw.wait()
    making.join()
    assert (btrfs_pool / "v").is_dir()
