"""The whole job as a user runs it: a process with settings in its environment, an exit code, and files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from job.errors import TrainingFailed
from job.results.summary import verdict_in_words
from tests import warm
from tests.helpers import alpaca_rows, arc_rows, read_jsonl, without_repacking, write_jsonl

ROOT = Path(__file__).parents[2]
STAGES = ["pull", "evaluate-base", "train", "evaluate-adapter"]


@dataclass(frozen=True)
class Inputs:
    """Where the base model, the training rows and the questions lie, and where runs may put their results."""

    folder: Path
    base: Path

    @property
    def rows(self) -> Path:
        """40 rows in Alpaca's schema."""
        return self.folder / "rows.jsonl"

    @property
    def questions(self) -> Path:
        """40 questions in ARC's schema."""
        return self.folder / "questions.jsonl"

    def environment(self, run: str, output: str, changes: Mapping[str, str]) -> dict[str, str]:
        """NF4, dropout, 20 steps in two epochs, states every 6 steps."""
        return {
            **os.environ,
            "JOB_RUN__ID": run,
            "JOB_RUN__OUTPUT": str(self.folder / output),
            "JOB_MODEL__ID": str(self.base),
            "JOB_DATA__SOURCE": str(self.rows),
            "JOB_EVAL__DATA": f"arc_easy={self.questions}",
            "JOB_LORA__DROPOUT": "0.1",
            "JOB_TRAIN__GLOBAL_BATCH_SIZE": "4",
            "JOB_TRAIN__LEARNING_RATE": "2e-3",
            "JOB_TRAIN__MAX_LENGTH": "512",
            "JOB_CHECKPOINT__EVERY_STEPS": "6",
            "JOB_RUN__SPOT_NOTICES": "off",
            **changes,
        }


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    stdout: str
    lines: list[dict[str, Any]]
    """The log."""
    run: Path
    """The run's folder."""

    @property
    def results(self) -> dict[str, Any]:
        """The manifest."""
        manifest: dict[str, Any] = json.loads((self.run / "results.json").read_text("utf-8"))
        return manifest


def run(inputs: Inputs, name: str, output: str = "runs", **changes: str) -> Ended:
    """Runs the job to its end."""
    done = warm.run([], inputs.environment(name, output, changes))
    return Ended(done.returncode, done.stdout, _parsed(done.stderr.splitlines()), inputs.folder / output / name)


def _parsed(stderr: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr]


def errors(ended: Ended) -> list[dict[str, Any]]:
    """The lines of the log at level error."""
    return [line for line in ended.lines if line["level"] == "error"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Inputs:
    """A model, rows and questions."""
    made = Inputs(tmp_path_factory.mktemp("pipeline"), base_folder)
    write_jsonl(made.rows, alpaca_rows(40))
    write_jsonl(made.questions, arc_rows(40))
    return made


@pytest.fixture(scope="module")
def whole(inputs: Inputs) -> Ended:
    """A run that nothing disturbed."""
    ended = run(inputs, "whole")
    assert ended.code == 0, ended.lines[-1]
    return ended


@pytest.fixture
def unfinished(inputs: Inputs, whole: Ended) -> str:
    """The name of a run that was killed just before it published its manifest."""
    copy = Path(shutil.copytree(whole.run, whole.run.with_name("unfinished"), dirs_exist_ok=True))
    (copy / "results.json").unlink()
    return copy.name


def artifacts(results: dict[str, Any]) -> dict[str, str]:
    """Hash by path, of the facts where a file also holds what a clock measured; without what is made of times."""
    return {
        artifact["path"]: artifact["facts_sha256"] or artifact["sha256"]
        for artifact in results["artifacts"]
        if "/tensorboard/" not in artifact["path"] and artifact["path"] != "artifacts/report.html"
    }


def test_a_run_ends_with_a_valid_manifest(whole: Ended) -> None:
    """Exit 0; the manifest fits the shipped schema and says what was done, in which stages, at which cost."""
    from job.results.manifest import validate

    results = whole.results
    validate(results)
    assert results["run"]["id"] == "whole"
    assert results["run"]["status"] == "complete"
    assert results["training"]["steps"] == 20
    assert results["training"]["examples"] == 80
    assert results["dataset"]["rows"] == 40
    assert results["model"]["quantization"] == "nf4"
    assert results["evaluation"]["tasks"]["arc_easy"]["n"] == 40
    (attempt,) = results["run"]["attempts"]
    assert set(STAGES) <= attempt["stage_seconds"].keys()
    assert results["settings"]["train.learning_rate"] == {
        "value": 0.002,
        "source": "environment JOB_TRAIN__LEARNING_RATE",
    }
    assert results["gate"]["passed"] is None


def test_every_artifact_is_what_the_manifest_says(whole: Ended) -> None:
    """Size and SHA-256 of every published file, and no file that the manifest does not know."""
    listed = {artifact["path"]: artifact for artifact in whole.results["artifacts"]}
    found = {
        path.relative_to(whole.run).as_posix(): path for path in (whole.run / "artifacts").rglob("*") if path.is_file()
    }
    assert listed.keys() == found.keys()
    for name, path in found.items():
        assert listed[name]["bytes"] == path.stat().st_size
        assert listed[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {name for name in listed if "/tensorboard/" not in name} == {
        "artifacts/adapter/README.md",
        "artifacts/adapter/adapter_config.json",
        "artifacts/adapter/adapter_model.safetensors",
        "artifacts/adapter/tokenizer.json",
        "artifacts/adapter/tokenizer_config.json",
        "artifacts/bom.cdx.json",
        "artifacts/evaluation/arc_easy.adapter.jsonl",
        "artifacts/evaluation/arc_easy.base.jsonl",
        "artifacts/evaluation/arc_easy.original.jsonl",
        "artifacts/findings.jsonl",
        "artifacts/metrics.jsonl",
        "artifacts/report.html",
    }


def test_the_figures_follow_from_the_records(whole: Ended) -> None:
    """Accuracies and counts of the manifest, recomputed from the published answers."""
    base, adapter = (
        read_jsonl(whole.run / f"artifacts/evaluation/arc_easy.{side}.jsonl") for side in ("base", "adapter")
    )
    task = whole.results["evaluation"]["tasks"]["arc_easy"]
    pairs = [
        (one["prediction"] == one["gold"], two["prediction"] == two["gold"])
        for one, two in zip(base, adapter, strict=True)
    ]
    assert [one["id"] for one in base] == [two["id"] for two in adapter]
    assert task["base"]["acc"] == sum(before for before, _ in pairs) / 40
    assert task["adapter"]["acc"] == sum(after for _, after in pairs) / 40
    assert task["improved"] == sum(after and not before for before, after in pairs)
    assert task["regressed"] == sum(before and not after for before, after in pairs)
    assert [line["log_likelihoods"] for line in base] != [line["log_likelihoods"] for line in adapter]


def failures(run: Path, work: Path) -> str:
    """What `verify` finds, as it is told."""
    from job.errors import VerificationError
    from job.results.reader import open_run
    from job.verification.verify import require_verified, verify

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        require_verified(verify(open_run(str(run)), work))
    except VerificationError as error:
        return f"exit {error.exit_code}\n{error}"
    return ""


def places(path: Path) -> set[int]:
    """Positions in a file: its middle, or of JSON the inside of a number and of a string."""
    data = path.read_bytes()
    found = set()
    if path.suffix in {".json", ".jsonl"}:
        for inside in (rb"\d\.\d", rb'"[a-z_]{4}'):
            hits = list(re.finditer(inside, data))
            found |= {hits[len(hits) // 2].end() - 1} if hits else set()
    return found or {len(data) // 2}


@pytest.mark.long
def test_every_changed_byte_of_a_run_is_found(whole: Ended, tmp_path: Path) -> None:
    """`verify` passes the run; after a one-bit change in any file, or without it, it ends with 4 and names the file."""
    copy = Path(shutil.copytree(whole.run, tmp_path / "copy"))
    assert failures(copy, tmp_path / "work") == ""
    for path in sorted(path for path in copy.rglob("*") if path.is_file() and ".store" not in path.parts):
        name, data = path.relative_to(copy).as_posix(), path.read_bytes()
        for position in places(path):
            changed = bytes(byte ^ 1 for byte in data[position : position + 1]) or b"1"  # of a file without findings
            path.write_bytes(data[:position] + changed + data[position + 1 :])
            found = failures(copy, tmp_path / "work")
            assert (found[:6], name in found) == ("exit 4", True), (name, position)
        path.unlink()
        assert name in failures(copy, tmp_path / "work")
        path.write_bytes(data)
    assert failures(copy, tmp_path / "work") == ""


def test_every_line_of_the_log_says_where_it_belongs(whole: Ended) -> None:
    """JSON lines with run, level and time; the attempt once there is one; the stage within one; figures every step."""
    assert all({"event", "level", "timestamp"} <= line.keys() and line["run"] == "whole" for line in whole.lines)
    first = next(number for number, line in enumerate(whole.lines) if "attempt" in line)
    assert first <= 1
    assert all(line["attempt"] == 1 for line in whole.lines[first:])
    for event in ("stage begins", "stage is done"):
        assert [line["stage"] for line in whole.lines if line["event"] == event] == [*STAGES, "publish"]
    begun = next(n for n, line in enumerate(whole.lines) if line["event"] == "stage begins")
    assert begun < next(n for n, line in enumerate(whole.lines) if line["event"] == "data is ready")
    steps = [line for line in whole.lines if line["event"] == "steps"]
    assert [line["done"] for line in steps] == list(range(1, 21))
    for line in steps:
        assert line["stage"] == "train"
        assert line["total"] == 20
        assert {"loss", "learning_rate", "tokens_per_second", "memory_bytes"} <= line.keys()
    assert {(line["stage"], line["model"]) for line in whole.lines if line["event"] == "evaluated"} == {
        ("evaluate-base", "original"),
        ("evaluate-base", "base"),
        ("evaluate-adapter", "adapter"),
    }
    assert {line["level"] for line in whole.lines} == {"info"}


def test_the_terminal_is_told_in_seven_lines(whole: Ended) -> None:
    """Results go to stdout: what happened, where the report is, and last the verdict and where all files are."""
    lines = whole.stdout.splitlines()
    assert len(lines) == 7
    assert lines[-2] == f"report: {whole.run}/artifacts/report.html"
    evaluation = whole.results["evaluation"]
    original = evaluation["full_precision"]["tasks"]["arc_easy"]["adapter_versus_original"]["acc"]["verdict"]
    verdict = verdict_in_words(evaluation["tasks"]["arc_easy"]["verdict"], original, quantized=True)
    assert lines[-1] == f"arc_easy (questions of questions.jsonl) {verdict}; results: {whole.run}/results.json"
    assert lines[-4].startswith("arc_easy, unquantized base: ")


def test_metrics_are_published_as_lines_and_as_events(whole: Ended) -> None:
    """Each step's facts in metrics.jsonl; the same losses as TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = read_jsonl(whole.run / "artifacts/metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert sum(line["target_tokens"] for line in metrics) == whole.results["training"]["target_tokens"]
    events = EventAccumulator(str(whole.run / "artifacts/tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in metrics], rel=1e-6)
    assert losses[-1] < losses[0]


def test_the_adapter_loads_plainly_and_answers_alike(inputs: Inputs, whole: Ended) -> None:
    """`PeftModel.from_pretrained` on a plainly quantized base predicts, for each question, what the records say."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(inputs.base, quantization_config=four_bit, dtype=torch.float32)
    base = without_repacking(plain)
    folder = whole.run / "artifacts/adapter"
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def likelihood(question: str, answer: str) -> float:
        asked, said = tokenizer(question).input_ids, tokenizer(f"{question} {answer}").input_ids
        with torch.no_grad():
            scores = model(torch.tensor([said])).logits[0, len(asked) - 1 : -1].float().log_softmax(-1)
        return float(scores.gather(1, torch.tensor(said[len(asked) :])[:, None]).sum())

    records = read_jsonl(whole.run / "artifacts/evaluation/arc_easy.adapter.jsonl")
    assert records
    for row, record in zip(read_jsonl(inputs.questions), records, strict=True):
        scores = [likelihood(f"Question: {row['question']}\nAnswer:", text) for text in row["choices"]["text"]]
        assert record["id"] == row["id"]
        # bitsandbytes' inference on some CPUs rounds to bf16
        assert scores == pytest.approx(record["log_likelihoods"], rel=0.01)
        assert scores.index(max(scores)) == record["prediction"]


@pytest.mark.long
def test_the_same_command_twice_gives_the_same_artifacts(inputs: Inputs, whole: Ended) -> None:
    """Another run elsewhere, with nothing to reuse: every artifact has the same hash, times and ids apart."""
    again = run(inputs, "again", "elsewhere")
    assert again.code == 0
    assert artifacts(again.results) == artifacts(whole.results)
    for key in ("dataset", "model"):
        assert again.results[key] == whole.results[key]
    assert again.results["training"]["loss"] == whole.results["training"]["loss"]
    assert again.results["evaluation"] == whole.results["evaluation"]


def test_a_preempted_run_ends_as_the_undisturbed_one(inputs: Inputs, whole: Ended) -> None:
    """SIGTERM while training: exit 75. The same command again: exit 0, the same artifacts, no stage done twice.

    It is tracked, which changes nothing, and costs are counted over both attempts, each at its own price.
    """
    places = {f"WANDB_{name}_DIR": str(inputs.folder / "wandb") for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    tracked = {"WANDB_MODE": "offline", "WANDB_DIR": str(inputs.folder), **places}
    stopped = run(inputs, "stopped", JOB_FAULT="sigterm@step=8", JOB_COST__USD_PER_HOUR="3.6", **tracked)
    assert stopped.code == 75
    (told,) = [line for line in stopped.lines if line["event"] == "Preempted"]
    assert (told["level"], told["exit_code"], told["attempt"]) == ("warning", 75, 1)
    assert "stopped by SIGTERM" in told["why"]
    assert not (stopped.run / "results.json").exists()

    resumed = run(inputs, "stopped", JOB_COST__USD_PER_HOUR="7.2", JOB_COST__ON_DEMAND_USD_PER_HOUR="14.4", **tracked)
    assert resumed.code == 0
    assert artifacts(resumed.results) == artifacts(whole.results)
    (resuming,) = [line for line in resumed.lines if line["event"] == "resuming"]
    assert 8 <= resuming["step"] < 20
    assert "evaluate-base" not in {line["stage"] for line in resumed.lines if line["event"] == "stage begins"}
    first, second = resumed.results["run"]["attempts"]
    assert (first["outcome"], second["outcome"]) == ("preempted", "complete")
    assert first["steps"] + second["steps"] == 20
    cost = resumed.results["cost"]
    assert cost["repeated_steps"] == 0
    assert [part["usd"] for part in cost["attempts"]] == pytest.approx(
        [first["seconds"] * 0.001, second["seconds"] * 0.002]
    )
    assert STAGES[:3] == list(first["stage_seconds"])
    assert 0 < cost["wasted_seconds"] < cost["seconds"]
    assert cost["savings"]["percent"] > 50
    for ended in (stopped, resumed):
        (line,) = [line for line in ended.lines if line["event"] == "the run is tracked"]
        assert Path(line["where"]).parent.name.endswith("-stopped")
    assert len(resumed.stdout.splitlines()) == len(whole.stdout.splitlines())
    # Its base was scored before, by the undisturbed run, which has the same key.
    assert "run whole" in resumed.results["evaluation"]["tasks"]["arc_easy"]["base"]["reused_from"]


def test_a_finished_run_is_not_run_again(inputs: Inputs, whole: Ended) -> None:
    """The same command on a complete run: exit 0 at once, and no byte changes."""
    before = (whole.run / "results.json").read_bytes()
    again = run(inputs, "whole")
    assert again.code == 0
    assert (whole.run / "results.json").read_bytes() == before
    assert [line["event"] for line in again.lines] == ["this run is complete already"]
    assert again.stdout == whole.stdout


def test_a_manifest_that_says_more_than_is_there(inputs: Inputs, whole: Ended) -> None:
    """A copy of a finished run that lacks files is finished again, with the same artifacts, from what it has."""
    copy = Path(shutil.copytree(whole.run, whole.run.with_name("copied")))
    for lost in ("artifacts/adapter/adapter_model.safetensors", "artifacts/evaluation/arc_easy.base.jsonl"):
        (copy / lost).unlink()
    ended = run(inputs, "copied")
    assert ended.code == 0, ended.lines[-1]
    said = [line["event"] for line in ended.lines]
    assert "the manifest lists files that are missing or damaged: the run continues" in said
    assert "steps" not in said
    assert [line["stage"] for line in ended.lines if line["event"] == "stage is done"] == [*STAGES, "publish"]
    assert artifacts(ended.results) == artifacts(whole.results)
    for artifact in ended.results["artifacts"]:
        assert hashlib.sha256((copy / artifact["path"]).read_bytes()).hexdigest() == artifact["sha256"]


def test_a_note_that_came_late_is_in_the_manifest(inputs: Inputs, whole: Ended, tmp_path: Path) -> None:
    """What the attempt before was writing when it was replaced arrives after its successor has begun."""
    copy = Path(shutil.copytree(whole.run, whole.run.with_name("late")))
    note = copy / "attempts/0001.json"
    program = f"""
import pathlib, job.cli.main
from job.runs.attempt import Attempt
plain = Attempt.stage
def stage(*given, **named):
    pathlib.Path({str(note)!r}).write_bytes({note.read_bytes()!r})
    return plain(*given, **named)
Attempt.stage = stage
raise SystemExit(job.cli.main.main([]))
"""
    for lost in (copy / "results.json", note):
        lost.unlink()
    done = warm.run([], inputs.environment("late", "runs", {}), source=program)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((copy / "results.json").read_text("utf-8"))
    assert [one["number"] for one in results["run"]["attempts"]] == [1, 2]
    assert failures(copy, tmp_path / "work") == ""


def test_a_gate_that_is_not_met_ends_with_3(inputs: Inputs, unfinished: str) -> None:
    """The results are published all the same, with the reason; and the exit code is 3 every time it is asked."""
    changes = {"JOB_GATE__MIN_DELTA": "0.9", "JOB_CHECKPOINT__KEEP": "5"}
    for attempt in range(2):
        ended = run(inputs, unfinished, **changes)
        assert ended.code == 3
        assert ended.results["gate"]["passed"] is False
        assert "the gate requires +0.9000" in ended.results["gate"]["reasons"][0]
        (error,) = errors(ended)
        assert (error["event"], error["exit_code"]) == ("GateError", 3)
        begun = [line["stage"] for line in ended.lines if line["event"] == "stage begins"]
        assert begun == ([] if attempt else ["pull", "publish"])
        assert f"gate not met; results: {ended.run}" in ended.stdout.splitlines()[-1]


def test_a_gate_may_look_back_to_an_earlier_run(inputs: Inputs, whole: Ended, unfinished: str, tmp_path: Path) -> None:
    """The earlier adapter takes the place of the base; its answers are published, so that anyone can check it."""
    changes = {"JOB_GATE__BASELINE": f"{whole.run}/results.json", "JOB_GATE__MAX_REGRESSION": "0.001"}
    ended = run(inputs, unfinished, **changes)
    assert ended.code == 3
    gate = ended.results["gate"]
    assert gate["baseline"]["run"] == "whole"
    assert gate["baseline"]["sha256"] == hashlib.sha256((whole.run / "results.json").read_bytes()).hexdigest()
    task = gate["baseline"]["tasks"]["arc_easy"]
    assert (task["delta"], task["improved"], task["regressed"]) == (0, 0, 0)  # the same adapter
    assert task["ci95"][0] < -0.001
    assert gate["reasons"] == [f"arc_easy: acc may have lost {-task['ci95'][0]:.4f}, the gate allows 0.0010"]
    assert failures(ended.run, tmp_path / "work") == ""


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({"JOB_GATE__BASELINE": "nowhere"}, 2, "is not a run"),
        ({"JOB_EVAL__LIMIT": "20"}, 65, "arc_easy: 40 questions there and 20 here"),
        ({"JOB_GATE__MAX_REGRESSION": ""}, 2, "has no threshold"),
    ],
)
def test_a_baseline_that_will_not_do_ends_the_job_at_once(
    inputs: Inputs, whole: Ended, changes: dict[str, str], code: int, why: str
) -> None:
    """Before a model is loaded, a step is done or a question is scored."""
    gate = {"JOB_GATE__BASELINE": str(whole.run), "JOB_GATE__MAX_REGRESSION": "0.01"}
    ended = run(inputs, "no-baseline", **(gate | changes))
    assert ended.code == code
    (error,) = errors(ended)
    assert error["problems"][0].startswith("JOB_GATE__BASELINE")
    assert why in error["problems"][0]
    assert "model is loaded" not in {line["event"] for line in ended.lines}


def test_another_setting_under_the_same_id_is_refused(inputs: Inputs, unfinished: str) -> None:
    """A run is one experiment: exit 2, with the setting, what it was and what it would be."""
    ended = run(inputs, unfinished, JOB_TRAIN__LEARNING_RATE="1e-3")
    assert ended.code == 2
    (error,) = errors(ended)
    assert error["problems"] == ["JOB_TRAIN__LEARNING_RATE: this run began with 0.002, not 0.001"]
    assert error["advice"] == "use the values with which the run began, or another JOB_RUN__ID for a new run"
    assert not (ended.run / "results.json").exists()


@pytest.mark.parametrize("changed", ["rows", "model"])
def test_other_inputs_under_the_same_id_are_refused(
    inputs: Inputs, unfinished: str, changed: str, tmp_path: Path
) -> None:
    """The same paths with another content: exit 65, and nothing is published."""
    path = inputs.rows if changed == "rows" else inputs.base / "tokenizer_config.json"
    before = path.read_bytes()
    try:
        if changed == "rows":
            write_jsonl(path, [*alpaca_rows(39), {"instruction": "Say no.", "input": "", "output": "no"}])
        else:
            path.write_bytes(before + b"\n")
        ended = run(inputs, unfinished)
    finally:
        path.write_bytes(before)
    assert ended.code == 65
    (error,) = errors(ended)
    where = "JOB_DATA__SOURCE" if changed == "rows" else "JOB_MODEL__ID"
    what = (
        "its content has changed since the first attempt of this run; restore it, or start a new run "
        "with another JOB_RUN__ID"
    )
    assert error["problems"] == [f"{where}: {what}"]
    assert not (ended.run / "results.json").exists()


def test_bad_rows_end_with_65_before_a_model_is_loaded(inputs: Inputs, tmp_path: Path) -> None:
    """All bad rows at once, each with file, line and field."""
    rows: list[dict[str, Any]] = [dict(row) for row in alpaca_rows(6)]
    rows[1]["output"] = ""
    rows[4]["instruction"] = 7
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    ended = run(inputs, "bad-rows", JOB_DATA__SOURCE=str(file), JOB_DATA__ON_BAD_ROW="error")
    assert ended.code == 65
    (error,) = errors(ended)
    assert error["total"] == 2
    assert [problem.partition(": ")[0] for problem in error["problems"]] == [
        f"{file}:2 output",
        f"{file}:5 instruction",
    ]
    assert "model is loaded" not in {line["event"] for line in ended.lines}


def test_training_that_diverges_ends_with_70(inputs: Inputs) -> None:
    """With words, a warning before, no results, and a code that no platform starts again; no checkpoint has NaN."""
    ended = run(inputs, "diverges", JOB_TRAIN__LEARNING_RATE="1e18", JOB_CHECKPOINT__EVERY_STEPS="1")
    assert ended.code == 70
    (warned,) = [line for line in ended.lines if line["event"] == "the learning rate is very high"]
    assert (warned["level"], warned["setting"]) == ("warning", "JOB_TRAIN__LEARNING_RATE")
    assert TrainingFailed.retry == "no"
    (error,) = errors(ended)
    assert error["event"] == "TrainingFailed"
    assert "JOB_TRAIN__LEARNING_RATE" in str(error)
    assert not (ended.run / "results.json").exists()
    assert json.loads((ended.run / "attempts" / "0001.json").read_text("utf-8"))["outcome"] == "failed"


def test_an_unknown_setting_ends_with_2(inputs: Inputs) -> None:
    """The nearest known name is told, on one line of the log, and nothing is written."""
    ended = run(inputs, "typo", "nowhere", JOB_TRAIN__LEARNING_RAET="1")
    assert ended.code == 2
    (line,) = ended.lines
    assert (line["event"], line["exit_code"], line["level"]) == ("SettingsError", 2, "error")
    assert "the nearest is JOB_TRAIN__LEARNING_RATE" in line["problems"][0]
    assert ended.stdout == ""
    assert not (inputs.folder / "nowhere").exists()
