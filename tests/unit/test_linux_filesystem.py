# SPDX-License-Identifier: Apache-2.0
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.linux import filesystem, signature
from csi_driver.linux.filesystem import FILESYSTEMS, parse_options

MIB = 1 << 20


@pytest.mark.parametrize(
    ("fs_type", "options", "parsed"),
    [
        ("ext4", "", []),
        ("ext4", "-i 16384", ["-i", "16384"]),
        ("ext4", "-i16384 -I256", ["-i", "16384", "-I", "256"]),
        ("ext4", "-i 64k", ["-i", "64k"]),
        ("ext4", "-m 0.5 -N 1000000", ["-m", "0.5", "-N", "1000000"]),
        ("ext4", "-O ^orphan_file,fast_commit", ["-O", "^orphan_file,fast_commit"]),
        ("ext4", "-E stride=4,stripe_width=8", ["-E", "stride=4,stripe_width=8"]),
        ("ext4", "-L 'data_1.2'", ["-L", "data_1.2"]),
        ("xfs", "-m reflink=1,rmapbt=0 -d agcount=8,su=64k,sw=2", ["-m", "reflink=1,rmapbt=0", "-d", "agcount=8,su=64k,sw=2"]),
        ("xfs", "-i size=1024 -n size=8k -l size=64m", ["-i", "size=1024", "-n", "size=8k", "-l", "size=64m"]),
        ("btrfs", "--csum xxhash", ["--csum", "xxhash"]),
        ("btrfs", "--csum=xxhash -M -m single", ["--csum", "xxhash", "-M", "-m", "single"]),
        ("btrfs", "-O ^free-space-tree", ["-O", "^free-space-tree"]),
    ],
)  # fmt: skip
def test_harmless_options_are_accepted(fs_type: str, options: str, parsed: list[str]) -> None:
    assert parse_options(fs_type, options) == parsed


@pytest.mark.parametrize(
    ("fs_type", "options", "named"),
    [
        ("ext4", "-d /etc", "'-d'"),
        ("ext4", "/dev/sda", "'/dev/sda'"),
        ("ext4", "--help", "'--help'"),
        ("ext4", "-E root_owner=0:0", "'root_owner=0:0'"),
        ("ext4", "-E stride=4,offset=1", "'stride=4,offset=1'"),
        ("ext4", "-E discard", "'discard'"),
        ("ext4", "-O journal_dev", "'journal_dev'"),
        ("ext4", "-O ^has_journal", "'^has_journal'"),
        ("ext4", "-J device=/dev/sda", "'device=/dev/sda'"),
        ("ext4", "-i", "''"),
        ("ext4", "-i -1", "'-1'"),
        ("ext4", "-i 16384;id", "'16384;id'"),
        ("ext4", "-N ٣", "'٣'"),
        ("ext4", "-F", "'-F'"),
        ("ext4", "-n", "'-n'"),
        ("ext4", "-L 'a\nb'", "'a\\\\nb'"),
        ("ext4", "'unfinished", "No closing quotation"),
        ("xfs", "-d file,name=/etc/passwd", "'file,name=/etc/passwd'"),
        ("xfs", "-l logdev=/dev/sda", "'logdev=/dev/sda'"),
        ("xfs", "-p /etc/passwd", "'-p'"),
        ("xfs", "-c options=/x", "'-c'"),
        ("xfs", "-r rtdev=/dev/sda", "'-r'"),
        ("btrfs", "-r /etc", "'-r'"),
        ("btrfs", "--rootdir=/etc", "'--rootdir=/etc'"),
        ("btrfs", "-M=1", "'=1'"),
        ("btrfs", "-b 1m", "'-b'"),
    ],
)
def test_any_other_option_is_refused_by_name(fs_type: str, options: str, named: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_options(fs_type, options)

    assert named.replace("\\\\", "\\") in str(caught.value)
    assert "mkfs option" in str(caught.value)


def test_a_refusal_tells_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"allowed are -i, -I, -N, -m"):
        parse_options("ext4", "-q")
    with pytest.raises(ValueError, match=r"allowed are \(finobt=\[01\]\|rmapbt=\[01\]"):
        parse_options("xfs", "-m crc=0")


def test_an_unknown_filesystem_names_the_known() -> None:
    with pytest.raises(ValueError, match="'zfs' is not one of ext4, xfs, btrfs"):
        parse_options("zfs", "")
    with pytest.raises(ValueError, match="'zfs' is not one of"):
        filesystem.make("zfs", Path("/nonexistent"))


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FILESYSTEMS["ext4"].options["-d"] = ".*"  # type: ignore[index]  # that it cannot is the point


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


def ext_superblock(compat: int, incompat: int, ro_compat: int) -> bytes:
    block = bytearray(1024)
    block[0x38:0x3A] = b"\x53\xef"
    for at, value in ((0x5C, compat), (0x60, incompat), (0x64, ro_compat)):
        block[at : at + 4] = value.to_bytes(4, "little")
    return bytes(block)


@pytest.mark.parametrize(
    ("offset", "content", "name"),
    [
        (1024, ext_superblock(0x38, 0x2, 0x3), "ext2"),
        (1024, ext_superblock(0x3C, 0x2, 0x3), "ext3"),
        (1024, ext_superblock(0x3C, 0x2C2, 0x46B), "ext4"),
        (1024, ext_superblock(0x3C, 0x2, 0x400), "ext4"),
        (1024, ext_superblock(0, 0x8, 0), "jbd"),
        (0, b"XFSB", "xfs"),
        (65600, b"_BHRfS_M", "btrfs"),
        (4086, b"SWAPSPACE2", "swap"),
        (65526, b"SWAPSPACE2", "swap"),
        (0, b"LUKS\xba\xbe\x00\x02", "crypto_LUKS"),
        (512, b"LABELONE", "LVM2_member"),
        (4096, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),
        (4 * MIB - 65536, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),
        (512, b"EFI PART", "gpt"),
        (4 * MIB - 512, b"EFI PART", "gpt"),
        (510, b"\x55\xaa", "dos"),
        (32769, b"CD001", "iso9660"),
        (0, b"hsqs", "squashfs"),
        (0, b"bluestore block device", "ceph_bluestore"),
        (3, b"NTFS    ", "ntfs"),
    ],
)
def test_what_is_there_is_named_and_not_blank(image: int, offset: int, content: bytes, name: str) -> None:
    os.pwrite(image, content, offset)

    assert filesystem.detect(image) == name
    assert not filesystem.is_blank(image)


def test_a_filesystem_counts_before_its_boot_sector(image: int) -> None:
    os.pwrite(image, b"\x55\xaa", 510)
    os.pwrite(image, b"NTFS    ", 3)

    assert filesystem.detect(image) == "ntfs"


def test_zeros_are_blank(image: int) -> None:
    assert filesystem.detect(image) is None
    assert filesystem.is_blank(image)


@pytest.mark.parametrize("offset", [0, 999_999, MIB - 1, 3 * MIB, 4 * MIB - 1])
def test_unknown_data_at_either_end_is_not_blank(image: int, offset: int) -> None:
    os.pwrite(image, b"\1", offset)

    assert filesystem.detect(image) is None
    assert not filesystem.is_blank(image)


@pytest.mark.parametrize("offset", [700 * MIB, (16 << 30) + 129 * MIB])
def test_data_in_the_middle_of_a_device_is_not_unused(image: int, offset: int) -> None:
    """Ten MiB every 128 MiB, as the groups of a filesystem that has a little in each; and nothing at either end."""
    os.ftruncate(image, 64 << 30)
    assert signature.is_unused(image)
    for start in range(offset, 63 << 30, 128 * MIB):
        for block in range(start, start + 10 * MIB, 64 << 10):
            os.pwrite(image, b"\1", block)

    assert not signature.is_unused(image)


@pytest.mark.parametrize("size", [0, 1, 511, 1024, 5000, MIB + 1])
def test_small_images_are_looked_at_whole(image: int, size: int) -> None:
    os.ftruncate(image, size)
    assert filesystem.is_blank(image)
    if size:
        os.pwrite(image, b"\1", size - 1)
        assert not filesystem.is_blank(image)


def test_what_cannot_be_read_is_an_error_and_never_blank(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            filesystem.detect(fd)
    finally:
        os.close(fd)
    write_only = os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
    os.ftruncate(write_only, MIB)
    try:
        with pytest.raises(OSError, match="pread"):
            filesystem.is_blank(write_only)
    finally:
        os.close(write_only)
    assert stat.S_ISREG((tmp_path / "f").stat().st_mode)


def test_an_unknown_filesystem_cannot_be_grown() -> None:
    with pytest.raises(ValueError, match="'vfat' cannot be grown"):
        filesystem.grow("vfat", 0, MIB)
