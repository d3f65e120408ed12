# SPDX-License-Identifier: Apache-2.0
"""The sizes of homes whose payload is a directory, kept by project quotas of the filesystem they lie on (ext4 or XFS).

A home's project id is kept where pods cannot reach it, on the home itself, and nowhere else. What a backend makes of a
pool where sizes are not enforced is that backend's business: then nothing here is asked of the filesystem.
"""

import threading
from collections.abc import Callable, Iterable

from csi_driver.backends.base import Directory
from csi_driver.catalog import Home
from csi_driver.errors import ResourceExhausted
from csi_driver.linux import quota
from csi_driver.model import KIB, MIB, HealthEntry, HealthStatus, Record, SizeLimits, Stats

LIMITS = SizeLimits(minimum_bytes=MIB, maximum_bytes=2**62, multiple_bytes=4 * KIB)
"""The home and its record are counted too: some KiB."""

FIRST_ID, LAST_ID = 0x4000_0000, 0x7FFF_FFFF
"""Project ids that volumes get: above those that people give by hand, and kubelet (from 1048577 on)."""

BYTES_PER_INODE = 16 * KIB
"""A volume may have a file for each of these, as many as mkfs.ext4 gives a filesystem of its size."""

_NONE = quota.ProjectUsage(0, 0, 0, 0)


class Projects:
    """Those of one pool. Not `enforced`: every size is 0, and nothing is limited."""

    def __init__(self, *, enforced: bool) -> None:
        self.enforced = enforced
        # Ids are looked for and taken by one thread at a time.
        self._guard = threading.Lock()

    def problem(self, root_fd: int) -> str | None:
        """Why sizes cannot be enforced beneath this directory, with the remedy; None if they can, or need not be."""
        return (quota.state(root_fd) or _inherited(root_fd)) if self.enforced else None

    def begin(self, home: Home, home_fd: int, size_bytes: int | None) -> None:
        """Give an empty home a project of its own, limited to this size; None: counted, not limited.

        Before anything is made in it: only what comes later belongs to the project.
        """
        if not self.enforced:
            return
        project_id = self._take_id(home, home_fd)
        if size_bytes is not None:
            _set_limit(home, project_id, size_bytes)

    def usage(self, home: Home) -> quota.ProjectUsage:
        """The home's limits and what it holds; all 0 where it has no project."""
        project_id = self._project(home)
        return quota.get(home.area_fd, project_id) if project_id else _NONE

    def grow(self, home: Home, size_bytes: int) -> int:
        """Make the limit at least so high; what it is then."""
        project_id = self._project(home)
        if not project_id:
            # Made while sizes were not enforced: what is in it belongs to no project, so a limit would hold nothing.
            return 0
        if quota.get(home.area_fd, project_id).limit_bytes < size_bytes:
            _set_limit(home, project_id, size_bytes)
        return quota.get(home.area_fd, project_id).limit_bytes

    def lift(self, home: Home) -> None:
        """Lift the limit. The id itself is free once the home's files are gone."""
        project_id = self._project(home)
        if FIRST_ID <= project_id <= LAST_ID:
            quota.set_limit(home.area_fd, project_id, 0)

    def health(self, home: Home, record: Record) -> Iterable[HealthEntry]:
        """What is wrong with the limit."""
        size_bytes = self.usage(home).limit_bytes
        if self.enforced and size_bytes < record.size_bytes:
            message = (
                f"volume {home.id!r}: its quota is {size_bytes} bytes (0: none), not {record.size_bytes}: it was made "
                "while sizes were not enforced, or somebody changed the quota"
            )
            yield HealthEntry(HealthStatus.DEGRADED, "SizeNotEnforced", message)

    def stats(self, home: Home, below: Stats) -> Stats:
        """How full the volume is; `below` is what its filesystem says, which is the answer where nothing is limited."""
        used = self.usage(home)
        if not used.limit_bytes:
            return below
        # Asked by id, not by statvfs: that follows the project of the directory, which its owner may change.
        return Stats(
            total_bytes=used.limit_bytes,
            used_bytes=used.used_bytes,
            available_bytes=max(0, min(used.limit_bytes - used.used_bytes, below.available_bytes)),
            total_inodes=used.limit_inodes,
            used_inodes=used.used_inodes,
            available_inodes=max(0, min(used.limit_inodes - used.used_inodes, below.available_inodes)),
        )

    def _project(self, home: Home) -> int:
        if not self.enforced:
            return 0
        with Directory(home.open_directory()) as opened:
            return quota.project(opened.fd)

    def _take_id(self, home: Home, home_fd: int) -> int:
        """A project id of its own for the home: from here on the filesystem counts the home itself by it."""
        with self._guard:
            project_id = free_id(home.id, lambda wanted: _is_used(home.area_fd, wanted))
            quota.set_project(home_fd, project_id)
        return project_id


def free_id(volume_id: str, is_used: Callable[[int], bool]) -> int:
    """A project id that nothing uses, the same one for the same volume if it can be.

    Raises:
        ResourceExhausted: all are used.
    """
    count = LAST_ID - FIRST_ID + 1
    # The end of the id is of a hash already; where two volumes meet, the later one takes the next.
    start = int(volume_id[-8:], 16) % count
    for step in range(count):
        project_id = FIRST_ID + (start + step) % count
        if not is_used(project_id):
            return project_id
    raise ResourceExhausted("every project id for volumes is used on this filesystem")


def _set_limit(home: Home, project_id: int, size_bytes: int) -> None:
    # Files take room that is not counted as theirs (XFS) or of which there is an end (ext4): without a limit on their
    # number a volume of empty files could fill the pool.
    quota.set_limit(home.area_fd, project_id, size_bytes, inodes=size_bytes // BYTES_PER_INODE)


def _is_used(root_fd: int, project_id: int) -> bool:
    found = quota.get(root_fd, project_id)
    return bool(found.limit_bytes or found.limit_inodes or found.used_bytes or found.used_inodes)


def _inherited(root_fd: int) -> str | None:
    """Why volumes cannot have projects of their own here; None if they can."""
    project = quota.project(root_fd)
    if not project:
        return None
    # What is made in a directory with a project has that project, and the kernel moves nothing from one to another.
    return f"the directory belongs to project {project} itself: take it out (chattr -p 0 -P) or choose another root"
