"""`make chaos-processes`: runs of several processes, one of which is killed, stopped or suspended at a random moment.

Every attempt is 2 or 3 processes, forked from this one: with torchrun's variables only (`plain`), by the job's launcher
(`launcher`), or by the launchers of two machines (`machines`). One process or launcher, drawn at random, gets SIGKILL,
SIGTERM or SIGSTOP. All others must end in time, with the right exit code, without a traceback and without leaving a
process behind. The last attempt is not disturbed: the run must have the bits of an undisturbed one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.distributed.launcher import worker_environment
from job.distributed.ranks import Place
from job.results.reader import parse
from job.runs.layout import facts_of
from tests.chaos import small
from tests.chaos.harness import preload
from tests.forked import free_port

STALL_SECONDS = 15
GRACE_SECONDS = 10
LAUNCHERS = {"plain": 2, "plain of three": 3, "launcher": 2, "machines": 2}
"""How processes are started, and how many."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
LIMITS = {signal.SIGKILL: 45.0, signal.SIGTERM: 45.0, signal.SIGSTOP: 2 * STALL_SECONDS + 90.0}
"""Seconds within which all others must end. They give up on a suspended store after a minute."""
CODES = {signal.SIGKILL: {1, 69}, signal.SIGTERM: {75, 69}, signal.SIGSTOP: {1, 69, 74}}
"""Allowed exit codes of the others, in addition to 0; 69 only if the processes had not connected."""
CONNECTED = "all processes are connected"
_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of Linux: processes that are left behind become children of this one."""


@dataclass(frozen=True)
class Try:
    """One signal: the process, the stage, how the others ended, and what was wrong."""

    launcher: str
    target: str
    number: int
    stage: str
    codes: tuple[int, ...]
    wrong: tuple[str, ...]


def main() -> int:
    """Tries, and prints each outcome; exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to go on where others ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many, whatever is left")
    parser.add_argument("--only", choices=LAUNCHERS, help="runs that are started in one way")
    parser.add_argument("--signal", choices=[number.name for number in SIGNALS], help="only this signal")
    parser.add_argument("--keep", type=Path, help="an empty folder for logs and runs, which are kept")
    chosen = parser.parse_args()
    preload()  # before anything else: it keeps torch from starting threads
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    begun, tries, different = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="qlora-job-processes-") as temporary:
        folder = chosen.keep.absolute() if chosen.keep else Path(temporary)
        environment = {
            **small.settings(folder, rows=16, questions=12),
            **_VALIDATION,
            "JOB_RUN__GRACE_SECONDS": str(GRACE_SECONDS),
            "JOB_TRAIN__STALL_SECONDS": str(STALL_SECONDS),
        }
        names = [chosen.only] if chosen.only else list(LAUNCHERS)
        whole: dict[int, tuple[dict[str, str], float]] = {}
        for number in range(chosen.first, chosen.first + chosen.runs):
            if time.monotonic() - begun > 60 * chosen.minutes:
                break
            launcher, draw = names[number % len(names)], random.Random(f"{chosen.seed} {number}")
            processes = LAUNCHERS[launcher]
            if processes not in whole:
                whole[processes] = _undisturbed(environment, folder, processes)
            expected, span = whole[processes]
            name = f"run-{number:03d}"
            there = {**environment, "JOB_RUN__ID": name, "JOB_RUN__OUTPUT": str(folder / "out" / name)}
            for attempt in range(draw.choice([1, 1, 2])):
                how = signal.Signals[chosen.signal] if chosen.signal else draw.choice(SIGNALS)
                tried = strike(there, launcher, how, draw, span, folder / f"{name}-{attempt}")
                tries.append(tried)
                where = f"to {tried.target} in {tried.stage}"
                told = f"{launcher}, {signal.Signals(tried.number).name} {where}: {list(tried.codes)}"
                print(f"{name}, {told}", *tried.wrong, sep="\n    ", flush=True)
            left = start(there, launcher, folder / f"{name}-end")
            codes = wait(left, 120)
            same = codes == [0] * len(left) and _facts(there) == expected
            different += not same
            if not same:
                print(f"{name}: the last attempt ended with {codes}, or the result DIFFERS", flush=True)
            if not chosen.keep:
                shutil.rmtree(folder / "out" / name)
    _report(tries, different)
    return 1 if different or any(tried.wrong for tried in tries) else 0


_VALIDATION = {"JOB_DATA__VALIDATION": "4", "JOB_TRAIN__VALIDATE_EVERY_STEPS": "3", "JOB_TRAIN__EPOCHS": "2"}


def strike(  # noqa: PLR0917 - what one signal needs to know of its run
    environment: Mapping[str, str], launcher: str, how: signal.Signals, draw: random.Random, span: float, logs: Path
) -> Try:
    """Starts an attempt, sends a signal to one of its processes, and watches the end of the others.

    Args:
        environment: The settings.
        launcher: A key of `LAUNCHERS`.
        how: The signal.
        draw: Decides to which process and when.
        span: Seconds that an undisturbed run takes.
        logs: Prefix of the logs' names.
    """
    committed = _newest(environment)
    pids = start(environment, launcher, logs)
    time.sleep(draw.uniform(0, 0.5) if draw.random() < 0.15 else draw.uniform(0, span))
    target = draw.choice(_living(pids) or pids)
    aim = _aim(target, pids)
    with suppress(ProcessLookupError):
        os.kill(target, how)
    stage, began = _stage(logs), time.monotonic()
    others = [pid for pid in pids if pid != target]
    codes = wait(others, LIMITS[how], kill=False)
    wrong = [] if None not in codes else [f"not ended within {time.monotonic() - began:.0f} s: {codes}"]
    if how == signal.SIGTERM:
        codes += wait([target], LIMITS[how], kill=False) if target in pids else []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    own = [] if how == signal.SIGTERM or target not in pids else [target]
    wait(own, 10)
    orphans = _left_behind(target)
    wrong += [f"left behind: {orphans}"] if orphans else []
    text = "\n".join(log.read_text("utf-8", "replace") for log in _logs(logs))
    allowed = {0, *CODES[how]} - ({69} if CONNECTED in text else set())
    ended = tuple(code for code in codes if code is not None)
    if not set(ended) <= allowed:
        wrong.append(f"exit codes {list(ended)}, allowed are {sorted(allowed)}; {logs}")
    if "Traceback" in text:
        wrong.append(f"a traceback: {text[text.index('Traceback') :][:1500]}")
    if _newest(environment) < committed:
        wrong.append(f"the checkpoint of step {committed} is gone")
    return Try(launcher, aim, how, stage, ended, tuple(wrong))


def start(environment: Mapping[str, str], launcher: str, logs: Path) -> list[int]:
    """Starts an attempt; returns the ids of its processes, or of its launchers."""
    port, count = str(free_port()), LAUNCHERS[launcher]
    if launcher == "launcher":
        return [_fork({**environment, "JOB_RUN__PROCESSES": str(count)}, Path(f"{logs}-l0.log"))]
    if launcher == "machines":
        common = {"JOB_RUN__NODES": "2", "JOB_RUN__RENDEZVOUS": f"127.0.0.1:{port}"}
        return [
            _fork({**environment, **common, "JOB_RUN__NODE_RANK": str(rank)}, Path(f"{logs}-l{rank}.log"))
            for rank in range(2)
        ]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        _fork({**environment, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, Path(f"{logs}-{rank}.log"))
        for rank in range(count)
    ]


def wait(pids: list[int], seconds: float, *, kill: bool = True) -> list[int | None]:
    """The exit codes, negative for a signal; None for a process that has not ended, which is killed on request."""
    codes: dict[int, int | None] = dict.fromkeys(pids)
    end = time.monotonic() + seconds
    while None in codes.values() and time.monotonic() < end:
        for pid in (pid for pid, code in codes.items() if code is None):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in (pid for pid, code in codes.items() if code is None and kill):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(codes.values())


def _fork(environment: Mapping[str, str], log: Path) -> int:
    """Forks a process of the job, or a launcher, whose own processes are forked, too: a cold start takes 10 s."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.closerange(3, 512)  # a launcher's sockets, which would stay open after its end
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name in [name for name in os.environ if name.startswith("JOB_")]:
            del os.environ[name]
        os.environ.update(environment)
        from job import __main__ as entry
        from job.cli.main import main
        from job.distributed import launcher

        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, entry._stopped_early)
        launcher._start = lambda _command, place, run, environ: _ForkedWorkers(place, run, environ, log)  # type: ignore[assignment]
        code = main(["run"])
    finally:
        os._exit(code)


class _ForkedWorkers:
    """Replaces torch's context of started processes."""

    def __init__(self, place: Place, run: str, environ: Mapping[str, str], log: Path) -> None:
        settings = {name: value for name, value in environ.items() if name.startswith("JOB_")}
        self._codes: dict[int, int] = {}
        self._pids = {
            local: _fork(
                settings | worker_environment(place, run, local, environ), log.with_name(f"{log.stem}-{local}.log")
            )
            for local in range(place.local_world_size)
        }
        self.subprocess_handlers = {
            local: SimpleNamespace(proc=SimpleNamespace(poll=lambda local=local: self._poll(local)))
            for local in self._pids
        }

    def pids(self) -> dict[int, int]:
        """The process ids by local rank."""
        return self._pids

    def close(self, death_sig: signal.Signals, timeout: float) -> None:
        """Kills those that are left."""
        for local, pid in self._pids.items():
            if self._poll(local) is None:
                os.kill(pid, death_sig)
                os.waitpid(pid, 0)
                self._codes[local] = -death_sig
        del timeout

    def _poll(self, local: int) -> int | None:
        if local not in self._codes:
            found, status = os.waitpid(self._pids[local], os.WNOHANG)
            if found:
                self._codes[local] = os.waitstatus_to_exitcode(status)
        return self._codes.get(local)


def _undisturbed(environment: Mapping[str, str], folder: Path, processes: int) -> tuple[dict[str, str], float]:
    """What an undisturbed run publishes, and the seconds that it takes."""
    there = {**environment, "JOB_RUN__ID": "whole", "JOB_RUN__OUTPUT": str(folder / "out" / f"whole-{processes}")}
    launcher = "plain" if processes == 2 else "plain of three"
    began = time.monotonic()
    pids = start(there, launcher, folder / f"whole-{processes}")
    codes = wait(pids, 200)
    span = time.monotonic() - began
    if any(codes):
        text = "\n".join(log.read_text("utf-8")[-2500:] for log in _logs(folder / f"whole-{processes}"))
        raise AssertionError(f"the undisturbed run ended with {codes}:\n{text}")
    print(f"{processes} processes, undisturbed: {span:.1f} s", flush=True)
    return _facts(there), span


def _living(pids: list[int]) -> list[int]:
    """The processes that may get the signal: these and the processes of launchers."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [one.pid for one in (process, *process.children()) if one.status() != psutil.STATUS_ZOMBIE]
    return found


def _aim(target: int, pids: list[int]) -> str:
    """A description of this process: its number among those that were started, or among those of its launcher."""
    if target in pids:
        return str(pids.index(target))
    try:
        siblings = psutil.Process(psutil.Process(target).ppid()).children()
        return f"process {[process.pid for process in siblings].index(target)} of a launcher"
    except (psutil.NoSuchProcess, ValueError):  # it has ended in the meantime
        return "a process of a launcher"


def _left_behind(target: int) -> list[str]:
    """Processes that still exist seconds after the end of all others, except a stopped one; they are killed."""
    end, orphans = time.monotonic() + 10, list[str]()
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = psutil.Process().children(recursive=True)
        if not left:
            return orphans
        for one in left:
            with suppress(psutil.NoSuchProcess):
                if one.pid != target and time.monotonic() > end:
                    orphans.append(f"{one.pid} {one.status()}")
                if one.pid == target or time.monotonic() > end:
                    one.kill()
        time.sleep(0.05)


def _facts(environment: Mapping[str, str]) -> dict[str, str]:
    place = Path(environment["JOB_RUN__OUTPUT"]) / environment["JOB_RUN__ID"]
    return facts_of(parse((place / "results.json").read_bytes()))


def _newest(environment: Mapping[str, str]) -> int:
    """The newest step with a complete checkpoint; once the run is published, a larger number than any step."""
    place = Path(environment["JOB_RUN__OUTPUT"]) / environment["JOB_RUN__ID"]
    if (place / "results.json").exists():
        return 1 << 30
    return max((int(path.parent.name.rpartition("-")[2]) for path in place.rglob("COMMITTED.json")), default=0)


def _logs(logs: Path) -> list[Path]:
    return sorted(logs.parent.glob(f"{logs.name}-*.log"))


def _stage(logs: Path) -> str:
    """The stage in the last line of process 0's log."""
    stage = "start-up"
    for log in _logs(logs):
        for line in log.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                stage = entry.get("stage", stage) if isinstance(entry, dict) else stage
    return stage


def _report(tries: list[Try], different: int) -> None:
    for title, key in (
        ("launcher", lambda one: one.launcher),
        ("stage", lambda one: one.stage),
    ):
        table = Counter((key(one), signal.Signals(one.number).name) for one in tries)
        print(f"\n{title:<18}" + "".join(f"{number.name:>9}" for number in SIGNALS))
        for name in sorted({name for name, _ in table}):
            print(f"{name:<18}" + "".join(f"{table[name, number.name]:>9}" for number in SIGNALS))
    wrong = sum(bool(one.wrong) for one in tries)
    print(f"{len(tries)} signals, {wrong} with something wrong; {different} runs that differ from the undisturbed one")


if __name__ == "__main__":
    raise SystemExit(main())
