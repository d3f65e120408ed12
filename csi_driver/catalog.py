# SPDX-License-Identifier: Apache-2.0
"""Homes and records on disk: what exists in a pool.

A volume exists if and only if its directory stands in `volumes/`, a snapshot in `snapshots/`. It gets there by one rename, complete and
synced, and leaves by one rename into `trash/`. There is no index. What a home's payload is, how much room there is
and who may use it are not this module's business.

    <root>/pool.json  lock  volumes/<id>/  snapshots/<id>/  groups/<id>/  staging/<id>/  trash/<id>.<n>/
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from csi_driver import handover
from csi_driver.claims import Claims
from csi_driver.errors import ConfigurationError, Error, NotFound, ResourceExhausted
from csi_driver.identity import SCHEMA, PoolRecord, find_identity
from csi_driver.linux import files
from csi_driver.model import GroupRecord, Record, SnapshotRecord, VolumeId

R = TypeVar("R", bound=msgspec.Struct)

RECORD_FILE, SNAPSHOT_FILE, GROUP_FILE = "volume.json", "snapshot.json", "group.json"
LOCK_FILE = "lock"
AREAS = VOLUMES, SNAPSHOTS, GROUPS, STAGING, TRASH = "volumes", "snapshots", "groups", "staging", "trash"
KEPT, ARCHIVE = "kept", "archive"
"""What deleted volumes leave behind whose class says so; the driver never looks into them."""
_PLACES: dict[type[msgspec.Struct], tuple[str, str]] = {
    Record: (VOLUMES, RECORD_FILE),
    SnapshotRecord: (SNAPSHOTS, SNAPSHOT_FILE),
    GroupRecord: (GROUPS, GROUP_FILE),
}
"""Where a home with such a record stands, and what the record's file is called."""


@dataclass(frozen=True, slots=True)
class Home:
    """The directory of one volume or snapshot. `name` is the id, with a number behind it in the trash."""

    id: str
    name: str
    area: str
    area_fd: int
    area_path: Path

    @property
    def path(self) -> Path:
        """For tools that want a name; everything else opens beneath `area_fd`."""
        return self.area_path / self.name

    def open(self, path: str, flags: int = os.O_RDONLY, mode: int = 0) -> int:
        """An fd of something in the home, never through a symlink; FileNotFoundError if it is not there."""
        return files.open_beneath(self.area_fd, f"{self.name}/{path}", flags, mode)

    def open_directory(self) -> int:
        """An fd of the home itself."""
        return files.open_beneath(self.area_fd, self.name, os.O_RDONLY | os.O_DIRECTORY)


class Catalog:
    """The homes of one pool. Holds the pool's lock for as long as it is open."""

    def __init__(
        self, root: Path, root_fd: int, lock_fd: int, pool: PoolRecord, *, exclusive: bool = True
    ) -> None:
        self.root = root
        # Where others work in the pool too, what is in staging belongs to whoever has claimed it.
        self._claims = None if exclusive else Claims(root_fd)
        self.root_fd = root_fd
        self.tag = pool.tag
        self._lock_fd = lock_fd
        self._areas = {area: files.ensure_directory(root_fd, area, mode=0o700) for area in AREAS}

    @classmethod
    def open(cls, root: Path, backend: str, *, exclusive: bool = True, tag: str = "") -> "Catalog":
        """Open the pool at `root`, made if there is none; `exclusive`: by this process alone; `tag`: that one only.

        Raises:
            ConfigurationError: it cannot be used: another process has it, it is another backend's, it was written
                by a newer version, or the directory cannot be made.
        """
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            root_fd = files.open_directory(root.resolve())
        except OSError as error:
            raise ConfigurationError(
                f"pool root {root}: cannot be opened or made: {error.strerror}"
            ) from error
        lock_fd = files.lock(root_fd, LOCK_FILE) if exclusive else os.dup(root_fd)
        if lock_fd is None:
            os.close(root_fd)
            raise ConfigurationError(
                f"pool root {root}: another process uses this pool (it holds {root / LOCK_FILE}): stop it first; "
                "one driver process serves a pool"
            )
        try:
            return cls(
                root,
                root_fd,
                lock_fd,
                find_identity(root, root_fd, backend, tag, VOLUMES),
                exclusive=exclusive,
            )
        except BaseException:
            os.close(lock_fd)
            os.close(root_fd)
            raise

    def close(self) -> None:
        """Give the pool's lock back."""
        if self._claims is not None:
            self._claims.close()
        for fd in (*self._areas.values(), self._lock_fd, self.root_fd):
            os.close(fd)

    def is_present(self) -> bool:
        """Whether `root` still names the directory that was opened (it may have been unmounted or replaced)."""
        try:
            now, then = os.stat(self.root), os.fstat(self.root_fd)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino)

    def check_present(self) -> None:
        """Make sure of it.

        Raises:
            ResourceExhausted: it does not.
        """
        if not self.is_present():
            raise ResourceExhausted(f"{self.root}: is not there any more: is its disk mounted?")

    def is_read_only(self) -> bool:
        """Whether the pool's filesystem refuses writes now."""
        return files.is_read_only(self.root_fd)

    # Finding

    def find(self, volume_id: str) -> Home | None:
        """The volume's home, or None."""
        return self._standing(VOLUMES, volume_id) if self._is_ours(volume_id) else None

    def find_snapshot(self, snapshot_id: str) -> Home | None:
        """The snapshot's home, or None."""
        return self._standing(SNAPSHOTS, snapshot_id) if self._is_ours(snapshot_id) else None

    def find_group(self, group_id: str) -> Home | None:
        """The home of a group of snapshots (its record alone), or None."""
        return self._standing(GROUPS, group_id) if self._is_ours(group_id) else None

    def has_group(self, group_id: str) -> bool:
        """Whether there is one, by the server's word: a client takes what it has looked for in vain for missing for a while.

        Opening a directory has the client ask what is in it now (nfs(5), close-to-open cache consistency).
        """
        return group_id in self._names(GROUPS)

    def get(self, volume_id: str) -> Home:
        """The volume's home.

        Raises:
            NotFound: there is none.
        """
        home = self.find(volume_id)
        if home is None:
            raise NotFound(f"volume {volume_id!r}: does not exist in {self.root}")
        return home

    def ids(self) -> list[str]:
        """The ids of all volumes, in order."""
        return [name for name in self._names(VOLUMES) if self._is_ours(name)]

    def stands(self, home: Home) -> bool:
        """Whether the home is still in its place."""
        return self._standing(home.area, home.name) is not None

    def home(self, volume_id: str) -> Home:
        """The home of an id that `ids` gave; does not look."""
        return self._home(VOLUMES, volume_id)

    def snapshots(self) -> list[Home]:
        """The homes of all snapshots, in the order of their ids."""
        return [self._home(SNAPSHOTS, name) for name in self._names(SNAPSHOTS) if self._is_ours(name)]

    def read(self, home: Home) -> Record:
        """The volume's record.

        Raises:
            NotFound: the volume went away meanwhile.
            ConfigurationError: written by a newer version.
            Error: it is damaged.
        """
        return _decode(_raw(home, RECORD_FILE), home, Record)

    def read_snapshot(self, home: Home) -> SnapshotRecord:
        """The snapshot's record; raises as `read` does."""
        return _decode(_raw(home, SNAPSHOT_FILE), home, SnapshotRecord)

    def read_group(self, home: Home) -> GroupRecord:
        """The group's record; raises as `read` does."""
        return _decode(_raw(home, GROUP_FILE), home, GroupRecord)

    def shares(self, home: Home) -> dict[str, int]:
        """What the home of either kind, also in the trash, shares with volumes; nothing if it has no record."""
        for file in (RECORD_FILE, SNAPSHOT_FILE):
            try:
                raw = _raw(home, file)
            except NotFound:
                continue
            return msgspec.convert(raw.get("shares", {}), dict[str, int])
        return {}

    def mutable(self, home: Home) -> dict[str, str]:
        """The mutable parameters of a volume, also in the trash; nothing if the home is no volume's."""
        try:
            raw = _raw(home, RECORD_FILE)
        except NotFound:
            return {}
        return msgspec.convert(raw.get("mutable", {}), dict[str, str])

    def has_committed(self, record: Record | SnapshotRecord | GroupRecord) -> bool:
        """Whether what this record makes stands in its place."""
        return self._standing(_PLACES[type(record)][0], record.id) is not None

    # Handing over: see `handover`

    def holder(self, home: Home) -> handover.Holder | None:
        """Who the volume was handed to last."""
        return handover.holder(home.area_fd, home.name)

    def hand_out(self, home: Home, node: str) -> handover.Holder:
        """Hand the volume to the node, if no other one has it."""
        return handover.hand_out(home.area_fd, home.name, home.id, node)

    def take_back(self, home: Home, payload: str, node: str) -> None:
        """Take it back from the node, which must not use the payload any more."""
        handover.take_back(home.area_fd, home.name, home.id, payload, node)

    # Making and removing

    def begin(self, volume_id: str) -> Home:
        """A new, empty home in staging. What an earlier try left must have been discarded.

        Raises:
            Aborted: another driver that has the pool is making one.
        """
        self.claim(volume_id)
        home = self._home(STAGING, volume_id)
        try:
            os.mkdir(home.name, 0o700, dir_fd=home.area_fd)
        except OSError:
            self.abandon(volume_id)
            raise
        return home

    def commit(self, home: Home, record: Record | SnapshotRecord | GroupRecord) -> Home:
        """Make a filled staging home a volume, a snapshot or a group: record written, all synced, one rename.

        The backend has synced the payload. After a crash the home is either in staging or whole in its place.
        """
        self.claim(home.id)
        area, file = _PLACES[type(record)]
        home_fd = home.open_directory()
        try:
            # Not by a rename of its own: the home's is the one that counts, and each of them costs a commit on the disk.
            files.write_new(home_fd, file, _encode(record))
            files.sync(home_fd)
        finally:
            os.close(home_fd)
        made = self._home(area, home.id)
        files.rename(home.area_fd, home.name, made.area_fd, made.name)
        files.sync(made.area_fd)
        self.abandon(home.id)
        return made

    def update(self, home: Home, **changes: Any) -> None:
        """Change fields of a record on disk; fields this version does not know stay."""
        raw = _raw(home, RECORD_FILE) | changes
        home_fd = home.open_directory()
        try:
            files.write_atomic(home_fd, RECORD_FILE, _encode(raw))
            files.sync(home_fd)
        finally:
            os.close(home_fd)

    def trash(self, home: Home, *, keep: bool = True) -> Home:
        """Take a volume or snapshot out of existence by one rename; its files go later, by `remove`.

        Not to `keep` it means that no retention holds it back.
        """
        # The wall clock is in the name: it is the time that retention is counted from, after a reboot too.
        number = time.time_ns() if keep else time.monotonic_ns()
        trashed = Home(home.id, f"{home.id}.{number}", TRASH, self._areas[TRASH], self.root / TRASH)
        files.rename(home.area_fd, home.name, trashed.area_fd, trashed.name)
        files.sync(trashed.area_fd)
        files.sync(home.area_fd)
        return trashed

    def keep(self, home: Home) -> Path:
        """Take a volume out of existence, and keep its home for ever; where it is now."""
        return self._move(home.area_fd, home, f"{KEPT}/{home.id}.{time.time_ns()}")

    def archive(self, home: Home, payload: str, name: str) -> Path | None:
        """Take the payload out of a volume's home, and keep it for ever by this name; None: it is not there any more."""
        with suppress(FileNotFoundError):
            return self._move(home.area_fd, home, f"{ARCHIVE}/{name}", payload)
        return None

    def _move(self, old_fd: int, home: Home, path: str, payload: str = "") -> Path:
        area, _, name = path.partition("/")
        fd = files.ensure_directory(self.root_fd, area, mode=0o700)
        try:
            files.rename(old_fd, f"{home.name}/{payload}".rstrip("/"), fd, name)
            files.sync(fd)
            files.sync(old_fd)
        finally:
            os.close(fd)
        return self.root / path

    def staged(self) -> Iterator[Home]:
        """What builds that died have left in staging."""
        for name in self._names(STAGING):
            yield self._home(STAGING, name)

    def find_staged(self, volume_id: str) -> Home | None:
        """The half-made home of this id, if a build has left one.

        Raises:
            Aborted: another driver is at it.
        """
        found = self._standing(STAGING, volume_id)
        if found is not None:
            self.claim(volume_id)
        return found

    def trashed(self) -> Iterator[tuple[Home, float]]:
        """The deleted homes and when each was deleted, in seconds since the epoch."""
        for name in self._names(TRASH):
            volume_id, _, number = name.rpartition(".")
            when = int(number) / 1e9 if number.isdecimal() else 0.0
            yield Home(volume_id, name, TRASH, self._areas[TRASH], self.root / TRASH), when

    def remove(self, home: Home, check: Callable[[], None] = lambda: None) -> None:
        """Remove a staging or trash home's files; refuses what exists, and anything with a mount in it.

        `check` is called now and then, and may raise: a repeat goes on from there.
        """
        if home.area not in (STAGING, TRASH):
            raise Error(f"{home.path}: only staging and trash are ever removed")
        if home.area == STAGING:
            self.claim(home.id)
        files.remove_tree(home.area_fd, home.name, check)
        if home.area == STAGING:
            self.abandon(home.id)

    def throw_staged(self, home: Home) -> bool:
        """Take a half-made home to the trash, unless somebody is at it, here or elsewhere; whether that was done.

        By one rename: whoever believes to be at it still, and is not (a claim ends with the process that has it, and with
        its server's patience), commits the whole home before that, or nothing.
        """
        if not self.take(home.id):
            return False
        try:
            self.trash(home, keep=False)
        except FileNotFoundError:
            return False  # committed or removed since it was listed
        finally:
            self.abandon(home.id)
        return True

    def claim(self, home_id: str) -> None:
        """Claim an id, if it is not ours already.

        Raises:
            Aborted: another driver that has the pool is working with it.
        """
        if self._claims is not None:
            self._claims.hold(home_id)

    def take(self, home_id: str) -> bool:
        """Claim an id that nobody is working with, here or elsewhere; False: somebody is. `abandon` gives back what was claimed."""
        return self._claims is None or self._claims.take(home_id)

    def abandon(self, home_id: str) -> None:
        """Leave what is in staging, or what was claimed, to whoever comes next, if several drivers have the pool."""
        if self._claims is not None:
            self._claims.give_back(home_id)

    def _names(self, area: str) -> list[str]:
        # Opened anew: a descriptor has one position that threads would share, and btrfs shows in an open directory
        # nothing that was made in it after the opening.
        fd = files.open_beneath(self._areas[area], ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def placed(self, home_id: str, name: str, area: str) -> Home:
        """The home of these words, as `Home` has them; does not look."""
        return Home(home_id, name, area, self._areas[area], self.root / area)

    def _home(self, area: str, volume_id: str) -> Home:
        return Home(volume_id, volume_id, area, self._areas[area], self.root / area)

    def _standing(self, area: str, volume_id: str) -> Home | None:
        home = self._home(area, volume_id)
        try:
            os.stat(home.name, dir_fd=home.area_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return home

    def _is_ours(self, volume_id: str) -> bool:
        parsed = VolumeId.find(volume_id)
        return parsed is not None and parsed.tag == self.tag


def _raw(home: Home, file: str) -> dict[str, Any]:
    try:
        content = files.read(home.area_fd, f"{home.name}/{file}")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFound(f"{_called(file)} {home.id!r}: has no record at {home.path / file}") from error
        raise
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Error(
            f"{_called(file)} {home.id!r}: its record {home.path / file} is damaged: {error}"
        ) from error


def _decode(raw: dict[str, Any], home: Home, kind: type[R]) -> R:
    file = _PLACES[kind][1]
    schema = raw.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ConfigurationError(
            f"{_called(file)} {home.id!r}: its record was written by a newer version of Orlop (schema {schema}, this "
            f"one knows {SCHEMA}): install that version again"
        )
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise Error(
            f"{_called(file)} {home.id!r}: its record {home.path / file} is damaged: {error}"
        ) from error


def _called(file: str) -> str:
    return file.removesuffix(".json")


def _encode(record: Record | SnapshotRecord | GroupRecord | dict[str, Any]) -> bytes:
    # A person may have to read it one day, without this program.
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
