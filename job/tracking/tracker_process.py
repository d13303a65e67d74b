"""The process of one tracker, which alone imports wandb or mlflow. `trackers` starts it and writes to it.

It reads one JSON object a line: first the run, then steps, and last how the attempt ended. It answers in the same form:
where the run can be seen, or what went wrong. When its input ends before the attempt did, the job was killed: it leaves
the tracker's run open, so that the next attempt can continue it.

The job never kills it, because the tracker may be writing its files. Without the job it ends within two minutes.

To add a tracker: a class with `log` and `finish` and an entry in `TRACKERS` here, its package as an extra in
pyproject.toml, and the variable by which a user enables it in `settings.load.trackers`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TextIO

Message = Mapping[str, Any]

TAG = "qlora-job.run"
"""MLflow gives runs its own ids: this tag holds the job's run id."""
_MAX_VALUE_CHARACTERS = 6000  # MLflow's limit for a parameter
_MAX_ERROR_CHARACTERS = 300
"""Characters of an error's text."""
_ORPHAN_SECONDS = 120.0
"""How long the process continues after its input has ended."""


class _Tracker(Protocol):
    """What a tracker does with the messages."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of an optimizer step."""

    def finish(self, outcome: str, summary: Mapping[str, float]) -> None:
        """The attempt ended: `complete`, `preempted` or `failed`."""


class _Wandb:
    """Weights & Biases: the run has our id, and is resumed where it exists."""

    def __init__(self, start: Message, reply: Callable[[Message], None]) -> None:
        import wandb

        self._run = wandb.init(
            id=start["run"],
            name=start["run"],
            resume="allow",
            project=start["project"],
            config=dict(start["config"]),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        reply({"where": self._run.url or self._run.dir})

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self, outcome: str, summary: Mapping[str, float]) -> None:
        self._run.summary.update({"outcome": outcome, **summary})
        if outcome == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "complete" else 1)


class _Mlflow:
    """MLflow: the run is found by a tag."""

    def __init__(self, start: Message, reply: Callable[[Message], None]) -> None:
        import mlflow

        if start["project"] is not None:
            mlflow.set_experiment(start["project"])
        earlier_runs = mlflow.search_runs(filter_string=f"tags.`{TAG}` = '{start['run']}'", output_format="list")
        if earlier_runs:
            run = mlflow.start_run(run_id=earlier_runs[0].info.run_id)
        else:
            run = mlflow.start_run(run_name=start["run"], tags={TAG: start["run"]})
            # Once: a parameter cannot be changed, and settings that do not decide the result may.
            mlflow.log_params({name: str(value)[:_MAX_VALUE_CHARACTERS] for name, value in start["config"].items()})
        self._mlflow, self._step = mlflow, 0
        reply({"where": f"run {run.info.run_id} of experiment {run.info.experiment_id}"})  # the URI may hold a password

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._step = step
        self._mlflow.log_metrics(dict(figures), step=step)

    def finish(self, outcome: str, summary: Mapping[str, float]) -> None:
        if summary:
            self._mlflow.log_metrics(dict(summary), step=self._step)
        self._mlflow.set_tag("qlora-job.outcome", outcome)
        self._mlflow.end_run({"complete": "FINISHED", "preempted": "KILLED"}.get(outcome, "FAILED"))


TRACKERS: Mapping[str, Callable[[Message, Callable[[Message], None]], _Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}


def serve(name: str, messages: Iterator[Message], reply: Callable[[Message], None]) -> None:
    """Passes messages to a tracker, from the run's start to the attempt's end, and reports when it is done."""
    try:
        tracker = TRACKERS[name](next(messages), reply)
        for message in messages:
            if "outcome" in message:
                tracker.finish(message["outcome"], message["summary"])
                reply({"done": True})
                return
            tracker.log(message["step"], message["figures"])
    except Exception as error:  # noqa: BLE001 - no exception of a tracker may end the run: it is reported
        reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_ERROR_CHARACTERS]}"})


def main() -> None:
    """Serves the tracker that is named on the command line."""
    answers, lines = _own_stdout(), SimpleQueue[str | None]()
    # WandB makes folders when it is imported and removes them at the interpreter's exit, which is skipped below.
    tempfile.tempdir = temporary = tempfile.mkdtemp(prefix="qlora-job-tracker-")

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        time.sleep(_ORPHAN_SECONDS)
        end(1)

    def end(code: int) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        os._exit(code)  # trackers register work for the interpreter's exit, which may never end

    def reply(message: Message) -> None:
        with suppress(OSError):  # the job no longer reads the answers
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    Thread(target=read, daemon=True).start()
    serve(sys.argv[1], (json.loads(line) for line in iter(lines.get, None)), reply)
    end(0)


def _own_stdout() -> TextIO:
    """A copy of stdout for the answers; what libraries print to stdout and stderr goes nowhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    return answers


if __name__ == "__main__":
    main()
