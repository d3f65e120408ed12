# SPDX-License-Identifier: Apache-2.0
"""What a StorageClass may say of a pool on a file server. Asks no server."""

from pathlib import Path

import pytest

from csi_driver import apart, backends
from csi_driver.backends.base import Backend
from csi_driver.config import parse
from csi_driver.errors import InvalidArgument
from csi_driver.linux.remote import Breaker
from csi_driver.model import AccessType, OnDelete, Parameters
from csi_driver.pool import Pool
from csi_driver.pools import Pools

CONFIG = """
scope = "shared"
[pools.team]
backend = "nfs"
server = "files.example.org"
path = "/export/team"
root = "{root}/team"
[pools.other]
backend = "nfs"
server = "files.example.org"
path = "/export/other"
root = "{root}/other"
"""


@pytest.fixture
def pools(tmp_path: Path) -> Pools:
    configured = parse(CONFIG.format(root=tmp_path)).pools
    return Pools(
        {
            name: Pool(one, *apart.stand_ins(one, backends.create(one), Breaker(name)))
            for name, one in configured.items()
        }
    )


@pytest.fixture
def backend(pools: Pools) -> Backend:
    return pools.named("team").backend


def parsed(backend: Backend, **parameters: str) -> Parameters:
    return backend.parse(parameters, AccessType.MOUNT, "")


@pytest.mark.parametrize(
    ("server", "path", "source"),
    [
        ("files.example.org", "/export//team/", "files.example.org:/export/team"),
        ("fd00::1", "/", "[fd00::1]:/"),
        ("[fd00::1]", "/team", "[fd00::1]:/team"),
    ],
)
def test_an_export_is_named_as_the_kernel_names_it(server: str, path: str, source: str) -> None:
    """What is mounted is found again by it."""
    text = f'scope = "shared"\n[pools.p]\nbackend = "nfs"\nserver = "{server}"\npath = "{path}"\n'
    features = backends.create(parse(text).pools["p"]).features

    assert features.export is not None and features.export.source == source
    assert features.server == server.strip("[]")


def test_a_class_may_name_the_export_of_a_pool(pools: Pools) -> None:
    asked = {"server": "files.example.org", "share": "/export/other"}

    assert [pool.name for pool in pools.candidates(asked)] == ["other"]
    assert [pool.name for pool in pools.candidates({**asked, "pool": "other"})] == ["other"]
    assert [pool.name for pool in pools.candidates({**asked, "share": "/export/other/"})] == ["other"]
    for wrong in ({**asked, "pool": "team"}, {**asked, "share": "/export"}, {"server": "files.example.org"}):
        with pytest.raises(InvalidArgument, match=r"exports: files\.example\.org:/export/other"):
            pools.candidates(wrong)


def test_what_becomes_of_the_deleted_is_one_of_three(backend: Backend) -> None:
    assert parsed(backend).on_delete is OnDelete.DELETE
    assert parsed(backend, onDelete="archive").on_delete is OnDelete.ARCHIVE
    with pytest.raises(InvalidArgument, match=r"parameters\.onDelete 'keep': give delete, retain, archive"):
        parsed(backend, onDelete="keep")


def test_other_drivers_words_are_understood(backend: Backend) -> None:
    meant = parsed(backend, subDir="${pvc.metadata.name}", mountPermissions="0770")

    assert (meant.sub_path, meant.mode) == ("${pvc.metadata.name}", 0o770)
    assert parsed(backend, mountPermissions="0").mode is None
    assert parsed(backend, mountPermissions="0750", mode="0750").mode == 0o750
    with pytest.raises(InvalidArgument, match="mountPermissions '0770'"):
        parsed(backend, mountPermissions="0770", mode="0750")
    with pytest.raises(InvalidArgument, match="subPath"):
        parsed(backend, subDir="../out")


def test_nothing_of_that_asks_a_server(pools: Pools, tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
