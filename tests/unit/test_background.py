"""Work that nobody waits for: its result or its error where they are asked for, and no process that it keeps alive."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.background import beside, leave_if_busy

ROOT = Path(__file__).parents[2]


def test_the_result_or_the_error_is_there_where_it_is_asked_for() -> None:
    """And a process whose work is done is not ended."""
    assert beside(lambda: 7, "x").result(10) == 7
    failing = beside(lambda: 1 // 0, "x")
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
    time.sleep(0.2)
    leave_if_busy(3)


def test_a_process_does_not_wait_for_it() -> None:
    """Not even for threads that the work started, which are no daemons."""
    script = """
import sys, threading, time
from job.background import beside, leave_if_busy
def work():
    thread = threading.Thread(target=time.sleep, args=[60]); thread.start(); thread.join()
beside(work, "x"); time.sleep(0.3); print("last words"); leave_if_busy(75)
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=50
    )
    assert (done.returncode, done.stdout) == (75, "last words\n")
    assert time.monotonic() - began < 30
