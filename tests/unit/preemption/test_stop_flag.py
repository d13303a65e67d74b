"""Stopping: the flag, its deadline, signals, and what there is still time for before the kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import Preempted
from job.preemption import stop_flag
from job.preemption.stop_flag import (
    SAME_REQUEST_SECONDS,
    SIGNALS,
    SPARE_SECONDS,
    SPARE_SHARE,
    StopFlag,
    Stopwatch,
    Timings,
    decide,
    stop_on_signals,
)
from tests.waiting import threads, wait_for

CLOCK = """
from types import SimpleNamespace
from job.preemption import stop_flag
now = [0.0]
stop_flag.time = SimpleNamespace(monotonic=lambda: now[0])
stop_flag._LONGEST_WAIT = 0.01  # then it looks at the clock again
stop_flag.LAST_SECONDS = 60.0  # of this machine's own clock, for the report
"""
"""Of a program, which lets its time pass as it says, however busy this machine is."""
SECONDS = st.floats(0, 1e4)
SHARES = st.floats(0, 1)


class TestStop:
    """The flag."""

    def test_nobody_asked(self) -> None:
        """Without a request the job goes on, and has all the time there is."""
        stop = StopFlag()
        stop.check()
        assert (stop(), stop.reason, stop.remaining()) == (False, None, math.inf)

    def test_a_request_ends_the_stage(self) -> None:
        """The message says who asked."""
        stop = StopFlag()
        stop.request("the test", 30)
        assert stop()
        assert 20 < stop.remaining() <= 30
        with pytest.raises(Preempted, match="the test"):
            stop.check()

    def test_waiting_leaves_time_for_the_end(self) -> None:
        """Before the deadline, the end of the attempt is still to be recorded."""
        stop = StopFlag()
        assert stop.waiting_seconds() == math.inf
        stop.request("the test", 30)
        assert 20 < stop.waiting_seconds() <= 30 - SPARE_SECONDS
        stop.request("the test", SPARE_SECONDS / 2)
        assert stop.waiting_seconds() == 0

    @given(st.lists(st.none() | st.floats(-10, 1000), min_size=1, max_size=5))
    def test_the_first_reason_and_the_earliest_deadline_hold(self, deadlines: list[float | None]) -> None:
        """A later request may shorten the time that is left, and never lengthens it."""
        stop = StopFlag()
        for number, seconds in enumerate(deadlines):
            before = stop.deadline
            stop.request(str(number), seconds)
            assert stop.deadline <= before
        assert stop.reason == "0"
        known = [seconds for seconds in deadlines if seconds is not None]
        assert stop.remaining() == pytest.approx(max(0.0, min(known, default=math.inf)), abs=9)

    def test_it_may_be_raised_from_any_thread(self) -> None:
        """Threads that ask at once lose no request."""
        stop = StopFlag()
        threads = [threading.Thread(target=stop.request, args=(str(n), 1000 - n)) for n in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stop.remaining() == pytest.approx(951, abs=20)


class TestSignals:
    """Of platforms, batch systems and persons."""

    @pytest.mark.parametrize("number", SIGNALS)
    def test_the_first_raises_the_flag_with_the_grace_period(self, number: signal.Signals) -> None:
        """The signal's name is the reason, the grace period the deadline, and the old handler comes back."""
        before = signal.getsignal(number)
        with stop_on_signals(17) as stop:
            signal.raise_signal(number)
            assert stop.reason == number.name
            assert 10 < stop.remaining() <= 17
        assert signal.getsignal(number) is before

    def test_a_signal_that_is_ignored_stays_ignored(self) -> None:
        """Nohup starts the job with HUP ignored: a terminal that goes away must not end it."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with stop_on_signals(17) as stop:
                signal.raise_signal(signal.SIGHUP)
                assert not stop()
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_signals_that_come_together_are_one_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Timeout, systemd and a closed terminal send a signal to a whole group, and the parent sends it once more."""
        monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"ended with {code}"))
        monkeypatch.setattr(stop_flag, "SAME_REQUEST_SECONDS", 60.0)  # a busy machine may pause in between
        with stop_on_signals(17) as stop:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)
            assert stop.reason == "SIGTERM"

    def test_a_limit_of_cpu_time_asks_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel repeats SIGXCPU while the checkpoint is saved; only another signal ends the process at once."""
        monkeypatch.setattr(stop_flag, "SAME_REQUEST_SECONDS", -1.0)
        ended: list[int] = []
        monkeypatch.setattr(os, "_exit", ended.append)
        with stop_on_signals(17):
            signal.raise_signal(signal.SIGXCPU)
            signal.raise_signal(signal.SIGXCPU)
            assert ended == []
            signal.raise_signal(signal.SIGTERM)
            assert ended == [75]

    def test_the_first_signal_after_a_notice_has_its_grace(self) -> None:
        """A notice is no signal: SIGTERM after it shortens the time and does not end the process."""
        with stop_on_signals(17) as stop:
            stop.request("a notice", 120)
            signal.raise_signal(signal.SIGTERM)
            assert stop.reason == "a notice"
            assert 10 < stop.remaining() <= 17

    @pytest.mark.parametrize("as_first_process", [False, True])
    @pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
    def test_the_second_ends_the_process_at_once(self, second: signal.Signals, as_first_process: bool) -> None:  # noqa: FBT001
        """Exit code 75 without waiting for anything, also for a container's first process, which the kernel shields."""
        program = (
            "import signal, time\n"
            "from job import log\n"
            "from job.preemption.stop_flag import stop_on_signals\n"
            "log.configure('json', 'info', run='one')\n"
            "with stop_on_signals(60) as stop:\n"
            "    print('ready', flush=True)\n"
            "    while not stop(): time.sleep(0.01)\n"
            "    print(stop.reason, flush=True)\n"
            "    time.sleep(100)\n"
        )
        command = [sys.executable, "-c", program]
        if as_first_process:
            command = ["unshare", "--pid", "--fork", "--mount-proc", *command]
            if subprocess.run([*command[:4], "true"], check=False, capture_output=True).returncode:
                pytest.skip("this machine lends no process namespaces")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            target = _child(process.pid) if as_first_process else process.pid
            os.kill(target, signal.SIGTERM)
            assert process.stdout.readline() == "SIGTERM\n"
            time.sleep(SAME_REQUEST_SECONDS + 0.1)
            os.kill(target, second)
            assert process.wait(50) == 75
            (line,) = map(json.loads, process.stderr.readlines())
            assert line["event"].startswith(f"a second signal ({second.name}) ends the process at once, without saving")
            assert "start the run again with its JOB_RUN__ID: it goes on after its last checkpoint" in line["event"]
            assert (line["run"], line["exit_code"], line["level"]) == ("one", 75, "warning")

    def test_one_process_of_several_says_it(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The others end without a line of their own."""
        monkeypatch.setattr(stop_flag, "SAME_REQUEST_SECONDS", -1.0)
        monkeypatch.setattr(os, "_exit", lambda _code: None)
        for says_end in (False, True):
            with stop_on_signals(says_end=says_end):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            assert capfd.readouterr().err.count("a second signal (SIGTERM)") == says_end

    def test_what_waits_too_long_ends_before_it_is_killed(self) -> None:
        """A store that throttles may keep it for longer than its grace: code 75. Another's signal ends nothing."""
        program = (
            f"{CLOCK}import os, signal, time\n"
            "from job import log\n"
            "log.configure('json', 'info', run='one')\n"
            "log.get_logger()\n"
            "with stop_flag.stop_on_signals(200) as stop:\n"
            "    heard, tell = os.pipe()\n"
            "    if not (other := os.fork()):\n"
            "        os.write(tell, b'.')\n"  # from here on it is another process
            "        while not stop(): time.sleep(0.01)\n"
            "        os.write(tell, b'.')\n"
            "        os._exit(0)\n"
            "    os.read(heard, 1)\n"
            "    os.kill(other, signal.SIGTERM)\n"
            "    os.read(heard, 1)\n"
            "    now[0] += 1000\n"  # longer than the time that would be left
            "    time.sleep(0.1)\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    print('works', flush=True)\n"
            "    while True:\n"
            "        time.sleep(0.01)\n"
            "        now[0] += 10\n"
        )
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stdout.splitlines()) == (75, ["works"])
        (line,) = map(json.loads, done.stderr.splitlines())
        assert "the grace period is over" in line["event"]
        assert line["run"] == "one"

    @pytest.mark.parametrize(
        ("grace", "report", "again", "code"),
        [(200, "71", False, 71), (1, "time.sleep(60)", False, 75), (1, "1 / 0", False, 75), (10**6, "71", True, 71)],
    )
    def test_what_waits_in_a_librarys_code_ends_too(self, grace: float, report: str, code: int, *, again: bool) -> None:
        """No handler is called then, nor by a second signal. Nor can a log keep it that nobody reads, or that hangs."""
        program = (
            f"{CLOCK if report == '71' else 'from job.preemption import stop_flag; now = [0.0]'}\n"
            "import ctypes, os, signal, time\n"
            "from threading import Timer\n"
            "libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)\n"
            "def ask():\n"
            "    for number in range(10**9):\n"
            f"        if number == 0 or number > {10 if again else 10**9}: os.kill(os.getpid(), signal.SIGTERM)\n"
            "        time.sleep(0.01)\n"
            "        now[0] += 10\n"
            f"with stop_flag.stop_on_signals({grace}, lambda message: print(message, flush=True) or {report}):\n"
            "    Timer(0.05, ask).start()\n"
            "    while True: libc.pthread_mutex_lock(lock)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], check=False, timeout=50, stdout=subprocess.PIPE)
        assert (done.returncode, b"a second signal ends" in done.stdout) == (code, again)
        assert (b"the grace period is over" in done.stdout) != again

    def test_a_grace_of_days_is_watched_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Longer than the system waits at once, the most that the setting allows; the time is up when all of it is."""
        now, ended = [0.0], list[int]()
        monkeypatch.setattr(stop_flag, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(stop_flag, "LAST_SECONDS", 60.0)
        monkeypatch.setattr(stop_flag, "_LONGEST_WAIT", 0.01)
        monkeypatch.setattr(os, "_exit", ended.append)

        def a_day_later() -> list[int]:
            now[0] += 86400.0
            return ended

        with stop_on_signals(30 * 86400.0, lambda _: 9):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)
            now[0] += 29 * 86400.0
            time.sleep(0.05)
            assert threads("grace")
            assert ended == []
            wait_for(a_day_later)
        assert ended == [9]

    def test_what_has_ended_in_time_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After the block nothing ends the process any more."""
        monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"ended with {code}"))
        with stop_on_signals(60):
            signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: not threads("grace"))


def _child(parent: int) -> int:
    with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as children:  # noqa: PTH123
        return int(children.read().split()[0])


def _fits(seconds: float, remaining: float) -> bool:
    return seconds * (1 + SPARE_SHARE) + SPARE_SECONDS <= remaining


class TestDecide:
    """What still fits."""

    @pytest.mark.parametrize(
        ("remaining", "step_left", "plan"),
        [
            (120, 1.0, "finish_step"),
            (30, 1.0, "save_now"),
            (30, 0.1, "finish_step"),
            (30, 0.0, "save_now"),
            (3, 1.0, "too_late"),
            (0, 1.0, "too_late"),
            (math.inf, 1.0, "finish_step"),
            (math.inf, 0.0, "save_now"),
            (math.nan, 1.0, "too_late"),
        ],
    )
    def test_by_example(self, remaining: float, step_left: float, plan: str) -> None:
        """A step of 40 s, a save of 1 s and an upload of 3 s."""
        assert decide(Timings(step=40, save=1, upload=3), remaining, step_left) == plan

    @given(st.builds(Timings, SECONDS, SECONDS, SECONDS), SECONDS, SHARES)
    def test_never_a_plan_that_does_not_fit_when_another_does(
        self, timings: Timings, remaining: float, step_left: float
    ) -> None:
        """The plan is the first that fits with the margin, of the most work kept; ending at once always fits."""
        publish = timings.save + timings.upload
        finish = step_left > 0 and _fits(step_left * timings.step + publish, remaining)
        plan = decide(timings, remaining, step_left)
        assert plan == ("finish_step" if finish else "save_now" if _fits(publish, remaining) else "too_late")

    @given(st.builds(Timings, SECONDS, SECONDS, SECONDS), SECONDS, SECONDS, SHARES, SHARES)
    def test_less_time_and_more_to_do_never_promise_more(
        self, timings: Timings, remaining: float, less: float, left: float, more: float
    ) -> None:
        """While the clock runs, or if more of the step is left, the plan only becomes more modest."""
        order = ["finish_step", "save_now", "too_late"]
        plan = order.index(decide(timings, remaining, left))
        assert order.index(decide(timings, remaining - less, left)) >= plan
        if left > 0:
            assert order.index(decide(timings, remaining, max(left, more))) >= plan

    @given(
        st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1)), min_size=1, max_size=20), SECONDS, st.floats(0, 20)
    )
    def test_deciding_before_every_micro_batch_always_leaves_time_to_save(
        self, parts: list[tuple[float, float]], remaining: float, publish: float
    ) -> None:
        """If a step continues because there is time, and no part exceeds its estimate, saving still succeeds."""
        step = sum(seconds for seconds, _ in parts)
        timings = Timings(step=step, save=publish / 2, upload=publish / 2)
        left = step
        for number, (seconds, speed) in enumerate(parts):
            plan = decide(timings, remaining, left / step)
            if plan != "finish_step":
                # Not before the first part: nothing was begun on a promise.
                assert number == 0 or plan == "save_now"
                break
            left = sum(estimate for estimate, _ in parts[number + 1 :])
            remaining -= seconds * speed
        else:
            assert decide(timings, remaining, 0.0) == "save_now"


def test_the_stopwatch_keeps_the_recent_maxima() -> None:
    """A slow upload counts until as many faster ones have followed; what never happened takes no time."""
    watch = Stopwatch(window=3)
    assert watch.timings == Timings(0, 0, 0)
    for seconds in (9, 1, 2):
        watch.add("upload", seconds)
    watch.add("step", 4)
    assert watch.timings == Timings(step=4, save=0, upload=9)
    watch.add("upload", 1)
    assert watch.timings == Timings(step=4, save=0, upload=2)
