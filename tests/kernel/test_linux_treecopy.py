# SPDX-License-Identifier: Apache-2.0
"""Copies of trees and files: everything that a file is, on every filesystem."""

import os
import random
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from csi_driver.linux import copy, fiemap, files, holes, mount, treecopy
from csi_driver.linux.copy import Stopped, Transfer
from tests.kernel.conftest import MIB, MakePool
from tests.trees import describe, differences

FILESYSTEMS = ("ext4", "xfs", "btrfs")
ACCESSED_NS = 10**18 + 1
ACL = bytes.fromhex(
    "0200000001000600ffffffff020007003930000004000400ffffffff10000700ffffffff20000400ffffffff"
)


def copied(source: Path, target: Path, transfer: Transfer | None = None, *, share: bool = True) -> None:
    target.mkdir()
    src_fd = files.open_directory(source)
    view = mount.private_view(src_fd)
    dst_fd = files.open_directory(target)
    try:
        treecopy.copy_tree(view, dst_fd, transfer or Transfer(), share=share)
    finally:
        for fd in (dst_fd, view, src_fd):
            os.close(fd)


def populate(root: Path) -> None:
    """One of everything."""
    root.mkdir()
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "file").write_bytes(os.urandom(100_000))
    (root / "empty").touch()
    os.link(root / "file", root / "sub" / "second")
    os.link(root / "file", root / "third")
    os.symlink("../no/where", root / "sub" / "link")
    os.symlink("x" * 1000, root / "long link")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fspath(root / "socket"))
    os.mknod(root / "null", stat.S_IFCHR | 0o640, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    (root / ("n" * 255)).write_text("long name")
    with open(os.fsencode(root) + b"/\xff\xfe not text\n", "wb") as file:
        file.write(b"x")
    with open(root / "sparse", "wb") as file:
        file.truncate(50 * MIB)
        file.seek(20 * MIB)
        file.write(os.urandom(65536))
    os.setxattr(root / "file", "user.note", b"kept")
    os.setxattr(root / "file", "trusted.mark", b"\0\1")
    os.setxattr(root / "sub", "user.note", b"dir")
    os.setxattr(root / "fifo", "trusted.mark", b"fifo")
    os.setxattr(root / "sub" / "link", "trusted.mark", b"link", follow_symlinks=False)
    # A file capability (version 2, cap_net_raw), which a change of owner would clear.
    os.setxattr(
        root / "empty", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
    )
    os.setxattr(root / "third", "system.posix_acl_access", ACL)
    os.setxattr(root / "sub", "system.posix_acl_default", ACL)
    os.chown(root / "sub" / "deep", 1234, 5678)
    os.chmod(root / "sub" / "deep", 0o2750)
    os.chown(root / "empty", 77, 88)
    os.chmod(root / "sparse", 0o4711)
    os.setxattr(
        root / "empty", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
    )
    os.lchown(root / "sub" / "link", 5, 6)
    for path in (root / "file", root / "sub" / "deep", root / "sub", root):
        os.utime(path, ns=(ACCESSED_NS, 10**18 + 123_456_789))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_everything_is_kept(make_pool: MakePool, fs_type: str, share: bool) -> None:
    pool = make_pool(fs_type)
    populate(pool / "a")

    copied(pool / "a", pool / "b", share=share)

    # Before anything is read, which would change it.
    assert os.stat(pool / "b" / "file").st_atime_ns == os.stat(pool / "b").st_atime_ns == ACCESSED_NS
    assert differences(describe(pool / "a"), describe(pool / "b")) == []
    assert os.stat(pool / "b" / "sparse").st_blocks * 512 < MIB


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_are_the_source_s_whatever_is_usual_where_the_copy_is(ext4_pool: Path, umask: int) -> None:
    """Neither this process's umask nor a group or a default ACL that a directory above hands down changes who reads a file."""
    source, above = ext4_pool / "source", ext4_pool / "above"
    (source / "sub").mkdir(parents=True)
    for mode in (0o000, 0o600, 0o644, 0o666, 0o777, 0o2755, 0o4711):
        for owner in (0, 1000):
            path = source / "sub" / f"{mode:o}-{owner}"
            path.write_text("content")
            os.chown(path, owner, owner)
            os.chmod(path, mode)
    before = describe(source)
    above.mkdir()
    os.chown(above, 0, 1234)
    os.chmod(above, 0o2775)
    os.setxattr(above, "system.posix_acl_default", ACL)
    usual = os.umask(umask)
    try:
        copied(source, above / "target")
    finally:
        os.umask(usual)
    assert differences(before, describe(above / "target")) == []


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_what_nobody_may_change_is_copied_without_its_flags(make_pool: MakePool, fs_type: str) -> None:
    """A copy with them could be neither written to nor removed."""
    pool = make_pool(fs_type)
    (pool / "a" / "sub").mkdir(parents=True)
    flagged = {"fixed": "+i", "log": "+a", "sub": "+i"}
    for name in ("fixed", "log"):
        (pool / "a" / name).write_text(name)
    (pool / "a" / "sub" / "file").write_text("x")
    for name, flags in flagged.items():
        subprocess.run(["chattr", flags, pool / "a" / name], check=True)
    try:
        copied(pool / "a", pool / "b")

        assert differences(describe(pool / "a"), describe(pool / "b")) == []
        for name in ("fixed", "log"):
            (pool / "b" / name).write_text("changed")
        (pool / "b" / "sub" / "file").unlink()
    finally:
        for name in flagged:
            subprocess.run(["chattr", "-ia", pool / "a" / name], check=True)


def test_a_tree_deeper_than_any_path(ext4_pool: Path) -> None:
    (ext4_pool / "a").mkdir()
    fd = files.open_directory(ext4_pool / "a")
    name = "d" * 200
    for _ in range(60):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open("bottom", "w", opener=lambda path, flags: os.open(path, flags, dir_fd=fd)) as file:
        file.write("here")
    os.link("bottom", "same", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)

    copied(ext4_pool / "a", ext4_pool / "b")

    fd = files.open_directory(ext4_pool / "b")
    for _ in range(60):
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    assert sorted(os.listdir(fd)) == ["bottom", "same"]
    assert os.stat("same", dir_fd=fd).st_nlink == 2
    os.close(fd)
    for tree in ("a", "b"):
        pool_fd = files.open_directory(ext4_pool)
        files.remove_tree(pool_fd, tree)
        os.close(pool_fd)


def test_what_is_mounted_in_it_and_devices_stay_out(ext4_pool: Path, xfs_pool: Path) -> None:
    (ext4_pool / "a" / "mounted").mkdir(parents=True)
    (xfs_pool / "secret").write_text("x")
    subprocess.run(["mount", "--bind", xfs_pool, ext4_pool / "a" / "mounted"], check=True)
    try:
        copied(ext4_pool / "a", ext4_pool / "b")
    finally:
        subprocess.run(["umount", ext4_pool / "a" / "mounted"], check=True)

    assert os.listdir(ext4_pool / "b" / "mounted") == []


def test_symlinks_that_race_lead_nowhere(ext4_pool: Path) -> None:
    """Directories that become symlinks to elsewhere while the tree is copied show nothing of elsewhere."""
    (ext4_pool / "outside").mkdir()
    (ext4_pool / "outside" / "secret").write_text("not yours")
    tree = ext4_pool / "a"
    for number in range(50):
        (tree / f"d{number}").mkdir(parents=True)
        (tree / f"d{number}" / "file").write_text("x")
    ending = threading.Event()

    def swap() -> None:
        while not ending.is_set():
            chosen = tree / f"d{random.randrange(50)}"
            aside = tree / f".{chosen.name}"
            os.rename(chosen, aside)
            os.symlink("../outside", chosen)
            os.unlink(chosen)
            os.rename(aside, chosen)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for number in range(30):
            copied(tree, ext4_pool / f"copy{number}")
    finally:
        ending.set()
        swapping.join()

    found = [name for copy in ext4_pool.glob("copy*") for _, _, names in os.walk(copy) for name in names]
    assert "secret" not in found
    assert "file" in found


def test_a_copy_stops_when_it_is_told(ext4_pool: Path) -> None:
    (ext4_pool / "a").mkdir()
    (ext4_pool / "a" / "file").write_bytes(bytes(100))
    stopped = Transfer()
    stopped.stop()

    with pytest.raises(Stopped):
        copied(ext4_pool / "a", ext4_pool / "b", stopped)


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_a_sparse_file_stays_sparse_and_equal(make_pool: MakePool, fs_type: str) -> None:
    pool = make_pool(fs_type)
    seed = random.Random(7)
    with open(pool / "a", "wb") as file:
        file.truncate(64 * MIB + 123)
        for _ in range(40):
            file.seek(seed.randrange(64 * MIB))
            file.write(seed.randbytes(seed.randrange(1, 200_000)))
    with open(pool / "a", "rb") as source, open(pool / "b", "w+b") as target:
        os.fsync(source.fileno())
        transfer = Transfer()
        copy.copy_sparse(source.fileno(), target.fileno(), transfer)
        os.fsync(target.fileno())
        assert transfer.done_bytes == holes.data_bytes(source.fileno()) < 20 * MIB
        assert not [one for one in fiemap.extents(target.fileno()) if one.flags & fiemap.SHARED]
    assert (pool / "a").read_bytes() == (pool / "b").read_bytes()
    assert (pool / "b").stat().st_blocks * 512 < 24 * MIB


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_what_is_shared_is_told_from_what_is_not(make_pool: MakePool, fs_type: str) -> None:
    pool = make_pool(fs_type)
    (pool / "a").write_bytes(os.urandom(8 * MIB))
    with open(pool / "a", "r+b") as source, open(pool / "b", "w+b") as target:
        os.fsync(source.fileno())
        assert fiemap.exclusive_bytes(source.fileno()) == 8 * MIB
        files.clone_file(source.fileno(), target.fileno())
        os.sync()
        assert fiemap.exclusive_bytes(source.fileno()) == 0
        source.seek(2 * MIB)
        source.write(os.urandom(MIB))
        source.flush()
        os.sync()
        own = fiemap.exclusive_bytes(source.fileno())
        assert MIB <= own < 2 * MIB
