"""A judge is checked before training, judges all pairs on one device, and its inputs are recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from job.distributed.processes import ALONE
from job.errors import SettingsError, TrainingFailed
from job.evaluation.principles import parse_judgements, rules_sha256
from job.records import Artifact, AuditRecord, Evaluated, JudgeRecord, PromptAnswer, Pulled, SafetyRecord
from job.runs import stage_records
from job.runs.attempt import Attempt
from job.runs.layout import Stage, prompts_key
from job.settings.load import Settings, load_settings
from job.stages import principles, pull, pull_other_models, pull_prompts
from job.stages.evaluate import other_answers_judged
from job.stages.handoff import Sources
from job.stages.principles import FoundJudge, check_judge, check_local, judge_answers, judge_sha256
from job.stages.pull_other_models import pull_judge, pull_safety_model, recorded_judge_sha256
from job.stages.pull_prompts import find_prompt_rows
from job.stages.safety import SafetyModel
from job.storage.open import StorageOptions
from job.verification.check_history import _judged_differ
from tests.attempts import Second, make_attempt
from tests.example_run import DATASET
from tests.helpers import write_jsonl
from tests.judge_server import judge_server

RULES = ["Be kind."]
RECORD = JudgeRecord("models/judge", None, None, "0" * 64, RULES, rules_sha256(RULES))


def settings(folder: Path, judge: str, *words: str) -> Settings:
    """Those of the demo with a judge."""
    (folder / "rules.txt").write_text("Be kind.\n")
    asked = (
        f"--eval.principles={folder}/rules.txt",
        "--eval.prompts=2",
        "--data.validation=2",
        f"--eval.judge={judge}",
    )
    return load_settings(["--preset=demo", *asked, *words], {})


def test_a_judge_in_a_bucket_is_not_looked_for_on_disk(tmp_path: Path) -> None:
    """Before the run begins, nothing is said of what lies in a store."""
    check_local(settings(tmp_path, "s3://models/j").eval)


def test_a_served_judge_is_asked_before_training(tmp_path: Path) -> None:
    """A wrong model name is an error, a server that is not there yet a warning; so is a key that anyone can read."""
    with judge_server() as server:
        served = ("--eval.judge_model=m", "--eval.judge_key=sk-not-to-be-shown")
        options = settings(tmp_path, server.url, *served).eval
        judge = FoundJudge(replace(RECORD, model=server.url, served="m"), None)
        check_judge(options, judge, lambda: None)
        server.codes = [404]
        with pytest.raises(SettingsError, match="JOB_EVAL__JUDGE_MODEL"):
            check_judge(options, judge, lambda: None)
    with structlog.testing.capture_logs() as logs:
        check_judge(options, judge, lambda: None)
        check_judge(options, replace(judge, record=replace(judge.record, model="http://no.invalid")), lambda: None)
    assert [log["event"].split(";")[0] for log in logs] == [
        "the judge does not answer now",
        "JOB_EVAL__JUDGE_KEY is sent to the judge unencrypted",
        "the judge does not answer now",
    ]


class Asked:
    """A judge that says A, and may run out of memory."""

    def __init__(self, device: str, asked: list[str], full_after: int) -> None:
        self.device, self.asked, self.left = device, asked, full_after

    def choose(self, _text: str, _check_stop: Callable[[], None]) -> str:
        """Raises as torch does on a full GPU."""
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.asked.append(self.device)
        return "A"


def exhausted() -> Any:
    """Fails as Python does without main memory."""
    raise MemoryError


def test_all_pairs_are_judged_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the GPU is full after one pair, the processor judges both, and a later attempt goes on there."""
    answers = {"base": ["x", "y"], "adapter": ["a", "b"]}
    artifacts = {}
    attempt = make_attempt(tmp_path)
    for side, texts in answers.items():
        path = tmp_path / f"{side}.jsonl"
        write_jsonl(path, [asdict(PromptAnswer(f"p:{n}", "q", None, text, 1, "eos")) for n, text in enumerate(texts)])
        artifacts[side] = attempt.publish(path, prompts_key(side))
    asked: list[str] = []
    monkeypatch.setattr(principles, "_devices", lambda *_: ["cuda", "cpu"])
    room = {"cuda": 3, "cpu": 99}
    monkeypatch.setattr(principles, "open_judge", lambda _options, _judge, device: Asked(device, asked, room[device]))
    judge, own = FoundJudge(RECORD, tmp_path), settings(tmp_path, "models/judge")
    found = judge_answers(attempt, own.eval, own.run, judge, artifacts)
    assert asked == ["cuda"] * 3 + ["cpu"] * 4
    assert [one.base_first for one in parse_judgements(attempt.fetch(found).read_bytes())] == ["A", "A"]
    room["cuda"] = 99
    judge_answers(attempt, own.eval, own.run, judge, artifacts)
    assert len(asked) == 7
    monkeypatch.setattr(principles, "open_judge", lambda *_: exhausted())
    answers_of_others = replace(judge, record=replace(RECORD, model="models/other"))
    with pytest.raises(TrainingFailed, match=r"the machine's memory ran out while judging.*JOB_EVAL__JUDGE"):
        judge_answers(attempt, own.eval, own.run, answers_of_others, artifacts)


def audited(*, left_out: int = 0, safety: SafetyRecord | None = None) -> AuditRecord:
    """The record of an audit."""
    return AuditRecord(9, left_out, {}, {}, 0, 40, "33", 9, safety=safety)


def test_answers_that_are_others_are_judged_again() -> None:
    """The adapter's record counts while the base's answers are those that were judged; so do records of before."""

    def evaluated(side: str, content: str) -> Evaluated:
        return Evaluated({}, [Artifact(prompts_key(side), 1, content * 64)])

    base, adapter = evaluated("base", "1"), evaluated("adapter", "2")
    assert not other_answers_judged(adapter, base)
    adapter = replace(adapter, judged=RECORD, judged_answers={"base": "1" * 64, "adapter": "2" * 64})
    assert not other_answers_judged(adapter, base)
    assert "have changed" in other_answers_judged(adapter, evaluated("base", "3"))
    told = {"evaluation": {"principles": {**asdict(RECORD), "n": 1}}}
    assert not list(_judged_differ(told, base, adapter))
    assert list(_judged_differ(told, evaluated("base", "3"), adapter))
    assert list(_judged_differ({"evaluation": {}}, base, adapter))
    for change in ({"revision": "abc"}, {"sha256": "1" * 64}, {"rules": ["Be rude."]}, {"rules_sha256": "1" * 64}):
        assert list(_judged_differ({"evaluation": {"principles": {**asdict(RECORD), **change}}}, base, adapter))


def test_a_run_keeps_the_judge_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later attempts ask for the commit of the first; other rules or files have another hash; only process 0 asks."""
    revisions: list[str | None] = []

    def find(_options: Any, _source: str, revision: str | None) -> FoundJudge:
        revisions.append(revision)
        return FoundJudge(RECORD, tmp_path)

    def attempt(judge: dict[str, str] | None, *, leads: bool = True) -> Attempt:
        pulled = None if judge is None else Pulled(DATASET, "0" * 64, None, {}, **judge)
        known = {Stage.PULL: pulled, Stage.EVALUATE_ADAPTER: Evaluated({}, [])}
        return make_attempt(Path(tempfile.mkdtemp(dir=tmp_path)), known, processes=ALONE if leads else Second({}))

    monkeypatch.setattr(pull_other_models, "find_judge", find)
    own = settings(tmp_path, "org/judge")
    first, later = attempt(None), attempt({"judge_revision": "abc", "judge_sha256": "0" * 64})
    assert pull_judge(first, own.eval, StorageOptions()) is not None
    judge = pull_judge(later, own.eval, StorageOptions())
    assert revisions == [None, "abc"]
    assert pull_judge(attempt(None, leads=False), own.eval, StorageOptions()) is None
    assert "org/judge" in pull._input_locations(first, own, ())
    assert "org/judge" not in pull._input_locations(attempt(None, leads=False), own, ())
    assert recorded_judge_sha256(first, judge) == recorded_judge_sha256(later, judge) == judge_sha256(RECORD)
    before = attempt({})
    assert recorded_judge_sha256(before, judge) is None
    others = (replace(RECORD, sha256="1" * 64), replace(RECORD, rules_sha256="1" * 64))
    assert len({judge_sha256(one) for one in (RECORD, *others)}) == 3


def test_rows_of_prompts_are_audited_like_those_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows were left out, those that are read again for their prompts get the same audit; else none."""
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(pull_prompts, "_prompts_of_rows", lambda *_, reading, **__: given.append(reading) or [])
    own, row_options, auditing = settings(tmp_path, "org/judge"), {"date": "today"}, {"date": "today", "audit": "setup"}
    for audit in (None, audited(left_out=0), audited(left_out=2)):
        tokens: Any = SimpleNamespace(record=replace(DATASET, audit=audit))
        attempt = make_attempt(tmp_path)
        arguments: dict[str, Any] = {"tokenizer": None, "fetched": ("x", None)}
        arguments |= {"reading": row_options, "auditing": auditing}
        rows = pull._row_settings(own)
        find_prompt_rows(attempt, own.eval, rows, StorageOptions(), tokens=tokens, **arguments)
    assert given == [row_options, row_options, auditing]


def test_a_run_keeps_the_classifier_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later attempts ask for the commit of the first, also where a branch is given."""
    revisions: list[str | None] = []
    safety = SafetyRecord("org/x", "abc", "0" * 64, ["bad"], 0.5)

    def find(data: Any, _source: str, _model: str) -> SafetyModel:
        revisions.append(data.safety_revision)
        return SafetyModel(tmp_path, safety)

    monkeypatch.setattr(pull_other_models, "find_safety_model", find)
    pulled = Pulled(replace(DATASET, audit=audited(safety=safety)), "0" * 64, None, {}, safety_sha256="0" * 64)
    own = load_settings(["--preset=demo", "--data.safety_model=org/x", "--data.safety_revision=main"], {})
    for known in (None, pulled):
        attempt = make_attempt(tmp_path, {Stage.PULL: known})
        pull_safety_model(attempt, own.data, StorageOptions())
    assert revisions == ["main", "abc"]


def test_all_machines_name_the_run_by_the_same_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the judge takes its hash and commit from process 0: else it would take its run for another."""
    record = Pulled(DATASET, "0" * 64, None, {})
    rows: dict[str, Any] = {"tokenizer": None, "examples": (), "validation": ()}
    sources = Sources(record=record, folder=tmp_path, quantized=False, **rows)
    monkeypatch.setattr(pull, "_pull", lambda *_: (sources, tmp_path))
    shared = {"date of the run": "2026-01-31", "judge": ["0" * 64, "abc"]}
    attempt = make_attempt(tmp_path, processes=Second(shared))
    found = pull.pull(attempt, settings(tmp_path, "org/judge")).record
    assert (found.judge_sha256, found.judge_revision) == ("0" * 64, "abc")
    assert stage_records.identity(found) != stage_records.identity(record)
