# SPDX-License-Identifier: Apache-2.0
"""mount(8) options as text, and the kernel's flags for them. Calls nothing.

What belongs to one mount (`Attributes`) is told from what belongs to the filesystem behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

# Per-mount flag: MOUNT_ATTR_…, MS_…, ST_… of statvfs. relatime is the absence of the other two.
FLAGS: Final = {
    "readonly": (0x1, 0x1, 0x1),
    "nosuid": (0x2, 0x2, 0x2),
    "nodev": (0x4, 0x4, 0x4),
    "noexec": (0x8, 0x8, 0x8),
    "noatime": (0x10, 0x400, 0x400),
    "strictatime": (0x20, 0x1000000, 0),
    "relatime": (0, 0x200000, 0x1000),
    "nodiratime": (0x80, 0x800, 0x800),
    "nosymfollow": (0x200000, 0x100, 0x2000),
}
ATIME: Final = ("noatime", "strictatime", "relatime")

# mount(8) option -> attribute and its value; the last one of several wins.
_OPTIONS: Final = {
    "ro": ("readonly", True),
    "rw": ("readonly", False),
    "nosuid": ("nosuid", True),
    "suid": ("nosuid", False),
    "nodev": ("nodev", True),
    "dev": ("nodev", False),
    "noexec": ("noexec", True),
    "exec": ("noexec", False),
    "noatime": ("noatime", True),
    "atime": ("noatime", False),
    "nodiratime": ("nodiratime", True),
    "diratime": ("nodiratime", False),
    "relatime": ("relatime", True),
    "norelatime": ("relatime", False),
    "strictatime": ("strictatime", True),
    "nostrictatime": ("strictatime", False),
    "nosymfollow": ("nosymfollow", True),
    "symfollow": ("nosymfollow", False),
}
# For mount(8) or /etc/fstab's readers only; the kernel knows nothing of them.
_USERLAND: Final = frozenset(("defaults", "auto", "noauto", "nofail", "_netdev", "silent", "loud", "async"))
_REFUSED: Final = frozenset(
    "bind rbind move remount loop offset sizelimit shared rshared private rprivate slave rslave unbindable runbindable"
    " user users owner group"
    # These have the kernel open (and write) a device that is not the volume's.
    " device journal_dev journal_path logdev rtdev".split()
)


@dataclass(frozen=True)
class Attributes:
    """What belongs to one mount, not to the filesystem behind it. False: as the source has it (see `bind`)."""

    readonly: bool = False
    nosuid: bool = False
    nodev: bool = False
    noexec: bool = False
    noatime: bool = False
    nodiratime: bool = False
    relatime: bool = False
    strictatime: bool = False
    nosymfollow: bool = False

    def covers(self, wanted: "Attributes") -> bool:
        """Whether a mount with these attributes has all that are `wanted`."""
        return all(getattr(self, one.name) for one in fields(self) if getattr(wanted, one.name))

    def bits(self, column: int) -> int:
        """All of them as the kernel's flags, in that column of `FLAGS`."""
        return sum(FLAGS[one.name][column] for one in fields(self) if getattr(self, one.name))


NONE: Final = Attributes()


def parse_flags(flags: Sequence[str]) -> tuple[Attributes, list[str]]:
    """Split mount(8) options into per-mount attributes and options of the filesystem itself, in order.

    An element may hold several, separated by commas outside double quotes; "rw", "defaults", "x-…" and the
    like are dropped. Of contradicting ones the last wins.

    Raises ValueError: an option that says what to mount rather than how ("bind", "remount", "shared", …).
    """
    attributes = NONE
    rest: list[str] = []
    for option in (option for flag in flags for option in _split(flag)):
        name = option.partition("=")[0]
        if name in _REFUSED:
            raise ValueError(f"mount option {option!r} is not for a volume: leave it out")
        if option in _OPTIONS:
            attribute, value = _OPTIONS[option]
            if attribute in ATIME and value:
                attributes = replace(attributes, noatime=False, relatime=False, strictatime=False)
            attributes = replace(attributes, **{attribute: value})
        elif option not in _USERLAND and not name.startswith(("x-", "X-", "comment")):
            rest.append(option)
    return attributes, rest


def _split(flag: str) -> Iterator[str]:
    # SELinux contexts have commas: context="system_u:object_r:container_file_t:s0:c1,c2".
    option, quoted = "", False
    for character in flag:
        if character == '"':
            quoted = not quoted
        if character == "," and not quoted:
            yield from filter(None, (option.strip(),))
            option = ""
        else:
            option += character
    yield from filter(None, (option.strip(),))
