# SPDX-License-Identifier: Apache-2.0
"""A driver over the memory backend: the layers above it, whole, without root."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from csi_driver.config import PoolConfig
from tests.rig import KINDS, Rig, configure, open_rig

MEMORY = KINDS[0]


class OpenRig(Protocol):
    """Opens a driver; the ones before it are closed first, as by a restart."""

    def __call__(self, *pools: PoolConfig, default_pool: str = "", extra: str = ...) -> Rig: ...


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenRig]:
    """`opened()` is a driver over one memory pool `p`; called again, it is that driver restarted."""
    current = ExitStack()

    def open_again(*pools: PoolConfig, default_pool: str = "", extra: str = 'reserved = "0%"\n') -> Rig:
        current.close()
        chosen = pools or (configure(MEMORY, tmp_path / "p", extra=extra),)
        return current.enter_context(open_rig(*chosen, default_pool=default_pool))

    with current:
        yield open_again


@pytest.fixture
def rig(opened: OpenRig) -> Rig:
    return opened()
