# SPDX-License-Identifier: Apache-2.0
"""Exports of file servers on this node: each is mounted once, and everything that is published from it is bound from there.

Whatever may ask the server is done by `remote`; whether an export is mounted is asked of the kernel, which does not.
Which exports may be used, and where they are shown, is the caller's business.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

from csi_driver.errors import InvalidArgument, Unavailable
from csi_driver.linux import fence, mount, mountinfo
from csi_driver.linux.export import GONE, NOT_REACHED, Source
from csi_driver.linux.remote import Server, Servers

T = TypeVar("T")

log = logging.getLogger(__name__)

_UNMOUNT_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A directory that must be there, and one beneath it, which is made if it is missing and an `owner` given: mode, uid, gid."""

    directory: str = ""
    sub_path: str = ""
    owner: dict[str, int] | None = None

    @property
    def path(self) -> str:
        """Both."""
        return "/".join(part for part in (self.directory, self.sub_path) if part)

    def open(self, server: Server, root: Path, timeout_s: float) -> int:
        """A descriptor of it beneath `root`, by a child of the server's. Raises as `Server.call`."""
        where = os.fspath(root)
        if self.owner is None:
            return server.call("open", timeout_s, root=where, path=self.path)[1]
        return server.call(
            "ensure", timeout_s, root=where, directory=self.directory, path=self.sub_path, owner=self.owner
        )[1]


class Exports:
    """The exports mounted beneath `directory`, each in one of its own; and `roots`, which others mount on every node."""

    def __init__(
        self,
        directory: Path,
        servers: Servers,
        timeout_s: float = 20.0,
        roots: Mapping[str, Path] = MappingProxyType({}),
        node: str = "",
    ) -> None:
        self.directory = directory
        self._node = node
        self.roots = roots
        self._servers = servers
        self._timeout_s = timeout_s
        # One mounts, the others wait: two mounts on one directory would hide one another.
        self._guards: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._users: dict[str, int] = {}

    @contextmanager
    def opened(self, source: Source, wanted: Wanted) -> Iterator[int]:
        """A descriptor of the directory on the export.

        A mount that has gone stale is replaced by a new one.

        Raises:
            Unavailable: the server does not answer.
            InvalidArgument: it cannot be mounted with these options.
            OSError: ENOENT no such directory, ELOOP or EXDEV a way out of the export, what mounting says.
        """
        with self._in_use(source):
            fd = self._open(source, wanted)
            try:
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def opened_in(self, root: Path, wanted: Wanted) -> Iterator[int]:
        """The same for a directory beneath one of the roots, which is mounted anew by others only."""
        try:
            fd = wanted.open(self._servers.named(os.fspath(root)), root, self._timeout_s)
        except OSError as error:
            if error.errno not in GONE:
                raise
            raise Unavailable(
                f"{root}: what is mounted there is of no use any more ({error.strerror}): mount it anew"
            ) from error
        try:
            yield fd
        finally:
            os.close(fd)

    def at_root(self, source: Source, ask: Callable[[Path], T]) -> T:
        """What `ask` answers of the directory that the export is mounted at; asked again if that had gone stale.

        Raises: as `opened`.
        """
        with self._in_use(source):
            server = self._servers.named(source.server)
            try:
                return ask(self._ensure_mounted(server, source))
            except OSError as error:
                if error.errno not in GONE:
                    raise
            with self._lock(source.key):
                self.unmount(self.directory / source.key, lazy=True)
            return ask(self._ensure_mounted(server, source))

    def keeper(self, source: str) -> Server:
        """Whom to ask about images on this export, which take longer than all else, and keep none of it waiting."""
        return self._servers.keeper(Source(source).server)

    def keeper_of(self, held: fence.Held) -> Server:
        """The same for an image that is held here already."""
        return self._servers.keeper(self._server_of(held))

    def shown_at(self, fd: int) -> list[mount.Mount]:
        """Where the directory that `opened` gave, or something below it, is published."""
        known = mount.mounts()
        mount_id = mount.mount_id_of(fd)
        base = next((entry for entry in known if entry.mount_id == mount_id), None)
        if base is None:
            return []
        below = Path(os.readlink(f"/proc/self/fd/{fd}")).relative_to(base.target)
        shown = os.path.normpath(os.path.join(_place(base), below))
        return [
            entry
            for entry in known
            if entry.device == base.device
            and os.path.join(_place(entry), "").startswith(os.path.join(shown, ""))
            and Path(entry.target).parent != self.directory
        ]

    def find_shown(self, part: str) -> Path | None:
        """A place where something is published that has `part` in its path on the server."""
        known = mountinfo.mounts()
        found = (one for one in known if part in os.path.join(_place(one), ""))
        return next((Path(one.target) for one in found if Path(one.target).parent != self.directory), None)

    def is_shown(self, path: Path) -> bool:
        """Whether something of a server is published at the path. Asks nobody."""
        return self._find_server(path) is not None

    def usage(self, path: Path) -> dict[str, int] | None:
        """How full the filesystem is that is published at `path`; None: no server's is.

        Raises:
            Unavailable: the server does not answer.
        """
        server = self._find_server(path)
        return server.call("usage", self._timeout_s, path=os.fspath(path))[0] if server else None

    def unmount(self, target: Path, *, lazy: bool = False) -> None:
        """Unmount what is at `target`, whether its server answers or not. Not an export, or nothing, is fine.

        Raises:
            OSError: EBUSY something uses it.
            Unavailable: it is still mounted (calls that hang were in the way).
        """
        server = self._find_server(target)
        if server is None:
            mount.unmount(target, lazy=lazy)
            return
        try:
            server.call("unmount", _UNMOUNT_S, always=True, target=os.fspath(target), lazy=lazy)
        except OSError as error:
            if error.errno != errno.EBUSY or lazy or self._answers(server, target):
                raise
            # A process that waits for a dead server cannot end, and so holds the mount. What it has not written yet is
            # written when the server is back, also from a mount that nobody sees any more.
            self.unmount(target, lazy=True)
        except Unavailable:
            # Whoever takes away a filesystem's last mount waits for its server, but the mount is gone before that.
            if self._find_server(target) is not None:
                raise

    def clear_stale(self, target: Path) -> None:
        """Unmount the export that is at `target` if its server knows it no more. Nothing there is fine.

        Raises:
            Unavailable: the server does not answer.
        """
        server = self._find_server(target)
        if server is None:
            return
        try:
            # Only the server can tell: what is cached here looks as it always did.
            os.close(server.call("open", self._timeout_s, root=os.fspath(target), path="")[1])
        except OSError as error:
            if error.errno not in GONE:
                raise
            self.unmount(target, lazy=True)

    def release_unused(self) -> None:
        """Unmount every export that nothing is published from any more. One that cannot be is left to the next call."""
        for target in {Path(entry.target) for entry in self._bases()}:
            with self._lock(target.name):
                try:
                    self._release(target)
                except (OSError, Unavailable) as error:
                    # Whose volume is unpublished now may be another server's.
                    log.warning("%s: not released: %s", target, error)

    def _release(self, target: Path) -> None:
        # Asked under its lock: another call may have released it meanwhile, or come to use it.
        known = mount.mounts()
        devices = {entry.device for entry in known if Path(entry.target) == target}
        shown = any(one.device in devices and Path(one.target) != target for one in known)
        shown = shown or any(held.export in devices for held in fence.all(self._node))
        if not devices or shown or self._users.get(target.name):
            return
        self.unmount(target, lazy=True)
        with suppress(FileNotFoundError):
            target.rmdir()

    def _find_server(self, target: Path) -> Server | None:
        """Whom to ask about what is mounted there; None: nothing is, or it is of this machine. Asks nobody itself."""
        known = mountinfo.mounts()
        entry = next((one for one in reversed(known) if one.target == os.fspath(target)), None)
        if entry is None:
            return None
        held = _held_at(entry)
        if held is not None:
            return self._servers.named(self._server_of(held))
        for root in self.roots.values():
            above = [one for one in known if root.is_relative_to(one.target)]
            if above and max(above, key=lambda one: len(one.target)).device == entry.device:
                return self._servers.named(os.fspath(root))
        # What a program serves (FUSE) waits for that, also where it is none of ours.
        served = ":/" in entry.source or entry.fs_type.startswith("fuse")
        return self._servers.named(Source(entry.source).server) if served else None

    def _server_of(self, held: fence.Held) -> str:
        """The server that has its image. Asks nobody."""
        base = self.base_of(held)
        # Without one its name is not known; still all images of one export go by one.
        return Source(base.source).server if base is not None else f"export {os.minor(held.export)}"

    def base_of(self, held: fence.Held) -> mount.Mount | None:
        """Where the export with its image is mounted. Not by the image's path, which is the mount's of who attached it."""
        return next(iter(fence.bases(held, self.directory)), None)

    def _bases(self) -> list[mount.Mount]:
        return [one for one in mountinfo.mounts() if Path(one.target).parent == self.directory]

    def _answers(self, server: Server, target: Path) -> bool:
        entry = next((one for one in reversed(mountinfo.mounts()) if one.target == os.fspath(target)), None)
        held = _held_at(entry) if entry is not None else None
        base = self.base_of(held) if held is not None else None
        # How full a filesystem on a device is, the kernel knows by itself.
        asked = Path(base.target) if base is not None else target
        try:
            server.call("usage", _UNMOUNT_S, path=os.fspath(asked))
        except (Unavailable, OSError):
            return False
        return True

    def _open(self, source: Source, wanted: Wanted) -> int:
        server = self._servers.named(source.server)
        root = self._ensure_mounted(server, source)
        try:
            return wanted.open(server, root, self._timeout_s)
        except OSError as error:
            if error.errno not in GONE:
                raise
        with self._lock(source.key):
            self.unmount(root, lazy=True)
        root = self._ensure_mounted(server, source)
        return wanted.open(server, root, self._timeout_s)

    def _ensure_mounted(self, server: Server, source: Source) -> Path:
        target = self.directory / source.key
        with self._lock(source.key):
            if not _is_mounted(target):
                self._mount(server, source, target)
        return target

    def _mount(self, server: Server, source: Source, target: Path) -> None:
        try:
            server.call(
                "mount",
                self._timeout_s,
                source=source.source,
                fs_type=source.fs_type,
                target=os.fspath(target),
                options=source.options,
            )
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise InvalidArgument(
                    f"{source.source}: cannot be mounted with the options {','.join(source.options) or 'given'!r}: "
                    f"{error.strerror}"
                ) from error
            if error.errno not in NOT_REACHED:
                raise
            raise Unavailable(
                f"server {source.server!r}: {source.source} cannot be mounted now: {error.strerror}: repeat"
            ) from error

    @contextmanager
    def _in_use(self, source: Source) -> Iterator[None]:
        with self._guard:
            self._users[source.key] = self._users.get(source.key, 0) + 1
        try:
            yield
        finally:
            with self._guard:
                self._users[source.key] -= 1

    def _lock(self, key: str) -> threading.Lock:
        with self._guard:
            return self._guards.setdefault(key, threading.Lock())


def _held_at(entry: mount.Mount) -> fence.Held | None:
    """The image that this is a mount of, if it is one."""
    return fence.of_device(entry.device) if entry.source.startswith("/dev/loop") else None


def _is_mounted(target: Path) -> bool:
    try:
        return mount.find_mounted(target) is not None
    except OSError as error:
        if error.errno not in GONE:
            raise
        return True


def _place(entry: mount.Mount) -> str:
    # NFS tells what a mount shows by its source; its root is always "/".
    return entry.source if entry.fs_type.startswith("nfs") else entry.root
