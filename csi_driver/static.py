# SPDX-License-Identifier: Apache-2.0
"""Static volumes: directories that an administrator made and wrote a PersistentVolume for.

Their `volumeHandle` is free; `volumeAttributes` name a pool and a path beneath one of the roots that the pool's
configuration allows (`static_roots`), or a server and a path that it exports. The driver only binds them: it never makes,
formats or deletes one.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from csi_driver.backends.base import PAYLOAD_IMAGE
from csi_driver.backends.parameters import FS_TYPE
from csi_driver.catalog import VOLUMES
from csi_driver.errors import InvalidArgument, NotFound, Unavailable, invalid, unknown_keys
from csi_driver.linux import files, mount
from csi_driver.linux.export import Source, address
from csi_driver.linux.exports import Exports, Wanted
from csi_driver.model import HealthEntry, HealthStatus, PublishRequest, Record, Stats
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.subpath import PARAMETER, expand_sub_path, in_the_way

POOL, PATH = "pool", "path"
SERVER, SHARE, DIRECTORY, MOUNT_OPTIONS = "server", "share", "directory", "mountOptions"
"""A server's export, by PATH or SHARE; DIRECTORY is one beneath it."""
IMAGE = "image"
"""Instead of a directory: an image, which one node at a time has. See `images`."""
_EXPORT_KEYS = (SERVER, PATH, SHARE, DIRECTORY, MOUNT_OPTIONS, PARAMETER, "mode", "uid", "gid")
_ROOT_KEYS = (POOL, DIRECTORY, PARAMETER, "mode", "uid", "gid")
"""A directory of a pool that every node has mounted."""
_SERVER = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\]|[0-9a-fA-F:]+")
METADATA_PREFIXES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")


def is_static(context: Mapping[str, str]) -> bool:
    """Whether a volume_context describes a static volume."""
    return PATH in context or is_export(context)


def is_export(context: Mapping[str, str]) -> bool:
    """Whether it lies on a file server that the node is to mount."""
    return SERVER in context or (POOL in context and DIRECTORY in context)


@contextmanager
def export_opened(exports: Exports, request: PublishRequest, options: Sequence[str]) -> Iterator[int]:
    """An fd of the directory on a server that the request's attributes name; `options` are the filesystem's own.

    Raises:
        InvalidArgument: the attributes or options are wrong.
        NotFound: there is no such directory.
        Unavailable: the server does not answer.
    """
    context = {key: value for key, value in request.context.items() if not key.startswith(METADATA_PREFIXES)}
    known = _EXPORT_KEYS if SERVER in context else _ROOT_KEYS
    if context.keys() - set(known):
        raise InvalidArgument(unknown_keys("volume_context", context.keys() - set(known), known))
    directory = context.get(DIRECTORY, "")
    sub_path = expand_sub_path(context.get(PARAMETER, ""), None, request.context)
    # In what others made, a reader changes nothing.
    ours = f"/{VOLUMES}/{request.volume_id}/" in f"/{directory}/"
    makes = sub_path and (ours or not request.reads_only)
    wanted = Wanted(directory, sub_path, owner(context) if makes else None)
    if SERVER in context:
        source = source_of(context, options)
        opened, place = exports.opened(source, wanted), source.source
    else:
        root = _root(exports, context, options)
        opened, place = exports.opened_in(root, wanted), os.fspath(root)
    try:
        with opened as fd:
            yield fd
    except FileNotFoundError as error:
        raise NotFound(
            f"volume_context: no directory {wanted.path or '.'!r} at {place!r} (is its filesystem mounted?): {error}"
        ) from error


def context_of(pool: Pool, payload: str, record: Record) -> dict[str, str]:
    """The volume_context by which every node finds what is in a pool on a server; empty for other pools."""
    if not pool.is_apart:
        return {}
    parameters, export = pool.parameters(record), pool.backend.features.export
    context = {POOL: pool.name}
    if export is not None:
        server, _, path = export.source.partition(":/")
        context = {SERVER: server, PATH: f"/{path}", MOUNT_OPTIONS: ",".join(export.options)}
    is_image = pool.backend.features.payload == PAYLOAD_IMAGE
    context |= {IMAGE: payload, FS_TYPE: record.fs_type} if is_image else {DIRECTORY: payload}
    context[PARAMETER] = expand_sub_path(parameters.sub_path, record, None)
    if context[PARAMETER] or is_image:
        mode = "" if parameters.mode is None else f"{parameters.mode:o}"
        owner = {"uid": parameters.uid, "gid": parameters.gid}
        context |= {"mode": mode, **{key: str(value) for key, value in owner.items() if value is not None}}
    return {key: value for key, value in context.items() if value}


def source_of(context: Mapping[str, str], options: Sequence[str] = ()) -> Source:
    """The export that the attributes name.

    Raises:
        InvalidArgument: they are wrong.
    """
    source = address(_server(context[SERVER]), _exported(context))
    return Source(source, options=(*_options(context), *options))


def owner(context: Mapping[str, str]) -> dict[str, int]:
    """Whose a new directory is to be: mode, uid and gid.

    Raises:
        InvalidArgument: one of them is no number.
    """
    try:
        mode, uid, gid = (
            int(context.get("mode", "755"), 8),
            *(int(context.get(key, "0")) for key in ("uid", "gid")),
        )
    except ValueError as error:
        raise InvalidArgument(f"volume_context: mode, uid or gid: {error}") from error
    return {"mode": mode, "uid": uid, "gid": gid}


def _root(exports: Exports, context: Mapping[str, str], options: Sequence[str]) -> Path:
    root = exports.roots.get(context[POOL])
    if root is None:
        known = ", ".join(sorted(exports.roots)) or "none"
        raise invalid(
            f"volume_context.{POOL}",
            context[POOL],
            f"this node's configuration has no such pool of directories; it has: {known}",
        )
    if options:
        raise invalid(
            "volume_capability.mount_flags",
            ",".join(options),
            "its filesystem is mounted by others: leave them out",
        )
    return root


def _options(context: Mapping[str, str]) -> list[str]:
    return [option for option in context.get(MOUNT_OPTIONS, "").split(",") if option]


def _server(name: str) -> str:
    if not _SERVER.fullmatch(name):
        raise invalid(f"volume_context.{SERVER}", name, "give a server's name or address")
    return name


def _exported(context: Mapping[str, str]) -> str:
    path = context.get(PATH) or context.get(SHARE, "")
    if context.get(PATH, path) != context.get(SHARE, path):
        raise InvalidArgument(f"volume_context: {PATH} and {SHARE} are the same thing: give one of them")
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise invalid(f"volume_context.{PATH}", path, "give the absolute path of an export, without '..'")
    return path


@contextmanager
def opened(pools: Pools, request: PublishRequest) -> Iterator[int]:
    """An fd of the directory that the request's attributes name.

    Raises:
        InvalidArgument: the attributes are wrong, or the path is not beneath an allowed root.
        NotFound: there is no such directory.
        FailedPrecondition: no directory, but something else is where `subPath` should be.
    """
    context = {key: value for key, value in request.context.items() if not key.startswith(METADATA_PREFIXES)}
    unknown = context.keys() - {POOL, PATH, PARAMETER}
    if unknown:
        raise InvalidArgument(unknown_keys("volume_context", unknown, (POOL, PATH, PARAMETER)))
    sub_path = expand_sub_path(context.get(PARAMETER, ""), None, request.context)
    with _opened_whole(pools, context.get(POOL, ""), context[PATH]) as directory_fd:
        if not sub_path:
            yield directory_fd
            return
        with in_the_way(sub_path):
            fd = files.ensure_directory(directory_fd, sub_path)
        try:
            yield fd
        finally:
            os.close(fd)


def shown_at(pools: Pools, request: PublishRequest) -> list[mount.Mount]:
    """All mounts that show the volume or a part of it, but for those that its own path leads through.

    Raises: as `opened`.
    """
    path = request.context[PATH]
    own = Path(os.path.realpath(path))
    with _opened_whole(pools, request.context.get(POOL, ""), path) as directory_fd:
        return [one for one in mount.mounts_of(directory_fd) if not own.is_relative_to(one.target)]


def export_stats(exports: Exports, path: Path) -> Stats | None:
    """Usage of the export that is published at `path`: that of the server's filesystem. None: none is.

    Raises:
        Unavailable: the server does not answer.
    """
    found = exports.usage(path)
    return None if found is None else Stats(**found)


def stats(pools: Pools, volume_id: str, path: Path) -> Stats:
    """Usage of a published static volume: that of the filesystem it lies on.

    NodeGetVolumeStats brings no attributes, so what is mounted at the path has to tell.

    Raises:
        NotFound: no static volume is published there.
    """
    _shown_at(pools, volume_id, path)
    usage = files.usage(path)
    return Stats(
        total_bytes=usage.total_bytes,
        used_bytes=usage.used_bytes,
        available_bytes=usage.free_bytes,
        total_inodes=usage.total_inodes,
        used_inodes=usage.used_inodes,
        available_inodes=usage.free_inodes,
    )


def export_health(exports: Exports, volume_id: str, volume_path: str) -> list[HealthEntry] | None:
    """What is wrong with the export that is published at the path, or anywhere for this volume. None: none is."""
    path = Path(volume_path) if volume_path else exports.find_shown(f"/{VOLUMES}/{volume_id}/")
    if path is None:
        return None
    try:
        found = export_stats(exports, path)
    except (Unavailable, OSError) as error:
        return [HealthEntry(HealthStatus.INACCESSIBLE, "ServerUnreachable", f"{path}: {error}")]
    return None if found is None else []


def health(pools: Pools, volume_id: str, path: Path) -> list[HealthEntry]:
    """What is wrong with a published static volume, as far as its filesystem shows.

    Raises:
        NotFound: no static volume is published there.
    """
    entry = _shown_at(pools, volume_id, path)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError as error:
        message = f"volume {volume_id!r}: its directory cannot be looked at: {error}"
        return [HealthEntry(HealthStatus.INACCESSIBLE, "Unreadable", message)]
    if "ro" in entry.super_options:
        message = f"volume {volume_id!r}: the filesystem that it lies on is read-only: see the kernel's log"
        return [HealthEntry(HealthStatus.DEGRADED, "FilesystemReadOnly", message)]
    return []


def _shown_at(pools: Pools, volume_id: str, path: Path) -> mount.Mount:
    """The mount of a static volume; its attributes are not told again, so what is mounted has to tell."""
    mounted = mount.find_mounted(path)
    entry = next((entry for entry in mount.mounts() if mounted and entry.mount_id == mounted.mount_id), None)
    if entry is None or not any(_lies_in(entry, root) for pool in pools for root in pool.config.static_roots):
        raise NotFound(f"volume {volume_id!r}: does not exist on this node, or is not at {os.fspath(path)!r}")
    return entry


@contextmanager
def _opened_whole(pools: Pools, pool_name: str, path: str) -> Iterator[int]:
    root, below = _allowed(pools, pool_name, path)
    try:
        root_fd = files.open_directory(root)
    except OSError as error:
        raise NotFound(
            f"volume_context.path {path!r}: its static root {os.fspath(root)!r} cannot be opened: {error.strerror}"
        ) from error
    try:
        directory_fd = _open(root_fd, below, path)
    finally:
        os.close(root_fd)
    try:
        yield directory_fd
    finally:
        os.close(directory_fd)


def _allowed(pools: Pools, pool_name: str, path: str) -> tuple[Path, str]:
    """The allowed root that `path` lies beneath, and the rest of the path."""
    pool = pools.named(pool_name, "volume_context.pool")
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise invalid("volume_context.path", path, "give an absolute path without '..'")
    inside = next((one for one in pools if _holds_homes(one, Path(path))), None)
    if inside is not None:
        raise invalid(
            "volume_context.path", path, f"lies in pool {inside.name!r}, or that in it: choose another"
        )
    for root in pool.config.static_roots:
        if Path(path).is_relative_to(root):
            return root, os.fspath(Path(path).relative_to(root))
    roots = ", ".join(map(str, pool.config.static_roots)) or "none"
    raise invalid(
        "volume_context.path", path, f"not beneath a static root of pool {pool_name!r}; its roots: {roots}"
    )


def _holds_homes(pool: Pool, path: Path) -> bool:
    """Whether a pod that is given `path` would have the pool's volumes with it."""
    return pool.config.root.is_relative_to(path) or any(path.is_relative_to(area) for area in pool.areas())


def _open(root_fd: int, below: str, path: str) -> int:
    try:
        return files.open_beneath(root_fd, below, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise NotFound(f"volume_context.path {path!r}: no such directory on this node") from error
    except OSError as error:
        raise invalid(
            "volume_context.path", path, f"cannot be opened: {error.strerror}; no symlinks"
        ) from error


def _lies_in(entry: mount.Mount, root: Path) -> bool:
    try:
        fd = files.open_directory(root)
    except OSError:
        return False
    try:
        device, beneath = mount.source_root(fd)
    finally:
        os.close(fd)
    inside = entry.root == beneath or entry.root.startswith(beneath.rstrip("/") + "/")
    return entry.device == device and inside
