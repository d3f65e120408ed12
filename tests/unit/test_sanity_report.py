# SPDX-License-Identifier: Apache-2.0
"""The judge of csi-sanity's reports: what it accepts and what it complains about."""

import json

import pytest

from tests.sanity.report import ExpectedSkip, Spec, judge, parse_expected_skip, parse_report

PASSED = Spec("Node Service / should work", "passed", "")
SKIPPED = Spec("ListSnapshots [Controller Server] / should work", "skipped", "ListSnapshots not supported")
LISTED = ExpectedSkip("*", "ListSnapshots [Controller Server] / *", "snapshots come later")


def test_report_names_a_spec_by_its_containers() -> None:
    raw = {
        "ContainerHierarchyTexts": ["Node Service", "NodeStageVolume"],
        "LeafNodeType": "It",
        "LeafNodeText": "should work",
        "State": "failed",
        "Failure": {"Message": " boom \n"},
    }
    setup = {
        "ContainerHierarchyTexts": None,
        "LeafNodeType": "AfterSuite",
        "LeafNodeText": "",
        "State": "passed",
    }

    specs = parse_report(json.dumps([{"SpecReports": [raw, setup]}]))

    assert specs == [
        Spec("Node Service / NodeStageVolume / should work", "failed", "boom"),
        Spec("AfterSuite", "passed", ""),
    ]


def test_a_listed_skip_is_accepted() -> None:
    verdict = judge("image/mount", [PASSED, SKIPPED], [LISTED])

    assert (verdict.passed, verdict.skipped, verdict.complaints) == (1, 1, ())


@pytest.mark.parametrize(
    ("specs", "expected", "complaint"),
    [
        ([PASSED, SKIPPED], [], "skipped, but not listed"),
        ([PASSED, SKIPPED], [ExpectedSkip("image/block", LISTED.spec, "…")], "skipped, but not listed"),
        ([PASSED, Spec(SKIPPED.name, "passed", "")], [LISTED], "listed, but not skipped"),
        ([PASSED], [LISTED], "there is no such spec"),
        ([PASSED, Spec("x", "failed", "boom")], [], "failed: x: boom"),
        ([PASSED, Spec("x", "panicked", "boom")], [], "panicked: x: boom"),
        ([SKIPPED], [LISTED], "nothing was proven"),
        ([PASSED, Spec("x", "pending", "")], [], "skipped, but not listed: x (pending)"),
    ],
)
def test_anything_else_is_complained_of(
    specs: list[Spec], expected: list[ExpectedSkip], complaint: str
) -> None:
    (found,) = judge("image/mount", specs, expected).complaints

    assert complaint in found


@pytest.mark.parametrize("line", ["* | spec", "* | spec | ", "spec", "a | b | c | d"])
def test_a_skip_without_a_reason_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="settings"):
        parse_expected_skip(line)
