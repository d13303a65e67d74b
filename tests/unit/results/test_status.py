"""The status of a run: every state is derived from the records in its store, with what happens next."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job import log
from job.checkpoints import checkpoint_store
from job.common.hashing import sealed, unsealed
from job.common.process_identity import this_process
from job.errors import DataError, JobError, NoProgress, Preempted, Problem, SettingsError
from job.preemption.stop_flag import StopFlag
from job.records import Artifact, ExportedRun, TrainingProgress
from job.results.outcome import MetricComparison, OutcomeValues
from job.results.status import STALLED_SECONDS, AttemptEnd, Resume, RunStatus, as_json, read_status
from job.results.status_text import as_lines, headline
from job.results.summary import summary
from job.runs import stage_records
from job.runs.attempt import Attempt
from job.runs.fault_injection import arm
from job.runs.layout import EXPORTED_RUN, LEASE, SETTINGS, Stage, attempt_key, marker_key, stage_key
from job.runs.lease import take
from job.runs.open_attempt import open_attempt
from job.runs.run_log import IdleLimit
from job.storage.local import LocalStore
from job.storage.open import StorageOptions
from tests.example_run import ATTEMPTS
from tests.published_run import forge, pairs, publish_run

OPTIONS = StorageOptions()
STEP = TrainingProgress(7, 96, 1.25, 1234.5, 61.0)


class Killed(BaseException):
    """The process was killed: nothing of what follows is recorded."""


@contextmanager
def attempt_at(folder: Path, *, killed: bool = False, idle: IdleLimit | None = None) -> Iterator[Attempt]:
    """An attempt at the run in a folder; one that is killed writes nothing at its end."""
    store = LocalStore(folder)
    opening = open_attempt(
        store,
        {"train.epochs": 2},
        cache=str(folder.with_name("cache")),
        stop=StopFlag(),
        report_progress=lambda: None,
        faults=arm((), store),
        idle=idle,
    )
    with suppress(Killed), opening as attempt:
        yield attempt
        if killed:
            attempt.note = lambda *_: None  # type: ignore[method-assign]
            raise Killed


def train(attempt: Attempt, training: TrainingProgress = STEP) -> None:
    """Trains up to a step and records it."""
    attempt.training = training
    attempt.step_done(training.step, 0.1)
    attempt.note("running")


def save(folder: Path, step: int) -> None:
    """Commits a checkpoint."""
    files = folder.with_name(f"files-{step}")
    files.mkdir()
    (files / "adapter.safetensors").write_bytes(b"weights")
    checkpoint_store.commit(LocalStore(folder), files, step, checkpoint_store.MarkerFields(1, 1, {}))


def seen(folder: Path, seconds: float = 1.0) -> RunStatus:
    """The status, so many seconds from now."""
    return read_status(str(folder), OPTIONS, now=datetime.now(UTC) + timedelta(seconds=seconds))


@pytest.mark.parametrize(("stall", "running", "stalled"), [(3600.0, 3700, 4400), (60.0, 65, 80), (None, 540, 660)])
def test_a_long_silence_is_what_the_watchdog_says(
    tmp_path: Path, stall: float | None, running: int, stalled: int
) -> None:
    """A long evaluation is no stall before its own watchdog would end it; earlier versions recorded no limit."""
    run = tmp_path / "run"
    with attempt_at(run, killed=True) as attempt:
        attempt.stall_seconds = stall
        attempt.note("running")
    before, after = seen(run, running), seen(run, stalled)
    assert (before.state, after.state) == ("running", "stalled")
    assert "if its process was killed, `stalled` is shown after" in "\n".join(as_lines(before))
    assert "if its process" not in "\n".join([*as_lines(seen(run, 5)), *as_lines(after)])


def test_a_running_attempt_is_seen_with_its_figures(tmp_path: Path) -> None:
    """Stage, step of how many, loss, speed, time left and the last sign of life, while the attempt goes on."""
    run = tmp_path / "run"
    with attempt_at(run) as attempt, attempt.timed(Stage.TRAIN):
        train(attempt)
        found = seen(run, 5)
        assert (found.state, found.attempt, found.stage, found.step_from) == ("running", 1, "train", "attempt")
        assert (found.step, found.total_steps, found.loss, found.tokens_per_second) == (7, 96, 1.25, 1234.5)
        assert found.remaining_seconds == 61.0
        assert 4 < (found.silent_seconds or 0) < 60
        text = "\n".join(as_lines(found))
    for words in ("running", "train", "7 of 96", "1.2500", "1,234 target tokens/s", "1 min 1 s of training", " ago)"):
        assert words in text


def test_copied_files_are_not_called_scored(tmp_path: Path) -> None:
    """An export counts the files of the finished run that it copies as progress; then what it scores."""
    run, key = tmp_path / "run", stage_key(EXPORTED_RUN)
    LocalStore(run).write(key, stage_records.render(key, json.dumps(asdict(ExportedRun("a-run", "0" * 64, 1))), ""))
    with attempt_at(run) as attempt:
        attempt.questions = 57
        attempt.note("running")
        assert (seen(run).exported_run, seen(run).questions) == ("a-run", None)
        with attempt.timed(Stage.EXPORT):
            attempt.questions = 3
            attempt.note("running")
            assert seen(run).questions == 3


def test_an_attempt_without_a_sign_of_life_is_stalled(tmp_path: Path) -> None:
    """After the limit, and not before, a run that says it goes on is called stalled, with for how long."""
    run = tmp_path / "run"
    with attempt_at(run, killed=True) as attempt, attempt.timed(Stage.TRAIN):
        train(attempt)
    assert seen(run, STALLED_SECONDS - 60).state == "running"
    found = seen(run, 2 * STALLED_SECONDS)
    assert found.state == "stalled"
    assert re.match(
        r"stalled \(nothing recorded for 20 min \d+ s\): the attempt was killed without not", headline(found)
    )
    assert read_status(str(run), OPTIONS, stalled_after=1e-9).state == "stalled"
    assert found.last_end is None  # the newest attempt may still go on
    with attempt_at(run):
        found = seen(run)
    assert (found.state, found.attempt, found.last_end) == (
        "running",
        2,
        AttemptEnd(1, "killed", None, None, None, None),
    )


def test_an_attempt_whose_process_is_gone_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the machine on which it ran this is seen at once, while its last record still says that it runs."""
    run, own = tmp_path / "run", this_process()
    assert own is not None
    monkeypatch.setattr("job.runs.attempt.this_process", lambda: replace(own, started=own.started - 1))
    with attempt_at(run, killed=True) as attempt, attempt.timed(Stage.TRAIN):
        train(attempt)
    found = seen(run)
    assert (found.state, found.last_end) == ("killed", AttemptEnd(1, "killed", None, None, None, None))
    assert headline(found).startswith("killed: the attempt's process is gone and recorded no end; the next attempt")
    text = "\n".join(as_lines(found))
    assert "7 of 96 (when the attempt ended)" in text
    assert "killed, or ended by a second signal: its end was not recorded" in text
    assert seen(run, 2 * STALLED_SECONDS).state == "killed"
    monkeypatch.setattr("job.runs.attempt.this_process", lambda: None)  # as in records of earlier versions
    with attempt_at(run, killed=True):
        assert seen(run).state == "running"
    assert "killed, replaced by a later attempt, or ended by a second signal: its end" in "\n".join(as_lines(seen(run)))


def test_an_end_that_is_recorded_while_the_records_are_read_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is gone by now may have recorded its end after `status` read that it runs."""
    run = tmp_path / "run"

    def ends(_process: object) -> bool:
        with suppress(Preempted):
            opening.__exit__(Preempted, Preempted("stopped by SIGTERM"), None)
        return True

    monkeypatch.setattr("job.results.status.has_ended", ends)
    opening = attempt_at(run)
    opening.__enter__()
    assert seen(run).state == "preempted"


def test_a_preempted_run_waits(tmp_path: Path) -> None:
    """It says why the attempt ended, at which stage and step, and what is saved."""
    run = tmp_path / "run"
    with suppress(Preempted), attempt_at(run) as attempt, attempt.timed(Stage.TRAIN):
        train(attempt)
        save(run, 5)
        raise Preempted("stopped by SIGTERM; step 5 of 96 is saved")
    found = seen(run, 10_000)
    assert (found.state, headline(found)) == ("preempted", "preempted, waiting for the next attempt")
    assert (found.stage, found.checkpoints) == ("train", (5,))
    text = "\n".join(as_lines(found))
    assert "7 of 96 (when the attempt ended)" in text
    assert "preempted with code 75 (preempted; a restart resumes the run): stopped by SIGTERM; step 5" in text


def test_what_is_saved_is_told_apart_from_what_is_lost(tmp_path: Path) -> None:
    """A new attempt that has done no step yet stands at the last checkpoint, not at the step that was lost."""
    run = tmp_path / "run"
    with attempt_at(run, killed=True) as attempt:
        train(attempt)
        save(run, 5)
    with attempt_at(run):
        found = seen(run)
    assert (found.step, found.total_steps, found.step_from, found.loss) == (5, 96, "checkpoint", None)
    assert "5 of 96 (at the last checkpoint)" in "\n".join(as_lines(found))


@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        (DataError([Problem("rows.jsonl, line 3", "no output")]), 65, "rows.jsonl, line 3: no output"),
        (JobError("the key hunter2 is wrong"), 1, "the key *** is wrong"),
        (ZeroDivisionError("by hunter2"), 1, "ZeroDivisionError: by ***"),
        (JobError("\x1b[2J" + "long " * 1000), 1, None),
    ],
)
def test_a_failed_run_says_with_which_code(tmp_path: Path, error: Exception, code: int, why: str | None) -> None:
    """The exit code, its meaning and the error's text, in which no secret stands, are in the attempt's record."""
    run = tmp_path / "run"
    log.configure("json", "error", ["hunter2"])
    with pytest.raises(type(error)), attempt_at(run), suppress(Preempted):
        raise error
    found = seen(run)
    assert found.state == "failed"
    assert headline(found).startswith(f"failed with code {code} (")
    assert headline(found).endswith("correct the cause before the next attempt" if code == 65 else "resumes the run")
    assert found.last_end is not None
    assert found.last_end.exit_code == code
    assert b"hunter2" not in (run / attempt_key(1)).read_bytes()
    assert len(found.last_end.why or "") <= 500
    if why is not None:
        assert found.last_end.why == why


def test_an_idle_run_has_failed(tmp_path: Path) -> None:
    """An attempt that ends with 71 instead of 75 is not called preempted: the platform counts it."""
    run = tmp_path / "run"
    with pytest.raises(JobError), attempt_at(run, idle=IdleLimit(1)):
        raise Preempted("stopped by SIGTERM")
    words, found = "failed with code 71 (several attempts in a row made no progress)", seen(run)
    assert headline(found) == f"{words}; the next attempt resumes the run"
    [end] = [line for line in as_lines(found) if "attempt 1 ended" in line]
    assert words in end
    assert "preempted with" not in end


def test_a_stall_is_recorded_before_the_watchdog_ends_the_process(tmp_path: Path) -> None:
    """The record says why, with the code that the watchdog ends the process with, and the next attempt counts it."""
    run, idle = tmp_path / "run", IdleLimit(2)
    with attempt_at(run, killed=True, idle=idle):
        idle.record_stall("no progress for 1800 s")
    found = seen(run)
    assert found.last_end is not None
    assert (found.last_end.exit_code, found.last_end.outcome) == (74, "stalled")
    assert found.last_end.why == "no progress for 1800 s"
    words = "failed with code 74 (no progress for too long; a restart resumes the run)"
    assert headline(found) == f"{words}; the next attempt resumes the run"
    with pytest.raises(NoProgress), attempt_at(run, idle=IdleLimit(2)):
        raise Preempted("stopped by SIGTERM")


def test_an_attempt_that_has_written_nothing_yet(tmp_path: Path) -> None:
    """Between taking the lease and the first record the run is running; for ever, it is stalled."""
    run = tmp_path / "run"
    take(LocalStore(run), "host")
    found = seen(run)
    assert (found.state, found.attempt, found.stage) == ("running", 1, None)
    assert "between two stages" in "\n".join(as_lines(found))
    assert seen(run, 2 * STALLED_SECONDS).state == "stalled"


def test_a_finished_run(tmp_path: Path) -> None:
    """With whether its gate is met; the path of its manifest names it too."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(60, improved=30)})
    found = seen(run)
    assert (found.state, found.step_from, found.problems) == ("finished", "training", ())
    assert found.step == found.total_steps
    assert found.stages_done == ("pull", "evaluate-base", "train", "evaluate-adapter")
    assert replace(seen(run / "results.json"), silent_seconds=None) == replace(found, silent_seconds=None)
    for passed, words in ((True, "finished, gate met"), (False, "finished, gate not met"), (None, "finished")):
        forge(run, lambda results, passed=passed: results["gate"].update(passed=passed))
        assert headline(seen(run)) == words


def test_the_outcome_of_a_finished_run(tmp_path: Path) -> None:
    """As `run` prints it at its end: accuracy with its paired difference, and where the report and the manifest are."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(60, improved=30)})
    status = seen(run)
    results = unsealed((run / "results.json").read_bytes())
    assert list(status.outcome) == summary(results, f"{run}/results.json")
    text = "\n".join(as_lines(status))
    assert "  outcome " in text
    assert "quiz, 60 questions: accuracy 25.00 % -> 75.00 % (+50.00, 95 % interval " in text
    assert f"results: {run}/results.json" in text


def test_the_result_of_a_finished_run_as_values(tmp_path: Path) -> None:
    """Figures are the manifest's; adapter, report and each published export are paths of files that are there."""
    right = [True] * 45 + [False] * 15
    run = publish_run(tmp_path / "run", {"quiz": pairs(60, improved=30)}, exported={"original": right})
    (run / "artifacts/report.html").write_bytes(b"page")
    report = asdict(Artifact("artifacts/report.html", 4, "0" * 64))
    forge(run, lambda results: results["artifacts"].append(report))
    status = seen(run)
    manifest = unsealed((run / "results.json").read_bytes())
    task, result = manifest["evaluation"]["tasks"]["quiz"], status.result
    assert result is not None
    assert status.resume is None
    [compared] = result.comparisons
    assert (compared.name, compared.metric, compared.questions) == ("quiz", "acc", 60)
    assert (compared.base, compared.adapter, compared.delta) == (0.25, 0.75, 0.5)
    assert (list(compared.ci95), compared.p, compared.verdict) == (task["ci95"], task["mcnemar_p"], "improved")
    assert (result.attempts, result.seconds) == (1, manifest["cost"]["seconds"])
    assert (result.adapter, result.report) == (f"{run}/artifacts/adapter", f"{run}/artifacts/report.html")
    assert result.exports == {"merged": f"{run}/artifacts/export/merged"}
    assert all(Path(at).exists() for at in (result.adapter, result.report, result.results, *result.exports.values()))
    shown = [line.split() for line in as_lines(status)]
    assert ["adapter", result.adapter] in shown
    assert ["export", "merged", result.exports["merged"]] in shown


def test_a_manifest_of_an_earlier_version(tmp_path: Path) -> None:
    """What it does not have is not shown: exports, groups, tasks without choices, a report."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(60, improved=30)})

    def older(results: dict[str, Any]) -> None:
        results.pop("exports", None)
        for name in ("groups", "measured", "full_precision", "precision", "near_ties"):
            results["evaluation"].pop(name, None)
        results["artifacts"] = [one for one in results["artifacts"] if not one["path"].endswith("report.html")]

    forge(run, older)
    status = seen(run)
    assert (status.state, status.problems) == ("finished", ())
    assert status.result is not None
    assert (status.result.report, status.result.exports, len(status.result.comparisons)) == (None, {}, 1)


def test_where_the_next_attempt_goes_on(tmp_path: Path) -> None:
    """From the newest checkpoint while training is not finished, then after the last finished stage."""
    run = tmp_path / "run"
    with attempt_at(run, killed=True):
        pass
    assert seen(run).resume == Resume(None, None, None)
    assert "begins anew: no stage is finished" in "\n".join(as_lines(seen(run)))
    with attempt_at(run, killed=True) as attempt:
        LocalStore(run).write("stages/pull.json", b"{}")
        train(attempt)
        assert seen(run).resume == Resume("pull", None, 7)
        assert "after stage pull; training begins anew; at least 7 steps to repeat" in "\n".join(as_lines(seen(run)))
        save(run, 5)
    status = seen(run)
    assert status.resume == Resume("pull", 5, 2)
    assert "goes on after step 5, from its checkpoint; at least 2 steps to repeat" in "\n".join(as_lines(status))
    with attempt_at(run, killed=True):  # which has not trained yet
        assert seen(run).resume == Resume("pull", 5, None)
        LocalStore(run).write("stages/train.json", b"{}")
        assert "goes on after stage train" in "\n".join(as_lines(seen(run)))
        assert seen(run).resume == Resume("train", None, 0)


def test_who_may_resume_a_run_is_told_its_id(tmp_path: Path) -> None:
    """A generated id is nowhere in the command that was typed; a run that goes on needs no start."""
    run = tmp_path / "run"
    with attempt_at(run, killed=True):
        pass
    words = "the same command with JOB_RUN__ID=run"
    for state, told in (("killed", True), ("preempted", True), ("running", False), ("stalled", False)):
        assert (words in "\n".join(as_lines(replace(seen(run), state=state)))) == told
    assert words not in "\n".join(as_lines(replace(seen(run), state="killed", exported_run="another")))


@pytest.mark.parametrize(
    "change",
    [
        lambda results: results["training"].update(loss="low"),
        lambda results: results["evaluation"]["tasks"]["quiz"].pop("ci95"),
        lambda results: results.update(cost=[]),
        lambda results: results["evaluation"].update(tasks={"quiz": 1}),
    ],
)
def test_an_outcome_that_cannot_be_formed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest of another version may lack what it needs: the state is told all the same, `verify` checks figures."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(60, improved=30)})
    forge(run, change)
    status = seen(run)
    assert (status.state, status.problems, status.outcome) == ("finished", (), ())


def test_a_published_file_that_is_gone(tmp_path: Path) -> None:
    """A run is not called finished that the job itself would go on with."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(60, improved=30)})
    (run / "artifacts/adapter/adapter_model.safetensors").unlink()
    found = seen(run)
    assert found.state == "damaged"
    assert "1 published file missing" in str(found.problems[0])
    (run / "results.json").unlink()
    found = seen(run)
    assert found.state == "damaged"
    assert "results.json: is missing, although an attempt has completed the run" in str(found.problems[0])


def test_no_run(tmp_path: Path) -> None:
    """A folder without records is a run that has not started; one with runs in it is refused, and names one."""
    found = seen(tmp_path / "nowhere")
    assert (found.state, headline(found)[:11]) == ("not-started", "not started")
    assert not (tmp_path / "nowhere").exists()
    with attempt_at(tmp_path / "run"):
        pass
    mistyped = seen(tmp_path / "rum")
    assert (mistyped.state, mistyped.runs_beside) == ("not-started", (f"{tmp_path}/run",))
    assert f"runs beside it  {tmp_path}/run" in "\n".join(as_lines(mistyped))
    with pytest.raises(SettingsError, match=re.escape(f"such as {tmp_path}/run")):
        seen(tmp_path)


def test_the_first_of_two_stages(tmp_path: Path) -> None:
    """Of `sft,dpo` the first stage is shown until the second one begins, and said to be that."""
    run = tmp_path / "run"
    with attempt_at(run / "sft") as attempt, attempt.timed(Stage.TRAIN):
        train(attempt)
        found = seen(run)
    assert (found.run, found.state, found.first_stage, found.step) == (str(run), "running", True, 7)
    assert headline(found) == "first stage (sft) of two: running"
    shutil.rmtree(run / "sft")
    publish_run(run / "sft", {"quiz": pairs(60)})
    assert headline(seen(run)).startswith("first stage (sft) of two: stalled")  # it was published months ago
    with attempt_at(run):
        assert not seen(run).first_stage


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """Its records have no figures: what they tell is shown, and the step is that of the last checkpoint."""
    store = LocalStore(tmp_path / "run")
    save(tmp_path / "run", 20)
    for record, words in (
        (replace(ATTEMPTS[0], outcome="failed"), "failed (the version of the job that ran it did not record the"),
        (ATTEMPTS[0], "preempted, waiting for the next attempt"),
        (replace(ATTEMPTS[0], outcome="running", finished=None), "stalled (nothing recorded for "),
        (replace(ATTEMPTS[0], outcome="killed", finished=None), "stalled (nothing recorded for "),
    ):
        store.write(attempt_key(1), sealed(asdict(record)))
        found = seen(tmp_path / "run")
        assert headline(found).startswith(words)
        assert (found.step, found.step_from, found.stage) == (20, "checkpoint", "train")
        assert found.last_sign_of_life == "2026-01-05T09:05:00.000Z"


def cut(data: bytes) -> bytes:
    """Half of a file."""
    return data[: len(data) // 2]


@pytest.mark.parametrize("key", [LEASE, attempt_key(1), marker_key(5), "results.json"])
@pytest.mark.parametrize(
    "damage", [cut, lambda _: b"", lambda _: b"[1]", lambda _: sealed({"a": 1}), lambda _: b"\xff\x00{"]
)
def test_damaged_records_are_named(tmp_path: Path, key: str, damage: Callable[[bytes], bytes]) -> None:
    """Whatever lies in place of a record, the status is told from the others, and the damaged one is named."""
    with attempt_at(tmp_path / "run") as attempt:
        train(attempt)
        save(tmp_path / "run", 5)
        run = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    path = run / key
    path.write_bytes(damage(path.read_bytes() if path.exists() else sealed({"run": 1})))
    found = seen(run)
    assert [problem.where for problem in found.problems] == [f"{run}/{key}"]
    assert (found.state, found.step) == ("running", 5 if key == attempt_key(1) else 7)
    assert any(line.lstrip().startswith("damaged") for line in as_lines(found))


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    """The settings that the run began with; those of earlier versions have no seal, and are not damaged."""
    with attempt_at(tmp_path / "run"):
        path = tmp_path / "run" / SETTINGS
        path.write_bytes(b'{"train.epochs": 1}')
        assert seen(tmp_path / "run").problems == ()
        for damaged in (b'{"train.epochs": 1', b"", b"[1]", sealed({"train.epochs": 1}).replace(b"1", b"2", 1)):
            path.write_bytes(damaged)
            assert [problem.where for problem in seen(tmp_path / "run").problems] == [str(path)]


def test_the_fields_of_the_json_are_documented() -> None:
    """Each field that `--format json` prints stands in the documentation of its class, and no other does."""
    for kind in (RunStatus, AttemptEnd, Resume, OutcomeValues, MetricComparison):
        documented = re.findall(r"^        (\w+): ", kind.__doc__ or "", re.MULTILINE)
        assert documented == [one.name for one in fields(kind)]
    printed: dict[str, Any] = as_json(RunStatus("/run", "failed", last_end=AttemptEnd(1, "failed", 2, "m", "w", None)))
    assert list(printed) == [one.name for one in fields(RunStatus)]
    assert list(printed["last_end"]) == [one.name for one in fields(AttemptEnd)]
