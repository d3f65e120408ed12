# SPDX-License-Identifier: Apache-2.0
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from csi_driver.linux.run import CommandFailed, CommandMissing, run


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_stdout_comes_back_and_stderr_stays_out_of_it() -> None:
    assert run(python("import sys; print('out'); print('warning', file=sys.stderr)"), timeout_s=10) == "out\n"


def test_bytes_that_are_not_utf8_survive() -> None:
    assert os.fsencode(run(["printf", r"\377a"], timeout_s=10)) == b"\xffa"


def test_paths_are_arguments_as_they_are(tmp_path: Path) -> None:
    odd = tmp_path / "a b;$(id)"
    odd.write_text("x")

    assert run(["cat", odd], timeout_s=10) == "x"


def test_input_is_what_the_child_reads() -> None:
    assert run(["cat"], timeout_s=10, input=b"hello") == "hello"


def test_without_input_the_child_reads_nothing() -> None:
    assert run(["cat"], timeout_s=10) == ""


def test_messages_are_in_english_and_tools_of_administrators_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    environment = run(["env"], timeout_s=10).splitlines()

    assert "LC_ALL=C" in environment
    assert "PATH=/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin" in environment


def test_a_failure_tells_command_code_and_the_end_of_stderr() -> None:
    with pytest.raises(CommandFailed) as caught:
        run(python("import sys; sys.stderr.write('x' * 9000 + 'the\\nreason\\n'); sys.exit(3)"), timeout_s=10)

    assert caught.value.returncode == 3
    assert not caught.value.timed_out
    assert str(caught.value).endswith("the reason")
    assert "failed with exit code 3: " in str(caught.value)
    assert len(caught.value.stderr) <= 2000
    assert "\n" not in str(caught.value)


def test_a_kill_hints_at_the_memory_limit() -> None:
    with pytest.raises(CommandFailed, match=r"was killed by SIGKILL \(the memory limit") as caught:
        run(python("import os; os.kill(os.getpid(), 9)"), timeout_s=10)

    assert caught.value.returncode == -9


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CommandMissing, match="no-such-tool is not here: install it"):
        run(["no-such-tool"], timeout_s=10)
    with pytest.raises(CommandMissing, match="install the Debian package xfsprogs") as caught:
        run([tmp_path / "mkfs.xfs"], timeout_s=10)
    assert caught.value.package == "xfsprogs"


def test_a_program_that_may_not_be_executed_is_missing(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")

    with pytest.raises(CommandMissing):
        run([tool], timeout_s=10)


def test_at_the_deadline_the_whole_group_dies_and_is_reaped(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '60']);"
        f"open({os.fspath(pid_file)!r}, 'w').write(str(child.pid)); print('half', flush=True); time.sleep(60)"
    )
    started = time.monotonic()

    with pytest.raises(CommandFailed, match=r"did not end within 1\.5 s and was killed") as caught:
        run(python(script), timeout_s=1.5)

    assert time.monotonic() - started < 50
    assert caught.value.timed_out
    grandchild = Path("/proc", pid_file.read_text())
    deadline = time.monotonic() + 5
    while grandchild.exists() and "\nState:\tZ" not in (grandchild / "status").read_text():
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.01)


def test_a_grandchild_that_left_the_group_cannot_hold_us(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import subprocess, sys, time; made = subprocess.Popen(['sleep', '60'], start_new_session=True); "
        f"open({os.fspath(pid_file)!r}, 'w').write(str(made.pid)); time.sleep(60)"
    )
    started = time.monotonic()

    with pytest.raises(CommandFailed, match="did not end within"):
        run(python(script), timeout_s=2)

    assert time.monotonic() - started < 50
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_only_the_descriptors_named_are_inherited() -> None:
    read_fd, write_fd = os.pipe()
    os.set_inheritable(read_fd, True)
    try:
        listing = run(["ls", "/proc/self/fd"], timeout_s=10, pass_fds=[write_fd]).split()
    finally:
        os.close(read_fd)
        os.close(write_fd)

    assert str(write_fd) in listing
    assert str(read_fd) not in listing


def test_each_command_is_one_line_in_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="csi_driver.linux.run")

    run(["echo", "two words"], timeout_s=10)

    [record] = caplog.records
    assert record.getMessage().startswith("ran echo 'two words': exit 0, ")
