# SPDX-License-Identifier: Apache-2.0
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.linux import loop
from csi_driver.linux.loop import Loop
from tests.conftest import require_tool
from tests.kernel.conftest import MIB, MakePool


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def make_image(path: Path, size_bytes: int = 16 * MIB) -> Path:
    with open(path, "wb") as file:
        file.truncate(size_bytes)
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    return path


@pytest.fixture
def image(scratch: Path) -> Path:
    return make_image(scratch / "image")


@contextmanager
def attached(
    path: Path, *, readonly: bool = False, direct_io: bool = True, sector_size: int = 512
) -> Iterator[Loop]:
    with opened(path) as fd:
        found = loop.attach(fd, readonly=readonly, direct_io=direct_io, sector_size=sector_size)
    try:
        yield found
    finally:
        loop.detach(found)


def test_loop_devices_can_be_used_here() -> None:
    assert loop.available() is None


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_file_becomes_a_device_with_its_content_and_size(image: Path, sector_size: int) -> None:
    with attached(image, sector_size=sector_size) as found:
        status = image.stat()
        assert (found.backing_device, found.backing_inode) == (status.st_dev, status.st_ino)
        assert (found.readonly, found.sector_size, found.size_bytes) == (False, sector_size, 16 * MIB)
        assert found.path == Path(f"/dev/loop{found.number}")
        assert found.device == found.path.stat().st_rdev
        with opened(found.path, os.O_RDWR) as fd:
            os.pwrite(fd, b"written" * 1000, 4096)
            os.fsync(fd)

    with opened(image) as fd:
        assert os.pread(fd, 7000, 4096) == b"written" * 1000


def test_direct_io_is_on_where_it_can_be_and_off_on_demand(image: Path) -> None:
    with attached(image, sector_size=4096) as found:
        assert found.direct_io
        assert Path(f"/sys/block/loop{found.number}/loop/dio").read_text().strip() == "1"
    with attached(image, direct_io=False) as found:
        assert not found.direct_io


def test_direct_io_that_cannot_be_is_left_off(workshop: Path) -> None:
    """A file on a filesystem with 4 KiB blocks on a 4 KiB disk has no direct I/O in units of 512."""
    disk = make_image(workshop / "disk", 64 * MIB)
    with attached(disk, sector_size=4096) as below:
        subprocess.run(["mkfs.ext4", "-q", "-F", below.path], check=True)
        (workshop / "mnt").mkdir()
        subprocess.run(["mount", below.path, workshop / "mnt"], check=True)
        above = make_image(workshop / "mnt/image", 8 * MIB)
        try:
            with attached(above, sector_size=512) as found:
                assert not found.direct_io
            with attached(above, sector_size=4096) as found:
                assert found.direct_io
        finally:
            subprocess.run(["umount", workshop / "mnt"], check=True)


def test_read_only_is_truly_so(image: Path) -> None:
    with attached(image, readonly=True) as found:
        assert found.readonly
        with opened(found.path) as fd:
            assert os.pread(fd, 512, 0) == bytes(512)
        with pytest.raises(OSError) as caught, opened(found.path, os.O_RDWR) as fd:
            os.pwrite(fd, b"x" * 512, 0)
        assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
    assert image.read_bytes()[:512] == bytes(512)


def test_a_read_only_descriptor_makes_a_writable_device(image: Path) -> None:
    with opened(image, os.O_PATH) as fd:
        found = loop.attach(fd)

    try:
        assert not found.readonly
    finally:
        loop.detach(found)


def test_a_file_that_cannot_be_written_is_no_writable_device(ext4_pool: Path) -> None:
    image = make_image(ext4_pool / "image")
    subprocess.run(["mount", "-o", "remount,ro", ext4_pool], check=True)

    with opened(image) as fd:
        with pytest.raises(OSError) as caught:
            loop.attach(fd)
        found = loop.attach(fd, readonly=True)

    assert caught.value.errno == errno.EROFS
    assert found.readonly
    loop.detach(found)


def test_a_device_left_read_only_by_its_last_user_is_writable_again(image: Path) -> None:
    require_tool("blockdev")
    with attached(image) as found:
        subprocess.run(["blockdev", "--setro", found.path], check=True)

    # The lowest free one is given out, so most likely the same.
    with attached(image) as found, opened(found.path, os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 512, 0)


@pytest.mark.parametrize("sector_size", [1, 513, 8192, 1 << 20])
def test_an_impossible_sector_size_is_an_error_and_leaks_no_device(image: Path, sector_size: int) -> None:
    with opened(image) as fd:
        with pytest.raises(OSError) as caught:
            found = loop.attach(fd, sector_size=sector_size)
            loop.detach(found)  # Newer kernels can do 8192 and more.
            raise OSError(errno.EINVAL, "it was possible")
        assert caught.value.errno == errno.EINVAL
        assert loop.find(fd) == []


def test_what_is_no_file_is_an_error(scratch: Path) -> None:
    with opened(scratch) as fd, pytest.raises(OSError) as caught:
        loop.attach(fd)
    assert caught.value.errno in (errno.EISDIR, errno.EINVAL)


def test_a_device_is_found_by_its_file_whatever_became_of_the_path(image: Path) -> None:
    with attached(image) as found, opened(image) as fd:
        renamed = image.rename(image.with_name("renamed"))
        # Another file at the old path is another file.
        make_image(image)
        with opened(image) as other:
            assert loop.find(other) == []
        assert loop.find(fd) == [found]
        os.link(renamed, renamed.with_name("hard link"))
        with opened(renamed.with_name("hard link")) as linked:
            assert loop.find(linked) == [found]
        renamed.unlink()
        renamed.with_name("hard link").unlink()
        assert loop.find(fd) == [found]
        assert found in loop.all()
        assert loop.get(found.number) == found


def test_all_devices_of_a_file_are_found_in_order(image: Path) -> None:
    with attached(image) as first, attached(image, readonly=True) as second, opened(image) as fd:
        assert loop.find(fd) == sorted((first, second), key=lambda one: one.number)
    with opened(image) as fd:
        assert loop.find(fd) == []


def test_names_of_any_bytes_can_be_attached(scratch: Path) -> None:
    image = make_image(scratch / os.fsdecode(b"\xff (deleted)\n" + b"n" * 200))
    with attached(image) as found, opened(image) as fd:
        assert loop.find(fd) == [found]


def test_detaching_again_is_fine_and_takes_nothing_from_another(image: Path, scratch: Path) -> None:
    with attached(image) as old:
        pass
    other = make_image(scratch / "other")
    with attached(other) as new:
        loop.detach(old)
        if new.number == old.number:
            assert loop.get(new.number) == new
        with opened(other) as fd:
            assert loop.find(fd) == [new]


def test_a_device_that_was_never_there_is_detached(image: Path) -> None:
    loop.detach(Loop(987_654, Path("/dev/loop987654"), 0, 1, 2, False, False, 512, 0))

    assert loop.get(987_654) is None


def test_a_device_that_someone_has_open_is_ebusy_and_stays_for_good(image: Path) -> None:
    """LOOP_CLR_FD marks such a device to vanish at its last close: a pod's raw device would go with the next look."""
    with attached(image) as found:
        with opened(found.path):
            started = time.monotonic()
            with pytest.raises(OSError) as caught:
                loop.detach(found)
            assert caught.value.errno == errno.EBUSY
            assert time.monotonic() - started > 0.5
        time.sleep(0.05)

        assert loop.get(found.number) == found
        assert Path(f"/sys/block/loop{found.number}/loop/autoclear").read_text().strip() == "0"


def test_a_mounted_device_is_ebusy_and_never_marked_to_vanish(image: Path, scratch: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    (scratch / "mnt").mkdir()
    autoclear = set()
    with attached(image) as found:
        subprocess.run(["mount", found.path, scratch / "mnt"], check=True)
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                autoclear.add(Path(f"/sys/block/loop{found.number}/loop/autoclear").read_text().strip())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with pytest.raises(OSError) as caught:
                loop.detach(found)
        finally:
            stop.set()
            watcher.join()
            subprocess.run(["umount", scratch / "mnt"], check=True)
        assert caught.value.errno == errno.EBUSY
        assert autoclear == {"0"}
        assert loop.get(found.number) == found


def test_a_device_that_is_soon_closed_is_waited_for(image: Path) -> None:
    with opened(image) as fd:
        found = loop.attach(fd)
        held = os.open(found.path, os.O_RDONLY)
        releaser = threading.Timer(0.3, os.close, [held])
        releaser.start()

        loop.detach(found)

        releaser.join()
        assert loop.find(fd) == []


def test_a_missing_node_is_made(image: Path) -> None:
    """A container's /dev is a copy of what the host had when the container started."""
    with attached(image) as found:
        found.path.unlink()
        assert loop.get(found.number) == found
        assert found.path.stat().st_rdev == found.device
        found.path.unlink()
    assert found.path.is_block_device()


def test_what_is_no_device_in_a_nodes_place_is_an_error(image: Path) -> None:
    with attached(image) as found:
        found.path.unlink()
        found.path.write_text("trap")
        try:
            with pytest.raises(OSError) as caught:
                loop.get(found.number)
            assert caught.value.errno == errno.ENOTBLK
            assert found.path.read_text() == "trap"
        finally:
            found.path.unlink()


def test_threads_that_attach_at_once_get_devices_of_their_own(scratch: Path) -> None:
    images = [make_image(scratch / f"i{number}", MIB) for number in range(24)]
    found: list[Loop] = []

    def attach(path: Path) -> Loop:
        with opened(path) as fd:
            return loop.attach(fd)

    try:
        with ThreadPoolExecutor(24) as pool:
            found += pool.map(attach, images)

        assert len({one.number for one in found}) == len(images)
        assert [one.backing_inode for one in found] == [path.stat().st_ino for path in images]
    finally:
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(loop.detach, found))
    assert not set(found) & set(loop.all())


def test_processes_that_attach_at_once_get_devices_of_their_own(scratch: Path) -> None:
    script = (
        "import os, sys; from csi_driver.linux import loop;"
        "fd = os.open(sys.argv[1], os.O_RDWR); found = [loop.attach(fd) for _ in range(5)];"
        "print(*(one.number for one in found))"
    )
    images = [make_image(scratch / f"i{number}", MIB) for number in range(4)]
    children = [
        subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
        for path in images
    ]
    printed = [child.communicate(timeout=60)[0].split() for child in children]
    try:
        assert [child.returncode for child in children] == [0] * 4
        numbers = [number for line in printed for number in line]
        assert len(set(numbers)) == 20
    finally:
        for path in images:
            with opened(path) as fd:
                for one in loop.find(fd):
                    loop.detach(one)


def test_a_grown_file_is_a_grown_device_once_it_is_told(image: Path) -> None:
    with attached(image) as found:
        os.truncate(image, 24 * MIB)

        grown = loop.refresh_size(found)

        assert grown.size_bytes == 24 * MIB
        assert loop.get(found.number) == grown
    with pytest.raises(OSError) as caught:
        loop.refresh_size(found)
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_images_on_other_filesystems_are_found_too(make_pool: MakePool, fs_type: str) -> None:
    """btrfs has a device number of its own for each subvolume; the kernel and stat(2) must agree on it."""
    image = make_image(make_pool(fs_type) / "image")

    with attached(image, sector_size=4096) as found, opened(image) as fd:
        assert loop.find(fd) == [found]


def test_a_look_at_all_devices_survives_others_coming_and_going(scratch: Path) -> None:
    images = [make_image(scratch / f"i{number}", MIB) for number in range(3)]
    stop = threading.Event()

    def churn(path: Path) -> None:
        while not stop.is_set():
            with attached(path):
                pass

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(churn, path) for path in images]
        try:
            for _ in range(100):
                loop.all()
        finally:
            stop.set()
        for one in running:
            one.result()
