# SPDX-License-Identifier: Apache-2.0
"""What a node's child does with an image on an export (see `fence`): have it, mount what is in it, grow it, let it go.

A program of its own beside `remote_worker`, whose operations it has too. Each may be killed at any point and repeated.
"""

import errno
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from csi_driver.linux import fence, files, filesystem, mount, privileges, remote_worker, unmounted
from csi_driver.linux.fence import Held
from csi_driver.linux.mountflags import Attributes

Found = tuple[dict[str, Any], int]
SECTOR_BYTES = 4096


def hold(request: dict[str, Any]) -> Found:
    """Lock an image and put it behind a device; a refusal is told as `refused`, who had it before as `before`."""
    standing = None
    if not request["readonly"]:
        devices = fence.find(request["volume_id"], request["node"])
        standing = next((one for one in devices if not one.readonly), None)
        if standing is not None and not fence.keep(standing):
            raise OSError(errno.EBUSY, "it is letting go of its image: repeat", os.fspath(standing.path))
    problem = fence.problem(Path(request["root"]))
    if problem:
        return {"refused": problem}, -1
    root_fd = os.open(request["root"], os.O_PATH | os.O_DIRECTORY)
    try:
        home_fd = files.open_beneath(root_fd, request["home"], os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(root_fd)
    try:
        return (_hold(home_fd, request) if standing is None else _held_yet(home_fd, request, standing)), -1
    finally:
        os.close(home_fd)


def _held_yet(home_fd: int, request: dict[str, Any], standing: Held) -> dict[str, Any]:
    """A device that stands, unless another node has taken over what is behind it: then it is good for nothing."""
    who = _read(home_fd, request["user_file"]).get("node", request["node"])
    if who != request["node"]:
        return {
            "refused": f"it was cut off from its server, and node {who!r} has taken the volume over: end the pods here"
        }
    return {"number": standing.number, "size_bytes": standing.size_bytes, "new": False}


def _hold(home_fd: int, request: dict[str, Any]) -> dict[str, Any]:
    readonly = request["readonly"]
    fd = files.open_beneath(home_fd, request["image"], os.O_RDONLY if readonly else os.O_RDWR)
    try:
        before = ""
        if not readonly:
            if not files.lock_whole(fd):
                who = _read(home_fd, request["user_file"]).get("node", "")
                return {
                    "refused": f"in use by node {who!r}" if who else "in use by another node, or being copied"
                }
            # Under the lock: whoever takes the volume back from a node makes sure first that nobody has it.
            refused = _stale(_read(home_fd, request["holder_file"]), request["handed"])
            if refused:
                return {"refused": refused}
            before = str(_read(home_fd, request["user_file"]).get("node", ""))
            told = {"node": request["node"], "since": time.time()}
            files.write_atomic(home_fd, request["user_file"], json.dumps(told).encode() + b"\n")
            files.sync(home_fd)
        found = os.fstat(fd)
        sector = SECTOR_BYTES if request["fs_type"] else max(512, files.direct_io_alignment(fd) or 512)
        # A discard would give away blocks that were reserved on the server when the volume was made.
        thin = found.st_blocks * 512 < found.st_size
        held = fence.hold(fd, request["node"], readonly=readonly, sector_size=sector, discard=thin)
    finally:
        os.close(fd)
    return {"number": held.number, "size_bytes": held.size_bytes, "before": before, "new": True}


def _stale(holder: dict[str, Any], handed: dict[str, Any]) -> str:
    """Why the node may not have what it was handed by ControllerPublishVolume, if that was asked at all; ""."""
    if not handed or (holder.get("node"), str(holder.get("generation"))) == (
        handed["node"],
        handed["generation"],
    ):
        return ""
    now = f"handed to node {holder['node']!r} now" if holder.get("node") else "taken back"
    return f"what handed it to node {handed['node']!r} is out of date: it was {now}"


def _read(home_fd: int, name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.read(home_fd, name))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def mount_held(request: dict[str, Any]) -> Found:
    """Mount the filesystem on a held device, as large as that, with the directory in it that pods see."""
    held, target = _held(request["volume_id"], request["node"]), Path(request["target"])
    fs_type, attributes = request["fs_type"], Attributes(**request["attributes"])
    mounted = mount.find_mounted(target)
    if mounted is not None and mounted.device != held.device:
        return {"refused": f"something else is mounted at {target}"}, -1
    if mounted is None:
        if not privileges.can_grow_mounted(fs_type):
            unmounted.grow_ext4(held.path, held.size_bytes)
        mount.mount_device(held.path, target, fs_type, request["options"], attributes)
    root_fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.close(files.ensure_directory(root_fd, request["directory"], durable=False, **request["owner"]))
        if privileges.can_grow_mounted(fs_type):
            filesystem.grow(fs_type, root_fd, held.size_bytes)
    finally:
        os.close(root_fd)
    return {}, -1


def grow_held(request: dict[str, Any]) -> Found:
    """Let devices, and the filesystem that is mounted at a path, be as large as the image is now."""
    size_bytes = max(
        fence.refresh(held, fence.seen(held, Path(request["exports"]))).size_bytes
        for held in fence.find(request["volume_id"], request["node"])
    )
    later = False
    if request["path"]:
        fd = os.open(request["path"], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = next(one for one in mount.mounts() if one.mount_id == mount.mount_id_of(fd))
            if privileges.can_grow_mounted(found.fs_type):
                filesystem.grow(found.fs_type, fd, size_bytes)
            else:
                later = unmounted.has_room(_held(request["volume_id"], request["node"]).path, size_bytes)
        finally:
            os.close(fd)
    return {"size_bytes": size_bytes, "later": later}, -1


def let_go(request: dict[str, Any]) -> Found:
    """Unmount it and take its devices away; `gone` tells whether that is so already."""
    devices = fence.find(request["volume_id"], request["node"])
    if not fence.let_go(
        request["volume_id"], request["node"], Path(request["target"]), request["patience_s"]
    ):
        return {"gone": False}, -1
    for held in devices:
        if held.readonly:
            continue
        # Deleted, or its export is gone: there is nothing to sign.
        with suppress(FileNotFoundError):
            _sign_off(fence.seen(held, Path(request["exports"])), request["user_file"], request["node"])
    return {"gone": True}, -1


def _sign_off(image: Path, user_file: str, node: str) -> None:
    """Say on the export that this node has let go of it in order."""
    home_fd = files.open_directory(image.parent)
    try:
        fd = files.open_beneath(home_fd, image.name, os.O_RDWR)
        try:
            # Alone, or another node may have signed meanwhile.
            if files.lock_whole(fd) and _read(home_fd, user_file).get("node") == node:
                os.unlink(user_file, dir_fd=home_fd)
        finally:
            os.close(fd)
    finally:
        os.close(home_fd)


def _held(volume_id: str, node: str) -> Held:
    held = next((one for one in fence.find(volume_id, node) if not one.readonly), None)
    if held is None:
        raise OSError(errno.ENXIO, "no device has its image", volume_id)
    return held


OPERATIONS: remote_worker.Operations = {
    **remote_worker.OPERATIONS,
    "hold": hold,
    "mount_held": mount_held,
    "grow_held": grow_held,
    "let_go": let_go,
}

if __name__ == "__main__":
    remote_worker.serve(OPERATIONS)
