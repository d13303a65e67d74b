"""The evaluation of the base with its original weights: when it is scored, and what a restart reuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from job.errors import Preempted
from job.model.model_record import describe_model
from job.model.packed_attention import NAME, use
from job.model.published_names import PublishedNames
from job.model.quantized_cache.layout import CachedBase
from job.records import PEFT, Evaluated, ExecutionPlan, Packing
from job.settings.load import Settings, load_settings
from job.stages import full_precision
from job.stages.full_precision import evaluate_bases
from job.stages.handoff import Loaded, Sources
from job.storage.local import LocalStore
from job.storage.open import ObjectStore
from tests.attempts import opened_attempt
from tests.helpers import arc_rows, make_base, make_model, write_jsonl
from tests.unit.stages.example_sources import example_sources
from tests.wrapped_store import WrappedStore

ANSWERS = "artifacts/evaluation/arc_easy.original.jsonl"
QUESTIONS = 12


@dataclass(frozen=True)
class World:
    """A base in bf16 and the questions."""

    folder: Path

    def settings(self, *words: str) -> Settings:
        """Of a run that scores a few questions at a time."""
        return load_settings([f"--model.id={self.folder / 'base'}", "--eval.batch_tokens=200", *words], {})

    def loaded(self, quantization: str = "nf4") -> Loaded:
        """The base as it is trained on, as an attempt has it in memory."""
        model = make_model(self.folder / "base", quantization=quantization)
        use(model.get_base_model(), NAME)
        record = describe_model(model, name="base", revision=None, sha256="0" * 64)
        if quantization == "none":
            record = replace(record, quantization="none")
        plan = ExecutionPlan(kept_base=False, kept_activations=True, recorded=False, reason="a CPU", forward=PEFT)
        packing = Packing(packed=True, reason="")
        return Loaded(model, record, 512, plan, CachedBase(), packing, PublishedNames(""))

    def sources(self) -> Sources:
        """What was pulled."""
        return example_sources(self.folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Written once."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "base").mkdir()
    make_base(folder / "base")
    AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(folder / "base")
    write_jsonl(folder / "questions.jsonl", arc_rows(QUESTIONS))
    return World(folder)


def run(
    world: World,
    runs: Path,
    *words: str,
    name: str = "one",
    quantization: str = "nf4",
    through: ObjectStore | None = None,
) -> Evaluated:
    """The stage of the run `name` in the store `runs`."""
    settings = world.settings(f"--run.output={runs}", f"--run.id={name}", *words)
    with opened_attempt(runs / name, through) as attempt:
        found = evaluate_bases(attempt, settings, world.sources(), world.loaded(quantization))
    assert found is not None
    return found


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The type of each original base that is loaded."""
    seen: list[str] = []
    load = full_precision.load_base

    def noting(*args: object, **words: object) -> object:
        seen.append(str(words["dtype"]))
        return load(*args, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(full_precision, "load_base", noting)
    return seen


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluated]:
    """The store of a run that nobody disturbed, and its record."""
    runs = tmp_path_factory.mktemp("whole")
    return runs, run(world, runs)


def test_the_original_base_is_scored_beside_the_quantized_one(whole: tuple[Path, Evaluated]) -> None:
    """Both have an answer to every question, and they are the answers of different weights."""
    runs, found = whole
    assert found.full_precision is not None
    assert found.full_precision.not_scored == ""
    assert found.full_precision.scores["arc_easy"].n == found.scores["arc_easy"].n == QUESTIONS
    assert ANSWERS in {artifact.path for artifact in found.artifacts}
    answers = (runs / "one" / ANSWERS).read_bytes()
    assert answers != (runs / "one" / ANSWERS.replace("original", "base")).read_bytes()


def test_an_altered_file_of_answers_is_written_again(
    world: World, whole: tuple[Path, Evaluated], tmp_path: Path
) -> None:
    """Of the same size, with one bit flipped: a restart publishes the first answers, to the byte."""
    runs = tmp_path / "runs"
    shutil.copytree(whole[0], runs)
    answers = runs / "one" / ANSWERS
    published = answers.read_bytes()
    answers.write_bytes(published[:9] + bytes([published[9] ^ 1]) + published[10:])
    assert run(world, runs) == whole[1]
    assert answers.read_bytes() == published


@pytest.mark.long
def test_a_restart_scores_no_question_twice(
    world: World, whole: tuple[Path, Evaluated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    """Ended while scoring the original base: the same bytes, and each sequence was scored once in total."""
    seen: list[int] = []
    score = full_precision.score_sequences

    def counting(model: Any, questions: Any, sequences: Any) -> Iterator[Any]:
        for number, scores in score(model, questions, sequences):
            seen.append(number)
            yield number, scores

    monkeypatch.setattr(full_precision, "score_sequences", counting)
    run(world, tmp_path / "whole")
    every = sorted(seen)
    seen.clear()
    with monkeypatch.context() as ended:

        def ending(model: Any, questions: Any, sequences: Any) -> Iterator[Any]:
            for found in counting(model, questions, sequences):
                yield found
                if len(seen) == len(every) // 2:
                    raise Preempted("in the middle")

        ended.setattr(full_precision, "score_sequences", ending)
        with pytest.raises(Preempted):
            run(world, tmp_path / "cut")
    assert 0 < len(seen) < len(every)
    found = run(world, tmp_path / "cut")
    assert sorted(seen) == every
    assert len(loads) == 3
    assert found == whole[1]
    assert (tmp_path / "cut/one" / ANSWERS).read_bytes() == (whole[0] / "one" / ANSWERS).read_bytes()


def test_an_attempt_after_it_was_scored_does_not_load_it(
    world: World, whole: tuple[Path, Evaluated], tmp_path: Path, loads: list[str]
) -> None:
    """Ended while the quantized base was scored: the record of the original is read, unless an answer file is gone."""
    folder = tmp_path / "one"

    def end(verb: str, key: str) -> None:
        if key.endswith("arc_easy.base.jsonl"):
            raise Preempted("after the original")

    with pytest.raises(Preempted):
        run(world, tmp_path, through=WrappedStore(LocalStore(folder), before=end))
    assert len(loads) == 1
    assert run(world, tmp_path) == whole[1]
    (folder / ANSWERS).unlink()
    assert run(world, tmp_path) == whole[1]
    assert len(loads) == 1


def test_a_second_run_with_the_same_base_reuses_its_scores(
    world: World, whole: tuple[Path, Evaluated], loads: list[str]
) -> None:
    """They are taken from the cache, the record says from which run, and the original is not loaded."""
    runs, first = whole
    found = run(world, runs, name="two")
    assert loads == []
    assert found.full_precision is not None
    assert first.full_precision is not None
    scores = found.full_precision.scores["arc_easy"]
    assert scores.reused_from is not None
    assert replace(scores, reused_from=None) == first.full_precision.scores["arc_easy"]
    assert (runs / "two" / ANSWERS).read_bytes() == (runs / "one" / ANSWERS).read_bytes()


def test_nothing_is_scored_where_it_is_switched_off_or_not_quantized(
    world: World, tmp_path: Path, loads: list[str]
) -> None:
    """The record has no original base then, and no file of its answers."""
    off = run(world, tmp_path, "--eval.full_precision=off", name="off")
    plain = run(world, tmp_path, name="plain", quantization="none")
    for found in (off, plain):
        assert found.full_precision is None
        assert ANSWERS not in {artifact.path for artifact in found.artifacts}
    assert loads == []


def test_where_it_cannot_be_scored_the_record_says_why(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    """Too little memory, weights that exist quantized only, and memory that runs out: the quantized base is scored."""
    with monkeypatch.context() as little:
        little.setattr(full_precision, "available_bytes", lambda: 1000)
        small = run(world, tmp_path, name="small")
    with monkeypatch.context() as published:
        published.setattr(full_precision, "quantization_method", lambda _config: "gptq")
        only = run(world, tmp_path, name="only")
    assert loads == []

    def full(*_args: object, **_words: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    def exhausted() -> object:
        raise MemoryError

    monkeypatch.setattr(full_precision, "load_base", full)
    out = run(world, tmp_path, name="out")
    monkeypatch.setattr(full_precision, "load_base", lambda *_args, **_words: exhausted())
    host = run(world, tmp_path, name="host")
    reasons = []
    for found in (small, only, out, host):
        assert found.full_precision is not None
        assert found.full_precision.scores == {}
        assert found.scores["arc_easy"].n == QUESTIONS
        reasons.append(found.full_precision.not_scored)
    assert reasons[0].startswith("it takes ")
    assert reasons[0].endswith(" are free")
    ran_out = "memory ran out while it was scored"
    assert reasons[1:] == ["the base is only published quantized", ran_out, ran_out]
