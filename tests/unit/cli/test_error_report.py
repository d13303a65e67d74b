"""The failure message for the platform: the kind of error, its exit code, and the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from job import log, pipeline
from job.cli import config, error_report
from job.cli import main as cli
from job.distributed import rendezvous
from job.distributed.processes import ALONE, Processes
from job.errors import AccessDenied, JobError, Preempted, Problem, SettingsError, Stalled, TrainingFailed
from job.platforms.detect import Platform
from job.runs.run_log import IdleLimit


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AccessDenied("no role"), "AccessDenied (exit code 77): node gpu-7: no role"),
        (Preempted("SIGTERM"), "Preempted (exit code 75): node gpu-7: SIGTERM"),
        (ZeroDivisionError("x"), "ZeroDivisionError (exit code 1): node gpu-7: x"),
        (SettingsError([Problem("JOB_X", "is wrong")]), "SettingsError (exit code 2): JOB_X: is wrong"),
    ],
)
def test_a_failure_that_another_machine_may_not_have_names_the_machine(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The termination message of a pod names its node, unless no machine is at fault; without a node it names none."""

    def fail(_words: list[str]) -> int:
        raise error

    said_to = tmp_path / "termination-log"
    monkeypatch.setattr(config, "config_command", fail)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_TERMINATION_LOG", str(said_to))
    for node, expected in (("gpu-7", said), ("", said.replace("node gpu-7: ", ""))):
        monkeypatch.setenv("KUBERNETES_NODE_NAME", node)
        assert cli.main(["config"]) == (error.exit_code if isinstance(error, JobError) else 1)
        assert said_to.read_text() == expected


@pytest.mark.parametrize(
    ("error", "attempt", "told"),
    [
        (Preempted("SIGINT"), {"attempt": 1}, "JOB_RUN__ID=20261130-1"),
        (Preempted("SIGINT"), {}, None),
        (TrainingFailed("diverged"), {"attempt": 1}, None),
    ],
)
def test_an_interrupted_attempt_says_with_which_id_it_is_resumed(
    error: JobError, attempt: dict[str, int], told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The id may have been generated, and the next start would make another; a run that has not begun has none yet."""
    log.configure("json", "info", run="20261130-1", **attempt)
    try:
        error_report.report(error, Platform("docker"))
    finally:
        log.clear_context()
    line = json.loads(capsys.readouterr().err)
    assert line.get("resume_with") == told


def test_the_id_of_a_first_training_stage_resumes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """It is made of the whole run's; given as an id, it would begin another run."""
    log.configure("json", "info", run="20261130-1-sft", attempt=1)
    try:
        error_report.report(Preempted("SIGINT"), Platform("docker"))
    finally:
        log.clear_context()
    assert "resume_with" not in json.loads(capsys.readouterr().err)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_memory_that_runs_out_is_no_bug(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Wherever it happens: exit code 70, which is not retried, and the settings to lower."""

    def fail(_words: list[str]) -> int:
        raise error

    monkeypatch.setattr(config, "config_command", fail)
    assert cli.main(["config"]) == TrainingFailed.exit_code
    said = capsys.readouterr().err
    assert "JOB_TRAIN__MAX_LENGTH" in said
    assert "a bug" not in said


@pytest.mark.parametrize("error", [MemoryError(), ImportError("x.so: failed to map segment from shared object")])
def test_a_report_for_which_there_is_no_memory(error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The log's libraries are imported for the first line: without them, one line of JSON says the same."""

    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr(config, "config_command", fail)
    monkeypatch.setattr(error_report, "_log", fail)
    assert cli.main(["config"]) == TrainingFailed.exit_code
    (line,) = capfd.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["event"], found["exit_code"]) == ("TrainingFailed", TrainingFailed.exit_code)
    assert "the machine's memory ran out" in found["why"]


def test_a_stall_names_its_code_and_the_machine(tmp_path: Path) -> None:
    """The watchdog's message is one of an error of the table, too."""
    platform = Platform("kubernetes", termination_log=tmp_path / "log", node="gpu-7")
    error_report.report_to_platform(platform, Stalled("x"), "no progress for 9 s")
    assert (tmp_path / "log").read_text() == "Stalled (exit code 74): node gpu-7: no progress for 9 s"


@pytest.mark.parametrize(("before", "end"), [(1, "Preempted (exit code 75)"), (2, "NoProgress (exit code 71)")])
def test_an_end_before_the_kill_is_reported_as_any_other(tmp_path: Path, before: int, end: str) -> None:
    """A process that waits too long is not retried without limit: attempts in a row without progress count."""
    platform = Platform("kubernetes", termination_log=tmp_path / "log")
    idle = IdleLimit(3, before=before, progressed=lambda: False)
    assert f"(exit code {error_report.report_late(idle, platform, 'the time is over')})" in end
    assert (tmp_path / "log").read_text().startswith(f"{end}: the time is over")


def test_memory_that_runs_out_is_no_bug_for_the_other_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is said to them as this process leaves is the error in words, with its code, whatever stage it was."""
    told: list[BaseException] = []

    @contextmanager
    def join(*_: Any, **__: Any) -> Iterator[Processes]:
        try:
            yield ALONE
        except BaseException as error:
            told.append(error)
            raise

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(os, "environ", dict(os.environ))  # `run` sets variables that libraries read
    monkeypatch.setattr(rendezvous, "join", join)
    monkeypatch.setattr(pipeline, "run", full)
    assert cli.main(["run", "--preset=demo", f"--run.output={tmp_path}", "--run.processes=1"]) == 70
    assert [(type(error), "JOB_TRAIN__MAX_LENGTH" in str(error)) for error in told] == [(TrainingFailed, True)]
