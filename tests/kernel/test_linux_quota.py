# SPDX-License-Identifier: Apache-2.0
"""Project quotas where the kernel has none: every answer must be a reason. Enforcement is tested in tests/lab."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.linux import quota
from tests.kernel.conftest import MakePool


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("fs_type", "remedy"), [("ext4", "tune2fs -O project,quota"), ("xfs", "mount it with -o prjquota")]
)
def test_a_filesystem_without_project_quota_says_what_to_do(
    make_pool: MakePool, fs_type: str, remedy: str
) -> None:
    with opened(make_pool(fs_type)) as fd:
        reason = quota.state(fd)

    assert reason is not None
    assert reason.startswith("project quotas are off: ")
    assert remedy in reason


def test_a_filesystem_that_cannot_have_them_says_so(btrfs_pool: Path) -> None:
    with opened(btrfs_pool) as fd:
        assert quota.state(fd) == "btrfs has no project quotas that this driver knows: use ext4 or xfs"


def test_without_the_feature_everything_else_is_an_error(ext4_pool: Path) -> None:
    with opened(ext4_pool) as fd:
        assert quota.project(fd) == 0
        with pytest.raises(OSError):
            quota.set_project(fd, 42)
        for call in (
            lambda: quota.set_limit(fd, 42, 1 << 20),
            lambda: quota.get(fd, 42),
            lambda: quota.next_id(fd, 0),
        ):
            with pytest.raises(OSError, match="quotactl"):
                call()


def test_xfs_keeps_projects_even_where_it_does_not_count_them(xfs_pool: Path) -> None:
    (xfs_pool / "d").mkdir()
    with opened(xfs_pool / "d") as fd:
        quota.set_project(fd, 4_000_000_000)
        (xfs_pool / "d/sub").mkdir()
        (xfs_pool / "d/f").touch()

        assert quota.project(fd) == 4_000_000_000
    for name in ("d/sub", "d/f"):
        with opened(xfs_pool / name) as fd:
            assert quota.project(fd) == 4_000_000_000, "what is made in it belongs to the project"
    with opened(xfs_pool) as fd:
        assert quota.project(fd) == 0
