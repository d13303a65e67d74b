"""Runs of the job that are killed at random points until they are done.

Every attempt is forked from a process that has imported the heavy libraries once: it takes two seconds instead of ten,
and is still a whole process that runs the real command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.records import AttemptRecord
from job.results.reader import open_run, parse, read_bytes
from job.runs.layout import facts_of
from job.storage.location import StorageOptions, join
from tests import clouds

MAX_ATTEMPTS = 40
BETWEEN = "start-up"


@dataclass(frozen=True)
class Kill:
    """One kill: the signal, seconds after the start, the stage, and how the process ended."""

    number: int
    after: float
    stage: str
    status: int


@dataclass(frozen=True)
class Outcome:
    """A finished run: its facts (path -> hash), its kills, and its attempts according to the run log."""

    facts: dict[str, str]
    kills: tuple[Kill, ...]
    attempts: tuple[AttemptRecord, ...]


def preload() -> None:
    """Imports what every attempt needs, before the first fork, without starting a thread."""
    import torch

    import job.stages.train

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    assert job.stages.train


def run_until_done(environment: Mapping[str, str], run: str, folder: Path, draw: random.Random, span: float) -> Outcome:
    """Starts attempts and kills them until one has enough time to finish.

    Args:
        environment: The settings, `JOB_RUN__OUTPUT` among them; `run` is added.
        run: The run's id.
        folder: Where the attempts' logs go.
        draw: Decides when and how each attempt is killed.
        span: Seconds that an undisturbed run takes; kills are within this time, and in later attempts after it.
    """
    kills: list[Kill] = []
    for number in range(1, MAX_ATTEMPTS + 1):
        log = folder / f"{run}-{number:02d}.log"
        child = start_attempt({**environment, "JOB_RUN__ID": run}, log)
        # First within an undisturbed run's time, so that most runs are killed; then ever later, so that each ends.
        after = draw.uniform(0, span * (0.9 + 0.3 * (number - 1)))
        blow = draw.choice([signal.SIGKILL, signal.SIGTERM])
        status = _wait(child, after)
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, blow)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status != 0:
                kills.append(Kill(blow, after, _stage(log), status))
        if status == 0:
            published = read_results(environment, run)
            attempts = tuple(AttemptRecord(**attempt) for attempt in published["run"]["attempts"])
            return Outcome(facts_of(published), tuple(kills), attempts)
        if status not in {-signal.SIGKILL, -signal.SIGTERM, os.EX_TEMPFAIL}:
            raise AssertionError(f"attempt {number} of {run} ended with {status}:\n{log.read_text()[-3000:]}")
    raise AssertionError(f"{run} was not done after {MAX_ATTEMPTS} attempts")


def read_results(environment: Mapping[str, str], run: str) -> dict[str, Any]:
    """The manifest of a finished run."""
    options = StorageOptions(endpoint_url=environment.get("JOB_STORAGE__ENDPOINT_URL"))
    place = join(environment["JOB_RUN__OUTPUT"], run)
    return clouds.in_fork(lambda: parse(read_bytes(open_run(place, options))))


def start_attempt(environment: Mapping[str, str], log: Path) -> int:
    """Forks an attempt of the run with its output in a file; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for name in [name for name in os.environ if name.startswith("JOB_")]:
            del os.environ[name]
        os.environ.update(environment)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from job.cli.main import main

        status = main(["run"])
    finally:
        os._exit(status)


def _wait(child: int, seconds: float) -> int | None:
    """The exit code of a child that ends within so many seconds, else None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _stage(log: Path) -> str:
    """The stage that the last line of a log is from."""
    stage = BETWEEN
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            entry: dict[str, Any] = json.loads(line)
            stage = entry.get("stage", stage)
    return stage
