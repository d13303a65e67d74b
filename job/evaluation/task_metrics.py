"""Tasks without choices: generated answers (exact_match), perplexities, likelihoods.

Each question has a value and a weight for each metric, and the figure is a function of their sums:

| aggregation | figure | what is compared between two models |
|---|---|---|
| mean | sum of values / n | the difference |
| perplexity | exp(-sum of log-likelihoods / n) | the logarithm of the ratio |
| weighted_perplexity | exp(-sum of log-likelihoods / sum of weights) | the logarithm of the ratio |
| bits_per_byte | -sum of log-likelihoods / sum of bytes / ln 2 | the difference |

Where every value is 0 or 1, the comparison is that of accuracies (`statistics.compare`). Else it is a ratio of sums, by
`paired_ratio`. A perplexity above `LARGEST_PERPLEXITY` is given as that number: texts without spaces have words of
hundreds of tokens, and e^710 is beyond all floats. Its comparison is by logarithms, which have no limit. Metrics with
another aggregation (bleu, f1) are no function of such sums, and are left out, with a warning.

To add an aggregation that is one: lm-eval's name of it in `AGGREGATIONS`, its figure in `aggregate`, its difference in
`_comparison`, and the name in `job/results.schema.json`. A metric with a known aggregation needs nothing here: a task
file names it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from job.errors import DataError, Problem, SettingsError
from job.evaluation import statistics
from job.evaluation.generation import GenerationOptions
from job.evaluation.samples import HASHES, MeasuredSample
from job.evaluation.token_sampling import Sampling
from job.records import MeasuredScores, Metric

AGGREGATIONS = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
LARGEST_PERPLEXITY = 1e18
"""Largest figure that is given for a perplexity; the reader of manifests refuses greater numbers."""
_TOP_K = 50
"""Where a task samples and names no `top_k`: transformers' default, which holds for lm-eval's HFLM."""
_GENERATES = {"until", "do_sample", "temperature", "top_k", "top_p"}
_LENGTHS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}


def metrics_of(task: Any) -> dict[str, Metric]:
    """The metrics of one of lm-eval's tasks that can be compared by question, by name."""
    from lm_eval.api.registry import get_aggregation

    aggregation_names = {id(get_aggregation(name)): name for name in AGGREGATIONS}
    better = task.higher_is_better()
    return {
        metric: Metric(aggregation_names[id(function)], bool(better.get(metric, True)))
        for metric, function in task.aggregation().items()
        if id(function) in aggregation_names
    }


def generation_options(task: str, generation_kwargs: Mapping[str, Any], *, seed: int = 0) -> GenerationOptions:
    """A task's `generation_kwargs`, as lm-eval reads them.

    Raises:
        SettingsError: They ask for what is not done here, such as beams or penalties, or for what is impossible.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    other = {name: value for name, value in generation_kwargs.items() if name not in _GENERATES | _LENGTHS}
    unknown = [name for name, value in other.items() if not (name == "num_beams" and value == 1)]
    try:
        options = normalize_gen_kwargs(dict(generation_kwargs))
        most, top_p = int(options["max_gen_toks"]), float(options.get("top_p") or 1.0)
        top_k = int(_TOP_K if (named := options.get("top_k")) is None else named)
    except (TypeError, ValueError) as error:
        problem = f"{task} has generation_kwargs that are no numbers: {error}"
        raise SettingsError([Problem("JOB_EVAL__TASKS", problem)]) from error
    stop, temperature = handle_stop_sequences(options.get("until"), eos=None), options.get("temperature", 0.0)
    draws = bool(options.get("do_sample"))
    if most < 1 or (draws and (top_k < 0 or not 0 < top_p <= 1)):  # greedy decoding uses neither of the two
        problem = f"{task} asks to generate at most {most} tokens, with top_k {top_k} and top_p {top_p}"
        limits = "at least 1, 0 and more than 0 are needed, and top_p is at most 1"
        raise SettingsError([Problem("JOB_EVAL__TASKS", f"{problem}; {limits}")])
    if draws and not temperature > 0:
        unknown.append(f"do_sample with a temperature of {temperature}")
    if unknown:
        problem = (
            f"{task} asks to generate with {', '.join(unknown)}; supported are greedy decoding and "
            "sampling by temperature, top_k "
        )
        raise SettingsError([Problem("JOB_EVAL__TASKS", f"{problem}and top_p")])
    sampling = None
    if draws:
        sampling = Sampling(float(temperature), top_k, top_p, seed)
    return GenerationOptions(most, tuple(map(str, stop)), sampling)


def measured_scores(
    samples: Sequence[MeasuredSample],
    metrics: Mapping[str, Metric],
    *,
    task: str,
    kind: str,
    source: str,
    version: str,
    num_fewshot: int,
    reused_from: str | None = None,
) -> MeasuredScores:
    """One model on one task, from its samples; `metrics` are by the names in `MeasuredSample.values`.

    Raises:
        ValueError: A sample lacks a metric.
    """
    for number, sample in enumerate(samples, start=1):
        if sample.values.keys() != metrics.keys():
            raise ValueError(f"line {number}: has the metrics {sorted(sample.values)}, not {sorted(metrics)}")
    hashes = "".join(getattr(sample, name) for sample in samples for name in HASHES)
    return MeasuredScores(
        task=task,
        kind=kind,
        source=source,
        task_hash=hashlib.sha256(hashes.encode()).hexdigest(),
        version=version,
        n=len(samples),
        num_fewshot=num_fewshot,
        metrics=dict(metrics),
        values={name: tuple(sample.values[name] for sample in samples) for name in metrics},
        reused_from=reused_from,
    )


def measured_from(
    samples: Sequence[MeasuredSample], task: str, claimed: Mapping[str, Any], side: str
) -> MeasuredScores:
    """The figures that follow from published samples; what they do not say is the manifest's.

    Args:
        samples: Samples of one model.
        task: Its name.
        claimed: The task in the manifest's `evaluation.measured`.
        side: `base` or `adapter`.

    Raises:
        ValueError: A sample lacks a metric.
    """
    metrics = {
        name: Metric(facts["aggregation"], facts["higher_is_better"]) for name, facts in claimed["metrics"].items()
    }
    descriptive = {name: claimed[name] for name in ("kind", "source", "version", "num_fewshot")}
    return measured_scores(samples, metrics, task=task, reused_from=claimed["reused_from"][side], **descriptive)


def aggregate(values: Sequence[tuple[float, float]], aggregation: str) -> float:
    """The figure of (value, weight) pairs; see the table above."""
    mean = math.fsum(value for value, _ in values) / math.fsum(weight for _, weight in values)
    if aggregation == "mean":
        return mean
    if aggregation == "bits_per_byte":
        return -mean / math.log(2)
    return math.exp(-mean) if -mean < math.log(LARGEST_PERPLEXITY) else LARGEST_PERPLEXITY


def compare_measured(base: Mapping[str, MeasuredScores], adapter: Mapping[str, MeasuredScores]) -> dict[str, Any]:
    """The manifest's `evaluation.measured`: both models on each task; p values by Holm over all of these metrics.

    Args:
        base: By task, the scores to compare with. It may hold more tasks than `adapter`.
        adapter: By task, the scores to compare.

    Raises:
        DataError: The questions, prompts or metrics of a task differ.
    """
    unpaired = [
        name
        for name, scores in adapter.items()
        if name not in base or (base[name].task_hash, base[name].metrics) != (scores.task_hash, scores.metrics)
    ]
    if unpaired:
        raise DataError([Problem(name, "the base answered other questions than the adapter") for name in unpaired])
    names = [(task, metric) for task, scores in adapter.items() for metric in scores.metrics]
    compared = [
        _comparison(base[task].values[metric], adapter[task].values[metric], adapter[task].metrics[metric])
        for task, metric in names
    ]
    holm = statistics.holm([metric_comparison["p"] for metric_comparison in compared])
    by_name = dict(zip(names, zip(compared, holm, strict=True), strict=True))
    return {
        task: {
            "kind": scores.kind,
            "source": scores.source,
            "task_hash": scores.task_hash,
            "version": scores.version,
            "n": scores.n,
            "num_fewshot": scores.num_fewshot,
            "reused_from": {"base": base[task].reused_from, "adapter": scores.reused_from},
            "metrics": {
                metric: _record(base[task], scores, metric, *by_name[task, metric]) for metric in scores.metrics
            },
        }
        for task, scores in adapter.items()
    }


def _record(
    base: MeasuredScores, adapter: MeasuredScores, name: str, compared: Mapping[str, Any], holm_p: float
) -> dict[str, Any]:
    metric = adapter.metrics[name]
    verdict = statistics.verdict(holm_p, compared["ci95"], higher_is_better=metric.higher_is_better)
    return {
        "aggregation": metric.aggregation,
        "higher_is_better": metric.higher_is_better,
        "base": aggregate(base.values[name], metric.aggregation),
        "adapter": aggregate(adapter.values[name], metric.aggregation),
        **compared,
        "holm_p": holm_p,
        "verdict": verdict,
    }


def _comparison(
    base: Sequence[tuple[float, float]], adapter: Sequence[tuple[float, float]], metric: Metric
) -> dict[str, Any]:
    """Difference, interval, p value and counts. `improved` counts the questions with the better value."""
    before, after = [value for value, _ in base], [value for value, _ in adapter]
    weights = [weight for _, weight in adapter]
    if weights != [weight for _, weight in base]:
        raise DataError([Problem("evaluation", "a question has different weights for base and adapter")])
    rises = (
        metric.higher_is_better if metric.aggregation == "mean" else True
    )  # a likelihood is better when it is higher
    counts = {
        "improved": sum((a > b) if rises else (a < b) for b, a in zip(before, after, strict=True)),
        "regressed": sum((a < b) if rises else (a > b) for b, a in zip(before, after, strict=True)),
    }
    if metric.aggregation == "mean" and {*before, *after} <= {0, 1} and set(weights) == {1}:
        comparison = statistics.compare([value == 1 for value in before], [value == 1 for value in after])
        return {
            "test": "mcnemar",
            "delta": comparison.delta,
            "ci95": comparison.ci95,
            "p": comparison.mcnemar_p,
            **counts,
        }
    delta, (low, high), p = statistics.paired_ratio([a - b for b, a in zip(before, after, strict=True)], weights)
    if metric.aggregation != "mean":  # the figure falls where the likelihood rises
        scale = 1 / math.log(2) if metric.aggregation == "bits_per_byte" else 1.0
        delta, low, high = -scale * delta, -scale * high, -scale * low
    return {"test": "paired_t", "delta": delta, "ci95": (low, high), "p": p, **counts}
