# SPDX-License-Identifier: Apache-2.0
"""What becomes of a test whose tool is missing: a skip on a laptop, a failure in CI."""

import pytest
from _pytest.outcomes import Failed, Skipped

from tests.conftest import require_tool


def test_missing_tool_skips_on_a_laptop_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)

    with pytest.raises(Skipped, match="mkfs\\.nonesuch"):
        require_tool("sh", "mkfs.nonesuch")


def test_missing_tool_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    with pytest.raises(Failed, match="mkfs\\.nonesuch"):
        require_tool("mkfs.nonesuch")


def test_present_tool_lets_the_test_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    require_tool("sh")
