# SPDX-License-Identifier: Apache-2.0
"""Every backend on a fresh filesystem of its own, and the check that a test leaves no mount and no loop device.

A new backend is one entry in `tests.rig.KINDS`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import IN_LAB, KINDS, MANAGED, Kind
from tests.scene import Scene, clean_place, set_up


@pytest.fixture
def place() -> Iterator[Path]:
    with clean_place() as path:
        yield path


@pytest.fixture(params=[*KINDS, MANAGED, *IN_LAB], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(
    params=[*(kind for kind in KINDS if kind.needs_root), MANAGED, *IN_LAB], ids=lambda kind: kind.name
)
def real_kind(request: pytest.FixtureRequest) -> Kind:
    """Those whose volumes a pod could use."""
    found: Kind = request.param
    return found


@pytest.fixture
def scene(kind: Kind, place: Path) -> Iterator[Scene]:
    with set_up(kind, place) as scene:
        yield scene


@pytest.fixture
def real_scene(real_kind: Kind, place: Path) -> Iterator[Scene]:
    with set_up(real_kind, place) as scene:
        yield scene
