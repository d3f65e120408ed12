# SPDX-License-Identifier: Apache-2.0
import errno
import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.linux import mount, syscall
from csi_driver.linux.mount import Attributes
from tests.conftest import require_tool
from tests.kernel.conftest import MIB, MakePool
from tests.kernel.old_kernel import run_without

# Before 6.8 there is no statmount, before 5.12 no mount_setattr, before 5.2 nothing of the new mount API.
BEFORE_6_8 = (syscall.STATMOUNT,)
BEFORE_5_12 = (*BEFORE_6_8, syscall.MOUNT_SETATTR)
BEFORE_5_2 = (
    *BEFORE_5_12,
    syscall.OPEN_TREE,
    syscall.MOVE_MOUNT,
    syscall.FSOPEN,
    syscall.FSCONFIG,
    syscall.FSMOUNT,
)

PLAIN = Attributes()


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def bind(source: Path, target: Path, attributes: Attributes = PLAIN) -> None:
    with opened(source) as fd:
        mount.bind(fd, target, attributes)


@pytest.fixture
def source(scratch: Path) -> Path:
    path = scratch / "source"
    path.mkdir()
    (path / "f").write_text("content")
    return path


@pytest.fixture
def target(scratch: Path) -> Iterator[Path]:
    path = scratch / "target"
    path.mkdir()
    yield path
    mount.unmount(path)


# bind and find_mounted


def test_nothing_is_mounted_where_nothing_is(scratch: Path) -> None:
    (scratch / "f").touch()
    (scratch / "link").symlink_to("/proc")

    for path in ("", "f", "missing", "missing/x", "f/x", "link"):
        assert mount.find_mounted(scratch / path) is None, path


def test_a_bound_directory_is_seen_and_found(source: Path, target: Path) -> None:
    bind(source, target)

    found = mount.find_mounted(target)

    assert (target / "f").read_text() == "content"
    assert found is not None
    assert (found.device, found.inode) == (source.stat().st_dev, source.stat().st_ino)
    assert (found.is_directory, found.readonly, found.rdev) == (True, False, 0)
    [entry] = [one for one in mount.mounts() if one.target == os.fspath(target)]
    assert entry.mount_id == found.mount_id


def test_a_bound_device_node_tells_its_number(scratch: Path) -> None:
    node = scratch / "target"
    node.touch()
    bind(Path("/dev/null"), node)

    found = mount.find_mounted(node)

    assert found is not None
    assert (found.rdev, found.is_directory) == (os.makedev(1, 3), False)
    assert node.read_bytes() == b""
    mount.unmount(node)
    assert stat.S_ISREG(node.stat().st_mode)


def test_a_descriptor_that_only_names_the_source_is_enough(source: Path, target: Path) -> None:
    with opened(source, os.O_PATH) as fd:
        mount.bind(fd, target, Attributes())

    assert (target / "f").read_text() == "content"


def test_the_source_may_be_renamed_or_hidden_once_it_is_open(source: Path, target: Path) -> None:
    with opened(source) as fd:
        source.rename(source.with_name("elsewhere"))
        mount.bind(fd, target, Attributes())

    assert (target / "f").read_text() == "content"


def test_a_deleted_source_is_an_error(scratch: Path, target: Path) -> None:
    (scratch / "gone").mkdir()

    with opened(scratch / "gone") as fd:
        (scratch / "gone").rmdir()
        with pytest.raises(FileNotFoundError):
            mount.bind(fd, target, Attributes())

    assert mount.find_mounted(target) is None


EACH_ATTRIBUTE = [
    Attributes(readonly=True),
    Attributes(nosuid=True),
    Attributes(nodev=True),
    Attributes(noexec=True),
    Attributes(noatime=True),
    Attributes(nodiratime=True),
    Attributes(relatime=True),
    Attributes(strictatime=True),
    Attributes(nosymfollow=True),
    Attributes(
        readonly=True, nosuid=True, nodev=True, noexec=True, noatime=True, nodiratime=True, nosymfollow=True
    ),
]


@pytest.mark.parametrize("wanted", EACH_ATTRIBUTE, ids=str)
def test_attributes_are_set_and_told(source: Path, target: Path, wanted: Attributes) -> None:
    bind(source, target, wanted)

    found = mount.find_mounted(target)

    assert found is not None
    expected = wanted if wanted.noatime or wanted.strictatime else replace(wanted, relatime=True)
    assert found.attributes == expected
    assert found.readonly is wanted.readonly
    with opened(target) as fd:
        assert mount.attributes_of(fd) == expected
    [entry] = [one for one in mount.mounts() if one.target == os.fspath(target)]
    for name in ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow"):
        assert (name in entry.options) is getattr(wanted, name)


def test_read_only_refuses_writes_there_and_nowhere_else(source: Path, target: Path) -> None:
    bind(source, target, Attributes(readonly=True))

    with pytest.raises(OSError) as caught:
        (target / "g").write_text("no")

    assert caught.value.errno == errno.EROFS
    (source / "g").write_text("yes")
    assert (target / "g").read_text() == "yes"


def test_read_only_is_so_from_the_first_moment(source: Path, target: Path) -> None:
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            try:
                # Only what is mounted has the file.
                os.close(os.open(target / "f", os.O_WRONLY))
                written += 1
            except OSError as error:
                assert error.errno in (errno.EROFS, errno.ENOENT)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(300):
        bind(source, target, Attributes(readonly=True))
        mount.unmount(target)
    stop.set()
    writer.join()

    assert written == 0


def test_what_protects_the_source_protects_the_bind_too(source: Path, target: Path, scratch: Path) -> None:
    bind(source, target, Attributes(readonly=True, nosuid=True, noexec=True, noatime=True))
    second = scratch / "second"
    second.mkdir()

    bind(target, second, Attributes(nodev=True, relatime=True))

    found = mount.find_mounted(second)
    assert found is not None
    assert found.attributes == Attributes(readonly=True, nosuid=True, noexec=True, nodev=True, relatime=True)
    mount.unmount(second)


def test_a_read_only_filesystem_is_told_apart_from_a_read_only_mount(ext4_pool: Path, target: Path) -> None:
    bind(ext4_pool, target)
    # -o remount of a bind target would change only that mount; this changes the filesystem.
    subprocess.run(["mount", "-o", "remount,ro", ext4_pool], check=True)

    found = mount.find_mounted(target)

    assert found is not None
    assert (found.readonly, found.attributes.readonly) == (True, False)


def test_mounts_below_the_source_stay_there(source: Path, target: Path) -> None:
    (source / "m").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source / "m"], check=True)
    (source / "m/hidden").touch()

    bind(source, target)

    assert os.listdir(target / "m") == []
    mount.unmount(source / "m")


def test_a_symlink_at_the_target_is_never_followed(source: Path, scratch: Path) -> None:
    victim = scratch / "victim"
    victim.mkdir()
    (scratch / "link").symlink_to("victim")
    (scratch / "dangling").symlink_to("nowhere")

    for name in ("link", "dangling"):
        with pytest.raises(OSError) as caught:
            bind(source, scratch / name)
        assert caught.value.errno == errno.ELOOP

    assert mount.find_mounted(victim) is None


def test_a_symlink_that_races_with_the_bind_catches_nothing(source: Path, scratch: Path) -> None:
    victim, spot = scratch / "victim", scratch / "spot"
    victim.mkdir()
    spot.mkdir()
    (scratch / "evil").symlink_to(victim)
    stop = threading.Event()

    def swap() -> None:
        with opened(scratch) as fd:
            while not stop.is_set():
                try:
                    syscall.renameat2(fd, "spot", fd, "evil", 2)  # RENAME_EXCHANGE
                except OSError as error:
                    assert error.errno == errno.EBUSY  # Mounted on just now.

    attacker = threading.Thread(target=swap)
    attacker.start()
    refused = bound = 0
    try:
        for _ in range(500):
            try:
                bind(source, spot)
                bound += 1
            except OSError as error:
                assert error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EINVAL)
                refused += 1
            assert mount.find_mounted(victim) is None
            for name in ("spot", "evil"):
                mount.unmount(scratch / name)
    finally:
        stop.set()
        attacker.join()

    assert refused and bound, "the race was run from both sides"


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_target_that_does_not_fit_is_an_error(source: Path, scratch: Path, kind: str) -> None:
    if kind == "file":
        (scratch / "t").touch()

    with pytest.raises(OSError) as caught:
        bind(source, scratch / "t")

    assert caught.value.errno in {"missing": (errno.ENOENT,), "file": (errno.ENOTDIR, errno.EINVAL)}[kind]
    assert caught.value.filename == os.fspath(scratch / "t")


def test_in_a_shared_parent_the_bind_is_shared_and_reaches_its_peers(scratch: Path, source: Path) -> None:
    """kubelet's directory is shared with the host, and what is mounted there must arrive there."""
    ours, peer = scratch / "ours", scratch / "peer"
    ours.mkdir()
    peer.mkdir()
    subprocess.run(["mount", "--bind", ours, ours], check=True)
    subprocess.run(["mount", "--make-shared", ours], check=True)
    subprocess.run(["mount", "--bind", ours, peer], check=True)
    (ours / "t").mkdir()

    bind(source, ours / "t")

    assert (peer / "t/f").read_text() == "content"
    assert {one.shared for one in mount.mounts() if one.target == os.fspath(ours / "t")} == {True}
    mount.unmount(ours / "t")
    assert mount.find_mounted(peer / "t") is None
    mount.unmount(peer)
    mount.unmount(ours)


# Unmounting


def test_unmounting_what_is_not_mounted_or_not_there_is_fine(scratch: Path) -> None:
    (scratch / "f").touch()

    for path in ("", "f", "missing", "missing/x", "f/x"):
        mount.unmount(scratch / path)


def test_stacked_mounts_all_go(source: Path, target: Path) -> None:
    for attributes in (Attributes(), Attributes(readonly=True), Attributes(), Attributes(nosuid=True)):
        bind(source, target, attributes)
    found = mount.find_mounted(target)
    assert found is not None
    assert found.attributes.nosuid, "the topmost is found"

    mount.unmount(target)

    assert mount.find_mounted(target) is None
    assert not [one for one in mount.mounts() if one.target == os.fspath(target)]


def test_a_mount_in_use_is_ebusy_after_a_second(source: Path, target: Path) -> None:
    bind(source, target)
    started = time.monotonic()

    with opened(target / "f"), pytest.raises(OSError) as caught:
        mount.unmount(target)

    assert caught.value.errno == errno.EBUSY
    assert time.monotonic() - started > 0.5
    assert mount.find_mounted(target) is not None


def test_a_mount_that_is_soon_free_is_waited_for(source: Path, target: Path) -> None:
    bind(source, target)
    fd = os.open(target / "f", os.O_RDONLY)
    releaser = threading.Timer(0.2, os.close, [fd])
    releaser.start()

    mount.unmount(target)

    releaser.join()
    assert mount.find_mounted(target) is None


def test_lazily_a_mount_in_use_goes_at_once(source: Path, target: Path) -> None:
    bind(source, target)
    bind(source, target)

    with opened(target / "f") as fd:
        mount.unmount(target, lazy=True)

        assert mount.find_mounted(target) is None
        assert os.read(fd, 99) == b"content"


def test_a_symlink_to_a_mount_is_not_unmounted_through(source: Path, target: Path, scratch: Path) -> None:
    bind(source, target)
    (scratch / "link").symlink_to(target)

    assert mount.find_mounted(scratch / "link") is None
    mount.unmount(scratch / "link")

    assert mount.find_mounted(target) is not None


def test_names_of_any_bytes_can_be_mounted_on(source: Path, scratch: Path) -> None:
    for name in (b" \t\n\\040", b"\xff\xfe", "größe ✓".encode(), b"n" * 255, b"a - b"):
        path = scratch / os.fsdecode(name)
        path.mkdir()
        bind(source, path)
        assert [one.target for one in mount.mounts() if one.target == os.fspath(path)] == [os.fspath(path)]
        mount.unmount(path)
        assert mount.find_mounted(path) is None


def test_a_dead_fuse_mount_is_no_nothing_and_can_be_unmounted(target: Path) -> None:
    """As a file server that died leaves it: every look at it is ENOTCONN."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse on this machine")
    with opened(Path("/dev/fuse"), os.O_RDWR) as fd:
        syscall.mount("dead", os.fspath(target), "fuse", 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0")
    with pytest.raises(OSError) as caught:
        os.listdir(target)
    assert caught.value.errno == errno.ENOTCONN

    try:
        assert mount.find_mounted(target) is not None
    except OSError as error:
        assert error.errno == errno.ENOTCONN

    mount.unmount(target)
    assert mount.find_mounted(target) is None


# Devices


@pytest.fixture
def loop_device(workshop: Path) -> Iterator[Path]:
    """An unmounted ext4 on a loop device."""
    image = workshop / "device.img"
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    made = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    yield Path(made.stdout.strip())
    # It would stay read-only for its next user.
    subprocess.run(["blockdev", "--setrw", made.stdout.strip()], check=True)
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_device_is_mounted_with_its_options_and_attributes(loop_device: Path, target: Path) -> None:
    wanted = Attributes(nosuid=True, nodev=True, noatime=True)
    mount.mount_device(loop_device, target, "ext4", ["commit=17", "nodiscard", "data=ordered"], wanted)

    found = mount.find_mounted(target)

    assert found is not None
    assert found.attributes == wanted
    assert found.device == loop_device.stat().st_rdev
    [entry] = [one for one in mount.mounts() if one.target == os.fspath(target)]
    assert (entry.fs_type, entry.source, entry.root) == ("ext4", os.fspath(loop_device), "/")
    assert "commit=17" in entry.super_options
    (target / "f").write_text("x")


def test_read_only_reaches_the_filesystem(loop_device: Path, target: Path) -> None:
    mount.mount_device(loop_device, target, "ext4", [], Attributes(readonly=True))

    [entry] = [one for one in mount.mounts() if one.target == os.fspath(target)]
    assert "ro" in entry.options
    assert "ro" in entry.super_options


def test_a_read_only_device_takes_a_read_only_mount_only(loop_device: Path, target: Path) -> None:
    subprocess.run(["blockdev", "--setro", loop_device], check=True)

    with pytest.raises(PermissionError):
        mount.mount_device(loop_device, target, "ext4")
    mount.mount_device(loop_device, target, "ext4", ["noload"], Attributes(readonly=True))

    assert mount.find_mounted(target) is not None


@pytest.mark.parametrize(
    ("fs_type", "options", "code", "said"),
    [
        ("ext4", ["bogus=1"], errno.EINVAL, "Unknown parameter 'bogus'"),
        ("ext4", ["bogus"], errno.EINVAL, "Unknown parameter 'bogus'"),
        ("ext4", ["commit=often"], errno.EINVAL, "Bad value for 'commit'"),
        ("xfs", [], errno.EINVAL, "fsconfig"),
        ("nosuchfs", [], errno.ENODEV, "fsopen"),
    ],
)
def test_a_mount_that_fails_tells_what_the_kernel_said(
    loop_device: Path, target: Path, fs_type: str, options: list[str], code: int, said: str
) -> None:
    with pytest.raises(OSError, match=said) as caught:
        mount.mount_device(loop_device, target, fs_type, options)

    assert caught.value.errno == code
    assert mount.find_mounted(target) is None


def test_a_missing_device_is_an_error(target: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mount.mount_device(Path("/dev/nosuchdevice"), target, "ext4")


def test_a_device_is_not_mounted_through_a_symlink(loop_device: Path, target: Path, scratch: Path) -> None:
    (scratch / "link").symlink_to(target)

    with pytest.raises(OSError) as caught:
        mount.mount_device(loop_device, scratch / "link", "ext4")

    assert caught.value.errno == errno.ELOOP
    assert mount.find_mounted(target) is None


def test_quotes_around_a_value_are_not_part_of_it(target: Path) -> None:
    mount.mount_device(Path("none"), target, "tmpfs", ['size="1m"', 'mode="700"'])

    assert target.stat().st_mode & 0o7777 == 0o700
    assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize == MIB


def test_a_detached_mount_is_seen_by_nobody_and_goes_with_its_descriptor(loop_device: Path) -> None:
    before = mount.mounts()
    fd = mount.mount_detached(loop_device, "ext4")
    os.mkdir("data", dir_fd=fd)
    assert mount.mounts() == before
    os.close(fd)

    again = mount.mount_detached(loop_device, "ext4", [], Attributes(readonly=True))

    try:
        assert stat.S_ISDIR(os.stat("data", dir_fd=again).st_mode)
        with pytest.raises(OSError) as caught:
            os.mkdir("more", dir_fd=again)
        assert caught.value.errno == errno.EROFS
    finally:
        os.close(again)


def test_a_directory_of_a_detached_mount_can_be_bound(loop_device: Path, target: Path) -> None:
    detached = mount.mount_detached(loop_device, "ext4", [], Attributes(nodev=True))
    os.mkdir("data", dir_fd=detached)
    os.close(os.open("data/f", os.O_CREAT, dir_fd=detached))
    data = os.open("data", os.O_RDONLY, dir_fd=detached)

    mount.bind(data, target, Attributes(nosuid=True))
    os.close(data)
    os.close(detached)

    assert os.listdir(target) == ["f"]
    found = mount.find_mounted(target)
    assert found is not None
    assert (found.attributes.nodev, found.attributes.nosuid) == (True, True)
    [entry] = [one for one in mount.mounts() if one.target == os.fspath(target)]
    assert entry.root == "/data"


# Which mounts show a directory


def test_all_mounts_of_a_directory_are_found_wherever_they_are(source: Path, scratch: Path) -> None:
    (source / "sub").mkdir()
    (scratch / "source2").mkdir()
    targets = [scratch / f"t{number}" for number in range(4)]
    for path, shown in zip(targets, (source, source, source / "sub", scratch / "source2"), strict=True):
        path.mkdir()
        bind(shown, path)

    with opened(source) as fd:
        found = [one.target for one in mount.mounts_of(fd)]
    with opened(targets[0]) as fd:
        through = [one.target for one in mount.mounts_of(fd)]
    with opened(source / "sub") as fd:
        below = [one.target for one in mount.mounts_of(fd)]

    assert found == through == [os.fspath(path) for path in targets[:3]]
    assert below == [os.fspath(targets[2])]
    for path in targets:
        mount.unmount(path)


def test_a_bound_file_is_found_too(source: Path, scratch: Path) -> None:
    (scratch / "t").touch()
    bind(source / "f", scratch / "t")

    with opened(source / "f") as fd:
        assert [one.target for one in mount.mounts_of(fd)] == [os.fspath(scratch / "t")]
    mount.unmount(scratch / "t")


def test_a_renamed_directory_takes_its_mounts_along(source: Path, target: Path) -> None:
    bind(source, target)
    moved = source.with_name("moved")
    source.rename(moved)

    with opened(moved) as fd:
        assert [one.target for one in mount.mounts_of(fd)] == [os.fspath(target)]


def test_a_deleted_directory_is_nowhere(scratch: Path) -> None:
    (scratch / "gone (deleted)").mkdir()
    with opened(scratch / "gone (deleted)") as fd:
        assert mount.source_root(fd)[1].endswith("/gone (deleted)")
        (scratch / "gone (deleted)").rmdir()
        with pytest.raises(FileNotFoundError):
            mount.source_root(fd)


def test_btrfs_mounts_are_found_by_what_mountinfo_shows(btrfs_pool: Path, target: Path) -> None:
    require_tool("btrfs")
    subprocess.run(["btrfs", "-q", "subvolume", "create", btrfs_pool / "v"], check=True)
    (btrfs_pool / "v/data").mkdir()
    bind(btrfs_pool / "v/data", target)

    with opened(btrfs_pool / "v") as fd:
        device, root = mount.source_root(fd)
        found = mount.mounts_of(fd)

    assert root == "/v"
    assert device != (btrfs_pool / "v").stat().st_dev
    assert [(one.target, one.root, one.device) for one in found] == [(os.fspath(target), "/v/data", device)]


def test_a_subvolume_mounted_by_name_is_found(make_pool: MakePool, target: Path) -> None:
    require_tool("btrfs")
    pool = make_pool("btrfs")
    subprocess.run(["btrfs", "-q", "subvolume", "create", pool / "v"], check=True)
    [device] = [one.source for one in mount.mounts() if one.target == os.fspath(pool)]
    subprocess.run(["mount", "-o", "subvol=v", device, target], check=True)
    (target / "d").mkdir()

    with opened(target / "d") as fd:
        assert mount.source_root(fd)[1] == "/v/d"
    with opened(pool / "v") as fd:
        assert [one.target for one in mount.mounts_of(fd)] == [os.fspath(target)]


# Older kernels

BIND = """
    import os
    from pathlib import Path
    from csi_driver.linux import mount
    source, target, wanted = Path(sys.argv[1]), Path(sys.argv[2]), eval("mount." + sys.argv[3])
    fd = os.open(source, os.O_RDONLY)
    mount.bind(fd, target, wanted)
    print(repr(mount.find_mounted(target)))
"""


LOOK = """
    from pathlib import Path
    from csi_driver.linux import mount
    print(repr(mount.find_mounted(Path(sys.argv[1]))))
"""


def found_by_child(printed: str) -> mount.Mounted:
    names = {"Mounted": mount.Mounted, "Attributes": Attributes}
    found = eval(printed, names)
    assert isinstance(found, mount.Mounted)
    return found


@pytest.mark.parametrize("missing", [BEFORE_6_8, BEFORE_5_12, BEFORE_5_2], ids=["6.7", "5.11", "5.1"])
@pytest.mark.parametrize("wanted", [Attributes(), *EACH_ATTRIBUTE], ids=str)
def test_older_kernels_bind_and_tell_the_same(
    source: Path, target: Path, missing: tuple[int, ...], wanted: Attributes
) -> None:
    told = found_by_child(run_without(missing, BIND, source, target, wanted))

    assert told == mount.find_mounted(target)
    assert told.attributes.covers(wanted)
    assert told.readonly is wanted.readonly


def test_older_kernels_keep_what_protects_the_source(source: Path, target: Path, scratch: Path) -> None:
    bind(source, target, Attributes(nosuid=True, noexec=True))
    (scratch / "second").mkdir()

    told = found_by_child(
        run_without(BEFORE_5_2, BIND, target, scratch / "second", Attributes(readonly=True))
    )

    assert told.attributes == Attributes(readonly=True, nosuid=True, noexec=True, relatime=True)
    mount.unmount(scratch / "second")


def test_older_kernels_tell_a_read_only_filesystem_from_a_read_only_mount(
    ext4_pool: Path, target: Path
) -> None:
    bind(ext4_pool, target)
    subprocess.run(["mount", "-o", "remount,ro", ext4_pool], check=True)

    told = [found_by_child(run_without(BEFORE_6_8, LOOK, path)) for path in (target, ext4_pool)]

    assert [(one.readonly, one.attributes.readonly) for one in told] == [(True, False), (True, True)]
    assert told == [mount.find_mounted(target), mount.find_mounted(ext4_pool)]


def test_older_kernels_do_not_follow_a_symlink_either(source: Path, target: Path, scratch: Path) -> None:
    (scratch / "link").symlink_to(target)

    with pytest.raises(AssertionError, match="the mount target is a symlink"):
        run_without(BEFORE_5_2, BIND, source, scratch / "link", Attributes())

    assert mount.find_mounted(target) is None


def test_older_kernels_mount_devices(loop_device: Path, target: Path) -> None:
    script = """
        from pathlib import Path
        from csi_driver.linux import mount
        wanted = mount.Attributes(nosuid=True, noatime=True)
        mount.mount_device(Path(sys.argv[1]), Path(sys.argv[2]), "ext4", ["commit=17"], wanted)
    """

    run_without(BEFORE_5_2, script, loop_device, target)

    found = mount.find_mounted(target)
    assert found is not None
    assert found.attributes == Attributes(nosuid=True, noatime=True)
    [entry] = [one for one in mount.mounts() if one.target == os.fspath(target)]
    assert "commit=17" in entry.super_options
