"""Runs lm-eval's tasks: lm-eval makes the prompts and grades the answers; the job's scorer computes the scores."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, cast

from job import log
from job.common.resources import usable_cpus
from job.errors import DataError, Problem, SettingsError
from job.evaluation.generation import GenerationOptions
from job.evaluation.samples import HASHES, MeasuredSample, Sample, task_scores
from job.evaluation.task_metrics import generation_options, measured_scores, metrics_of
from job.evaluation.task_names import MEASURED, MULTIPLE_CHOICE
from job.evaluation.tasks import Tasks, compiled_once, question_id, restart_examples
from job.records import Answer, ChoiceScore, MeasuredScores, Metric, Question, TaskScores

Generate = Callable[[list[tuple[int, ...]], GenerationOptions], list[Answer]]
"""Answers prompts, in order."""
Score = Callable[[list[Question]], list[list[ChoiceScore]]]
"""Scores questions: for each, in order, its choices."""

_TEXTS = 256
"""Texts that a thread tokenizes at a time."""


@compiled_once()
def evaluate(
    tasks: Tasks, tokenizer: Any, score: Score, *, limit: int | None, cut_to: int | None = None
) -> dict[str, tuple[TaskScores, list[Sample]]]:
    """Runs the tasks with multiple-choice questions.

    Args:
        tasks: From `load_tasks`; others than multiple-choice ones are left out, and are for `measure`.
        tokenizer: The model's.
        score: Called once, with the questions of all tasks; not without any.
        limit: Number of questions of each task, from the first; None for all.
        cut_to: lm-eval's `max_length`: a question that has more tokens with a choice loses its beginning; None for any
            length.

    Returns:
        By task: its figures and its samples.

    Raises:
        SettingsError: A task does not grade choices as right or wrong.
        DataError: The tokenizer makes no tokens of a question or a choice.
    """
    multiple_choice = tasks.only(MULTIPLE_CHOICE)
    if not multiple_choice.loaded["tasks"]:
        return {}
    results = _run(multiple_choice, _scoring_model(tokenizer, score, cut_to), limit)
    return {
        name: _task_result(task, tasks.sources[name], results["samples"][name])
        for name, task in multiple_choice.loaded["tasks"].items()
    }


@compiled_once()
def measure(
    tasks: Tasks,
    tokenizer: Any,
    score: Score,
    generate: Generate,
    *,
    limit: int | None,
    max_length: int,
    cut_to: int | None = None,
    seed: int = 0,
) -> dict[str, tuple[MeasuredScores, list[MeasuredSample]]]:
    """Runs the tasks without choices: generated answers, perplexities, likelihoods.

    Args:
        tasks: From `load_tasks`; multiple-choice ones are left out, and are for `evaluate`.
        tokenizer: The model's.
        score: Called once for each kind of task that is scored, with its texts in windows.
        generate: Called once for each way to generate, with the prompts that are answered in that way.
        limit: As for `evaluate`.
        max_length: Tokens of a window of a text whose perplexity is measured, and lm-eval's `max_length`.
        cut_to: As for `evaluate`; a prompt keeps as many of its last tokens as leave room for the answer.
        seed: Seed of sampled answers.

    Returns:
        By task: its figures and its samples.

    Raises:
        DataError: The tokenizer makes no tokens of a text.
    """
    measured_tasks = tasks.only(*MEASURED)
    if not measured_tasks.loaded["tasks"]:
        return {}
    lm = _scoring_model(tokenizer, score, cut_to, Generating(generate, max_length, seed))
    results = _run(measured_tasks, lm, limit)
    return {
        name: _measured_result(task, tasks.sources[name], results["samples"][name])
        for name, task in measured_tasks.loaded["tasks"].items()
    }


def _run(tasks: Tasks, lm: Any, limit: int | None) -> Any:
    """lm-eval's results. Each run draws the same examples for its prompts."""
    import lm_eval

    for task in tasks.loaded["tasks"].values():
        restart_examples(task)
    with warnings.catch_warnings(), _without_figures(tasks.loaded["tasks"].values()):
        warnings.simplefilter("ignore")  # lm-eval's own are about its code
        return lm_eval.evaluate(lm=lm, task_dict=tasks.loaded, limit=limit, bootstrap_iters=0)


@contextmanager
def _without_figures(tasks: Iterable[Any]) -> Iterator[None]:
    """Only lm-eval's samples are used. Its figures are not computed: its perplexity overflows where words are long."""
    tasks_without_figures = list(tasks)
    for task in tasks_without_figures:
        task.aggregation = partial(dict.fromkeys, task.aggregation(), len)
    try:
        yield
    finally:
        for task in tasks_without_figures:
            del task.aggregation


@dataclass(frozen=True)
class Generating:
    """How the model of `_scoring_model` generates, and reads long texts; see `measure`."""

    generate: Generate
    max_length: int
    seed: int


def _scoring_model(  # noqa: C901 - the methods of its class are counted
    tokenizer: Any, score: Score, cut_to: int | None, generating: Generating | None = None
) -> Any:
    """An lm-eval model whose log-likelihoods come from `score`. It tokenizes as lm-eval's own HFLM does."""
    from lm_eval.api.model import TemplateLM

    prefix = int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    begin = str(tokenizer.decode([prefix]))

    class ScoringModel(TemplateLM):  # type: ignore[misc]
        """Defined here because its base is a heavy import."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.backend = "causal"
            self.encoded: dict[str, list[int]] = {}

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001 - lm-eval's signature
            if add_special_tokens is None and (known := self.encoded.get(string)) is not None:
                return known  # not copied: lm-eval changes none of them
            if add_special_tokens is None:
                return _ids(tokenizer, string, begin)
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            self.encoded = _encoded(tokenizer, [request.args for request in requests], begin)
            try:
                return super().loglikelihood(requests, disable_tqdm=True)
            finally:
                self.encoded = {}

        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            # lm-eval requests one choice at a time, those of a question one after the other with the same context
            grouped = [list(group) for _, group in groupby(requests, key=lambda request: request[1])]
            questions = [Question(tuple(g[0][1]), tuple(tuple(request[2]) for request in g)) for g in grouped]
            _check_tokens(requests)
            if cut_to is not None:
                questions = _cut(questions, cut_to)
            return [(s.log_likelihood, s.greedy) for scores in score(questions) for s in scores]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            windows, owners = [], []
            for number, request in enumerate(requests):
                for context, predicted in _windows(self, request.args[0], cast("Generating", generating).max_length):
                    windows.append(Question(tuple(context), (tuple(predicted),)))
                    owners.append(number)
            if empty := [n for n in range(len(requests)) if n not in set(owners)]:
                raise DataError([Problem(f"text {n}", "the tokenizer returns no tokens for it") for n in empty])
            totals = [0.0] * len(requests)
            for number, (score_of_window,) in zip(owners, score(windows), strict=True):
                totals[number] += score_of_window.log_likelihood
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
            return _generated(tokenizer, requests, cast("Generating", generating), cut_to)

    return ScoringModel()


def _ids(tokenizer: Any, text: str, begin: str) -> list[int]:
    """The tokens of a text as HFLM has them: special tokens are not added to a text that begins with `begin`.

    Else a task whose prompts begin with the text of the beginning-of-sequence token would be scored with two of them.
    """
    special = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
    return list(tokenizer.encode(text, **special))


def _encoded(tokenizer: Any, pairs: Iterable[tuple[str, str]], begin: str) -> dict[str, list[int]]:
    """The tokens of the texts that lm-eval tokenizes of contexts with their choices, each text once and all together.

    It tokenizes each context alone, without spaces at its end, and again before each choice. `begin`: as for `_ids`.
    """
    texts = list(dict.fromkeys(text for a, b in pairs if a for text in (a.rstrip(), a + b)))
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not texts or not hasattr(backend, "encode_batch"):  # one in Python, which gains nothing by a list
        return {text: _ids(tokenizer, text, begin) for text in texts}
    tokenizer.encode(texts[0])  # switches off truncation and padding that tokenizer.json may have set
    begun = {text: _ids(tokenizer, text, begin) for text in texts if begin and text.startswith(begin)}
    texts = [text for text in texts if text not in begun]
    parts = [texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS)]
    # Threads, since the library releases the GIL meanwhile; its own threads are switched off because of forks.
    with ThreadPoolExecutor(usable_cpus()) as pool:
        encodings = [one for part in pool.map(backend.encode_batch, parts) for one in part]
    return begun | {text: one.ids for text, one in zip(texts, encodings, strict=True)}


def _windows(lm: Any, text: str, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, predicted tokens) of each of lm-eval's windows of a text, of at most `max_length` tokens."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = lm.tok_encode(text)
    return map(make_disjoint_window, get_rolling_token_windows(ids, lm.prefix_token_id, max_length, context_len=1))


def _generated(tokenizer: Any, requests: Sequence[Any], generating: Generating, cut_to: int | None) -> list[str]:
    """The answers to lm-eval's requests, in order; those with the same generation options together."""
    ends = tokenizer.decode([tokenizer.eos_token_id])
    groups: dict[GenerationOptions, list[int]] = {}
    for number, request in enumerate(requests):
        options = generation_options(request.task_name, request.args[1], seed=generating.seed)
        groups.setdefault(replace(options, stop=(*options.stop, ends)), []).append(number)
    answers: dict[int, str] = {}
    for options, numbers in groups.items():
        prompts = [_prompt_ids(tokenizer, requests[number].args[0]) for number in numbers]
        if cut_to is not None:
            prompts = [prompt[-max(1, cut_to - options.max_new_tokens) :] for prompt in prompts]
        generated = generating.generate(prompts, options)
        answers.update({number: answer.text for number, answer in zip(numbers, generated, strict=True)})
    return [answers[number] for number in range(len(requests))]


def _prompt_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """As HFLM tokenizes a prompt: a beginning-of-sequence token that is in the text is not added again."""
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tuple(tokenizer.encode(text, **({"add_special_tokens": False} if begins else {})))


def _cut(questions: Sequence[Question], most: int) -> list[Question]:
    """The questions without the beginning of those that are too long, exactly as lm-eval's HFLM cuts them.

    It keeps the last `most + 1` tokens of context and choice, of which the last one is not read. Each choice of such a
    question then has its own context.
    """
    shortened: list[Question] = []
    long = 0
    for question in questions:
        if len(question.context) + max(map(len, question.choices)) <= most + 1:
            shortened.append(question)
            continue
        long += 1
        shortened += [Question(question.context[-(most + 1 - len(choice)) :], (choice,)) for choice in question.choices]
    if long:
        log.get_logger().warning(
            "questions were too long: their beginning was cut off", questions=long, max_length=most
        )
    return shortened


def _check_tokens(requests: Sequence[Any]) -> None:
    """Refuses empty contexts and choices: without a token there is no likelihood.

    Raises:
        DataError: With all of them.
    """
    problems = dict.fromkeys(  # a question is in the requests of all its choices
        Problem(f"question {context[-80:]!r}", f"the tokenizer returns no tokens for {what}")
        for (context, choice), context_ids, choice_ids in requests
        for what, ids in (("it", context_ids), (f"its choice {choice!r}", choice_ids))
        if not ids
    )
    if problems:
        raise DataError([*problems])


def _task_result(task: Any, source: str, results: list[dict[str, Any]]) -> tuple[TaskScores, list[Sample]]:
    """Figures and samples of one task, from what lm-eval calls its samples."""
    if any(result[metric] not in {0, 1} for result in results for metric in ("acc", "acc_norm") if metric in result):
        what = (
            f"{task.task_name} gives fractions of a point; only tasks whose answers are right or wrong can be compared"
        )
        raise SettingsError([Problem("JOB_EVAL__TASKS", what)])
    samples = [_sample(task, result) for result in sorted(results, key=lambda result: result["doc_id"])]
    scores = task_scores(
        samples,
        task=task.task_name,
        source=source,
        version=str(task.VERSION),
        num_fewshot=task.config.num_fewshot or 0,
    )
    return scores, samples


def _measured_result(
    task: Any, source: str, results: list[dict[str, Any]]
) -> tuple[MeasuredScores, list[MeasuredSample]]:
    """Figures and samples of one task; lm-eval gives a question once for each of its filters."""
    metric_of = metrics_of(task)
    if left_out := sorted({name for result in results for name in result["metrics"]} - metric_of.keys()):
        log.get_logger().warning(
            "metrics are left out: they are not averages over questions", task=task.task_name, metrics=left_out
        )
    by_doc: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        by_doc.setdefault(result["doc_id"], []).append(result)
    samples = [_measured_sample(by_doc[number], metric_of) for number in sorted(by_doc)]
    metrics = {name: metric_of[name.partition(",")[0]] for name in samples[0].values}
    record: dict[str, Any] = {"task": task.task_name, "kind": task.OUTPUT_TYPE, "source": source}
    record |= {"version": str(task.VERSION), "num_fewshot": task.config.num_fewshot or 0}
    return measured_scores(samples, metrics, **record), samples


def _measured_sample(results: Sequence[dict[str, Any]], metrics: Mapping[str, Metric]) -> MeasuredSample:
    """One question, from lm-eval's result of each of its filters."""
    first = results[0]
    values = {
        f"{name},{result['filter']}": _weighted(result[name])
        for result in results
        for name in result["metrics"]
        if name in metrics
    }
    return MeasuredSample(
        id=question_id(first["doc"] if isinstance(first["doc"], dict) else {}, first["doc_id"]),
        **{name: first[name] for name in HASHES},
        prompt=first["arguments"][0][0],
        target=_plain(first["target"]),
        responses=_plain(first["resps"][0]),
        filtered={result["filter"]: _plain(result["filtered_resps"][0]) for result in results},
        values=values,
    )


def _weighted(value: Any) -> tuple[float, float]:
    """A question's value of a metric and its weight: perplexities come with the number of words or bytes."""
    return (float(value[0]), float(value[1])) if isinstance(value, tuple | list) else (float(value), 1.0)


def _plain(value: Any) -> Any:
    """The value as JSON has it: a tuple as a list, a type that JSON lacks as text."""
    return json.loads(json.dumps(value, default=str))


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
