"""The scorer: usable with a model and a list of questions, with cached scores, and divided over processes."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grimp
import pytest
import torch

from job.common.validation import adapter_of
from job.distributed.processes import ALONE
from job.distributed.ranks import Place
from job.errors import JobError, TrainingFailed
from job.evaluation import score_cache, scorer
from job.evaluation.parallel_scoring import ParallelScoring, _Work
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.evaluation.scorer import Scores, score_questions, score_sequences
from job.evaluation.scoring import begin_scoring, score_sequence
from job.records import Question
from job.stages import pull_model
from job.storage.local import LocalStore
from tests.helpers import fill_adapter, make_model

QUESTIONS = [Question((0, 4, 6), ((7,), (8, 9))), Question((0, 5, 9, 3), ((7, 8), (10, 11, 12), (3,)))]


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    """The tiny model with an adapter."""
    return fill_adapter(make_model(base_folder))


def test_a_model_and_two_questions_are_enough(model: Any) -> None:
    """No store, no attempt, no lm-eval: each choice gets its log-likelihood, which is at most 0, in order."""
    scores = score_questions(model, QUESTIONS)
    assert [len(choices) for choices in scores] == [2, 3]
    assert all(-100 < choice.log_likelihood < 0 for choices in scores for choice in choices)


def test_questions_that_begin_alike_are_packed_together(model: Any) -> None:
    """Whatever order they are asked in: what they begin with is computed once, and the scores keep the order."""
    examples = [tuple(range(start, start + 20)) for start in (50, 100)]
    asked = [Question((0, *examples[n % 2], 5 + n), ((7,), (8, 9 + n))) for n in range(6)]
    packed: list[list[Question]] = []

    def score(model: Any, questions: list[Question], sequences: Mapping[int, range]) -> Iterator[tuple[int, Scores]]:
        packed.extend(questions[part.start : part.stop] for part in sequences.values())
        yield from score_sequences(model, questions, sequences)

    found = score_questions(model, asked, 21 + 3 * 2, score=score)
    assert packed == [asked[::2], asked[1::2]]
    for question, scores in zip(asked, found, strict=True):
        alone = [choice.log_likelihood for choice in score_sequence(model, [question])[0]]
        assert [choice.log_likelihood for choice in scores] == pytest.approx(alone, abs=1e-4)


def test_the_example_in_the_docstring_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the module shows can be pasted into a REPL at the root of the repository."""
    monkeypatch.chdir(Path(scorer.__file__).parents[2])
    failed, tried = doctest.testmod(scorer, optionflags=doctest.ELLIPSIS)
    assert (failed, tried > 6) == (0, True)


def test_scores_that_are_not_finite_are_refused(base_folder: Path) -> None:
    """A model that diverged ends the evaluation: NaN has a largest choice too."""
    diverged = fill_adapter(make_model(base_folder), scale=float("nan"))
    with pytest.raises(JobError, match=r"diverged.*JOB_TRAIN__LEARNING_RATE"):
        score_questions(diverged, QUESTIONS)


def counted(calls: list[int]) -> Callable[..., Iterator[tuple[int, Scores]]]:
    """`score_sequences` that notes which sequences it was asked for."""

    def score(model: Any, questions: list[Question], sequences: Mapping[int, range]) -> Iterator[tuple[int, Scores]]:
        calls.extend(sequences)
        return score_sequences(model, questions, sequences)

    return score


def test_cached_scores_are_not_computed_again(model: Any, tmp_path: Path) -> None:
    """The same questions and conditions: same bits from the cache; other conditions: computed."""
    store, calls, progress = LocalStore(tmp_path), [], []
    score = counted(calls)

    def cached(run: str, **conditions: str) -> tuple[Scores, str | None]:
        cache = ScoreCache(store, "scores", run, conditions)
        scores = score_questions(model, QUESTIONS, 1, cache=cache, score=score, on_progress=progress.append)
        return scores, cache.reused_from

    first, from_first = cached("one")
    assert (calls, progress, from_first) == ([0, 1], [0, 1, 2], None)
    again, from_again = cached("one")
    assert (again, calls, from_again) == (first, [0, 1], None)  # its own: resumed, not reused
    other, from_other = cached("two")
    assert (other, calls) == (first, [0, 1])
    assert from_other is not None
    assert from_other.endswith(" (run one)")
    cached("two", adapter="another")
    assert calls == [0, 1, 0, 1]


def test_what_was_scored_before_an_error_is_kept(model: Any, tmp_path: Path) -> None:
    """A request to stop between two sequences loses neither."""
    store, calls = LocalStore(tmp_path), []

    def stopped(model: Any, questions: list[Question], sequences: Mapping[int, range]) -> Iterator[tuple[int, Scores]]:
        yield next(score_sequences(model, questions, sequences))
        raise JobError("stop")

    with pytest.raises(JobError, match="stop"):
        score_questions(model, QUESTIONS, 1, cache=ScoreCache(store, "scores", "one", {}), score=stopped)
    score_questions(model, QUESTIONS, 1, cache=ScoreCache(store, "scores", "one", {}), score=counted(calls))
    assert calls == [1]


def test_a_sequence_is_launched_before_the_one_before_it_is_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU gets its next work before the host waits for the last, and every sequence is given once, in order."""
    seen: list[str] = []

    def begin(_model: Any, questions: list[Question], _forward: object) -> Callable[[], Scores]:
        (name,) = (str(question.context[1]) for question in questions)
        seen.append(f"launched {name}")

        def wait() -> Scores:
            seen.append(f"read {name}")
            return begin_scoring(model, questions)()

        return wait

    asked = [Question((0, name), ((7,), (8, 9))) for name in (1, 2, 3)]
    alone = [score_sequence(model, [question]) for question in asked]
    monkeypatch.setattr(scorer, "begin_scoring", begin)
    found = list(score_sequences(model, asked, {number: range(number, number + 1) for number in range(3)}))
    assert found == list(enumerate(alone))
    assert seen == ["launched 1", "launched 2", "read 1", "launched 3", "read 2", "read 3"]


def test_a_stop_between_two_sequences_keeps_what_was_read(model: Any, tmp_path: Path) -> None:
    """The job may have to stop at any of them; the next attempt scores the rest, with the same bits."""
    asked = [*QUESTIONS, *QUESTIONS]
    whole = score_questions(model, asked, 1)
    store, calls, pauses = LocalStore(tmp_path), [], iter(range(99))

    def check_stop(**_: Any) -> None:
        if next(pauses) == 2:
            raise JobError("stop")

    with pytest.raises(JobError, match="stop"):
        score_questions(
            model,
            asked,
            1,
            cache=ScoreCache(store, "scores", "one", {}),
            score=ParallelScoring(ALONE, check_stop).score,
        )
    cache = ScoreCache(store, "scores", "one", {})
    assert score_questions(model, asked, 1, cache=cache, score=counted(calls)) == whole
    assert calls == [2, 3]


@pytest.mark.parametrize("damage", [b"no scores\n", b""])
def test_damaged_scores_are_computed_again(model: Any, tmp_path: Path, damage: bytes) -> None:
    """A file that does not match its name is never used."""
    store, calls = LocalStore(tmp_path), []
    first = score_questions(model, QUESTIONS, 1, cache=ScoreCache(store, "scores", "one", {}))
    (key,) = [info.key for info in store.list("scores/")]
    store.write(key, damage)
    assert (
        score_questions(model, QUESTIONS, 1, cache=ScoreCache(store, "scores", "one", {}), score=counted(calls))
        == first
    )
    assert calls == [0, 1]


def test_files_of_other_programs_beside_scores_are_left_alone(model: Any, tmp_path: Path) -> None:
    """Also those whose names are no keys of a store, which reading them by name would end in an error."""
    store, calls = LocalStore(tmp_path), []
    first = score_questions(model, QUESTIONS, 1, cache=ScoreCache(store, "scores", "one", {}))
    (key,) = [info.key for info in store.list("scores/")]
    (tmp_path / key).with_name("we\\ird.jsonl").write_text("{}\n")
    cache = ScoreCache(store, "scores", "one", {})
    assert score_questions(model, QUESTIONS, 1, cache=cache, score=counted(calls)) == first
    assert calls == []


class Peers:
    """Two processes as the first of them sees them; the second has answered before it is asked."""

    place = Place(rank=0, world_size=2)

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.shared = answers, []

    def broadcast(self, _what: str, value: Callable[[], Any]) -> Any:
        """Notes what process 0 tells the other."""
        self.shared.append(value())
        return self.shared[-1]

    def receive(self) -> list[Any]:
        """One answer a call, after a call without any."""
        return [self.answers.pop()] if self.answers else []


class Helper:
    """The second process: it is told the work, and then that there is no more."""

    place = Place(rank=1, world_size=2)

    def __init__(self, told: list[str]) -> None:
        self.told, self.sent = [*told, ""], []

    def broadcast(self, _what: str, _value: Callable[[], Any]) -> Any:
        """What process 0 tells."""
        return self.told.pop(0)

    def send(self, value: Any) -> None:
        """Notes what process 0 would get."""
        self.sent.append(value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_without_memory_ends_the_others(model: Any, rank: int) -> None:
    """Among several its error is one of the job, which is told to all; a process alone may go on in another way."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    members: list[Any] = [Peers([]), Helper([adapter_of(_Work).dump_json(_Work({0: [0, 1], 1: [1, 2]})).decode()])]
    scoring = ParallelScoring(members[rank], lambda **_: None, full)
    alone = ParallelScoring(ALONE, lambda **_: None, full)
    with pytest.raises(TrainingFailed, match=r"while sequences were scored.*JOB_EVAL__BATCH_TOKENS"):
        _ = scoring.help(model) if rank else list(scoring.score(model, QUESTIONS, {0: range(1), 1: range(1, 2)}))
    with pytest.raises(torch.OutOfMemoryError):
        next(alone.score(model, QUESTIONS, {0: range(1)}))


def test_processes_share_the_sequences(model: Any) -> None:
    """Each scores its own half, and process 0 returns what one process alone would."""
    alone = score_questions(model, QUESTIONS, 1)
    first = Peers([])
    work = ParallelScoring(first, lambda **_: None).score(model, QUESTIONS, {0: range(1), 1: range(1, 2)})
    assert next(work) == (0, alone[:1])
    second = Helper(first.shared)
    ParallelScoring(second, lambda **_: None).help(model)
    assert [number for number, _ in second.sent] == [1]
    both = Peers(second.sent)
    assert score_questions(model, QUESTIONS, 1, score=ParallelScoring(both, lambda **_: None).score) == alone


def closure(*roots: str) -> set[str]:
    """The modules of the job that these import, directly or not, themselves included; imports in functions count."""
    graph, found, left = grimp.build_graph("job", cache_dir=None), set(), list(roots)
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += graph.find_modules_directly_imported_by(module)
    return found


CARRY_VALUES = {
    *("job.records", "job.errors", "job.log", "job.common.formatting", "job.common.hashing", "job.common.disk"),
    "job.model.loading_errors",
}
"""Frozen dataclasses without behaviour, messages, hashes of files, and errors of the disk and of loading: none of them
takes part in a computation."""


def test_the_key_of_scores_covers_all_code_that_decides_them() -> None:
    """A module that scoring or the forward pass starts to import has to join the list, or scores would be stale."""
    roots = ("job.evaluation.scoring", "job.evaluation.generation", "job.model.load_base", "job.model.lora")
    fused = tuple(f"job.model.fused.{name}" for name in ("frozen_weights", "lora_forward", "precise_forward"))
    assert list(score_cache.CODE) == sorted(closure(*roots, "job.model.adapter_files", *fused) - CARRY_VALUES)


def test_the_key_of_a_quantized_base_covers_all_code_that_decides_its_bits() -> None:
    """The same for the cached quantized base; what only moves and checks its files does not count."""
    found = closure("job.model.load_base", "job.model.quantized_cache.cache") - CARRY_VALUES
    found -= {
        "job.model.adapter_options",
        "job.model.decomposed_init",
        "job.model.families",
        "job.model.lora",
        "job.model.packed_attention",
        "job.model.packed_layout",
        "job.model.target_modules",
        "job.model.tensor_names",
        "job.model.tokenizer",
        "job.model.tokenizer_files",
        "job.model.whole_modules",
    }  # they work on the loaded base, and change no weight of it
    found -= {module for module in found if module.startswith("job.model.fused.")}  # nor do these
    assert list(pull_model.CODE) == sorted(
        module for module in found if not module.startswith(("job.storage.", "job.common."))
    )


def test_the_conditions_of_a_score(tmp_path: Path) -> None:
    """What the caller says of the model, and machine, software and code."""
    found = score_conditions({"adapter": ["0"]})
    assert found["adapter"] == ["0"]
    assert {"software", "cpu", "gpus", "driver"} <= found.keys()
    assert len(found["code"]) == len(score_cache.CODE)
