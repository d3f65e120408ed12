# SPDX-License-Identifier: Apache-2.0
"""Judges one report of csi-sanity against the committed list of expected skips.

A failure is a failure; a skip that is not listed is one too, and so is a listed one that is not skipped any more: the
list says exactly what the driver cannot do. Running csi-sanity is `run`'s business.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# csi-sanity itself switches such specs off; they are listed like any other skip.
SKIPPED = ("skipped", "pending")


@dataclass(frozen=True)
class Spec:
    name: str
    state: str
    message: str


@dataclass(frozen=True)
class ExpectedSkip:
    settings: str
    """A pattern over the names of settings: `*`, `image/block`, `directory/*`."""
    spec: str
    """A pattern over the names of specs; `*` stands for any text."""
    reason: str


@dataclass(frozen=True)
class Verdict:
    passed: int
    skipped: int
    complaints: tuple[str, ...]


def parse_report(text: str) -> list[Spec]:
    return [parse_spec(raw) for suite in json.loads(text) for raw in suite["SpecReports"]]


def parse_spec(raw: dict[str, Any]) -> Spec:
    # Set-up and tear-down nodes have no text of their own, only a type.
    parts = [*(raw.get("ContainerHierarchyTexts") or []), raw["LeafNodeText"] or raw["LeafNodeType"]]
    failure = raw.get("Failure", {})
    return Spec(" / ".join(parts), raw["State"], failure.get("Message", "").strip())


def read_expected_skips(path: Path) -> list[ExpectedSkip]:
    """Each line is `settings | spec | reason`; the reason is required."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [parse_expected_skip(line) for line in lines if line and not line.startswith("#")]


def parse_expected_skip(line: str) -> ExpectedSkip:
    parts = [part.strip() for part in line.split(" | ")]
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"a line of expected skips is `settings | spec | reason`, not {line!r}")
    return ExpectedSkip(*parts)


def matches(pattern: str, text: str) -> bool:
    # The names hold brackets, which mean themselves here.
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def judge(settings: str, specs: Iterable[Spec], expected: Iterable[ExpectedSkip]) -> Verdict:
    specs = list(specs)
    here = [skip for skip in expected if matches(skip.settings, settings)]
    passed = [spec for spec in specs if spec.state == "passed"]
    skipped = [spec for spec in specs if spec.state in SKIPPED]
    complaints = [
        f"{spec.state}: {spec.name}: {spec.message}"
        for spec in specs
        if spec.state != "passed" and spec.state not in SKIPPED
    ]
    complaints += [
        f"skipped, but not listed: {spec.name} ({spec.message or spec.state})"
        for spec in skipped
        if not any(matches(skip.spec, spec.name) for skip in here)
    ]
    complaints += [
        f"listed, but not skipped: {spec.name}"
        for spec in passed
        if any(matches(skip.spec, spec.name) for skip in here)
    ]
    complaints += [
        f"listed, but there is no such spec: {skip.spec}"
        for skip in here
        if not any(matches(skip.spec, spec.name) for spec in specs)
    ]
    if not passed:
        complaints.append("no spec passed at all: nothing was proven")
    return Verdict(len(passed), len(skipped), tuple(complaints))
