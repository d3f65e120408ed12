# SPDX-License-Identifier: Apache-2.0
"""The turns of several freezes; that they hold, the kernel tests show."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.linux import online, syscall
from csi_driver.linux.freeze import Freezer


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    made = Freezer()
    yield made
    made.close()


def test_one_that_is_long_written_out_keeps_no_other_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, freezer: Freezer
) -> None:
    slow, quick = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("slow", "quick"))
    writing, written = threading.Event(), threading.Event()

    def syncfs(fd: int) -> None:
        if fd == slow:
            writing.set()
            assert written.wait(60)

    monkeypatch.setattr(syscall, "syncfs", syncfs)
    monkeypatch.setattr(online, "freeze", lambda _: None)
    monkeypatch.setattr(online, "thaw", lambda _: None)

    def freeze_slow() -> None:
        with freezer.frozen([slow]):
            pass

    other = threading.Thread(target=freeze_slow)
    other.start()
    try:
        assert writing.wait(60)
        with freezer.frozen([quick]):
            pass
        assert freezer.count == 1
    finally:
        written.set()
        other.join()
    assert freezer.count == 2
    os.close(slow)
    os.close(quick)
