# SPDX-License-Identifier: Apache-2.0
"""The `subPath` parameter: which directory inside a volume a pod gets, with the names of its claim filled in."""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from csi_driver.errors import FailedPrecondition, InvalidArgument, invalid
from csi_driver.model import Record

PARAMETER = "subPath"
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
VARIABLES = ("pvc.metadata.namespace", "pvc.metadata.name", "pv.metadata.name", "pod.namespace", "pod.name")


def check_sub_path(template: str) -> None:
    """Refuse a template that could not be a path inside a volume.

    Raises:
        InvalidArgument: says what is wrong with it.
    """
    if not template:
        return
    for name in _VARIABLE.findall(template):
        if name not in VARIABLES:
            raise invalid(PARAMETER, template, f"unknown variable ${{{name}}}; known: {', '.join(VARIABLES)}")
    plain = _VARIABLE.sub("x", template)
    parts = plain.split("/")
    if template.startswith("/") or "\0" in template or any(part in ("", ".", "..") for part in parts):
        raise invalid(PARAMETER, template, "give a relative path without empty, '.' or '..' components")
    if any(len(part.encode()) > 255 for part in parts) or len(plain.encode()) > 1024:
        raise invalid(PARAMETER, template, "a component is at most 255 bytes long, all of it 1024")


@contextmanager
def in_the_way(sub_path: str) -> Iterator[None]:
    """For the making of that directory: what a pod has put in its place is the pod's to remove.

    Raises:
        FailedPrecondition: a file or a symlink is there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise FailedPrecondition(
            f"{PARAMETER} {sub_path!r}: no directory, but something else is there in the volume ({error.strerror}): "
            "remove it"
        ) from error


def expand_sub_path(template: str, record: Record | None, context: Mapping[str, str] | None) -> str:
    """The path that the template means for this volume and pod; "" for none. Without a context (there is no pod yet)
    the pod's variables stay in it.

    Raises:
        InvalidArgument: a variable has no value here (the provisioner needs --extra-create-metadata for the claim's).
    """
    check_sub_path(template)
    values = {
        "pvc.metadata.namespace": record.pvc_namespace if record else "",
        "pvc.metadata.name": record.pvc_name if record else "",
        "pv.metadata.name": record.pv_name if record else "",
        "pod.namespace": (context or {}).get("csi.storage.k8s.io/pod.namespace", ""),
        "pod.name": (context or {}).get("csi.storage.k8s.io/pod.name", ""),
    }

    def value(match: re.Match[str]) -> str:
        if context is None and match[1].startswith("pod."):
            return match[0]
        found = values[match[1]]
        # Kubernetes names are safe as file names; anything else came from elsewhere and could climb.
        if not _NAME.fullmatch(found):
            raise InvalidArgument(
                f"{PARAMETER} {template!r}: ${{{match[1]}}} is {found!r} for this volume, which is no name: "
                "names of the claim need csi-provisioner's --extra-create-metadata"
            )
        return found

    return _VARIABLE.sub(value, template)
