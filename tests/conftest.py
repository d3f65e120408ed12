# SPDX-License-Identifier: Apache-2.0
"""What a test may demand of the machine, and what happens when the machine has it not.

On a laptop a missing tool or privilege skips the test, with its reason. Where `CI=true` it fails it: a skip there is a
hole nobody sees. Markers of tiers come from the directory a test lives in. No fixtures of any layer belong here.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest

TESTS = Path(__file__).parent
# Tiers that are a directory of their own; `crash`, `soak` and `bench` are marked test by test.
TIERS_BY_DIRECTORY = ("conformance", "kernel", "lab", "cluster")


def unavailable(reason: str) -> NoReturn:
    """Give this test up: a skip with its reason on a laptop, a failure in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"not possible here, and CI=true allows no skip: {reason}", pytrace=False)
    pytest.skip(reason)


def require_root() -> None:
    if os.geteuid() != 0:
        unavailable("needs root: it mounts")


def require_tool(*names: str) -> None:
    """Every one of these programs can be run; else the test is given up."""
    # Debian keeps administrators' tools where an ordinary user's PATH does not look.
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [name for name in names if shutil.which(name, path=search) is None]
    if missing:
        unavailable(
            f"{', '.join(missing)} not found; as root, `make debian-packages` installs what tests need"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in TIERS_BY_DIRECTORY:
            item.add_marker(tier)
        parameters = (
            item.callspec.params.values()
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else ()
        )
        if any(getattr(value, "served", False) for value in parameters):
            item.add_marker("served")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        sys.stderr.write("\nNo test was selected: the tier is empty, or its markers are misspelt.\n")
