"""Evaluation by lm-eval: its tasks, prompts and metrics, with the scoring done on flat rows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from job.errors import DataError, Problem, SettingsError
from job.evaluation.samples import HASHES, tally
from job.evaluation.tasks import Tasks, compiled_once, question_id
from job.records import ChoiceScore, Question, TaskScores

Scorer = Callable[[list[Question]], list[list[ChoiceScore]]]


@compiled_once()
def evaluate(
    tasks: Tasks, tokenizer: Any, score: Scorer, *, limit: int | None
) -> dict[str, tuple[TaskScores, list[dict[str, Any]]]]:
    """Runs the tasks zero-shot.

    Args:
        tasks: From `load_tasks`.
        tokenizer: The model's.
        score: Scores all questions, in order.
        limit: Questions of each task, from the first; None for all.

    Returns:
        By task: its figures, and one record a question (see `_question_record`).
    """
    import lm_eval

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own, of no use to the user
        results = lm_eval.evaluate(
            lm=_flat_lm(tokenizer, score), task_dict=_zero_shot(tasks.loaded), limit=limit, bootstrap_iters=0
        )
    return {
        name: _task_result(task, tasks.sources[name], results["samples"][name])
        for name, task in tasks.loaded["tasks"].items()
    }


def _zero_shot(loaded: Any) -> Any:
    """The tasks without examples in the prompt."""
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


def _flat_lm(tokenizer: Any, score: Scorer) -> Any:
    """An lm-eval model that answers log-likelihood requests by `score`, tokenizing as lm-eval's own HFLM does."""
    from lm_eval.api.model import TemplateLM

    class FlatLM(TemplateLM):  # type: ignore[misc]
        """Defined here because its base is a heavy import."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.backend = "causal"

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer.encode(string, **special))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002, FBT001, FBT002
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002, FBT001, FBT002
            grouped = [list(group) for _, group in groupby(requests, key=lambda request: request[1])]
            questions = [Question(tuple(g[0][1]), tuple(tuple(request[2]) for request in g)) for g in grouped]
            _check_tokens(requests)
            return [(s.log_likelihood, s.greedy) for scores in score(questions) for s in scores]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002, FBT001, FBT002
            raise SettingsError([Problem("eval.tasks", "only multiple-choice tasks can be evaluated")])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002, FBT001, FBT002
            raise SettingsError([Problem("eval.tasks", "only multiple-choice tasks can be evaluated")])

    return FlatLM()


def _check_tokens(requests: Sequence[Any]) -> None:
    """Refuses what the tokenizer makes nothing of: it would have no likelihood, or no place to be read from."""
    wrong = [
        Problem(f"question {context[-80:]!r}", f"the tokenizer makes no tokens of {what}")
        for (context, choice), context_ids, choice_ids in requests
        for what, ids in (("it", context_ids), (f"its choice {choice!r}", choice_ids))
        if not ids
    ]
    if wrong:
        raise DataError(wrong)


def _task_result(task: Any, source: str, samples: list[dict[str, Any]]) -> tuple[TaskScores, list[dict[str, Any]]]:
    """Figures and records of one task, from lm-eval's samples."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    records = [_question_record(task, sample) for sample in samples]
    if any(sample["acc"] not in {0, 1} for sample in samples):
        what = (
            f"{task.task_name} gives fractions of a point; only tasks whose answers are right or wrong can be compared"
        )
        raise SettingsError([Problem("eval.tasks", what)])
    scores = tally(
        task=task.task_name,
        source=source,
        version=str(task.VERSION),
        hashes=(sample[name] for sample in samples for name in HASHES),
        correct=[bool(sample["acc"]) for sample in samples],
        correct_norm=[bool(sample["acc_norm"]) for sample in samples] if "acc_norm" in samples[0] else None,
    )
    return scores, records


def _question_record(task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """One question: what was asked, and everything needed to score it again.

    Log-likelihoods are in nats, lengths in characters.
    """
    doc = sample["doc"]
    choices = task.doc_to_choice(doc)
    lengths = [len(choice) for choice in choices]
    context, continuation = sample["arguments"][0][:2]
    # some tasks also score every choice without its question, behind these
    likelihoods = [response[0] for response in sample["filtered_resps"]][: len(lengths)]
    normalized = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    return {
        "id": question_id(doc, sample["doc_id"]),
        **{key: sample[key] for key in HASHES},
        # tasks with several contexts have their choices in these, and ask which one the same words go on
        "question": continuation.strip() if task.multiple_input else context,
        "choices": choices,
        "log_likelihoods": likelihoods,
        "choice_lengths": lengths,
        "prediction": likelihoods.index(max(likelihoods)),
        "prediction_norm": normalized.index(max(normalized)),
        "gold": sample["target"],
        "acc": sample["acc"],
        "acc_norm": sample.get("acc_norm"),
    }


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON line a question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in records), encoding="utf-8")
