# SPDX-License-Identifier: Apache-2.0
"""How lines of the log look."""

import json
import logging
import sys
from pathlib import Path

import pytest

from csi_driver.rpc.logs import Json, Text


def record(message: str = "NodeStageVolume", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("csi_driver.x", logging.INFO, "", 0, message, None, None)
    made.created = 1_700_000_000.25
    made.fields = fields
    return made


def failed() -> logging.LogRecord:
    try:
        raise ValueError("why")
    except ValueError:
        return logging.LogRecord("x", logging.ERROR, "", 0, "CreateVolume", None, sys.exc_info())


def test_text_has_fields_behind_the_message() -> None:
    line = Text().format(record(volume_id="v-1", code="OK", ms=0.4211))

    assert line == "2023-11-14T22:13:20.250Z INFO    NodeStageVolume volume_id=v-1 code=OK ms=0.421"


def test_json_has_the_same_fields() -> None:
    line = json.loads(Json().format(record(volume_id="v-1", code="OK", ms=0.421)))

    assert line == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "csi_driver.x",
        "message": "NodeStageVolume",
        "volume_id": "v-1",
        "code": "OK",
        "ms": 0.421,
    }


@pytest.mark.parametrize("value", ["two words", "", 'quo"te', "new\nline", "\x1b[31m", "a=b", "日本"])
def test_values_that_are_not_plain_are_quoted(value: str) -> None:
    line = Text().format(record(name=value))

    assert json.loads(line.partition("name=")[2]) == value


@pytest.mark.parametrize("form", [Text(), Json()])
@pytest.mark.parametrize("value", ["a\nb", "a\r\nb", "a\u2028b", "a\x85b", "a\x0bb", "a\x1b[2Kb"])
def test_nobody_can_write_a_line_of_his_own(form: logging.Formatter, value: str) -> None:
    line = form.format(record(value, name=value))

    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_a_field_that_is_a_path_or_a_number_is_written_as_text() -> None:
    assert json.loads(Json().format(record(endpoint=Path("/a"))))["endpoint"] == "/a"
    assert Text().format(record(endpoint=Path("/a"), calls=3)).endswith("endpoint=/a calls=3")


def test_a_traceback_follows_the_line_of_text() -> None:
    head, _, trace = Text().format(failed()).partition("\n")

    assert head.endswith("ERROR   CreateVolume")
    assert trace.startswith("Traceback") and trace.endswith("ValueError: why")


def test_a_traceback_is_a_field_in_json() -> None:
    text = Json().format(failed())

    assert "\n" not in text
    assert json.loads(text)["trace"].endswith("ValueError: why")
