# SPDX-License-Identifier: Apache-2.0
"""A served driver: started, watched from outside, stopped. Its calls are `client`'s business."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0


def write_config(path: Path, pools: Mapping[str, str]) -> None:
    """A configuration of these pools: name to the lines of its table."""
    tables = "".join(f"\n[pools.{name}]\n{lines}\n" for name, lines in pools.items())
    path.write_text(f'driver_name = "bench.orlop.dev"\nnode_id = "bench"\n{tables}', encoding="utf-8")


class Driver:
    """One process, from `start` to `stop` or `kill`."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.socket = folder / "csi.sock"
        self._config = config
        self._log = folder / "driver.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Returns when the socket is there; how long that took, in seconds.

        Raises:
            RuntimeError: it ended, or made no socket in time; with the end of its log.
        """
        self.socket.unlink(missing_ok=True)
        # Ends with us, however we end.
        argv = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "csi_driver", "serve"]
        argv += ["--config", os.fspath(self._config), "--endpoint", f"unix://{self.socket}"]
        began = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while not self.socket.is_socket():
            took_s = time.perf_counter() - began
            if self._process.poll() is not None or took_s > START_TIMEOUT_S:
                self.kill()
                raise RuntimeError(f"orlop serve did not start: {self._log_tail()}")
            time.sleep(0.002)
        return time.perf_counter() - began

    @property
    def pid(self) -> int:
        assert self._process is not None, "started"
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self._process is not None, "started"
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and an orderly end; RuntimeError if it was none."""
        assert self._process is not None, "started"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            threads = self._threads()
            self.kill()
            raise RuntimeError(
                f"orlop serve did not end within {STOP_TIMEOUT_S:.0f} s of SIGTERM; its threads:\n{threads}\n"
                f"its log:\n{self._log_tail()}"
            ) from None
        if code != 0:
            raise RuntimeError(f"orlop serve ended with {code}: {self._log_tail()}")

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _threads(self) -> str:
        """What each waits for in the kernel, as root sees it (proc_pid_wchan(5))."""
        told = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                told.append(
                    f"{task.name} {(task / 'comm').read_text().strip()}: {(task / 'wchan').read_text()}"
                )
            except OSError as error:  # one that has just ended
                told.append(f"{task.name}: {error.strerror}")
        return "\n".join(sorted(told))

    def resident_bytes(self) -> int:
        """VmRSS."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024

    def cpu_s(self) -> tuple[float, float]:
        """Processor time that it has used in user mode and in the kernel, its ended children included."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        user, system, child_user, child_system = (int(field) for field in fields[11:15])
        ticks = os.sysconf("SC_CLK_TCK")
        return (user + child_user) / ticks, (system + child_system) / ticks


@contextmanager
def served(folder: Path, pools: Mapping[str, str]) -> Iterator[Driver]:
    """A driver with these pools (name to the lines of its table), its files in `folder`."""
    folder.mkdir(exist_ok=True)
    config = folder / "orlop.toml"
    write_config(config, pools)
    driver = Driver(folder, config)
    driver.start()
    try:
        yield driver
    finally:
        driver.stop()
