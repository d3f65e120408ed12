# SPDX-License-Identifier: Apache-2.0
"""A program that runs beside this one: started, watched and ended by its own pid. `run` is for those to wait for."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self


class Child:
    """A running child of this process, in a session of its own: the terminal's Ctrl-C is not for it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, argv: Sequence[str | Path], output_fd: int) -> Self:
        """Start it; what it prints goes to `output_fd`, its stdin is empty.

        Raises OSError: it is not there, or cannot be executed.
        """
        return cls(
            subprocess.Popen(
                [os.fspath(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=output_fd,
                stderr=output_fd,
                start_new_session=True,
            )
        )

    @property
    def pid(self) -> int:
        """Its process id, also after its end."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """How it ended (negative: the signal that ended it); None while it runs."""
        return self._process.poll()

    def kill(self) -> int:
        """SIGKILL, and wait for its end; fine when it has ended already. Returns its exit code."""
        self._process.kill()
        return self._process.wait()

    def end(self, timeout_s: float) -> int | None:
        """SIGTERM, and wait for an orderly end. Returns its exit code; None: it was late, and has been killed."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code once it has ended by itself; None if that takes longer."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
