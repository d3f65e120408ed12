# SPDX-License-Identifier: Apache-2.0
"""Directory trees for tests of copies: made at random, changed at random, and described in full."""

import os
import random
import stat
from collections.abc import Sequence
from pathlib import Path

ATTRIBUTES = ("user.note", "trusted.mark")
MOST_BYTES = 200_000


def describe(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that can be known of a tree, by the paths in it."""
    found: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, bytes] = {}
    top = os.fsencode(root)
    for folder, folders, names in os.walk(top):
        folders.sort()
        for name in (b".", *sorted(folders + names)):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            place = os.path.relpath(path, top)
            first = inodes.setdefault(status.st_ino, place) if not stat.S_ISDIR(status.st_mode) else place
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            content: object = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            links = status.st_nlink if not stat.S_ISDIR(status.st_mode) else 0
            found[place] = (
                status.st_mode, status.st_uid, status.st_gid, status.st_rdev, links, first,
                status.st_mtime_ns, tuple(sorted(attributes.items())), content,
            )  # fmt: skip
    return found


def differences(before: dict[bytes, tuple[object, ...]], after: dict[bytes, tuple[object, ...]]) -> list[str]:
    """What is not the same, short enough to be read."""
    return [
        f"{place!r}: {str(before.get(place))[:300]} != {str(after.get(place))[:300]}"
        for place in sorted(before.keys() | after.keys())
        if before.get(place) != after.get(place)
    ]


class Tree:
    """A tree that random things are done to."""

    def __init__(self, root: Path, seed: random.Random, attributes: Sequence[str] = ATTRIBUTES) -> None:
        self._root = os.fsencode(root)
        self._seed = seed
        self._attributes = attributes

    def disturb(self, steps: int) -> None:
        """So many things: make, write, cut, link, rename, remove, change."""
        actions = (
            *(self._make_file,) * 4, *(self._write,) * 4, self._make_directory, self._make_special, self._link,
            self._cut, self._rename, self._remove, self._describe_otherwise, self._mark,
        )  # fmt: skip
        for _ in range(steps):
            self._seed.choice(actions)()

    def _all(self) -> list[bytes]:
        return [
            os.path.join(folder, name)
            for folder, folders, names in os.walk(self._root)
            for name in sorted(folders + names)
            if name != b"lost+found"
        ]

    def _some(self, wanted: int) -> bytes | None:
        found = [path for path in self._all() if stat.S_IFMT(os.lstat(path).st_mode) == wanted]
        return self._seed.choice(found) if found else None

    def _new(self) -> bytes:
        folder = self._some(stat.S_IFDIR) if self._seed.random() < 0.7 else None
        length = self._seed.choice((1, 8, 8, 8, 255))
        forbidden = (0, ord("/"))
        name = bytes(self._seed.choice([n for n in range(256) if n not in forbidden]) for _ in range(length))
        path = os.path.join(folder or self._root, name)
        return self._new() if name in (b".", b"..") or os.path.lexists(path) else path

    def _make_file(self) -> None:
        with open(self._new(), "wb") as file:
            file.write(self._seed.randbytes(self._seed.choice((0, 1, 1000, 5000, 60_000, 100_000))))

    def _make_directory(self) -> None:
        os.mkdir(self._new())

    def _make_special(self) -> None:
        match self._seed.randrange(4):
            case 0:
                os.mkfifo(self._new())
            case 1:
                os.mknod(self._new(), stat.S_IFSOCK | 0o700)
            case 2:
                os.mknod(self._new(), stat.S_IFCHR | 0o600, os.makedev(1, 3))
            case 3:
                os.symlink(self._seed.randbytes(20).hex() * self._seed.choice((1, 24)), self._new())

    def _link(self) -> None:
        path = self._some(stat.S_IFREG)
        if path is not None:
            os.link(path, self._new())

    def _write(self) -> None:
        path = self._some(stat.S_IFREG)
        if path is not None:
            with open(path, "r+b") as file:
                # Beyond the end as well: that leaves a hole.
                file.seek(self._seed.randrange(MOST_BYTES))
                file.write(self._seed.randbytes(self._seed.randrange(1, 20_000)))

    def _cut(self) -> None:
        path = self._some(stat.S_IFREG)
        if path is not None:
            os.truncate(path, self._seed.randrange(MOST_BYTES))

    def _rename(self) -> None:
        path = self._some(stat.S_IFREG)
        if path is not None:
            os.rename(path, self._new())

    def _remove(self) -> None:
        path = self._some(stat.S_IFREG)
        if path is not None:
            os.unlink(path)

    def _describe_otherwise(self) -> None:
        path = self._some(self._seed.choice((stat.S_IFREG, stat.S_IFDIR)))
        if path is not None:
            os.chown(path, self._seed.randrange(70_000), self._seed.randrange(70_000))
            os.chmod(path, self._seed.randrange(0o10000))
            os.utime(path, ns=(self._seed.randrange(2**60), self._seed.randrange(2**60)))

    def _mark(self) -> None:
        path = self._some(self._seed.choice((stat.S_IFREG, stat.S_IFDIR)))
        if path is not None:
            os.setxattr(
                path, self._seed.choice(self._attributes), self._seed.randbytes(self._seed.randrange(100))
            )
