# SPDX-License-Identifier: Apache-2.0
"""How the attached loop devices are listed; all else about them is the kernel tests' business."""

import io

import pytest

from csi_driver.linux import loop

HEADLINE = b"major minor  #blocks  name\n\n"


def listing(numbers: list[int]) -> bytes:
    return HEADLINE + b"".join(b"   7 %8d      65536 loop%d\n" % (number, number) for number in numbers)


def test_a_device_that_one_reading_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel gives a page at a time, and goes on by position: a device that went meanwhile hides one that stays.
    full = list(range(300))
    hidden = [number for number in full[1:] if number != 200]
    readings = [listing(hidden), listing(full[1:]), listing(full[1:])]
    monkeypatch.setattr(loop, "open", lambda *_: io.BytesIO(readings.pop(0)), raising=False)

    assert loop.numbers() == full[1:]
    assert readings == []


def test_a_short_list_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [listing([3, 1]) + b" 259        0      65536 nvme0n1\n"]
    monkeypatch.setattr(loop, "open", lambda *_: io.BytesIO(readings.pop(0)), raising=False)

    assert loop.numbers() == [1, 3]
