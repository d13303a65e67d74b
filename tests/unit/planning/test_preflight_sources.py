"""The inputs of a run, checked in advance in the same way as by the job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.audit.rows import set_up
from job.data.examples import lengths_of
from job.errors import DataError, JobError, SettingsError
from job.planning import preflight_data, preflight_models
from job.planning.preflight import NotChecked
from job.planning.preflight_data import preview_data, preview_questions, report_audit
from job.planning.preflight_models import ModelFacts, find_tokenizer, preview_adapter, preview_model
from tests.families.models import tiny_config
from tests.helpers import READING, alpaca_rows, arc_rows, write_jsonl

HERE: dict[str, Any] = {"online": lambda: False, "storage": {}}
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""A whole safetensors file, without tensors."""


def test_a_model_here_is_read_but_not_loaded(base_folder: Path, tmp_path: Path) -> None:
    """Its architecture, and its tokenizer; nothing has to be fetched."""
    state, _, model = preview_model(str(base_folder), None, folder=tmp_path, **HERE)
    assert state == "ok"
    assert model.architecture is not None
    assert (model.architecture.hidden, model.download_bytes) == (128, 0)
    assert find_tokenizer(model)[2].eos_token_id == 1


@pytest.mark.parametrize(
    ("family", "says"),
    [
        (
            "gemma2",
            "on a GPU all of gemma2's decoder is fused, without CUDA graphs: torch's kernel for packed attention",
        ),
        ("seed_oss", "on a GPU only these layers are fused, not the whole decoder of seed_oss"),
        ("qwen3", None),
    ],
)
def test_what_is_not_as_fast_as_can_be_is_said(tmp_path: Path, family: str, says: str | None) -> None:
    """Of families without fused decoders, and of those that cannot be recorded."""
    tiny_config(family).save_pretrained(tmp_path)
    model = ModelFacts(tmp_path, None, None)
    _, what, _ = preview_adapter(model, None, quantization="none", max_length=64)
    assert (says in what) if says else ("on a GPU" not in what)


@pytest.mark.parametrize(
    ("break_it", "error", "what"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "no config.json that can be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), DataError, "is not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), DataError, "no config.json that can be read"),
        (lambda folder: (folder / "config.json").unlink(), DataError, "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), DataError, "no weights in safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(bytes(100)),
            DataError,
            r"model\.safetensors is no whole safetensors file",
        ),
        (shutil.rmtree, DataError, "does not exist"),
    ],
)
def test_a_model_that_would_not_load_is_wrong(
    base_folder: Path, tmp_path: Path, break_it: Callable[[Path], Any], error: type[JobError], what: str
) -> None:
    """No folder, no weights, no configuration, or one that nobody can read."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    break_it(folder)
    with pytest.raises(error, match=what):
        preview_model(str(folder), None, folder=tmp_path, **HERE)


def test_a_model_of_another_kind_is_a_note(base_folder: Path, tmp_path: Path) -> None:
    """It may train all the same; there are just no figures."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    state, what, model = preview_model(str(folder), None, folder=tmp_path, **HERE)
    assert (state, model.architecture) == ("note", None)
    assert "gpt2 models are not known" in what


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # As google/gemma-3-4b-it has it: the rest are the defaults of its class.
        (
            {
                "model_type": "gemma3",
                "text_config": {
                    "model_type": "gemma3_text",
                    "hidden_size": 2560,
                    "intermediate_size": 10240,
                    "num_hidden_layers": 34,
                    "sliding_window": 1024,
                },
                "vision_config": {"model_type": "siglip_vision_model"},
            },
            {"heads": 8, "kv_heads": 4, "head_size": 256, "vocabulary": 262208, "tied": True},
        ),
        ({"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32}, {"kv_heads": 8}),
        ({"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}, {"kv_heads": 32}),
        ({"model_type": "qwen3", "hidden_size": 2560, "num_attention_heads": 32}, {"head_size": 128}),
    ],
)
def test_what_a_configuration_leaves_out_has_the_default_of_its_family(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    """As in the run: with other sizes than the run's the forecast would silently be wrong."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(NO_TENSORS)
    state, what, model = preview_model(str(tmp_path), None, folder=tmp_path, **HERE)
    assert state == "ok", what
    assert {name: getattr(model.architecture, name) for name in expected} == expected


@pytest.mark.parametrize("change", [{"rope_parameters": "x"}, {"num_hidden_layers": "three"}, {"hidden_act": 5}])
def test_a_configuration_of_other_types_is_refused_by_the_plan(
    base_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """With the run's error: no field of the wrong type ends the plan in a traceback."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change))
    state, what, model = preview_model(str(folder), None, folder=tmp_path, **HERE)
    assert (state, model.architecture) == ("note", None), what
    with pytest.raises(DataError, match="does not describe a model"):
        preview_adapter(model, None, quantization="none", max_length=64)


def test_files_with_too_few_weights_are_refused_by_the_plan(base_folder: Path, tmp_path: Path) -> None:
    """Of a model that is here, as the run does when it loads them; and files that are cut."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 30}))
    _, _, model = preview_model(str(folder), None, folder=tmp_path, **HERE)
    with pytest.raises(DataError, match=r"describes [\d,]+ weights, and its files hold"):
        preview_adapter(model, None, quantization="none", max_length=64)
    (folder / "config.json").write_text(json.dumps(config))
    preview_adapter(model, None, quantization="none", max_length=64)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DataError, match=f"{folder}"):
        preview_adapter(model, None, quantization="none", max_length=64)


def test_the_audit_is_told_with_languages_and_lengths(tmp_path: Path, tokenizer: Any) -> None:
    """Findings by kind and place, then what kind of text the rows are; lengths only where tokens are counted."""
    source = str(write_jsonl(tmp_path / "rows.jsonl", [*alpaca_rows(20), alpaca_rows(4)[3]]))
    how = READING | HERE | {"max_length": 500, "folder": tmp_path, "audit": set_up(None, {})}
    told = []
    for known in (tokenizer, None):
        _, _, facts = preview_data(source, tokenizer=known, **how)
        assert facts.audit is not None
        state, what, _ = report_audit(facts.audit, facts.long_rows)
        assert state == "note"
        assert what.startswith(f"21 rows: 1 duplicate ({source}:21)")
        assert ("Languages of the rows, by pycld2" in what) != ("Languages were not detected" in what)
        told.append(what)
    longest = max(lengths_of(preview_data(source, tokenizer=tokenizer, **how)[2].examples))
    assert f"the longest {longest:,}." in told[0]
    assert "the longest" not in told[1]


def test_data_is_read_as_the_job_will(tmp_path: Path, tokenizer: Any) -> None:
    """The same examples and the same faults; without a tokenizer the schema is checked and the tokens are a guess."""
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(20))
    how = READING | HERE | {"max_length": 40, "folder": tmp_path}
    source = str(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="40 are allowed"):
        preview_data(source, tokenizer=tokenizer, **how)
    state, what, facts = preview_data(source, tokenizer=tokenizer, **(how | {"max_length": 500}))
    assert (state, len(facts.examples), facts.estimated, facts.licence) == ("ok", 20, False, None)
    assert what == "20 rows in the schema alpaca"
    state, what, facts = preview_data(source, tokenizer=None, **how)
    assert (state, len(facts.examples), facts.estimated) == ("note", 20, True)
    assert "7 rows may be too long" in what
    write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "x"}, {"instruction": "y", "output": " "}])
    for known in (tokenizer, None):
        with pytest.raises(DataError) as raised:
            preview_data(str(tmp_path / "bad.jsonl"), tokenizer=known, **how)
        assert raised.value.total == 2


def test_data_that_is_too_large_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is quick; what it did not look at, it says."""
    monkeypatch.setattr(preflight_data, "peek_dataset", lambda *_: (10**12, "mit"))
    how = READING | HERE | {"tokenizer": None, "max_length": 9, "folder": tmp_path}
    online = {"revision": "main", "online": lambda: True}
    with pytest.raises(NotChecked, match=r"931\.3 GiB, too much"):
        preview_data("some/data", **(how | online))
    with pytest.raises(NotChecked, match="some/data: the hub cannot be reached"):
        preview_data("some/data", **(how | online | {"online": lambda: False}))
    with pytest.raises(SettingsError, match="needs a revision"):
        preview_data("some/data", **how)


def test_a_hub_model_may_be_in_the_cache(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub its configuration is taken from the cache; without that, nothing was checked."""
    monkeypatch.setattr(preflight_models, "cached_model", lambda *_: base_folder)
    state, what, model = preview_model("some/model", None, folder=tmp_path, **HERE)
    assert (state, model.folder, model.download_bytes) == ("ok", base_folder, None)
    assert "the hub cannot be reached" in what
    monkeypatch.setattr(preflight_models, "cached_model", lambda *_: None)
    with pytest.raises(NotChecked, match="some/model is no folder here and not in the cache"):
        preview_model("some/model", None, folder=tmp_path, **HERE)


def test_questions_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    """As the job loads them; where one task's cannot be had, none are counted, and its name is said."""
    write_jsonl(tmp_path / "questions.jsonl", arc_rows(12))
    data = {"arc_easy": str(tmp_path / "questions.jsonl")}
    how: dict[str, Any] = {"online": lambda: False, "folder": tmp_path, "storage": {}}
    _, _, all_of_them = preview_questions(["arc_easy"], data, tokenizer=tokenizer, limit=None, **how)
    _, _, some = preview_questions(["arc_easy"], data, tokenizer=None, limit=5, **how)
    assert (all_of_them.count, some.count) == (12, 5)
    assert 0 < all_of_them.reads < all_of_them.tokens
    with pytest.raises(NotChecked, match="arc_challenge"):
        preview_questions(["arc_easy", "arc_challenge"], data, tokenizer=None, limit=5, **how)


def test_counted_tokens_are_those_that_are_scored(tmp_path: Path, tokenizer: Any) -> None:
    """What a plan counts is what the job's flat rows hold, question for question, up to how pieces meet."""
    from job.evaluation.harness import evaluate
    from job.evaluation.scorer import BATCH_TOKENS
    from job.evaluation.scoring import reads_of, tokens_to_compute
    from job.evaluation.tasks import load_tasks
    from job.records import ChoiceScore, Question

    write_jsonl(tmp_path / "questions.jsonl", arc_rows(20))
    data = {"arc_easy": str(tmp_path / "questions.jsonl")}
    how: dict[str, Any] = {"online": lambda: False, "folder": tmp_path, "storage": {}}
    _, _, found = preview_questions(["arc_easy"], data, tokenizer=tokenizer, limit=None, **how)
    asked: list[Question] = []

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        asked.extend(questions)
        return [[ChoiceScore(-1.0, greedy=False) for _ in question.choices] for question in questions]

    evaluate(load_tasks(["arc_easy"], {"arc_easy": tmp_path / "questions.jsonl"}, data), tokenizer, score, limit=None)
    assert found.tokens == pytest.approx(tokens_to_compute(asked, BATCH_TOKENS), rel=0.02)
    assert found.reads == pytest.approx(sum(map(reads_of, asked)), rel=0.02)


def test_without_a_model_there_is_no_tokenizer() -> None:
    """And nothing to be wrong with it."""
    with pytest.raises(NotChecked):
        find_tokenizer(None)
