# SPDX-License-Identifier: Apache-2.0
"""Static volumes: directories that an administrator made and wrote a PersistentVolume for.

Their `volumeHandle` is free; `volumeAttributes` name a pool and a path beneath one of the roots that the pool's
configuration allows (`static_roots`). The driver only binds them: it never makes, formats or deletes one.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from csi_driver.errors import InvalidArgument, NotFound, invalid, unknown_keys
from csi_driver.linux import files, mount
from csi_driver.model import PublishRequest, Stats
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from csi_driver.subpath import PARAMETER, expand_sub_path, in_the_way

POOL, PATH = "pool", "path"
_METADATA_PREFIXES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")


def is_static(context: Mapping[str, str]) -> bool:
    """Whether a volume_context describes a static volume."""
    return PATH in context


@contextmanager
def opened(pools: Pools, request: PublishRequest) -> Iterator[int]:
    """An fd of the directory that the request's attributes name.

    Raises:
        InvalidArgument: the attributes are wrong, or the path is not beneath an allowed root.
        NotFound: there is no such directory.
        FailedPrecondition: no directory, but something else is where `subPath` should be.
    """
    context = {key: value for key, value in request.context.items() if not key.startswith(_METADATA_PREFIXES)}
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


def stats(pools: Pools, volume_id: str, path: Path) -> Stats:
    """Usage of a published static volume: that of the filesystem it lies on.

    NodeGetVolumeStats brings no attributes, so what is mounted at the path has to tell.

    Raises:
        NotFound: no static volume is published there.
    """
    mounted = mount.find_mounted(path)
    entry = next((entry for entry in mount.mounts() if mounted and entry.mount_id == mounted.mount_id), None)
    if entry is None or not any(_lies_in(entry, root) for pool in pools for root in pool.config.static_roots):
        raise NotFound(f"volume {volume_id!r}: does not exist on this node, or is not at {os.fspath(path)!r}")
    usage = files.usage(path)
    return Stats(
        total_bytes=usage.total_bytes,
        used_bytes=usage.used_bytes,
        available_bytes=usage.free_bytes,
        total_inodes=usage.total_inodes,
        used_inodes=usage.used_inodes,
        available_inodes=usage.free_inodes,
    )


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
