# SPDX-License-Identifier: Apache-2.0
"""What mount.nfs says, as the number that tells what to do about it. A program that only says so stands in for it."""

import errno
import os
from pathlib import Path

import pytest

from csi_driver.linux import export

SOURCE = export.Source("files.example.org:/share", options=("nfsvers=4.2",))


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
    program = tmp_path / "bin/mount.nfs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 32\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    with pytest.raises(OSError) as failed:
        export.mount(SOURCE, tmp_path / "target")

    assert failed.value.errno == number
    assert failed.value.strerror == (said or "exit code 32")
    assert number in (*export.NOT_REACHED, errno.EACCES, errno.ENOENT, errno.EINVAL)
