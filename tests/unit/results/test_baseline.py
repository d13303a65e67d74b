"""The gate's baseline: a complete earlier run with the same questions, or an error before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from job.errors import DataError, SettingsError
from job.records import Artifact, Evaluated
from job.results.baseline import Baseline, check_prompts, check_questions, read_baseline, warn_of_other_dtype
from job.results.reader import open_run
from job.runs.layout import answers_key
from job.storage.local import LocalStore
from job.storage.open import StorageOptions
from job.verification.verify import verify
from tests.published_run import forge, pairs, publish_file, publish_run, rewrite

QUIZ = "artifacts/evaluation/quiz.baseline.jsonl"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A run."""
    return publish_run(tmp_path / "earlier", {"quiz": pairs(40, improved=10)})


@pytest.fixture
def baseline(earlier: Path) -> Baseline:
    """The same run as the gate's baseline."""
    return read_baseline(str(earlier), StorageOptions())


def questions(baseline: Baseline) -> dict[str, list[tuple[str, str]]]:
    """Id and row hash of each question, by task."""
    return {task: found.questions for task, found in baseline.tasks.items()}


def test_an_earlier_run_is_read(earlier: Path, baseline: Baseline) -> None:
    """From its folder or its manifest: its adapter's answers, and the questions they are to."""
    assert replace(baseline, results="") == replace(
        read_baseline(f"{earlier}/results.json", StorageOptions()), results=""
    )
    assert (baseline.run, baseline.results) == ("earlier", str(earlier))
    assert baseline.tasks["quiz"].scores.correct == tuple(after for _, after in pairs(40, improved=10))
    assert baseline.tasks["quiz"].data == (earlier / answers_key("quiz", "adapter")).read_bytes()
    assert baseline.tasks["quiz"].questions[0][0] == "quiz-0"


def test_no_run_is_a_wrong_setting(tmp_path: Path) -> None:
    """A path with nothing there is told under the setting's name."""
    with pytest.raises(SettingsError, match=r"JOB_GATE__BASELINE: .*nowhere: is not a run"):
        read_baseline(str(tmp_path / "nowhere"), StorageOptions())


@pytest.mark.parametrize("damage", ["manifest", "answers", "missing", "unfinished"])
def test_a_damaged_run_is_no_baseline(earlier: Path, damage: str) -> None:
    """What is not as it was published is refused, with the file."""
    answers, manifest = earlier / answers_key("quiz", "adapter"), earlier / "results.json"
    match damage:
        case "manifest":
            manifest.write_bytes(manifest.read_bytes().replace(b"0.5", b"0.6", 1))
        case "answers":
            answers.write_bytes(answers.read_bytes().replace(b"0.0", b"1.0", 1))
        case "missing":
            answers.unlink()
        case "unfinished":
            manifest.unlink()
    name = "results" if damage in {"manifest", "unfinished"} else "quiz"
    with pytest.raises(DataError, match=rf"JOB_GATE__BASELINE: .*{name}"):
        read_baseline(str(earlier), StorageOptions())


def test_a_baseline_scored_in_another_dtype_is_told(baseline: Baseline) -> None:
    """The gate would count the difference of the two as one of the adapters."""
    with capture_logs() as told:
        warn_of_other_dtype(baseline, "fp32")
        assert told == []
        warn_of_other_dtype(baseline, "fp16")
    assert [(one["baseline"], one["dtype"]) for one in told] == [("fp32", "fp16")]


def test_the_same_questions_pass(baseline: Baseline) -> None:
    """And a task that only the earlier run was asked does not matter."""
    check_questions(baseline, questions(baseline), "acc")
    check_questions(baseline, {}, "acc")
    check_prompts(baseline, {"quiz": baseline.tasks["quiz"].scores})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda asked: {"riddles": asked["quiz"]}, "run earlier was not asked riddles"),
        (lambda asked: {"quiz": asked["quiz"][:-1]}, "quiz: 40 questions there and 39 here"),
        (lambda asked: {"quiz": [("x", "y"), *asked["quiz"][1:]]}, "number 1 is 'quiz-0' there and 'x' here"),
        (lambda asked: {"quiz": [*asked["quiz"][:-1], ("quiz-39", "y")]}, "number 40 is 'quiz-39' reads differently"),
    ],
)
def test_other_questions_are_refused(
    baseline: Baseline, change: Callable[[Any], dict[str, list[tuple[str, str]]]], why: str
) -> None:
    """By task, with the first one that differs."""
    with pytest.raises(DataError, match=f"{why}.*cannot be compared"):
        check_questions(baseline, change(questions(baseline)), "acc")


def test_a_metric_that_the_earlier_run_lacks(baseline: Baseline) -> None:
    """The gate's metric has to be there on both sides."""
    quiz = baseline.tasks["quiz"]
    without = replace(baseline, tasks={"quiz": replace(quiz, scores=replace(quiz.scores, correct_norm=None))})
    check_questions(without, questions(baseline), "acc")
    with pytest.raises(DataError, match="quiz has no acc_norm"):
        check_questions(without, questions(baseline), "acc_norm")


def test_questions_in_other_words_are_refused(baseline: Baseline) -> None:
    """The same rows may be asked otherwise by another version of the harness."""
    other = {"quiz": replace(baseline.tasks["quiz"].scores, task_hash="0" * 64)}
    with pytest.raises(DataError, match="quiz: run earlier was asked the same questions in another wording"):
        check_prompts(baseline, other)


@pytest.fixture
def gated(tmp_path: Path, earlier: Path, baseline: Baseline) -> Path:
    """A later run that was gated by the earlier one: worse on five questions."""

    def against(store: LocalStore, adapter: Evaluated) -> tuple[dict[str, Any], list[Artifact]]:
        return baseline.compared(adapter.scores), [publish_file(store, QUIZ, baseline.tasks["quiz"].data)]

    settings = [f"--gate.baseline={earlier}", "--gate.max_regression=0.01"]
    return publish_run(tmp_path / "later", {"quiz": pairs(40, regressed=5)}, settings=settings, baseline=against)


def failed(run: Path, work: Path) -> dict[str, str]:
    """The checks that do not hold, and the first difference of each."""
    work.mkdir()
    return {check.what: str(check.differences[0]) for check in verify(open_run(str(run)), work) if check.differences}


def test_a_gated_run_carries_its_evidence(gated: Path, earlier: Path, tmp_path: Path) -> None:
    """It verifies without the earlier run, whose answers lie beside its own."""
    shutil.rmtree(earlier)
    assert json.loads((gated / "results.json").read_bytes())["gate"]["baseline"]["dtype"] == "fp32"
    assert failed(gated, tmp_path / "work") == {}
    forge(gated, lambda results: results["gate"].update(passed=True, reasons=[]))
    assert failed(gated, tmp_path / "work2") == {"gate": "results.json gate.passed: claimed true, found false"}


def test_a_false_comparison_with_the_earlier_run_is_found(gated: Path, tmp_path: Path) -> None:
    """Figures of the comparison, and the answers that it rests on."""
    forge(gated, lambda results: results["gate"]["baseline"]["tasks"]["quiz"].update(regressed=1))
    assert failed(gated, tmp_path / "1")["gate"].startswith(
        "results.json gate.baseline.tasks.quiz.regressed: claimed 1"
    )
    forge(gated, lambda results: results["gate"]["baseline"]["tasks"].clear())
    assert "gate" in failed(gated, tmp_path / "2")
    lines = (gated / QUIZ).read_bytes().splitlines(keepends=True)
    rewrite(gated, QUIZ, b"".join([lines[1], lines[0], *lines[2:]]))
    assert "gate" in failed(gated, tmp_path / "3")
