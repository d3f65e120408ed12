# SPDX-License-Identifier: Apache-2.0
"""Project ids of directory volumes: no two the same, without an index."""

from hypothesis import given
from hypothesis import strategies as st

from csi_driver.backends.projects import FIRST_ID, LAST_ID, free_id
from csi_driver.model import VolumeId, name_hash


def id_of(name: str) -> str:
    return str(VolumeId("p", "00000000", name_hash(name)))


@given(st.text())
def test_volume_gets_the_same_id_again_where_it_is_free(name: str) -> None:
    first = free_id(id_of(name), lambda _: False)

    assert first == free_id(id_of(name), lambda _: False)
    assert FIRST_ID <= first <= LAST_ID


@given(st.lists(st.sampled_from("abcdef"), max_size=40))
def test_no_id_is_given_twice(names: list[str]) -> None:
    used: set[int] = set()
    for name in names:
        used.add(free_id(id_of(name), used.__contains__))

    assert len(used) == len(names)


def test_search_goes_on_from_the_beginning_after_the_last_id() -> None:
    volume_id = "p-00000000-" + "0" * 24 + "3fffffff"

    assert free_id(volume_id, lambda _: False) == LAST_ID
    assert free_id(volume_id, {LAST_ID}.__contains__) == FIRST_ID
