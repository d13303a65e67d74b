"""`verify`: an unchanged run passes; any change, even with recomputed hashes, is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from job.common.hashing import sealed, unsealed
from job.errors import AccessDenied, SettingsError, VerificationError
from job.evaluation import near_ties
from job.evaluation.groups import compare_groups
from job.evaluation.policy_verdict import sentence
from job.records import AdapterRecord, AuditRecord, Evaluated, GroupSpec
from job.report.report import read_report_data, render_report
from job.results import manifest
from job.results.reader import open_run
from job.runs.layout import attempt_key
from job.runs.run_log import parse_record
from job.runs.stage_records import parse
from job.storage.local import LocalStore
from job.verification.differences import CheckResult
from job.verification.verify import as_json, as_lines, require_verified, verify
from tests.published_run import forge, pairs, publish_file, publish_run, rewrite

ADAPTER = "artifacts/adapter/adapter_model.safetensors"
TASK = "artifacts/evaluation/quiz.adapter.jsonl"
MARKER = "checkpoints/step-00000004/COMMITTED.json"
CHECKPOINT = "checkpoints/step-00000004/0002"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts, the first of them killed, on two tasks."""
    answers = {"quiz": pairs(60, improved=14, regressed=2), "riddles": pairs(20, regressed=3)}
    return publish_run(tmp_path_factory.mktemp("published") / "a-run", answers, attempts=2)


@pytest.fixture
def run(published: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(published, tmp_path / "a-run"))


@pytest.fixture
def check(run: Path, tmp_path: Path) -> Callable[[], dict[str, CheckResult]]:
    """Verifies the copy; returns the checks that do not hold, by name."""

    def checked() -> dict[str, CheckResult]:
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return {found.what: found for found in verify(open_run(str(run)), work) if found.differences}

    return checked


Checker = Callable[[], dict[str, CheckResult]]


def told(failed: dict[str, CheckResult]) -> str:
    """All that differs, as a person reads it."""
    return "\n".join(str(difference) for found in failed.values() for difference in found.differences)


def test_a_published_run_verifies(check: Checker) -> None:
    """Everything holds in a run that nobody touched, although one of its attempts was killed."""
    assert check() == {}


def test_marks_of_sagemaker_need_not_be_there(run: Path, check: Checker) -> None:
    """Earlier versions listed them in manifests of runs that SageMaker copied to S3, where they never are."""
    mark = {"path": "stages/pull.json.sagemaker-uploaded", "bytes": 0, "sha256": "0" * 64}
    forge(run, lambda results: results["evidence"].append(mark))
    assert check() == {}


def test_every_file_is_vouched_for(run: Path, check: Checker) -> None:
    """A flipped bit in the middle of any file is reported with the file's name."""
    for path in files_of(run):
        name, data = path.relative_to(run).as_posix(), path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        assert name in told(check())
        path.write_bytes(data)
    assert check() == {}


@pytest.mark.long
def test_every_file_is_missed(run: Path, check: Checker) -> None:
    """A file that is gone is named, whichever it is."""
    for path in files_of(run):
        name, data = path.relative_to(run).as_posix(), path.read_bytes()
        path.unlink()
        if name == "results.json":
            with pytest.raises(VerificationError, match=r"results\.json: is missing"):
                check()
        else:
            assert name in told(check())
        path.write_bytes(data)
    assert check() == {}


@pytest.mark.parametrize("name", ["results.json", "artifacts/adapter/adapter_model.safetensors"])
def test_a_missing_file_is_named(run: Path, check: Checker, name: str) -> None:
    """The manifest by an error, since nothing can be said without it; any other file among the differences."""
    (run / name).unlink()
    if name == "results.json":
        with pytest.raises(VerificationError, match=r"results\.json: is missing"):
            check()
    else:
        assert name in told(check())


def files_of(run: Path) -> list[Path]:
    """All that the run published."""
    return sorted(path for path in run.rglob("*") if path.is_file() and ".store" not in path.parts)


def change(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a value of a manifest."""

    def changed(results: dict[str, Any]) -> None:
        *way, name = [int(part) if part.isdigit() else part for part in place.split("/")]
        inner: Any = results
        for part in way:
            inner = inner[part]
        assert inner[name] != value
        inner[name] = value

    return changed


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("evaluation/tasks/quiz/delta", 0.25, "evaluation"),
        ("evaluation/tasks/quiz/improved", 15, "evaluation"),
        ("evaluation/tasks/quiz/regressed", 1, "evaluation"),
        ("evaluation/tasks/quiz/ci95/0", 0.1, "evaluation"),
        ("evaluation/tasks/quiz/mcnemar_p", 1e-30, "evaluation"),
        ("evaluation/tasks/quiz/holm_p", 1e-4, "evaluation"),
        ("evaluation/tasks/quiz/minimum_detectable_effect", 0.01, "evaluation"),
        ("evaluation/tasks/riddles/verdict", "improved", "evaluation"),
        ("evaluation/tasks/quiz/n", 61, "evaluation"),
        ("evaluation/tasks/quiz/task_hash", "0" * 64, "evaluation"),
        ("evaluation/tasks/quiz/base/acc", 0.45, "evaluation"),
        ("evaluation/tasks/quiz/adapter/stderr", 0.01, "evaluation"),
        ("evaluation/tasks/quiz/adapter/acc_norm", 0.9, "evaluation"),
        ("evaluation/tasks/quiz/acc_norm/delta", 0.9, "evaluation"),
        ("gate/passed", True, "gate"),
        ("gate/min_delta", 0.1, "gate"),
        ("gate/metric", "acc_norm", "gate"),
        ("gate/max_regression", 0.5, "gate"),
        ("training/steps", 5, "training"),
        ("training/examples", 17, "training"),
        ("training/target_tokens", 171, "training"),
        ("training/loss", 2.5, "training"),
        ("training/seconds", 2.0, "training"),
        ("training/peak_memory_bytes", 1, "stages"),
        ("cost/seconds", 60.0, "cost"),
        ("cost/repeated_steps", 1, "cost"),
        ("cost/usd", 0.01, "cost"),
        ("cost/goodput", 0.9, "cost"),
        ("cost/wasted_seconds", 0.0, "cost"),
        ("cost/energy_kwh", 1.0, "cost"),
        ("cost/stages/train/usd", 0.0, "cost"),
        ("cost/attempts/1/wasted_usd", 0.0, "cost"),
        ("run/attempts/0/usd_per_hour", 0.5, "attempts"),
        ("run/attempts/1/energy_joules", 1e6, "attempts"),
        ("settings/train.learning_rate/value", 1.0, "settings"),
        ("settings/train.epochs/value", 3, "training"),
        ("settings/train.epochs/value", 1, "training"),
        ("settings/train.max_steps/value", 3, "training"),
        ("settings/train.global_batch_size/value", 0, "training"),
        ("training/steps", 3, "checkpoints"),
        ("evaluation/tasks/quiz/delta", 0.5, "stages"),
        ("dataset/sha256", "0" * 64, "stages"),
        ("dataset/licences", {"rows.jsonl": "mit"}, "stages"),
        ("model/licence", "mit", "stages"),
        ("dataset/rows", 9, "stages"),
        ("model/sha256", "0" * 64, "stages"),
        ("model/revision", "main", "stages"),
        ("run/attempts/0/steps", 3, "attempts"),
        ("run/attempts/1/last_step", 3, "attempts"),
        ("run/attempts/1/seconds", 99.0, "attempts"),
        ("run/attempts/1/stage_seconds/train", 1.0, "attempts"),
        ("run/started", "2026-01-05T08:00:00Z", "attempts"),
        ("artifacts/0/path", "artifacts/../lease.json", "artifacts"),
        ("artifacts/0/path", "/etc/passwd", "artifacts"),
        ("artifacts/0/path", "settings.json", "other files"),
        ("artifacts/0/bytes", 10**15, "artifacts"),
        ("evidence/0/path", "artifacts/metrics.jsonl", "other files"),
        ("evidence/0/sha256", "0" * 64, "evidence"),
    ],
)
def test_a_false_claim_is_found_behind_a_true_seal(
    run: Path, check: Checker, place: str, value: Any, what: str
) -> None:
    """A figure or fingerprint that does not follow from the run's files is named, though the manifest is sealed."""
    forge(run, change(place, value))
    failed = check()
    assert what in failed
    assert "manifest" not in failed


def test_a_run_of_an_earlier_version_verifies(run: Path, check: Checker) -> None:
    """Fields that its manifest lacks, since they came later, are as if they had their defaults."""

    def older(results: dict[str, Any]) -> None:
        for part, names in {
            "dataset": ("validation", "sources", "long_rows"),
            "training": ("validation", "method", "beta", "reference", "preference", "start_sha256"),
        }.items():
            for name in names:
                del results[part][name]

    forge(run, older)
    failed = check()
    assert "stages" not in failed


def test_differences_tell_place_and_both_values(run: Path, check: Checker) -> None:
    """A person reads what is claimed where, and what was found."""
    forge(run, change("evaluation/tasks/quiz/improved", 15))
    (difference,) = check()["evaluation"].differences
    assert str(difference) == "results.json evaluation.tasks.quiz.improved: claimed 15, found 14"


def records(run: Path) -> list[dict[str, Any]]:
    """The adapter's answers."""
    return [json.loads(line) for line in (run / TASK).read_bytes().splitlines()]


def put(run: Path, rows: list[dict[str, Any]]) -> None:
    """Publishes other answers of the adapter, with their hashes."""
    rewrite(run, TASK, "".join(json.dumps(row) + "\n" for row in rows).encode())


def test_an_answer_has_to_follow_from_its_likelihoods(run: Path, check: Checker) -> None:
    """A wrong answer that is marked right is found in its own line, also when every sum was made to fit."""
    rows = records(run)
    number = next(n for n, row in enumerate(rows) if not row["acc"])
    rows[number]["acc"] = 1.0
    put(run, rows)
    assert f"{TASK} line {number + 1}" in told(check())


@pytest.mark.parametrize(
    ("key", "value"),
    [("prediction", 2), ("prediction_norm", 2), ("log_likelihoods", [-1.0]), ("acc", 0.5), ("doc_hash", "x")],
)
def test_a_record_that_cannot_be_is_named(run: Path, check: Checker, key: str, value: Any) -> None:
    """Predictions that are not the likeliest choice, and values of no record's kind."""
    rows = records(run)
    rows[3][key] = value
    put(run, rows)
    assert TASK in told({"evaluation": check()["evaluation"]})
    assert "line 4" in told(check())


def test_questions_have_to_be_the_same_on_both_sides(run: Path, check: Checker) -> None:
    """Answers in another order are not paired with those of the base."""
    rows = records(run)
    put(run, [rows[1], rows[0], *rows[2:]])
    assert 'quiz.base.jsonl line 1: claimed question "quiz-1" as the adapter was asked' in told(check())


@pytest.mark.parametrize("key", ["id", "doc_hash", "prompt_hash", "target_hash"])
def test_each_question_is_the_bases(run: Path, check: Checker, key: str) -> None:
    """Another id, row, prompt or right answer on one side is another question, whatever else is alike."""
    rows = records(run)
    rows[6][key] = "quiz-99" if key == "id" else "1" * 64
    put(run, rows)
    assert "quiz.base.jsonl line 7: claimed question" in told({"evaluation": check()["evaluation"]})


@pytest.mark.parametrize("path", [ADAPTER, TASK, "artifacts/evaluation/riddles.base.jsonl", "artifacts/metrics.jsonl"])
def test_files_are_those_of_the_stages(run: Path, check: Checker, path: str) -> None:
    """A file that was exchanged with all its hashes in the manifest still has another hash in its stage's record."""
    rewrite(run, path, b" " + (run / path).read_bytes())
    assert "results.json artifacts.sha256" in told({"stages": check()["stages"]})


def test_answers_that_are_missing(run: Path, check: Checker) -> None:
    """Fewer answers than the manifest counts."""
    put(run, records(run)[:-1])
    assert "results.json evaluation.tasks.quiz.n: claimed 60, found 59" in told(check())


def test_metrics_that_are_no_metrics(run: Path, check: Checker) -> None:
    """A file with the right hash that does not hold the steps."""
    lines = (run / "artifacts/metrics.jsonl").read_bytes().splitlines(keepends=True)
    for other, why in (
        (b'{"step": 1}\n', "line 2: epoch: Field required"),
        (b'{"step": "x"}\n', "line 2: step: Input should be"),
    ):
        rewrite(run, "artifacts/metrics.jsonl", b"".join([lines[0], other, *lines[2:]]))
        failed = check()
        assert f"artifacts/metrics.jsonl: claimed the metrics of one step on each line, found {why}" in told(failed)


def test_files_that_nobody_vouches_for_are_named(run: Path, check: Checker) -> None:
    """An extra file among the artifacts, in the run's folder, or in a checkpoint's folder is named."""
    for name in ("artifacts/adapter/adapter_model.bin", "notes.txt", "checkpoints/step-00000004/0002/more", "x\n.txt"):
        path = run / name
        path.write_bytes(b"1234")
        (difference,) = check()["other files"].differences
        assert difference.found == "a file of 4 bytes"
        assert difference.where == name
        path.unlink()


def test_a_hostile_name_cannot_take_over_the_terminal(run: Path, check: Checker) -> None:
    """Control characters in the names of files and settings are shown as what they are."""
    (run / "x\n\x1b[31m.txt").write_bytes(b"")
    forge(run, lambda results: results["settings"].update({"\x1b[2J": {"value": 1, "source": "default"}}))
    forge(run, change("artifacts/0/path", "artifacts/\x1b[2J"))
    checks = list(check().values())
    assert {check.what for check in checks} >= {"artifacts", "other files"}
    assert all(line.isprintable() for line in as_lines(checks))
    with pytest.raises(VerificationError) as error:
        require_verified(checks)
    assert all(str(problem).isprintable() for problem in error.value.problems)


def test_what_killed_attempts_leave_is_told_and_no_fault(run: Path, check: Checker, tmp_path: Path) -> None:
    """Half a checkpoint of an attempt that was killed, or a probe of the store: notes."""
    for name in ("checkpoints/step-00000004/0001/adapter.safetensors", "checkpoints/step-00000003/0001/a", ".probe-1"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"half")
    assert check() == {}
    (tmp_path / "more").mkdir()
    (found,) = [one for one in verify(open_run(str(run)), tmp_path / "more") if one.notes]
    assert len(found.notes) == 3


def reseal(run: Path, name: str, **changes: Any) -> None:
    """Changes a file that carries a seal of its own."""
    facts = unsealed((run / name).read_bytes())
    (run / name).write_bytes(sealed(facts | changes))


BEFORE: dict[str, Any] = {
    "outcome": "running",
    "finished": None,
    "seconds": 50.0,
    "stage_seconds": {"pull": 1.5, "train": 48.0},
    "energy_joules": 8000.0,
}
"""In a record of the last attempt: as of a note that it wrote in training."""


def test_the_lease_is_the_last_attempts(run: Path, check: Checker) -> None:
    """An earlier attempt cannot have it."""
    reseal(run, "lease.json", epoch=1)
    assert "lease.json: claimed attempt 2 or later, found attempt 1" in told(check())


def test_an_attempt_that_came_too_late_is_told(run: Path, check: Checker) -> None:
    """It took the lease while the one before published, found all done, and is no fault; without the lease it is."""
    record = unsealed((run / attempt_key(2)).read_bytes())
    (run / attempt_key(3)).write_bytes(sealed(record | {"number": 3}))
    assert attempt_key(3) in told({"other files": check()["other files"]})
    reseal(run, "lease.json", epoch=3)
    reseal(run, attempt_key(2), **BEFORE, steps=1)
    assert check() == {}


def test_killed_right_after_publishing(run: Path, check: Checker) -> None:
    """The ledger then has the last note of before; it cannot have lasted longer than the manifest says."""
    reseal(run, attempt_key(2), **BEFORE)
    assert check() == {}
    reseal(run, attempt_key(2), seconds=61.0)
    assert f"{attempt_key(2)} seconds" in told(check())
    reseal(run, attempt_key(2), **BEFORE | {"energy_joules": 9001.0})
    assert f"{attempt_key(2)} energy_joules" in told(check())
    reseal(run, attempt_key(2), **BEFORE | {"stage_seconds": {"pull": 1.5, "train": 50.5}})
    assert f"{attempt_key(2)} stage_seconds.train" in told(check())


def test_a_record_with_a_seal_is_no_other_attempts(run: Path, check: Checker) -> None:
    """A well-sealed record of another attempt in the place of the last one."""
    shutil.copy(run / attempt_key(1), run / attempt_key(2))
    assert "results.json run.attempts[1].number: claimed 2, found 1" in told(check())


def test_a_manifest_of_an_earlier_version_says_nothing_of_steps_that_no_record_has(run: Path, check: Checker) -> None:
    """It has 0 where a killed attempt may have done steps that were repeated; it verifies as it was written."""

    def as_before(results: dict[str, Any]) -> None:
        assert results["cost"].pop("repeated_steps_exact") is False
        results["cost"]["repeated_steps"] = 0

    forge(run, as_before)
    assert check() == {}


def test_no_attempt_can_be_left_out(run: Path, check: Checker) -> None:
    """An attempt that the ledger has and the manifest has not, as its seconds and dollars would be nice to lose."""
    forge(run, lambda results: (results["run"]["attempts"].pop(0), results["cost"].update(seconds=60.5)))
    assert "results.json run.attempts: claimed all attempts, found one more in attempts/0001.json" in told(check())


def test_the_last_record_is_no_older_than_the_manifest(run: Path, check: Checker) -> None:
    """An attempt that ended wrote its record after the manifest: less time or energy in it cannot be."""
    reseal(run, attempt_key(2), seconds=60.0)
    assert f"{attempt_key(2)} seconds: claimed 60.0, found at least 60.5 by results.json" in told(check())
    reseal(run, attempt_key(2), seconds=60.5, energy_joules=8999.0)
    assert f"{attempt_key(2)} energy_joules" in told(check())


def test_the_record_of_a_later_attempt_is_one(run: Path, check: Checker) -> None:
    """Also of an attempt that had nothing to do any more: whatever else lies there is named."""
    reseal(run, "lease.json", epoch=3)
    (run / attempt_key(3)).write_bytes(b"{}")
    assert f"{attempt_key(3)}: claimed a record of the job" in told({"attempts": check()["attempts"]})


def test_an_earlier_versions_count_of_repeated_steps_is_checked(run: Path, check: Checker) -> None:
    """It added up what the attempts recorded, which was none here."""
    forge(run, lambda results: (results["cost"].pop("repeated_steps_exact"), results["cost"].update(repeated_steps=5)))
    assert "results.json cost.repeated_steps: claimed 5, found 0" in told(check())


def remark(run: Path, marker: str = MARKER, **changes: Any) -> None:
    """Changes a marker, with its seal and its hash in the manifest."""
    facts = unsealed((run / marker).read_bytes())
    rewrite(run, marker, sealed(facts | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epoch": 3}, "claimed an attempt of the manifest from 1 on, found attempt 3"),
        ({"epoch": 0}, "claimed an attempt of the manifest from 1 on, found attempt 0"),
        ({"step": 2}, "claimed the step of its folder, found step 2"),
        ({"files": {"../../lease.json": {"bytes": 1, "sha256": "0" * 64}}}, "claimed a commit marker"),
    ],
)
def test_checkpoints_follow_each_other(run: Path, check: Checker, changes: dict[str, Any], expected: str) -> None:
    """Epochs never go back as steps rise, a marker is of its folder's step, and names no file elsewhere."""
    remark(run, **changes)
    assert f"{MARKER}: {expected}" in told({"checkpoints": check()["checkpoints"]})


@pytest.mark.parametrize("path", [MARKER, "stages/train.json", attempt_key(1)])
def test_a_record_of_another_run_is_named(run: Path, check: Checker, path: str) -> None:
    """Markers, stages and attempts name their run; a sealed one of another run is told, one that names none is not."""
    facts = unsealed((run / path).read_bytes())
    own = facts["run"]
    rewrite(run, path, sealed(facts | {"run": "0" * 64}))
    assert f"{path}: claimed a record of the run {own}, found a record of the run {'0' * 64}" in told(check())
    rewrite(run, path, sealed(facts | {"run": None}))
    assert check() == {} or path.startswith("stages/")


def test_the_last_attempt_is_of_this_run(run: Path, check: Checker) -> None:
    """Also the record that no manifest has the hash of."""
    path = run / attempt_key(2)
    path.write_bytes(sealed(unsealed(path.read_bytes()) | {"run": "0" * 64}))
    assert f"{attempt_key(2)}: claimed a record of the run" in told(check())


@pytest.mark.parametrize("other", [{}, {"run": "0" * 64}, {"epoch": 2}, {"step": 4}])
def test_a_marker_that_came_late_is_told_and_no_fault(
    run: Path, check: Checker, tmp_path: Path, other: dict[str, Any]
) -> None:
    """One that an attempt before the last wrote after the run was published; of others nobody could say why."""
    facts = unsealed((run / MARKER).read_bytes()) | {"step": 3, "epoch": 1}
    late = run / "checkpoints" / "step-00000003" / "COMMITTED.json"
    late.parent.mkdir()
    late.write_bytes(sealed(facts | other))
    if other:
        assert "step-00000003/COMMITTED.json: claimed no such file" in told(check())
        return
    assert check() == {}
    (files,) = [found for found in verify(open_run(str(run)), tmp_path) if found.what == "other files"]
    assert "step-00000003/COMMITTED.json was written by an attempt that had been replaced" in files.notes[0]


def test_epochs_never_go_back(run: Path, check: Checker) -> None:
    """A later step cannot be an earlier attempt's."""
    remark(run, MARKER.replace("04", "02"), epoch=2)
    remark(run, epoch=1)
    assert f"{MARKER}: claimed an attempt of the manifest from 2 on, found attempt 1" in told(check())


def test_software_of_another_version_is_told(run: Path, tmp_path: Path, check: Checker) -> None:
    """A checkpoint that other versions wrote makes a run that is not bit-identical, and no false one."""
    software = unsealed((run / MARKER).read_bytes())["software"]
    remark(run, software=software | {"torch": "1.0"})
    assert check() == {}
    (tmp_path / "more").mkdir()
    notes = [note for found in verify(open_run(str(run)), tmp_path / "more") for note in found.notes]
    assert notes == ["the checkpoint of step 4 was written by other versions of torch"]


@pytest.mark.parametrize("weights", [np.zeros((3, 4), np.float32), np.full((4, 3), 4, np.float32)])
def test_the_adapter_is_the_last_states(run: Path, check: Checker, tmp_path: Path, weights: Any) -> None:
    """Other tensors under the adapter's name, with all hashes in order, do not pass for what was trained."""
    save_file({"model.q_proj.lora_A.weight": weights}, tmp_path / "other")
    rewrite(run, ADAPTER, (tmp_path / "other").read_bytes())
    assert f"{ADAPTER}: claimed the tensors of checkpoints/step-00000004/0002/" in told(check())


def test_an_adapter_that_is_none(run: Path, check: Checker) -> None:
    """Bytes that are no tensors are told, not stumbled over."""
    rewrite(run, ADAPTER, b"no tensors")
    assert "an unreadable file" in told({"checkpoints": check()["checkpoints"]})


def test_checkpoints_know_the_published_steps(run: Path, check: Checker) -> None:
    """A loss that was changed in the published metrics is not that of the checkpoints."""
    path = "artifacts/metrics.jsonl"
    lines = [json.loads(line) for line in (run / path).read_bytes().splitlines()]
    lines[0]["loss"] = 0.5
    rewrite(run, path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    assert "metrics.jsonl line 1: claimed step 1 as in artifacts/metrics.jsonl" in told(check())


def rewrite_in_checkpoint(run: Path, name: str, data: bytes) -> None:
    """Replaces a file of the last checkpoint, with its size and hash in the marker."""
    (run / CHECKPOINT / name).write_bytes(data)
    files = unsealed((run / MARKER).read_bytes())["files"]
    remark(run, files=files | {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: lines[:3], "claimed the metrics of 4 steps, found 3 steps"),
        (lambda lines: [*lines[:3], b"[]\n"], "claimed the metrics of one step on each line, found something else"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2: claimed step 2 as in artifacts/metrics"),
    ],
)
def test_metrics_of_a_checkpoint(
    run: Path, check: Checker, change: Callable[[list[bytes]], list[bytes]], expected: str
) -> None:
    """Its marker lists a file that lacks a step, is not JSON lines, or has the steps in another order."""
    lines = (run / CHECKPOINT / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    rewrite_in_checkpoint(run, "metrics.jsonl", b"".join(change(lines)))
    assert f"{CHECKPOINT}/metrics.jsonl" in told(check())
    assert expected in told({"checkpoints": check()["checkpoints"]})


def test_a_step_that_is_missing_in_the_metrics(run: Path, check: Checker) -> None:
    """As many lines as steps, but one of them is a step that was not trained."""
    path = "artifacts/metrics.jsonl"
    rewrite(run, path, (run / path).read_bytes().replace(b'"step": 4', b'"step": 5'))
    assert "claimed the steps 1, 2, 3 and so on" in told({"training": check()["training"]})


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.q_proj.lora_A.weight": np.full((3, 4), 4, np.float32), "more": np.zeros(1, np.float32)},
        {"model.q_proj.lora_B.weight": np.full((3, 4), 4, np.float32)},
        {"model.q_proj.lora_A.weight": np.full((3, 4), 4, np.float32).view(np.int32)},
        {},
    ],
    ids=["one more", "another name", "another dtype", "none"],
)
def test_the_adapter_has_the_last_states_tensors(
    run: Path, check: Checker, tmp_path: Path, tensors: dict[str, Any]
) -> None:
    """None more, none fewer, under their names and in their dtype, though every byte of the numbers is the same."""
    save_file(tensors, tmp_path / "other")
    rewrite(run, ADAPTER, (tmp_path / "other").read_bytes())
    assert f"{ADAPTER}: claimed the tensors of {CHECKPOINT}/" in told({"checkpoints": check()["checkpoints"]})


def test_the_manifest_describes_the_adapters_files(run: Path, check: Checker) -> None:
    """One module of rank 3 with twelve numbers: another rank, kind or number in the manifest is named."""
    config = publish_file(LocalStore(run), "artifacts/adapter/adapter_config.json", b'{"peft_type": "LORA"}')
    claimed = AdapterRecord(
        kind="lora", init="default", use_rslora=False, use_dora=False, modules=1, ranks=3, parameters=12
    )

    def described(adapter: AdapterRecord) -> str:
        forge(run, lambda results: results["training"].update(adapter=asdict(adapter)))
        return told({what: found for what, found in check().items() if what != "stages"})

    forge(run, lambda results: results["artifacts"].append(asdict(config)))
    assert described(claimed) == ""
    for change in ({"ranks": 4}, {"kind": "adalora"}, {"parameters": 24}, {"modules_to_save": ["lm_head"]}):
        (name,) = change
        assert described(replace(claimed, **change)).startswith(f"results.json training.adapter.{name}")


def asked(**settings: str) -> Callable[[dict[str, Any]], None]:
    """Settings that the run did not have."""
    values = {name.replace("__", "."): {"value": value, "source": "default"} for name, value in settings.items()}
    return lambda results: results["settings"].update(values)


def audited(results: dict[str, Any]) -> None:
    """An audit of which there are no findings."""
    results["dataset"]["audit"] = asdict(AuditRecord(8, 0, {}, {}, 0, 0, "0" * 64, 8))


@pytest.mark.parametrize(
    ("forged", "what"),
    [
        (asked(eval__prompts="x"), "prompts"),
        (asked(eval__principles="x"), "principles"),
        (asked(train__method="dpo"), "preferences"),
        (asked(train__method="sft,dpo"), "first stage"),
        (audited, "audit"),
    ],
)
def test_every_part_is_checked(run: Path, check: Checker, forged: Callable[[dict[str, Any]], None], what: str) -> None:
    """Sample answers, a judge, preferences, a first stage, an audit: claimed, and the run has nothing of them."""
    forge(run, forged)
    assert what in check()


def test_savings_follow_from_the_price_without_preemption(tmp_path: Path) -> None:
    """121 seconds for $1.50 an hour instead of $3 save half of it, by the settings and nothing else."""
    run = publish_run(
        tmp_path / "run",
        {"quiz": pairs(20)},
        attempts=2,
        settings=["--cost.usd_per_hour=1.5", "--cost.on_demand_usd_per_hour=3"],
    )
    savings = json.loads((run / "results.json").read_bytes())["cost"]["savings"]
    assert savings["usd"] == pytest.approx(121 / 3600 * 1.5)
    assert savings["percent"] == pytest.approx(50)
    assert _checked(run, tmp_path / "before") == {}
    forge(run, change("cost/savings/usd", 9.0))
    assert "results.json cost.savings.usd: claimed 9.0" in told(_checked(run, tmp_path / "after"))


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 10**6, b"null", b"1" * 5000])
def test_what_is_no_manifest(run: Path, check: Checker, data: bytes) -> None:
    """Garbage in its place is the one difference there is."""
    (run / "results.json").write_bytes(data)
    failed = check()
    assert failed.keys() == {"manifest"}
    assert told(failed).startswith("results.json: claimed the job's manifest, found ")


def test_a_link_leads_nowhere(run: Path, check: Checker, tmp_path: Path) -> None:
    """A symbolic link in the place of a file is not followed."""
    (tmp_path / "secret").write_bytes((run / TASK).read_bytes())
    (run / TASK).unlink()
    (run / TASK).symlink_to(tmp_path / "secret")
    assert f"{TASK}: claimed" in told(check())
    (run / "results.json").rename(tmp_path / "results.json")
    (run / "results.json").symlink_to(tmp_path / "results.json")
    with pytest.raises(AccessDenied):
        check()


def test_where_there_is_no_run(tmp_path: Path) -> None:
    """A wrong path is the user's mistake; a run without results is one that does not verify."""
    with pytest.raises(SettingsError, match="is not a run"):
        verify(open_run(str(tmp_path / "nowhere")), tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lease.json").write_text("{}")
    with pytest.raises(VerificationError, match="is not complete"):
        verify(open_run(str(tmp_path / "run/results.json")), tmp_path)


def test_the_outcome_for_people_and_programs(run: Path, published: Path, tmp_path: Path) -> None:
    """A line a check, with what differs below it, and one of them all; the same as JSON; and an error that names it."""
    (tmp_path / "work").mkdir()
    checks = verify(open_run(str(published)), tmp_path / "work")
    *each, last = as_lines(checks)
    assert [line.split()[0] for line in each] == ["holds"] * len(checks)
    assert last == f"verified: all {len(checks)} checks hold"
    assert as_json("x", checks)["verified"] is True
    require_verified(checks)
    forge(run, change("training/loss", 2.5))
    checks = verify(open_run(str(run)), tmp_path / "work")
    found = json.loads(json.dumps(as_json("x", checks)))
    assert found["verified"] is False
    assert [check["what"] for check in found["checks"] if not check["holds"]] == ["training", "stages"]
    assert any(line.startswith("  results.json training.loss: claimed 2.5, found ") for line in as_lines(checks))
    assert as_lines(checks)[-1] == f"2 of {len(checks)} checks differ"
    with pytest.raises(VerificationError, match=r"results\.json training\.loss: claimed 2\.5, found ") as error:
        require_verified(checks)
    assert error.value.exit_code == 4


def test_the_ledger_reads_back(run: Path) -> None:
    """What the made-up runs hold is what the job reads."""
    assert parse_record((run / attempt_key(1)).read_bytes()).outcome == "running"


@pytest.mark.parametrize(("gain", "passed"), [("0.0", True), ("0.9", False)])
def test_a_policy_is_judged_again(gain: str, passed: bool, tmp_path: Path) -> None:  # noqa: FBT001 - parametrized
    """The rules are in the manifest, so their outcomes follow from the answers; a changed one is found."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"tasks: {{arc: {{role: critical, min_gain: {gain}}}}}")
    folder = publish_run(tmp_path / "run", {"arc": pairs(40, improved=12)}, settings=[f"--gate.policy={policy}"])
    results = json.loads((folder / "results.json").read_bytes())
    manifest.validate(results)
    assert results["gate"]["passed"] is passed
    rule = results["gate"]["policy"]["rules"][0]
    assert (rule["outcome"], rule["found"]) == ("met" if passed else "missed", 0.3)
    page = render_report(results, read_report_data(results, lambda one: folder / one.path))
    assert b"Quality gate by policy" in page
    assert sentence(rule).encode() in page
    (tmp_path / "work").mkdir()
    assert all(not check.differences for check in verify(LocalStore(folder), tmp_path / "work"))
    for change in (
        lambda found: found["gate"]["policy"]["rules"][0].update(outcome="inconclusive"),
        lambda found: found["gate"]["policy"]["asked"]["tasks"]["arc"].update(min_gain=-1.0),
        lambda found: found["gate"]["policy"]["asked"].update(alpha="high"),
        lambda found: found["gate"].pop("policy"),
    ):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        forge(tmp_path / "copy", change)
        shutil.rmtree(tmp_path / "work")
        (tmp_path / "work").mkdir()
        found = verify(LocalStore(tmp_path / "copy"), tmp_path / "work")
        assert any(check.differences for check in found if check.what == "gate")


ORIGINAL = "artifacts/evaluation/quiz.original.jsonl"


@pytest.fixture(scope="module")
def with_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base was scored with its original weights too: quantization had cost more than training gave."""
    answers = {"quiz": pairs(60, improved=14, regressed=2)}
    folder = tmp_path_factory.mktemp("with-original") / "a-run"
    return publish_run(folder, answers, original={"quiz": [True] * 55 + [False] * 5})


def _checked(run: Path, work: Path) -> dict[str, CheckResult]:
    work.mkdir()
    return {found.what: found for found in verify(open_run(str(run)), work) if found.differences}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("scores/acc", 0.5),
        ("base_versus_original/acc/delta", -0.01),
        ("base_versus_original/acc/verdict", "inconclusive"),
        ("adapter_versus_original/acc/ci95", [0.01, 0.02]),
        ("adapter_versus_original/acc/verdict", "improved"),
    ],
)
def test_forged_figures_of_the_original_base_are_found(
    with_original: Path, tmp_path: Path, place: str, value: object
) -> None:
    """What quantization cost and what is left are computed again from the answers, whatever the manifest says."""
    assert _checked(with_original, tmp_path / "before") == {}
    run = Path(shutil.copytree(with_original, tmp_path / "a-run"))
    forge(run, change(f"evaluation/full_precision/tasks/quiz/{place}", value))
    found = _checked(run, tmp_path / "after")
    assert "evaluation.full_precision" in told({"evaluation": found["evaluation"]})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("bound", 5.0),
        ("tasks/quiz/acc/base", 399),
        ("tasks/quiz/acc/lowest/delta", -0.5),
        ("tasks/quiz/acc/holds", False),
    ],
)
def test_forged_near_ties_are_found(published: Path, tmp_path: Path, place: str, value: object) -> None:
    """Near ties and the worst case are computed again from the answers, and compared with the stages' records."""
    run = Path(shutil.copytree(published, tmp_path / "a-run"))
    forge(run, change(f"evaluation/near_ties/{place}", value))
    found = _checked(run, tmp_path / "after")
    assert "evaluation.near_ties" in told({"evaluation": found["evaluation"]})


@pytest.mark.parametrize("bound", [0.0001, 2.5])
def test_a_run_by_another_bound_of_near_ties_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float
) -> None:
    """A run made before the bound was changed, up or down, is checked by the bound that it names, which is told."""
    with monkeypatch.context() as then:
        then.setitem(near_ties.BOUNDS, "fp32", bound)
        run = publish_run(tmp_path / "run", {"quiz": pairs(20, improved=9)})
    (tmp_path / "work").mkdir()
    found = {check.what: check for check in verify(open_run(str(run)), tmp_path / "work")}
    assert not [check for check in found.values() if check.differences]
    assert found["evaluation"].notes == (
        f"near ties are counted by the run's own bound, {bound} nats; this version's bound for \"fp32\" is 0.001 nats",
    )
    counted = json.loads((run / "results.json").read_bytes())["evaluation"]["near_ties"]["tasks"]["quiz"]["acc"]
    assert (counted["base"] > 0) == (bound > 1)


def test_near_ties_cannot_be_left_out(published: Path, tmp_path: Path) -> None:
    """A manifest without them contradicts the stages, unless these are of a version that did not look for them."""
    run = Path(shutil.copytree(published, tmp_path / "a-run"))
    forge(run, lambda results: results["evaluation"].pop("near_ties"))
    assert "evaluation.near_ties" in told(_checked(run, tmp_path / "work"))


def test_answers_of_the_original_base_cannot_be_exchanged_or_left_out(with_original: Path, tmp_path: Path) -> None:
    """Other answers contradict the figures, hashes recomputed or not; figures left out contradict the stage."""
    run = Path(shutil.copytree(with_original, tmp_path / "exchanged"))
    rewrite(run, ORIGINAL, (run / TASK).read_bytes())
    assert "evaluation" in _checked(run, tmp_path / "work-1")
    run = Path(shutil.copytree(with_original, tmp_path / "left-out"))
    forge(run, lambda results: results["evaluation"].pop("full_precision"))
    assert "evaluation.full_precision" in told(_checked(run, tmp_path / "work-2"))


def test_a_task_cannot_be_cut_from_a_group(tmp_path: Path) -> None:
    """A group without the task that got worse, with all figures and seals computed again, is not what was pulled."""
    spec = GroupSpec("1", ("one", "two"), {"acc,none": True}, {"acc,none": True})
    answers = {"one": pairs(20, improved=9), "two": pairs(20, regressed=9)}
    run = publish_run(tmp_path / "run", answers, groups={"own": spec})
    assert not _checked(run, tmp_path / "whole")
    kind = TypeAdapter(Evaluated)

    def cut(results: dict[str, Any]) -> None:
        stages = (run / f"stages/evaluate-{side}.json" for side in ("base", "adapter"))
        sides = (parse(f"stages/{path.name}", path.read_bytes(), kind)[0] for path in stages)
        results["evaluation"]["groups"] = compare_groups({"own": replace(spec, tasks=("one",))}, *sides)

    forge(run, cut)
    found = _checked(run, tmp_path / "cut")
    assert "evaluation.groups.own" in told(found)
    assert list(found) == ["stages"]
    forge(run, lambda results: results["evaluation"].update(groups={}))
    assert "evaluation.groups" in told(_checked(run, tmp_path / "none"))


def test_a_task_cannot_be_left_out(tmp_path: Path) -> None:
    """The tasks that were scored are those that were pulled, also where the records of the evaluations are forged."""
    run = publish_run(tmp_path / "run", {"one": pairs(20, improved=9), "two": pairs(20, regressed=9)})
    path = run / "stages/pull.json"
    record = unsealed(path.read_bytes())
    record["questions"]["three"] = record["questions"]["one"]
    rewrite(run, "stages/pull.json", sealed(record))
    assert "results.json evaluation" in told(_checked(run, tmp_path / "left"))


def test_answers_by_two_rules_are_told(run: Path, check: Checker) -> None:
    """Answers of base and adapter that different versions ended by different tokens cannot be compared."""
    path = run / "stages/evaluate-adapter.json"
    rewrite(run, "stages/evaluate-adapter.json", sealed({**unsealed(path.read_bytes()), "generation": {"sums": "00"}}))
    assert "stages/evaluate-adapter.json generation" in told(check())


def test_a_precision_that_no_stage_recorded_is_named(run: Path, check: Checker) -> None:
    """Scores in another precision than the stages say would be read as if they were exact."""
    precision = {"dtype": "fp32", "sums": "fp32", "reason": "as in training"}
    forge(run, lambda results: results["evaluation"].update(precision=precision))
    assert "results.json evaluation.precision" in told({"stages": check()["stages"]})


def test_answers_of_the_original_base_are_to_the_same_questions(with_original: Path, tmp_path: Path) -> None:
    """In another order, or of fewer tasks than the other sides, they are not compared."""
    run = Path(shutil.copytree(with_original, tmp_path / "a-run"))
    first, second, *rest = (run / ORIGINAL).read_bytes().splitlines(keepends=True)
    rewrite(run, ORIGINAL, b"".join([second, first, *rest]))
    found = _checked(run, tmp_path / "swapped")
    assert 'quiz.original.jsonl line 1: claimed question "quiz-0"' in told({"evaluation": found["evaluation"]})
    run = Path(shutil.copytree(with_original, tmp_path / "cut"))
    forge(run, lambda results: results["evaluation"]["full_precision"]["tasks"].clear())
    found = _checked(run, tmp_path / "none")
    assert "evaluation.full_precision.tasks" in told({"evaluation": found["evaluation"]})


def test_both_sides_are_scored_in_one_precision(run: Path, check: Checker) -> None:
    """The adapter's record names another precision than the base's: a difference, and no end of `verify`."""
    path = "stages/evaluate-adapter.json"
    record = unsealed((run / path).read_bytes())
    rewrite(run, path, sealed({**record, "precision": {"dtype": "fp32", "sums": "fp32", "reason": "test"}}))
    assert f"{path} precision" in told(check())
