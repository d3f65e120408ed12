# SPDX-License-Identifier: Apache-2.0
"""What mount.nfs says, as the number that tells what to do about it. A program that only says so stands in for it."""

import errno
import os
from pathlib import Path

import pytest

from csi_driver.linux import export

SOURCE = export.Source("files.example.org:/share")


def stand_in(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "mount.nfs").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "mount.nfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ((), "vers=4"),
        (("hard", "nconnect=2"), "vers=4,hard,nconnect=2"),
        (("hard", "nfsvers=4.1"), "hard,nfsvers=4.1"),
        (("vers=3", "nolock"), "vers=3,nolock"),
    ],
)
def test_nfsv4_is_meant_where_nothing_is_said(
    options: tuple[str, ...], given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(f"echo $* >{tmp_path}/said", tmp_path / "bin", monkeypatch)

    export.mount(export.Source("files:/share", options=options), tmp_path / "target")

    assert (tmp_path / "said").read_text().split() == ["files:/share", f"{tmp_path}/target", "-o", given]


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("mount.nfs: access denied by server while mounting files:/share", errno.EACCES),
        ("mount.nfs: mounting files:/share failed, reason given by server: No such file or directory", errno.ENOENT),
        ("mount.nfs: an incorrect mount option was specified for /m", errno.EINVAL),
        ("mount.nfs: Connection refused for files:/share on /m", errno.ECONNREFUSED),
        ("mount.nfs: Connection timed out for files:/share on /m", errno.ETIMEDOUT),
        ("mount.nfs: No route to host for files:/share on /m", errno.EHOSTUNREACH),
        ("mount.nfs: Failed to resolve server files: Name or service not known", errno.EHOSTUNREACH),
        ("mount.nfs: mount system call failed for /m", errno.EIO),
        ("", errno.EIO),
    ],
)  # fmt: skip
def test_what_mounting_fails_with(
    said: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(f"echo '{said}' >&2; exit 32", tmp_path / "bin", monkeypatch)

    with pytest.raises(OSError) as failed:
        export.mount(SOURCE, tmp_path / "target")

    assert failed.value.errno == number
    assert failed.value.strerror == (said or "exit code 32")
    assert number in (*export.NOT_REACHED, errno.EACCES, errno.ENOENT, errno.EINVAL)
