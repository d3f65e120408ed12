# SPDX-License-Identifier: Apache-2.0
import os
import time

from csi_driver.linux import mountinfo

LINE = rb"36 35 98:0 /mnt1 /mnt/two\040words rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue"


def test_every_field_of_a_line_is_told() -> None:
    mount = mountinfo.parse(LINE)

    assert mount == mountinfo.Mount(
        mount_id=36,
        parent_id=35,
        device=os.makedev(98, 0),
        root="/mnt1",
        target="/mnt/two words",
        options=("rw", "noatime"),
        fs_type="ext3",
        source="/dev/root",
        super_options=("rw", "errors=continue"),
        shared=True,
    )


def test_a_mount_without_optional_fields_is_private() -> None:
    mount = mountinfo.parse(b"36 35 98:0 / / rw - tmpfs none rw")

    assert not mount.shared
    assert (mount.root, mount.target) == ("/", "/")


def test_a_slave_alone_is_not_shared() -> None:
    assert not mountinfo.parse(b"36 35 98:0 / /a rw master:3 - tmpfs none rw").shared


def test_an_empty_source_and_no_super_options_are_read() -> None:
    mount = mountinfo.parse(b"36 35 0:41 / /a rw - fuse  rw")

    assert (mount.fs_type, mount.source, mount.super_options) == ("fuse", "", ("rw",))


def test_a_separator_within_the_optional_fields_is_not_the_end() -> None:
    # The kernel escapes spaces in names, so " - " is the separator wherever it stands; a bare dash is a name.
    mount = mountinfo.parse(rb"36 35 0:41 /- /a\040-\040b rw - tmpfs - rw,size=1k")

    assert (mount.root, mount.target, mount.source) == ("/-", "/a - b", "-")


def test_newlines_tabs_backslashes_and_bytes_beyond_utf8_come_back_as_they_are() -> None:
    mount = mountinfo.parse(rb"36 35 0:41 / /a\012b\011c\134d\134040" + b"\xff\xc3\xa9 rw - tmpfs none rw")

    assert os.fsencode(mount.target) == b"/a\nb\tc\\d\\040\xff\xc3\xa9"


def test_ten_thousand_lines_are_read_in_no_time() -> None:
    lines = [LINE.replace(b"36 35", b"%d 35" % number) for number in range(10_000)]

    started = time.monotonic()
    found = [mountinfo.parse(line) for line in lines]

    assert [mount.mount_id for mount in found] == list(range(10_000))
    assert time.monotonic() - started < 5, "two orders of magnitude slower than it should be"


def test_the_root_of_this_process_is_among_its_mounts() -> None:
    assert any(mount.target == "/" for mount in mountinfo.mounts())


def test_a_directory_is_found_by_its_filesystem_and_path(tmp_path: os.PathLike[str]) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        device, path = mountinfo.source_root(fd)
        owner = max(
            (one for one in mountinfo.mounts() if os.fspath(tmp_path).startswith(one.target)),
            key=lambda one: len(one.target),
        )
    finally:
        os.close(fd)

    assert device == owner.device
    assert path.endswith(os.fspath(tmp_path)[len(owner.target) :])
