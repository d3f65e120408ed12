# SPDX-License-Identifier: Apache-2.0
"""What becomes of directories that every node has mounted, and of exports that nothing uses. No server is asked."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from csi_driver import static
from csi_driver.errors import NotFound, Unavailable
from csi_driver.linux import mount
from csi_driver.linux.exports import Exports
from csi_driver.linux.mountinfo import Mount
from csi_driver.linux.remote import MOST_LEFT_BEHIND, Breaker, Servers
from csi_driver.model import AccessMode, AccessType, Capability, PublishRequest

MANY = Capability(AccessType.MOUNT, AccessMode.MULTI_NODE_MULTI_WRITER)


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[Exports]:
    (tmp_path / "team").mkdir()
    servers = Servers()
    yield Exports(tmp_path / "exports", servers, 30, {"team": tmp_path / "team"})
    servers.close()


def published(exports: Exports, directory: str, *, readonly: bool = False, handle: str = "pv-1") -> None:
    """The mode of the directory would be the caller's; whoever runs the tests has it."""
    owner = {"uid": str(os.getuid()), "gid": str(os.getgid())}
    context = {"pool": "team", "directory": directory, "subPath": "deep/er", **owner}
    asked = PublishRequest(handle, "/nowhere", MANY, readonly=readonly, context=context)
    with static.export_opened(exports, asked, ()):
        pass


def test_where_the_filesystem_is_not_mounted_nothing_is_made(exports: Exports, tmp_path: Path) -> None:
    """It would be made on the node's own disk, and out of sight when the filesystem is back."""
    with pytest.raises(NotFound, match="is its filesystem mounted"):
        published(exports, "volumes/pv-1/data")

    assert not list((tmp_path / "team").iterdir())


def test_a_sub_directory_is_made_in_what_is_there(exports: Exports, tmp_path: Path) -> None:
    there = tmp_path / "team/photos"
    there.mkdir()

    with pytest.raises(NotFound):
        published(exports, "photos", readonly=True)
    assert not list(there.iterdir())
    published(exports, "photos")
    assert (there / "deep/er").is_dir()
    published(exports, "photos", readonly=True)


def test_in_a_volume_of_the_driver_s_own_a_reader_finds_its_sub_directory(
    exports: Exports, tmp_path: Path
) -> None:
    (tmp_path / "team/volumes/pv-1/data").mkdir(parents=True)

    published(exports, "volumes/pv-1/data", readonly=True)

    assert (tmp_path / "team/volumes/pv-1/data/deep/er").is_dir()


def entry(target: Path) -> Mount:
    return Mount(1, 0, os.makedev(0, 77), "/", os.fspath(target), (), "nfs4", "server:/a", (), False)


def test_an_export_that_another_call_has_released_is_fine(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Exports, "_bases", lambda _: [entry(tmp_path / "exports/key")])

    exports.release_unused()


def test_an_export_that_cannot_be_released_is_nobody_else_s_trouble(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = entry(tmp_path / "exports/key")
    asked = []

    def unmount(_exports: Exports, target: Path, *, lazy: bool = False) -> NoReturn:
        asked.append((target, lazy))
        raise Unavailable("server 'server': another call waits for it: repeat")

    monkeypatch.setattr(mount, "mounts", lambda: [base])
    monkeypatch.setattr(Exports, "_bases", lambda _: [base])
    monkeypatch.setattr(Exports, "unmount", unmount)

    exports.release_unused()

    assert asked == [(tmp_path / "exports/key", True)]
    assert "not released" in caplog.text


def test_pods_can_end_though_some_children_are_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    breaker, stuck = Breaker("server"), [1] * MOST_LEFT_BEHIND
    monkeypatch.setattr(breaker, "left_behind", lambda: stuck)

    with pytest.raises(Unavailable, match="stuck in the kernel"):
        breaker.check_start()
    breaker.check_start(always=True)
    stuck += stuck
    with pytest.raises(Unavailable, match="stuck in the kernel"):
        breaker.check_start(always=True)
