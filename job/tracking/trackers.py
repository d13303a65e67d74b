"""Experiment trackers (Weights & Biases, MLflow): they get the figures of every step, and cannot disturb the run.

Each tracker has a separate process (`tracker_process`), which gets lines of JSON from a bounded queue. One that
fails, hangs or is too slow costs the run a warning and some figures, never an error; at the end, a few seconds.

To add one: a class and its entry in `TRACKERS` of `tracker_process`, and the variables that enable it in `trackers` of
`job/settings/load.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import copy_context
from importlib.util import find_spec
from queue import Full, Queue
from threading import Thread
from typing import Any

from job import log
from job.errors import Preempted, Replaced
from job.records import StepMetrics, ValidationMetrics
from job.tracking.figures import final_figures, step_figures, validation_figures

QUEUED = 1000
"""Length of a tracker's queue of messages; when it is full, messages are dropped."""
FINISH_SECONDS = 20.0
STOP_SECONDS = 3.0
"""How long all trackers together may take to finish: at the end of a run, and when its machine is being taken away."""
ANSWER_SECONDS = 1.0
"""How long to wait for the answers of a tracker's process that has ended."""
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
"""Turns off the trackers' own telemetry; values that the user has set take precedence."""


class Tracking:
    """The trackers of a run, none before `start`."""

    def __init__(
        self, projects: Mapping[str, str | None], run: str, config: Mapping[str, Any], environ: Mapping[str, str]
    ) -> None:
        self._projects, self._environ = projects, environ
        self._start = {"run": run, "config": config}
        self._trackers: list[_TrackerProcess] = []
        self._summary: dict[str, float] = {}

    def start(self) -> None:
        """Starts the trackers that are installed, and warns of those that are not."""
        for name, project in self._projects.items():
            spec = find_spec(name)
            if spec is None or spec.origin is None:  # a folder of this name is no package
                fix = f"run pip install '.[{name}]' in the repository, or set JOB_LOG__TRACKERS=off"
                _warn(name, "the run is not tracked: the tracker's package is not installed", fix=fix)
                continue
            try:
                self._trackers.append(_TrackerProcess(name, {**self._start, "project": project}, self._environ))
            except OSError as error:
                _warn(name, "the run is not tracked: the tracker's process cannot be started", why=str(error))

    def step(self, metrics: StepMetrics) -> None:
        """Sends the figures of a step."""
        for tracker in self._trackers:
            tracker.put({"step": metrics.step, "figures": step_figures(metrics)})

    def validation(self, metrics: ValidationMetrics) -> None:
        """Sends the figures of a validation."""
        for tracker in self._trackers:
            tracker.put({"step": metrics.step, "figures": validation_figures(metrics)})

    def results(self, results: Mapping[str, Any]) -> None:
        """Keeps the final figures, for `finish`."""
        self._summary = final_figures(results)

    def finish(self, outcome: str, seconds: float) -> None:
        """Sends how the attempt ended, and waits for the trackers, at most `seconds`."""
        for tracker in self._trackers:
            tracker.put({"outcome": outcome, "summary": self._summary})
            tracker.put(None)
        for tracker in self._trackers:
            tracker.wait(seconds / len(self._trackers))

    def leave(self) -> None:
        """Ends the trackers' processes without finishing their run: another attempt continues with it."""
        for tracker in self._trackers:
            tracker.leave()


@contextmanager
def tracking(
    projects: Mapping[str, str | None], run: str, config: Mapping[str, Any], environ: Mapping[str, str]
) -> Iterator[Tracking]:
    """Context manager: yields the trackers, and reports to them at the end of the block how it ended.

    Args:
        projects: By tracker that the user enabled, the project to put the run into; None where the user named one.
        run: The run's id: later attempts go on with the same run of the tracker.
        config: The settings, without secrets.
        environ: The environment of the trackers' processes, where they find their keys and addresses.
    """
    trackers_of_run = Tracking(projects, run, config, environ)
    try:
        yield trackers_of_run
    except Replaced:
        trackers_of_run.leave()
        raise
    except Preempted:
        trackers_of_run.finish("preempted", STOP_SECONDS)
        raise
    except BaseException:
        trackers_of_run.finish("failed", FINISH_SECONDS)
        raise
    trackers_of_run.finish("complete", FINISH_SECONDS)


class _TrackerProcess:
    """One tracker's process, and the two threads that talk with it."""

    def __init__(self, name: str, start: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self.name, self._slow, self._quiet = name, False, False
        self._queue: Queue[Mapping[str, Any] | None] = Queue(QUEUED)
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with a module of ours
            [sys.executable, "-m", "job.tracking.tracker_process", name],
            env={**QUIET, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for the job, which then tells the tracker
        )
        self.put(start)
        # The threads' log lines carry the run and the attempt like ours.
        threads = [Thread(target=copy_context().run, args=(work,), daemon=True) for work in (self._write, self._read)]
        for thread in threads:
            thread.start()
        self._reader = threads[1]

    def put(self, message: Mapping[str, Any] | None) -> None:
        """Queues a message, or drops it if too many are waiting; None is the last one."""
        try:
            self._queue.put_nowait(message)
        except Full:
            if not self._slow:
                self._slow = True
                _warn(self.name, "the tracker is too slow; some metrics are left out")

    def wait(self, seconds: float) -> None:
        """Waits for the process to end; then leaves it running, since killing it could damage its files."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._warn_once(f"the tracker did not end within {seconds:g} s; the run does not wait for it")
        else:
            self._reader.join(ANSWER_SECONDS)

    def leave(self) -> None:
        """Lets the process end, without further warnings."""
        self._quiet = True
        self.put(None)

    def _write(self) -> None:
        with suppress(OSError), self._process.stdin as pipe:  # type: ignore[union-attr]
            for message in iter(self._queue.get, None):
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

    def _read(self) -> None:
        with self._process.stdout as answers:  # type: ignore[union-attr]
            for answer in map(json.loads, answers):
                if "where" in answer:
                    log.get_logger().info("the run is tracked", tracker=self.name, where=answer["where"])
                elif "error" in answer:
                    self._warn_once("the tracker failed; the run continues without it", why=answer["error"])
                else:
                    return
        self._warn_once("the tracker ended; the run continues without it")

    def _warn_once(self, message: str, **details: str) -> None:
        """Warns, once for each tracker."""
        if not self._quiet:
            self._quiet = True
            _warn(self.name, message, **details)


def _warn(tracker: str, message: str, **details: str) -> None:
    log.get_logger().warning(message, tracker=tracker, **details)
