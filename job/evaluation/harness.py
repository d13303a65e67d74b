"""Runs lm-eval's tasks: lm-eval makes the prompts and grades the answers; the job's scorer computes the scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from job import log
from job.errors import DataError, Problem, SettingsError
from job.evaluation.samples import HASHES, Sample, task_scores
from job.evaluation.tasks import Tasks, compiled_once, question_id
from job.records import ChoiceScore, Question, TaskScores

Score = Callable[[list[Question]], list[list[ChoiceScore]]]
"""Scores questions: for each, in order, its choices."""


@compiled_once()
def evaluate(
    tasks: Tasks, tokenizer: Any, score: Score, *, limit: int | None, cut_to: int | None = None
) -> dict[str, tuple[TaskScores, list[Sample]]]:
    """Runs the tasks zero-shot.

    Args:
        tasks: From `load_tasks`.
        tokenizer: The model's.
        score: Called once, with the questions of all tasks.
        limit: The first so many questions of each task; None for all.
        cut_to: lm-eval's `max_length`: a question that has more tokens with a choice loses its beginning; None for any
            length.

    Returns:
        By task: its figures and its samples.

    Raises:
        SettingsError: A task does not grade choices as right or wrong.
        DataError: The tokenizer makes no tokens of a question or a choice.
    """
    import lm_eval

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own are about its code
        results = lm_eval.evaluate(
            lm=_scoring_model(tokenizer, score, cut_to),
            task_dict=_zero_shot(tasks.loaded),
            limit=limit,
            bootstrap_iters=0,
        )
    return {
        name: _task_result(task, tasks.sources[name], results["samples"][name])
        for name, task in tasks.loaded["tasks"].items()
    }


def _zero_shot(loaded: Any) -> Any:
    """The tasks, set to no examples in the prompt."""
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


def _scoring_model(tokenizer: Any, score: Score, cut_to: int | None) -> Any:
    """An lm-eval model whose log-likelihoods come from `score`. It tokenizes as lm-eval's own HFLM does."""
    from lm_eval.api.model import TemplateLM

    class ScoringModel(TemplateLM):  # type: ignore[misc]
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

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001 - lm-eval's signature
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer.encode(string, **special))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            # lm-eval asks for one choice at a time, those of a question one after the other with the same context
            grouped = [list(group) for _, group in groupby(requests, key=lambda request: request[1])]
            questions = [Question(tuple(g[0][1]), tuple(tuple(request[2]) for request in g)) for g in grouped]
            _check_tokens(requests)
            if cut_to is not None:
                questions = _cut(questions, cut_to)
            return [(s.log_likelihood, s.greedy) for scores in score(questions) for s in scores]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            raise SettingsError([Problem("JOB_EVAL__TASKS", "only multiple-choice tasks can be evaluated")])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            raise SettingsError([Problem("JOB_EVAL__TASKS", "only multiple-choice tasks can be evaluated")])

    return ScoringModel()


def _cut(questions: Sequence[Question], most: int) -> list[Question]:
    """The questions without the beginning of those that are too long, exactly as lm-eval's HFLM cuts them.

    It keeps the last `most + 1` tokens of context and choice, of which the last one is not read. Each choice of such a
    question then has a context of its own.
    """
    kept: list[Question] = []
    long = 0
    for question in questions:
        if len(question.context) + max(map(len, question.choices)) <= most + 1:
            kept.append(question)
            continue
        long += 1
        kept += [Question(question.context[-(most + 1 - len(choice)) :], (choice,)) for choice in question.choices]
    if long:
        log.get_logger().warning(
            "questions were too long: their beginning was cut off", questions=long, max_length=most
        )
    return kept


def _check_tokens(requests: Sequence[Any]) -> None:
    """Refuses empty contexts and choices: without a token there is no likelihood.

    Raises:
        DataError: With all of them.
    """
    wrong = [
        Problem(f"question {context[-80:]!r}", f"the tokenizer makes no tokens of {what}")
        for (context, choice), context_ids, choice_ids in requests
        for what, ids in (("it", context_ids), (f"its choice {choice!r}", choice_ids))
        if not ids
    ]
    if wrong:
        raise DataError(wrong)


def _task_result(task: Any, source: str, results: list[dict[str, Any]]) -> tuple[TaskScores, list[Sample]]:
    """Figures and samples of one task, from what lm-eval calls its samples."""
    if any(result[metric] not in {0, 1} for result in results for metric in ("acc", "acc_norm") if metric in result):
        what = (
            f"{task.task_name} gives fractions of a point; only tasks whose answers are right or wrong can be compared"
        )
        raise SettingsError([Problem("JOB_EVAL__TASKS", what)])
    samples = [_sample(task, result) for result in sorted(results, key=lambda result: result["doc_id"])]
    return task_scores(samples, task=task.task_name, source=source, version=str(task.VERSION)), samples


def _sample(task: Any, result: dict[str, Any]) -> Sample:
    """One question and its scores."""
    doc = result["doc"]
    choices = task.doc_to_choice(doc)
    lengths = [len(choice) for choice in choices]
    context, continuation = result["arguments"][0][:2]
    # some tasks also score every choice without its question, behind these
    likelihoods = [response[0] for response in result["filtered_resps"]][: len(lengths)]
    normalized = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    return Sample(
        id=question_id(doc, result["doc_id"]),
        **{name: result[name] for name in HASHES},
        # where a task has several contexts, its choices are in them, and the continuation is what they have in common
        question=continuation.strip() if task.multiple_input else context,
        choices=choices,
        log_likelihoods=likelihoods,
        choice_lengths=lengths,
        prediction=likelihoods.index(max(likelihoods)),
        prediction_norm=normalized.index(max(normalized)),
        gold=result["target"],
        acc=float(result["acc"]),
        acc_norm=None if "acc_norm" not in result else float(result["acc_norm"]),
    )
