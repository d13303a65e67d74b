"""The status of a run as text, as `qlora-job status` prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import TypeVar

from job.common.formatting import count, duration, moment
from job.common.tables import aligned
from job.errors import exit_codes
from job.results.status import AttemptEnd, Resume, RunStatus
from job.runs.killed_for_memory import FIX
from job.runs.layout import FIRST_STAGE, Stage
from job.storage.open import is_remote

T = TypeVar("T")


def as_lines(status: RunStatus) -> list[str]:
    """The status as lines of text: the state, and below it everything else that is known."""
    rows = [(f"  {name}", text.replace("\N{NO-BREAK SPACE}", " ")) for name, text in _rows(status)]
    return [headline(status), *aligned(rows)]


def headline(status: RunStatus) -> str:
    """The state in words, and what happens next."""
    end, silent = status.last_end, status.silent_seconds
    match status.state:
        case "running":
            text = "running"
        case "preempted":
            text = "preempted, waiting for the next attempt"
        case "killed":
            text = "killed: the attempt's process is gone and recorded no end; the next attempt resumes the run"
        case "stalled":
            text = (
                "stalled (nothing recorded)" if silent is None else f"stalled (nothing recorded for {duration(silent)})"
            )
            text += ": the attempt was killed without notice, or hangs"
        case "finished":
            text = "finished" + {None: "", True: ", gate met", False: ", gate not met"}[status.gate]
        case "failed" if end is not None and end.exit_code is not None:
            retry = exit_codes().get(end.exit_code, (None, "no"))[1]
            then = "correct the cause before the next attempt" if retry == "no" else "the next attempt resumes the run"
            text = f"failed with code {end.exit_code} ({end.meaning}); {then}"
        case "failed":
            text = "failed (the version of the job that ran it did not record the exit code)"
        case "not-started":
            text = f"not started, or not a run: {without_run(status)}"
        case "damaged":
            text = "damaged: files of the results are missing or damaged; start the run again to repair it"
    part = "first stage (sft) of two: " if status.first_stage else ""
    return f"{part}{text}".replace("\N{NO-BREAK SPACE}", " ")


def without_run(status: RunStatus) -> str:
    """What is at the place of a run that has no record of an attempt, in words."""
    below = "no object below this URI" if is_remote(status.run) else "no such folder"
    return {
        None: "there is no record of an attempt",
        "missing": f"there is {below}",
        "empty": "the folder is empty",
        "other-files": "there are files, but none of them is a record of an attempt",
    }[status.place]


def _rows(status: RunStatus) -> Iterator[tuple[str, str]]:
    """(name, text) of everything that is known."""
    goes_on, end = status.state in {"running", "stalled"}, status.last_end
    in_training = status.state == "running" and status.stage == Stage.TRAIN
    texts = {
        "run": status.run,
        "exports": _if(status.exported_run, "the finished run {}".format),
        "attempt": _if(status.attempt, str),
        "stage" if goes_on else "ended in stage": status.stage or (_NO_STAGE if goes_on else None),
        "step": _if(status.step, lambda _: _step(status)),
        "loss": _if(status.loss, "{:.4f}".format),
        "speed": _if(status.tokens_per_second, "{:,.0f} target tokens/s".format),
        "time left": _if(status.remaining_seconds if in_training else None, _time_left),
        "scored": _if(None if in_training else status.questions, "{:,}".format),
        "last record": _if(status.silent_seconds, lambda ago: _last_record(status, ago)),
        "stages done": ", ".join(status.stages_done),
        "checkpoints": _if(status.attempt, lambda _: _checkpoint_steps(status.checkpoints)),
        "next attempt": _if(status.resume, _resume),
        "to resume": _to_resume(status),
        f"attempt {end.attempt if end else 0} ended": _if(end, lambda end: _end(end, status.attempt)),
        "likely cause": status.likely,
        "what to change": FIX if status.likely or (end and end.outcome == "killed" and end.why) else None,
    }
    yield from ((name, text) for name, text in texts.items() if text)
    yield from ((name, line) for name, line in zip_longest(["outcome"], status.outcome, fillvalue="") if line)
    if status.result is not None:
        yield from (("adapter", location) for location in [status.result.adapter] if location)
        yield from ((f"export {name}", location) for name, location in status.result.exports.items())
    yield from ((name, run) for name, run in zip_longest(["runs beside it"], status.runs_beside, fillvalue="") if run)
    yield from (("damaged", str(problem)) for problem in status.problems)


_QUIET_SECONDS = 30.0
"""Seconds without a record, a few times what usually lies between two, after which a user may doubt that it runs."""
_NO_STAGE = "between two stages, such as loading the model"


def _if(value: T | None, render: Callable[[T], str]) -> str | None:
    return None if value is None else render(value)


def _time_left(seconds: float) -> str:
    return f"{duration(seconds)} of training; the stages after it are not counted"


def _last_record(status: RunStatus, ago: float) -> str:
    text = f"{moment(status.last_sign_of_life or '')} UTC ({duration(ago)} ago)"
    if status.state != "running" or status.stalled_after is None or ago < _QUIET_SECONDS:
        return text
    return (
        f"{text}; if its process was killed, `stalled` is shown after {duration(status.stalled_after)} without a "
        "record, and `killed` at once on the machine on which it ran"
    )


def _checkpoint_steps(steps: Sequence[int]) -> str:
    return f"step {', '.join(map(str, steps))}" if steps else "none"


def _step(status: RunStatus) -> str:
    total = "" if status.total_steps is None else f" of {status.total_steps}"
    since = {"checkpoint": " (at the last checkpoint)", "training": " (training is done)"}
    if status.step_from == "attempt" and status.state in {"preempted", "killed", "failed"}:
        return f"{status.step}{total} (when the attempt ended)"
    return f"{status.step}{total}{since.get(status.step_from or '', '')}"


def _resume(resume: Resume) -> str:
    """Where it would go on, in words."""
    repeated = f"; at least {count(resume.repeated_steps, 'step')} to repeat" if resume.repeated_steps else ""
    if resume.step is not None:
        return f"goes on after step {resume.step}, from its checkpoint{repeated}"
    if resume.after_stage is None:
        return "begins anew: no stage is finished"
    repeated = f"; training begins anew{repeated}" if repeated else ""
    return f"goes on after stage {resume.after_stage}{repeated}"


def _to_resume(status: RunStatus) -> str | None:
    """How a run that waits for its next attempt is started: its id may have been generated, and then nobody set it.

    An export has an id that the job makes of another run's; a first training stage is started by the whole run.
    """
    waits = status.resume is not None and status.state in {"preempted", "killed", "failed"}
    name = status.run.rstrip("/").rpartition("/")[2]
    if not waits or status.exported_run is not None or name == FIRST_STAGE.rstrip("/"):
        return None
    return f"the same command with JOB_RUN__ID={name}"


def _end(end: AttemptEnd, newest: int | None) -> str:
    if end.outcome == "killed":
        others = "or ended" if end.attempt == newest else "replaced by a later attempt, or ended"
        words = f"killed, {others} by a second signal: its end was not recorded"
        return words if end.why is None else f"{words}; {end.why}"
    code = "" if end.exit_code is None else f" with code {end.exit_code} ({end.meaning})"
    return f"{end.outcome}{code}" + ("" if end.why is None else f": {end.why}")
