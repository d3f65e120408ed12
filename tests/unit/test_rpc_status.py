# SPDX-License-Identifier: Apache-2.0
"""The error table."""

import errno
import re

import pytest
from grpc import StatusCode

from csi_driver import errors
from csi_driver.linux.run import CommandFailed
from csi_driver.rpc.status import CODES, MESSAGE_BYTES, shorten, status_of


def subclasses(kind: type[BaseException]) -> list[type[BaseException]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in subclasses(child))]


def code_named_after(kind: type[BaseException]) -> StatusCode:
    """InvalidArgument is INVALID_ARGUMENT; classes that no code is named after are our own fault."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()
    return StatusCode.__members__.get(name, StatusCode.INTERNAL)


@pytest.mark.parametrize(
    "kind", [kind for kind in subclasses(errors.Error) if kind.__module__ == errors.__name__]
)
def test_every_error_becomes_the_code_it_is_named_after(kind: type[BaseException]) -> None:
    assert status_of(kind("volume 'x': why"), "CreateVolume").code is code_named_after(kind)


@pytest.mark.parametrize("kind", list(CODES))
def test_a_subclass_becomes_the_code_of_its_parent(kind: type[BaseException]) -> None:
    child = type("Narrower", (type("Narrow", (kind,), {}),), {})

    assert status_of(child("x"), "CreateVolume").code is CODES[kind]


def test_only_errors_of_ours_are_internal_by_design() -> None:
    internal = {kind for kind, code in CODES.items() if code is StatusCode.INTERNAL}

    assert internal == {errors.Error}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, StatusCode.RESOURCE_EXHAUSTED),
        (errno.EDQUOT, StatusCode.RESOURCE_EXHAUSTED),
        (errno.EFBIG, StatusCode.OUT_OF_RANGE),
        (errno.ENAMETOOLONG, StatusCode.INVALID_ARGUMENT),
        (errno.EBUSY, StatusCode.FAILED_PRECONDITION),
        (errno.EMFILE, StatusCode.UNAVAILABLE),
        (errno.ETIMEDOUT, StatusCode.UNAVAILABLE),
        (errno.EAGAIN, StatusCode.UNAVAILABLE),
        (errno.EROFS, StatusCode.INTERNAL),
        (errno.EIO, StatusCode.INTERNAL),
        (errno.EPERM, StatusCode.INTERNAL),
    ],
)
def test_the_kernels_errors(number: int, code: StatusCode) -> None:
    status = status_of(OSError(number, "why", "/pool/x"), "NodeStageVolume")

    assert (status.code, status.message) == (code, "NodeStageVolume: /pool/x: why")


def test_an_error_of_two_names_tells_both() -> None:
    status = status_of(OSError(errno.EIO, "why", "/a", None, "/b"), "DeleteVolume")

    assert status.message == "DeleteVolume: /a -> /b: why"


def test_a_timeout_without_a_number_may_be_repeated() -> None:
    assert status_of(TimeoutError(), "X").code is StatusCode.UNAVAILABLE


def test_a_failed_tool_is_told_in_a_sentence() -> None:
    status = status_of(CommandFailed(["mkfs.ext4", "/x"], 1, "no such device"), "CreateVolume")

    assert status.code is StatusCode.INTERNAL
    assert status.is_our_fault
    assert "mkfs.ext4" in status.message


def test_what_nobody_foresaw_is_internal_and_says_so() -> None:
    status = status_of(KeyError("x"), "CreateVolume")

    assert status.code is StatusCode.INTERNAL
    assert status.message == "CreateVolume: unexpected KeyError: 'x'; the driver's log has the details"


def test_an_error_without_words_still_has_a_sentence() -> None:
    assert status_of(errors.NotFound(), "DeleteVolume").message == "DeleteVolume: failed (NotFound)"


def test_messages_are_bounded() -> None:
    message = status_of(errors.NotFound("ü" * 5000), "X").message

    assert len(message.encode()) <= MESSAGE_BYTES
    assert message.endswith("ü…")


@pytest.mark.parametrize("text", ["", "short", "ü" * 5])
def test_short_text_stays(text: str) -> None:
    assert shorten(text, 10) == text
