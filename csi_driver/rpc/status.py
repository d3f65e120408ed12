# SPDX-License-Identifier: Apache-2.0
"""THE error table: which gRPC code an exception becomes, and what the caller reads.

Raising is everybody else's business; nobody else names a code.
"""

import errno
from dataclasses import dataclass

from grpc import StatusCode

from csi_driver import errors

CODES: dict[type[BaseException], StatusCode] = {
    errors.InvalidArgument: StatusCode.INVALID_ARGUMENT,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.AlreadyExists: StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: StatusCode.RESOURCE_EXHAUSTED,
    errors.OutOfRange: StatusCode.OUT_OF_RANGE,
    errors.Aborted: StatusCode.ABORTED,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    errors.Unimplemented: StatusCode.UNIMPLEMENTED,
    errors.Error: StatusCode.INTERNAL,
    # Not known to have failed: the provisioner must not take it for "surely not in progress".
    TimeoutError: StatusCode.UNAVAILABLE,
}

ERRNOS: dict[int, StatusCode] = {
    errno.ENOSPC: StatusCode.RESOURCE_EXHAUSTED,
    errno.EDQUOT: StatusCode.RESOURCE_EXHAUSTED,
    errno.EFBIG: StatusCode.OUT_OF_RANGE,
    # A name that the caller gave is one that no filesystem takes.
    errno.ENAMETOOLONG: StatusCode.INVALID_ARGUMENT,
    errno.ELOOP: StatusCode.INVALID_ARGUMENT,
    errno.EBUSY: StatusCode.FAILED_PRECONDITION,
    errno.ETXTBSY: StatusCode.FAILED_PRECONDITION,
    # These pass: the same call may succeed in a moment.
    **dict.fromkeys(
        (
            errno.EAGAIN,
            errno.EINTR,
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
            errno.ETIMEDOUT,
            errno.ECONNREFUSED,
            errno.ECONNRESET,
            errno.EHOSTDOWN,
            errno.EHOSTUNREACH,
            errno.ENETDOWN,
            errno.ENETUNREACH,
            errno.ENOTCONN,
            errno.ESTALE,
        ),
        StatusCode.UNAVAILABLE,
    ),
}
"""What the kernel says where no layer had a better word for it; every other number is INTERNAL."""

MESSAGE_BYTES = 2048
"""gRPC sends the message as a header, percent-encoded (up to threefold); clients refuse 8 KiB of headers."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a failed call answers."""

    code: StatusCode
    message: str

    @property
    def is_our_fault(self) -> bool:
        """Whether the log must have the traceback."""
        return self.code in (StatusCode.INTERNAL, StatusCode.UNKNOWN)


def status_of(error: BaseException, method: str) -> Status:
    """The answer to a call that ended in `error`; `method` names the call in sentences of our own."""
    code = _code_of(error)
    if isinstance(error, errors.Error):
        sentence = str(error)
    elif isinstance(error, OSError):
        sentence = f"{method}: {_os_sentence(error)}"
    else:
        sentence = f"{method}: unexpected {type(error).__name__}: {error}; the driver's log has the details"
    return Status(code, shorten(sentence or f"{method}: failed ({type(error).__name__})", MESSAGE_BYTES))


def shorten(text: str, size_bytes: int) -> str:
    """`text`, or as much of its beginning as fits into so many bytes of UTF-8, with a mark that more followed."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= size_bytes:
        return text
    return encoded[: size_bytes - 3].decode("utf-8", "ignore") + "…"


def _code_of(error: BaseException) -> StatusCode:
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    if isinstance(error, OSError) and error.errno is not None:
        return ERRNOS.get(error.errno, StatusCode.INTERNAL)
    return StatusCode.INTERNAL


def _os_sentence(error: OSError) -> str:
    cause = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: {cause}" if names else cause
