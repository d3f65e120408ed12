# SPDX-License-Identifier: Apache-2.0
"""Where volumes are mounted, by what the kernel shows: mounts and loop devices are read once, for all of them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from csi_driver.backends.base import PAYLOAD_DIRECTORY
from csi_driver.cli.records import Home
from csi_driver.linux import files, loop, mount
from csi_driver.linux.mount import Mount


@dataclass(slots=True)
class Places:
    """Of one volume: where pods see it, where kubelet has staged it, and its loop devices."""

    published: list[str] = field(default_factory=list)
    staged: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)


def find(homes: Iterable[Home]) -> dict[str, Places]:
    """The places of every volume. Loop devices need root; without it those of images are not found."""
    known = mount.mounts()
    try:
        backing = {(one.backing_device, one.backing_inode): str(one.path) for one in loop.all()}
    except PermissionError:
        backing = {}
    return {home.id: _places(home, known, backing) for home in homes}


def _places(home: Home, known: list[Mount], backing: dict[tuple[int, int], str]) -> Places:
    places = Places()
    try:
        image = home.image.stat()
    except OSError:
        places.published = _binds(home, known)
        return places
    device = backing.get((image.st_dev, image.st_ino))
    if device is None:
        return places
    places.devices.append(device)
    for entry in known:
        if entry.source == device:
            # Pods see the directory in the filesystem; all of it is seen only where it is staged.
            inside = entry.root == f"/{PAYLOAD_DIRECTORY}" or entry.root.startswith(f"/{PAYLOAD_DIRECTORY}/")
            (places.published if inside else places.staged).append(entry.target)
        elif entry.fs_type == "devtmpfs" and entry.root == f"/{os.path.basename(device)}":
            places.published.append(entry.target)
    return places


def _binds(home: Home, known: list[Mount]) -> list[str]:
    """Where the home's directory is bound to, as (device, path in the filesystem) tells."""
    try:
        fd = files.open_directory(home.path.resolve())
    except OSError:
        return []
    try:
        device, root = mount.source_root(fd)
    finally:
        os.close(fd)
    return [one.target for one in known if one.device == device and one.root.startswith(f"{root}/")]
