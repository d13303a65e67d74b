"""The watchdog: ends a process that makes no progress, says where it hung, and never ends others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from job.preemption.watchdog import watch
from tests.waiting import threads

NO_FAULTHANDLER = "import faulthandler\nfaulthandler.dump_traceback_later = lambda *_, **__: None\n"
"""It goes by the clock: how long a busy machine pauses the whole process is not to matter."""


def run(body: str, stall: float = 0.5, first: str = NO_FAULTHANDLER) -> subprocess.CompletedProcess[str]:
    """Runs a body of indented lines within `watch`; `told(message)` is the callback."""
    program = (
        f"{first}import ctypes, sys, threading, time\n"
        "import job.preemption.watchdog\n"
        f"job.preemption.watchdog.CALLBACK_SECONDS = {0.3 if 'hanging' in body else 60.0}\n"
        "def told(message): print(message, flush=True)\n"
        "def broken(message): raise RuntimeError(message)\n"
        "def hanging(message): time.sleep(60)\n"
        "def where_it_hangs(): time.sleep(60)\n"
        f"stall = {stall}\n{body}"
    )
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)


def test_a_stalled_process_ends_and_says_where_it_hung() -> None:
    """Exit code 74; the stacks of all threads on stderr; the platform is told once, in words."""
    done = run(
        "threading.Thread(target=where_it_hangs, daemon=True).start()\n"
        "with job.preemption.watchdog.watch(stall, told):\n"
        "    where_it_hangs()\n"
    )
    assert done.returncode == 74
    assert done.stdout.count("no progress for 0.5 s") == 1
    assert done.stderr.count("in where_it_hangs") == 2
    assert "no progress for 0.5 s" in done.stderr


def test_a_replaced_stderr_does_not_matter() -> None:
    """A progress bar or a test harness may have put anything there; the stacks go to the real one."""
    done = run("sys.stderr = None\nwith job.preemption.watchdog.watch(stall, told):\n    where_it_hangs()\n")
    assert done.returncode == 74
    assert "in where_it_hangs" in done.stderr


def test_a_callback_that_fails_or_hangs_cannot_keep_it_alive() -> None:
    """What the callback writes to may be what everything hangs on."""
    for callback in ("broken", "hanging"):
        done = run(f"with job.preemption.watchdog.watch(stall, {callback}):\n    where_it_hangs()\n")
        assert (callback, done.returncode) == (callback, 74)


def test_a_beat_starts_the_time_anew() -> None:
    """A stage that gets on, however long it takes in all, is left alone."""
    done = run(
        "with job.preemption.watchdog.watch(stall, told) as report_progress:\n"
        "    for _ in range(10):\n"
        "        time.sleep(0.15)\n"
        "        report_progress()\n"
        "print('finished')\n",
        stall=1.0,
    )
    assert (done.returncode, done.stdout) == (0, "finished\n")


def test_a_library_that_holds_the_interpreter_is_ended_too() -> None:
    """When no Python thread can run, faulthandler's own thread ends the process after twice the time."""
    done = run("with job.preemption.watchdog.watch(stall, told):\n    ctypes.PyDLL(None).sleep(20)\n", first="")
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_a_process_that_can_start_no_more_threads_is_ended_too() -> None:
    """Memory or the number of threads is used up: often why it hangs. faulthandler cannot be armed again then."""
    done = run(
        "def refuse(*_, **__): raise RuntimeError('unable to start watchdog thread')\n"
        "with job.preemption.watchdog.watch(stall, told):\n"
        "    faulthandler.dump_traceback_later = refuse\n"
        '    def start(_): raise RuntimeError("can\'t start new thread")\n'
        "    threading.Thread.start = start\n"
        "    where_it_hangs()\n"
    )
    assert done.returncode == 74
    assert "no progress for 0.5 s" in done.stderr
    assert "in where_it_hangs" in done.stderr


def test_it_watches_before_its_thread_has_run() -> None:
    """The first thing that is watched may hold the interpreter: there is no time to arm faulthandler in a thread."""
    first = "import threading\nthreading.Thread.start = threading.Thread.join = lambda *_: None\n"
    done = run("with job.preemption.watchdog.watch(stall, told):\n    ctypes.PyDLL(None).sleep(20)\n", 0.1, first)
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_a_process_that_was_frozen_goes_on() -> None:
    """A container that was paused for longer than the limit is not ended when it resumes."""
    program = (
        f"{NO_FAULTHANDLER}import time, job.preemption.watchdog\n"
        "with job.preemption.watchdog.watch(2.0, print) as report_progress:\n"
        "    print('ready', flush=True)\n"
        "    for _ in range(8): time.sleep(0.1)\n"  # several: one would be over when it wakes up
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.2)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0


def test_it_ends_with_the_job() -> None:
    """The thread is joined at once, however long the limit, and nothing fires afterwards."""
    began = time.monotonic()
    told: list[str] = []
    with watch(3600, told.append):
        assert threads("watchdog")
    assert time.monotonic() - began < 60  # a tick is 360 s
    assert not threads("watchdog")
    assert told == []
