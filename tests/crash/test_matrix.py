# SPDX-License-Identifier: Apache-2.0
"""The crash matrix: every operation, on every backend, dies after every step; then the caller goes on as callers do.

It either repeats the call, or gives up and calls the opposite. Both must end as if nothing had happened: the same
volumes, records, mounts, devices and room as an undisturbed run leaves, and nothing beside them.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.cases import (
    COPIES,
    FROZEN,
    IMAGE_XFS,
    OPERATIONS,
    Case,
    Operation,
    clear,
    picture_after,
    run,
    settled,
)
from tests.crash.tracer import Outcome, run_until
from tests.rig import IN_LAB, KINDS, LAB, SERVED_IMAGE, SHARING, Kind
from tests.scene import clean_place, set_up

pytestmark = pytest.mark.crash
# Inline volumes are a node's own.
NOT_SERVED = ("publish-inline", "unpublish-inline")
EVERY = int(os.environ.get("ORLOP_CRASH_EVERY", "1"))
"""Die after every n-th step only, beginning with any of the first n: a sample, another one in each run."""


def killed(case: Case, operation: Operation, step: int) -> Outcome:
    def action() -> Callable[[], object]:
        rig = case.scene.open()
        return lambda: operation.act(case, rig)

    return run_until(action, step)


@pytest.fixture
def place() -> Iterator[Path]:
    with clean_place() as path:
        yield path


def cases() -> Iterator[object]:
    for name, operation in OPERATIONS.items():
        kinds = (*KINDS, *IN_LAB, *([SERVED_IMAGE] if LAB else []))
        for kind in (*kinds, SHARING[0]) if name in COPIES else kinds:
            if kind.served and name in NOT_SERVED:
                continue
            if operation.needs_root and (kind.used_elsewhere or not kind.needs_root):
                continue
            if name in FROZEN and kind.backend != "image":
                continue
            if name == "expand" and kind.backend == "image":
                kind = IMAGE_XFS  # ext4 may be grown mounted only with CAP_SYS_RESOURCE
            yield pytest.param(operation, kind, id=f"{name}-{kind.name}")


@pytest.mark.parametrize("repeated", [True, False], ids=["repeated", "given-up"])
@pytest.mark.parametrize(("operation", "kind"), list(cases()))
def test_death_after_every_step(operation: Operation, kind: Kind, repeated: bool, place: Path) -> None:
    with set_up(kind, place, 2 << 30) as scene:
        case = Case(scene, place / "pods")
        case.pods.mkdir()
        goes_on = (operation.act,) if repeated else operation.undo
        empty = picture_after(case, ())
        expected = picture_after(case, (*operation.before, operation.act, *goes_on))
        clear(case, empty)

        step = random.randint(1 - EVERY, 0)
        while True:
            step += EVERY
            run(case, operation.before)
            outcome = killed(case, operation, step)
            run(case, goes_on)
            found = settled(case, case.scene.open(), expected)
            assert found.same(expected), (
                f"killed after step {step}, {outcome.killed_after}: {found}, not {expected}"
            )
            clear(case, empty)
            if outcome.finished:
                break

        # Otherwise the tracer saw nothing.
        assert outcome.steps > 0 or operation.act in (Case.stage, Case.unstage, Case.empty_trash)
