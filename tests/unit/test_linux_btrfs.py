# SPDX-License-Identifier: Apache-2.0
"""A commit is asked for again when the kernel has missed the request; the ioctl itself is the kernel tests' business."""

import errno
import threading
from ctypes import c_uint64

import pytest

from csi_driver.linux import btrfs


class Kernel:
    """Begins a commit at the request of this number; who made an earlier one sleeps until then."""

    def __init__(self, heard: int) -> None:
        self._heard = heard
        self._guard = threading.Lock()
        self._begun = threading.Event()
        self.requests = 0
        self.asleep = 0

    def ioctl(self, _fd: int, request: int, argument: c_uint64, _operation: str) -> int:
        assert request == btrfs.BTRFS_IOC_START_SYNC
        with self._guard:
            self.requests += 1
            self.asleep += 1
            if self.requests == self._heard:
                self._begun.set()
        assert self._begun.wait(20.0), "nobody asked again"
        with self._guard:
            self.asleep -= 1
        argument.value = 7
        return 0


@pytest.mark.parametrize("heard", [1, 2, 3])
def test_a_request_that_the_kernel_misses_is_made_again(monkeypatch: pytest.MonkeyPatch, heard: int) -> None:
    kernel = Kernel(heard)
    monkeypatch.setattr(btrfs, "ioctl", kernel.ioctl)
    assert btrfs.start_commit(-1) == 7
    # At least: a busy machine may let a request wait that was heard.
    assert kernel.requests >= heard
    assert kernel.asleep == 0, "no request is left behind, with a fd that is closed soon"


def test_a_commit_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _request: int, _argument: c_uint64, operation: str) -> int:
        raise OSError(errno.EROFS, operation)

    monkeypatch.setattr(btrfs, "ioctl", refuse)
    with pytest.raises(OSError, match="START_SYNC") as refused:
        btrfs.start_commit(-1)
    assert refused.value.errno == errno.EROFS
