# SPDX-License-Identifier: Apache-2.0
"""The configuration file: what is accepted, and what each refusal says."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver import backends, config
from csi_driver.config import (
    SHARED_BACKENDS,
    parse,
    read_options,
)
from csi_driver.errors import ConfigurationError
from csi_driver.model import GIB, KIB, MIB
from csi_driver.values import Reserved, parse_duration, parse_reserved, parse_size


def managed(keys: str, backend: str = "image", *, name: str = "fast", root: str = "/data/fast") -> str:
    table = f"[pools.{name}]\nroot = '{root}'\nbackend = '{backend}'\nretention = 0\n[pools.{name}.backing]\n"
    return table + (keys.replace(", ", "\n") or "preallocate = false") + "\n"


POOL = '[pools.fast]\nroot = "/data/fast"\n'


def test_smallest_file() -> None:
    found = parse(POOL)

    pool = found.pools["fast"]
    assert (pool.name, pool.backend, pool.root) == ("fast", "image", Path("/data/fast"))
    assert pool.reserved == Reserved(share=0.05)
    assert pool.retention_s == 0
    assert found.driver_name == "local.orlop.dev"


def test_everything_said() -> None:
    found = parse(
        """
        driver_name = "disks.example.org"
        node_id = "n1"
        region = "r1"
        zone = "z1"
        default_pool = "fast"
        expansion = "controller"
        max_volumes_per_node = 12
        retired_tags = ["0123abcd"]
        workers = 4
        drain_timeout = "1m"
        [pools.fast]
        backend = "directory"
        root = "/data/fast"
        reserved = "10Gi"
        retention = "1d"
        classes = ["cloud_ssd"]
        static_roots = ["/srv/shared"]
        mounted = true
        enforce_capacity = false
        [pools.slow]
        root = "/data/slow"
        """
    )

    assert list(found.pools) == ["fast", "slow"]
    assert found.retired_tags == {"0123abcd"}
    assert found.drain_timeout_s == 60
    fast = found.pools["fast"]
    assert fast.reserved == Reserved(bytes=10 * GIB)
    assert fast.retention_s == 86400
    assert fast.classes == ("cloud_ssd",)
    assert fast.static_roots == (Path("/srv/shared"),)
    assert fast.mounted
    assert fast.options == {"enforce_capacity": False}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"no pool is configured.*\[pools.NAME\]"),
        ("pools = 1", "object"),
        ("[pools.fast\n", "not valid TOML"),
        ("color = 1\n" + POOL, r"unknown key 'color'.*driver_name.*workers"),
        (POOL + "[pools.Fast]\nroot = '/x'\n", r"\[pools.Fast\].*lower case"),
        (f"[pools.{'a' * 17}]\nroot = '/x'\n", "letter and up to 15"),
        ("[pools.fast]\n", r"root ''.*absolute path"),
        ("[pools.fast]\nroot = 'data'\n", r"root 'data'.*absolute path"),
        ("[pools.fast]\nroot = 5\n", r"\[pools.fast\].*root"),
        (POOL + "reserved = '100%'\n", r"reserved: '100%'"),
        (POOL + "reserved = 'much'\n", r"reserved: 'much' is not a size"),
        (POOL + "retention = 'a week'\n", r"retention: 'a week' is not a duration"),
        (POOL + "static_roots = ['srv']\n", r"static_roots 'srv'.*absolute"),
        (POOL + "static_roots = ['/']\n", "static_roots '/'"),
        (POOL + "static_roots = ['/a/../b']\n", "static_roots"),
        ("default_pool = 'slow'\n" + POOL, r"default_pool 'slow'.*configured: fast"),
        ("retired_tags = ['x']\n" + POOL, r"retired_tags 'x'.*8 hex digits"),
        ("workers = 0\n" + POOL, "workers 0"),
        ("max_volumes_per_node = -1\n" + POOL, "max_volumes_per_node -1"),
        ("driver_name = '-x'\n" + POOL, "driver_name '-x'"),
        ("driver_name = '" + "a" * 64 + "'\n" + POOL, "at most 63"),
        ("expansion = 'never'\n" + POOL, "expansion"),
        (POOL + "[pools.b]\nroot = '/data/fast'\n", "is the root of"),
        (POOL + "[pools.b]\nroot = '/data/fast/b'\n", r"lies in it"),
        (POOL + "backing = 'fast.img'\n", r"\[pools.fast\].*backing"),
        (managed(""), r"\[pools.fast.backing\]: name either a file or a device"),
        (managed("file = '/data/f', device = '/dev/sdb'"), "name either a file or a device"),
        (managed("file = 'f', size = '1Gi'"), r"\[pools.fast.backing\] file 'f'.*absolute"),
        (managed("file = '/data/../f', size = '1Gi'"), "without '..'"),
        (managed("file = '/data/f'"), r"size 0: give the size .* at least 320Mi"),
        (managed("file = '/data/f', size = '1M'"), "size '1M': give the size"),
        (managed("file = '/data/f', size = 'big'"), "size: 'big' is not a size"),
        (managed("device = 'sdb'"), r"device 'sdb'.*absolute"),
        (managed("device = '/data/sdb'"), r"device '/data/sdb': give a block device in /dev"),
        (managed("device = '/dev/sdb', size = '1Gi'"), "size '1Gi': a device is as large as it is"),
        (managed("device = '/dev/sdb', preallocate = true"), "preallocate True: a device is as large"),
        (managed("device = '/dev/sdb', filesystem = 'ext4'"), r"\[pools.fast.backing\]: .*ext4"),
        (managed("device = '/dev/sdb', fs = 'xfs'"), r"unknown key 'fs'.*filesystem, preallocate, size"),
        (managed("device = '/dev/sdb', filesystem = 'xfs'", "btrfs"), "filesystem 'xfs': .*needs \"btrfs\""),
        (
            managed("file = '/data/fast/f', size = '1Gi'"),
            r"lies in the root of \[pools.fast\]: put it beside",
        ),
        (managed("device = '/dev/sdb'", root="/fast"), r"root '/fast'.*another one than '/'"),
        (
            managed("device = '/dev/sdb'") + managed("device = '/dev/sdb'", name="b", root="/data/b"),
            r"\[pools.b.backing\] '/dev/sdb': is the backing of \[pools.fast\] already",
        ),
        ("scope = 'shared'\n" + managed("device = '/dev/sdb'", "nfs"), "lies on its server: leave it out"),
    ],
)
def test_refused_with_the_key_and_a_remedy(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as refused:
        parse(text, "orlop.toml")

    assert "orlop.toml" in str(refused.value)


def test_a_managed_pool_in_a_file() -> None:
    found = parse(managed("file = '/data/fast.img', size = '50Gi', preallocate = true")).pools["fast"].backing

    assert found is not None
    assert (found.target, found.is_device, found.fs_type) == (Path("/data/fast.img"), False, "xfs")
    assert (found.size_bytes, found.preallocate) == (50 * GIB, True)
    assert parse(POOL).pools["fast"].backing is None


def test_a_managed_pool_on_a_device_has_the_filesystem_of_its_backend() -> None:
    found = parse(managed("device = '/dev/disk/by-id/nvme-1'", "btrfs")).pools["fast"].backing

    assert found is not None
    assert (found.is_device, found.fs_type, found.size_bytes) == (True, "btrfs", 0)


def test_file_that_is_not_there_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--config"):
        config.load(tmp_path / "none.toml")


def test_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "orlop.toml"
    path.write_text(POOL)

    assert list(config.load(path).pools) == ["fast"]


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    depth: int = 3


def test_options_of_a_backend() -> None:
    pool = parse(POOL + "depth = 5\n").pools["fast"]

    assert read_options(pool, _Options).depth == 5


def test_unknown_option_names_the_common_keys_too() -> None:
    pool = parse(POOL + "deep = 5\n", "orlop.toml").pools["fast"]

    with pytest.raises(
        ConfigurationError, match=r"orlop.toml: \[pools.fast\]: unknown key 'deep'.*depth.*reserved"
    ):
        read_options(pool, _Options)


def test_option_of_a_wrong_type_is_named() -> None:
    pool = parse(POOL + "depth = 'deep'\n").pools["fast"]

    with pytest.raises(ConfigurationError, match="depth"):
        read_options(pool, _Options)


def test_unknown_backend_names_the_known() -> None:
    pool = parse(POOL + "backend = 'tape'\n").pools["fast"]

    with pytest.raises(ConfigurationError, match=r"'tape'.*btrfs, directory, image, memory"):
        backends.create(pool)


@pytest.mark.parametrize("name", sorted(backends.BACKENDS))
def test_every_backend_refuses_options_of_others(name: str) -> None:
    scope = "shared" if name in SHARED_BACKENDS else "node"
    pool = parse(f"scope = '{scope}'\n{POOL}backend = '{name}'\nspindles = 5\n").pools["fast"]

    with pytest.raises(ConfigurationError, match="unknown key 'spindles'"):
        backends.create(pool)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("1Ki", KIB),
        ("1.5Gi", 3 * GIB // 2),
        ("500MB", 500_000_000),
        ("2M", 2_000_000),
        (" 3 MiB ", 3 * MIB),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", -1, True, "1 2", "Gi", "1Xi", "0x10", "1e9"])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90), ("90", 90), ("90s", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604800), ("250ms", 0.25)],
)
def test_durations(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@given(st.integers(0, 2**63))
def test_size_of_bytes_is_exact(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}Ki") == size * 1024


@given(st.text(max_size=12))
def test_readers_answer_or_say_value_error(text: str) -> None:
    for reader in (parse_size, parse_duration, parse_reserved):
        try:
            reader(text)
        except ValueError as error:
            assert text.strip()[:3] in str(error) or "not a" in str(error)


@given(st.integers(0, 99), st.integers(0, 2**60))
def test_share_of_a_filesystem(percent: int, total: int) -> None:
    reserved = parse_reserved(f"{percent}%").of(total)

    assert 0 <= reserved <= total
    assert abs(reserved - total * percent / 100) <= max(2, total / 1e9)


def test_directories_that_all_nodes_have_are_of_the_shared_driver() -> None:
    shared = parse('scope = "shared"\n[pools.team]\nbackend = "directory"\nroot = "/mnt/team"\n')

    assert shared.pools["team"].shared and not parse(POOL).pools["fast"].shared
    with pytest.raises(ConfigurationError, match=r"backend 'image': not in a driver of scope 'shared'"):
        parse('scope = "shared"\n[pools.team]\nroot = "/mnt/team"\n')
    with pytest.raises(ConfigurationError, match=r"backend 'nfs': not in a driver of scope 'node'"):
        parse('[pools.team]\nbackend = "nfs"\nserver = "s"\npath = "/p"\n')
