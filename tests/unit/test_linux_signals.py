# SPDX-License-Identifier: Apache-2.0
"""A process that is told to stop stops, whichever thread hears of it, and whenever."""

import subprocess
import sys

import pytest

ALL = """
import os, signal, sys, threading, time
from csi_driver.linux.signals import Stopping
stopping = Stopping()
"""
# What a C library's threads do to the main one: the kernel gives the signal to whoever lets it in.
ANOTHER_THREAD = (
    ALL
    + """
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
stopping.wait()
os._exit(7)
"""
)
BEFORE_WAITING = (
    ALL
    + """
os.kill(os.getpid(), signal.SIGINT)
stopping.wait()
sys.exit(7)
"""
)
# A signal at one step of the way into waiting; each step in a life of its own.
ON_THE_WAY = (
    ALL
    + """
left = int(sys.argv[1])
def trace(frame, event, argument):
    global left
    frame.f_trace_opcodes = True
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGTERM)
    return trace
threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM) if left > 0 else None).start()
sys.settrace(trace)
stopping.wait()
os._exit(7)
"""
)
TWICE = (
    ALL
    + """
for _ in range(2):
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
)


def run(code: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-c", code, *arguments], timeout=30, check=False).returncode


@pytest.mark.parametrize("code", [ANOTHER_THREAD, BEFORE_WAITING], ids=["another-thread", "before-waiting"])
def test_it_stops(code: str) -> None:
    assert run(code) == 7


def test_it_stops_at_each_step_of_the_way_into_waiting() -> None:
    assert [run(ON_THE_WAY, str(step)) for step in range(1, 16)] == [7] * 15


def test_the_second_signal_ends_it_at_once() -> None:
    assert run(TWICE) == 128 + 15
