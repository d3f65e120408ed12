# SPDX-License-Identifier: Apache-2.0
"""The StorageClass parameters that backends share, from text to values.

Which keys a backend knows beyond `COMMON`, and whether it can do what a value says, is the backend's business.
"""

import re
from collections.abc import Mapping

from csi_driver.errors import InvalidArgument, invalid, unknown_keys
from csi_driver.model import PLACEMENT_KEYS, OnDelete, Parameters
from csi_driver.subpath import check_sub_path

FS_TYPE, MODE, UID, GID, SUB_PATH = "fsType", "mode", "uid", "gid", "subPath"
MKFS_OPTIONS, PROVISIONING, ON_DELETE = "mkfsOptions", "provisioning", "onDelete"
SUB_DIR, MOUNT_PERMISSIONS = "subDir", "mountPermissions"
COMMON = (FS_TYPE, MODE, UID, GID, SUB_PATH)
EVERY = (*COMMON, MKFS_OPTIONS, PROVISIONING, ON_DELETE, SUB_DIR, MOUNT_PERMISSIONS)
"""What any backend knows."""
PROVISIONINGS = ("thick", "thin")

_MODE = re.compile(r"[0-7]{1,5}")
# Not \d, which takes the digits of every script.
_ID = re.compile(r"[0-9]{1,10}")
# 2**32 - 1 means "leave it as it is" to chown(2).
_LARGEST_ID = 2**32 - 2


def parse_parameters(
    parameters: Mapping[str, str], fs_type: str, *, further: tuple[str, ...] = (), thin: bool = False
) -> Parameters:
    """The parameters as values; `further` are the keys that this backend knows beyond `COMMON`.

    `fs_type` is the capability's, `thin` what holds where `provisioning` is not given.

    Raises:
        InvalidArgument: an unknown key, a bad value, or a filesystem other than the capability's.
    """
    unknown = parameters.keys() - {*COMMON, *further}
    if unknown:
        raise InvalidArgument(unknown_keys("parameters", unknown, (*COMMON, *further, *PLACEMENT_KEYS)))
    sub_path = parameters.get(SUB_PATH, "")
    check_sub_path(sub_path)
    return Parameters(
        fs_type=_one_fs_type(parameters.get(FS_TYPE, ""), fs_type),
        mkfs_options=tuple(parameters.get(MKFS_OPTIONS, "").split()),
        mode=_mode(parameters.get(MODE)),
        uid=_id(UID, parameters.get(UID)),
        gid=_id(GID, parameters.get(GID)),
        sub_path=sub_path,
        thin=_thin(parameters.get(PROVISIONING), thin),
        on_delete=_on_delete(parameters.get(ON_DELETE, OnDelete.DELETE)),
    )


def check_fs_type(wanted: str, have: str) -> None:
    """Refuse a filesystem other than the pool's own, for volumes that are a part of it.

    Raises:
        InvalidArgument: says which one it is.
    """
    if wanted not in ("", have):
        raise invalid(
            FS_TYPE, wanted, f"volumes here are a part of the pool's filesystem, {have}: leave it out"
        )


def _one_fs_type(parameter: str, capability: str) -> str:
    if parameter and capability and parameter != capability:
        raise invalid(
            f"parameters.{FS_TYPE}",
            parameter,
            f"the volume_capability asks for {capability!r}: a volume has one",
        )
    return parameter or capability


def _mode(text: str | None) -> int | None:
    if text is None:
        return None
    mode = int(text, 8) if _MODE.fullmatch(text) else -1
    if not 0 <= mode <= 0o7777:
        raise invalid(f"parameters.{MODE}", text, "give an octal number from 0 to 7777, like 0770")
    return mode


def _id(key: str, text: str | None) -> int | None:
    if text is None:
        return None
    number = int(text) if _ID.fullmatch(text) else -1
    if not 0 <= number <= _LARGEST_ID:
        raise invalid(f"parameters.{key}", text, f"give a number from 0 to {_LARGEST_ID}")
    return number


def _on_delete(text: str) -> OnDelete:
    try:
        return OnDelete(text)
    except ValueError as error:
        raise invalid(f"parameters.{ON_DELETE}", text, f"give {', '.join(OnDelete)}") from error


def _thin(text: str | None, default: bool) -> bool:
    if text is None:
        return default
    if text not in PROVISIONINGS:
        raise invalid(f"parameters.{PROVISIONING}", text, f"give {' or '.join(PROVISIONINGS)}")
    return text == "thin"
