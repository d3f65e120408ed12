# SPDX-License-Identifier: Apache-2.0
"""How lines of the log look: text for people, JSON for collectors, the same fields in both.

A record's fields are what it carries as `extra={"fields": {...}}`. What is logged, and that no secret is, is the
business of whoever logs.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Literal, TextIO

Format = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")

_PLAIN = re.compile(r"[A-Za-z0-9_./:@,+%~-]+")


def set_up(level: str, form: Format, stream: TextIO | None = None) -> logging.Handler:
    """Send the whole process's log to `stream` (stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Json() if form == "json" else Text())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # Nobody reads these, and they cost a look at the stack and at the scheduler for every line.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    return handler


class Text(logging.Formatter):
    """`time LEVEL message key=value …`; values that are not plain are quoted, so that a line stays a line."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_timestamp(record.created), f"{record.levelname:<7}", _one_line(record.getMessage())]
        words.extend(f"{key}={_word(value)}" for key, value in _fields(record).items())
        trace = _trace(self, record)
        return " ".join(words) + (f"\n{trace}" if trace else "")


class Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        trace = _trace(self, record)
        if trace:
            line["trace"] = trace
        # ASCII only: some programs break lines at U+2028, too.
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _timestamp(seconds: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds * 1000) % 1000:03d}Z"


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _one_line(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""
