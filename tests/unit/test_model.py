# SPDX-License-Identifier: Apache-2.0
"""Sizes, ids and lock keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import OutOfRange
from csi_driver.model import (
    DEFAULT_SIZE,
    GIB,
    MIB,
    AccessMode,
    CapacityRange,
    SizeLimits,
    VolumeId,
    lock_key,
    name_hash,
)

LIMITS = SizeLimits(minimum_bytes=MIB, maximum_bytes=4 * GIB, multiple_bytes=4096)

limits = st.builds(
    lambda step, low, span: SizeLimits(step * low, step * (low + span), step),
    st.sampled_from([1, 512, 4096, MIB]),
    st.integers(1, 50),
    st.integers(0, 5000),
)
sizes = st.one_of(st.just(0), st.integers(1, 10_000 * 4096), st.integers(1, 2**63 - 1))


@given(limits, sizes, sizes)
def test_resolved_size_satisfies_request_and_backend(limits: SizeLimits, required: int, limit: int) -> None:
    try:
        size = limits.resolve(CapacityRange(required, limit))
    except OutOfRange:
        # Then there is none.
        lowest = max(required, limits.minimum_bytes)
        lowest = -(-lowest // limits.multiple_bytes) * limits.multiple_bytes
        assert lowest > min(limits.maximum_bytes, limit or limits.maximum_bytes)
        return

    assert limits.minimum_bytes <= size <= limits.maximum_bytes
    assert size % limits.multiple_bytes == 0
    assert size >= required
    assert not limit or size <= limit


@given(limits, sizes)
def test_resolved_size_is_not_larger_than_need_be(limits: SizeLimits, required: int) -> None:
    if not required or required > limits.maximum_bytes:
        return

    assert (
        limits.resolve(CapacityRange(required)) - max(required, limits.minimum_bytes) < limits.multiple_bytes
    )


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        (CapacityRange(), DEFAULT_SIZE),
        (CapacityRange(0, 10 * MIB), 10 * MIB),
        (CapacityRange(0, 10 * MIB + 5), 10 * MIB),
        (CapacityRange(1), MIB),
        (CapacityRange(MIB + 1), MIB + 4096),
        (CapacityRange(MIB, MIB), MIB),
    ],
)
def test_size_of_a_request(wanted: CapacityRange, size: int) -> None:
    assert LIMITS.resolve(wanted) == size


def test_size_beyond_the_backend_names_both() -> None:
    with pytest.raises(OutOfRange, match=rf"required_bytes {5 * GIB}.*{4 * GIB}"):
        LIMITS.resolve(CapacityRange(5 * GIB))


def test_limit_below_the_next_multiple_names_the_size_that_could_be_made() -> None:
    with pytest.raises(OutOfRange, match=rf"limit_bytes {MIB + 2}.*{MIB + 4096}"):
        LIMITS.resolve(CapacityRange(MIB + 1, MIB + 2))


def test_default_size_gives_way_to_a_small_backend() -> None:
    assert SizeLimits(MIB, 16 * MIB).resolve(CapacityRange()) == 16 * MIB


@given(st.text())
def test_name_hash_is_32_hex_digits_of_any_text(name: str) -> None:
    digest = name_hash(name)

    assert len(digest) == 32
    assert set(digest) <= set("0123456789abcdef")


def test_name_hash_takes_lone_surrogates() -> None:
    assert name_hash("\ud800") != name_hash("\ud801")


def test_id_reads_back() -> None:
    volume_id = VolumeId("fast", "0123abcd", name_hash("pvc-1"))

    assert VolumeId.find(str(volume_id)) == volume_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "fast-0123abcd-" + "0" * 31,
        "fast-0123abcd-" + "0" * 33,
        "fast-0123ABCD-" + "0" * 32,
        "Fast-0123abcd-" + "0" * 32,
        "../-0123abcd-" + "0" * 32,
        "fast-0123abcd-" + "0" * 32 + "\n",
        "a" * 17 + "-0123abcd-" + "0" * 32,
        "fast-0123abcd-" + "٠" * 32,
    ],
)
def test_what_is_no_id(text: str) -> None:
    assert VolumeId.find(text) is None


@given(st.text(max_size=200))
def test_id_of_any_text_is_a_plain_file_name(text: str) -> None:
    found = VolumeId.find(text)

    assert found is None or ("/" not in text and text not in (".", "..") and text.isascii())


def test_calls_by_name_and_by_id_share_a_lock() -> None:
    volume_id = VolumeId("fast", "0123abcd", name_hash("pvc-1"))

    assert lock_key(str(volume_id)) == name_hash("pvc-1")
    assert lock_key("csi-inline-1") == name_hash("csi-inline-1")


def test_only_reader_modes_are_reader_only() -> None:
    assert {mode for mode in AccessMode if mode.reader_only} == {
        AccessMode.SINGLE_NODE_READER_ONLY,
        AccessMode.MULTI_NODE_READER_ONLY,
    }
