# SPDX-License-Identifier: Apache-2.0
"""The errors that travel up to a caller, named after the gRPC codes they become.

Raise them with a sentence an operator can act on: the object, the operation, the cause, the remedy.
How they become codes is `rpc.status`'s business; nothing below `rpc` knows gRPC.
"""

from collections.abc import Iterable


class Error(Exception):
    """Base of all errors meant for a caller. Alone it means: our fault (INTERNAL)."""


class InvalidArgument(Error):
    """The request is wrong whatever the state of the system: names the field, the value, what to do."""


class NotFound(Error):
    """The volume, snapshot, path or pool named does not exist."""


class AlreadyExists(Error):
    """It exists, but made with other arguments."""


class FailedPrecondition(Error):
    """The system is not in the state that the call needs (in use, not staged, cannot share)."""


class ResourceExhausted(Error):
    """No room here, or it cannot be made on this node: the scheduler should look elsewhere."""


class OutOfRange(Error):
    """A size outside what can be made, or a page or offset past the end."""


class Aborted(Error):
    """Another call is working on it, or an undo did not finish: repeat later."""


class Unavailable(Error):
    """The store or the server behind it does not answer now: repeat later."""


class Unimplemented(Error):
    """This driver, as it is configured, does not do that."""


class ConfigurationError(Error):
    """The configuration or the machine cannot be used as asked. Stops the start; never an RPC's answer."""


def invalid(field: str, value: object, remedy: str) -> InvalidArgument:
    """The one sentence of a bad field: `field 'value': remedy`."""
    return InvalidArgument(f"{field} {value!r}: {remedy}")


def unknown_keys(where: str, unknown: Iterable[str], known: Iterable[str]) -> str:
    """One sentence that names the unknown keys and the known ones."""
    bad = ", ".join(repr(key) for key in sorted(unknown))
    return f"{where}: unknown key {bad}; known keys: {', '.join(sorted(known))}"
