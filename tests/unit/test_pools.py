# SPDX-License-Identifier: Apache-2.0
"""Which pool a volume is in, and which may take a new one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from csi_driver.model import MIB, VolumeId, name_hash
from csi_driver.pools import Pools
from tests.rig import Kind, Rig, configure, open_rig, volume

SMALL = Kind("small", "memory", options='total = "100Mi"\nclasses = ["hdd", "any"]\n')
LARGE = Kind("large", "memory", options='total = "200Mi"\nclasses = ["ssd", "any"]\n')
UNENFORCED = Kind("loose", "directory", options="enforce_capacity = false\n")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Pools `small` and `large`, and `loose`, which enforces no size."""
    kinds = {"small": SMALL, "large": LARGE, "loose": UNENFORCED}
    with open_rig(*(configure(kind, tmp_path / name, name=name) for name, kind in kinds.items())) as rig:
        yield rig


def names(pools: Pools, **parameters: str) -> list[str]:
    return [pool.name for pool in pools.candidates(parameters)]


def test_named_pool_is_the_only_candidate(rig: Rig) -> None:
    assert names(rig.pools, pool="small") == ["small"]


def test_label_means_the_pools_that_carry_it_roomiest_first(rig: Rig) -> None:
    assert names(rig.pools, type="any") == ["large", "small"]
    assert names(rig.pools, type="hdd") == ["small"]

    rig.controller.create_volume(volume("a", 150 * MIB, pool="large"))

    assert names(rig.pools, type="any") == ["small", "large"]


def test_without_a_name_only_pools_that_keep_sizes(rig: Rig) -> None:
    assert names(rig.pools) == ["large", "small"]


def test_pool_and_label_must_agree(rig: Rig) -> None:
    assert names(rig.pools, pool="small", type="hdd") == ["small"]
    with pytest.raises(InvalidArgument, match=r"parameters.type 'ssd'.*'small'"):
        names(rig.pools, pool="small", type="ssd")


def test_unknown_pool_and_label_name_the_known(rig: Rig) -> None:
    with pytest.raises(InvalidArgument, match=r"parameters.pool 'none'.*large, loose, small"):
        names(rig.pools, pool="none")
    with pytest.raises(InvalidArgument, match=r"parameters.type 'none'.*any, hdd, ssd"):
        names(rig.pools, type="none")


def test_what_other_nodes_have_sends_the_claim_there(rig: Rig) -> None:
    pools = Pools({pool.name: pool for pool in rig.pools}, elsewhere=frozenset({"nvme", "gold", "small"}))

    for parameters in ({"pool": "nvme"}, {"type": "gold"}):
        with pytest.raises(ResourceExhausted, match="other nodes have it"):
            pools.candidates(parameters)
    assert names(pools, pool="small") == ["small"]


def test_default_pool_is_taken_whatever_its_room(tmp_path: Path) -> None:
    configs = [configure(kind, tmp_path / kind.name, name=kind.name) for kind in (SMALL, LARGE)]

    with open_rig(*configs, default_pool="small") as rig:
        assert names(rig.pools) == ["small"]


def test_only_pool_is_the_default_even_if_it_keeps_no_sizes(tmp_path: Path) -> None:
    with open_rig(configure(UNENFORCED, tmp_path / "p")) as rig:
        assert names(rig.pools) == ["p"]


def test_several_pools_that_keep_no_sizes_must_be_named(tmp_path: Path) -> None:
    configs = [configure(UNENFORCED, tmp_path / name, name=name) for name in ("a", "b")]

    with open_rig(*configs) as rig, pytest.raises(InvalidArgument, match=r"parameters.pool: missing.*a, b"):
        names(rig.pools)


def test_volume_is_found_by_id_and_by_name(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", MIB, pool="small"))

    pool, home = rig.pools.get(made.id)
    assert (pool.name, home.id) == ("small", made.id)
    assert rig.pools.find_name("a") == (pool, home)
    assert rig.pools.find_name("b") is None


def test_unknown_volume_names_the_pools(rig: Rig) -> None:
    with pytest.raises(NotFound, match=r"small.*large.*loose"):
        rig.pools.get("nothing")


def test_only_other_disks_volumes_are_foreign(rig: Rig, tmp_path: Path) -> None:
    small = next(iter(rig.pools))
    rig.pools.check_foreign("no id at all")
    rig.pools.check_foreign(small.id_of("gone"))

    for foreign in (
        VolumeId("small", "00000000", name_hash("a")),
        VolumeId("other", small.catalog.tag, name_hash("a")),
    ):
        with pytest.raises(FailedPrecondition, match="retired_tags"):
            rig.pools.check_foreign(str(foreign))


def test_retired_disks_volumes_are_nowhere(rig: Rig) -> None:
    pools = Pools({pool.name: pool for pool in rig.pools}, retired_tags=frozenset({"00000000"}))

    pools.check_foreign(str(VolumeId("small", "00000000", name_hash("a"))))


def test_id_of_another_pool_is_not_looked_for_in_this_one(rig: Rig) -> None:
    made = rig.controller.create_volume(volume("a", MIB, pool="small"))
    _, tag, digest = made.id.split("-")

    assert rig.pools.find(f"large-{tag}-{digest}") is None
    assert rig.pools.named_of(f"large-{tag}-{digest}") is None
