"""The figures of a manifest, worked out again from the published answers and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from job.data.batch_plan import steps_per_epoch
from job.evaluation.comparison import compare_tasks, judge
from job.evaluation.samples import HASHES, Sample, contradiction, parse, tally_records
from job.records import AttemptRecord, StepMetrics, TaskScores
from job.results.cost import compute_cost
from job.results.reader import answers_path
from job.runs.layout import METRICS, RESULTS
from job.training.config import total_steps
from job.verification.differences import Check, Difference, count, find_differences, show, why

_MOST_TOLD = 5

Copies = Mapping[str, Path]
Sheets = dict[str, list[Sample]]


def check_evaluation(results: Mapping[str, Any], copies: Copies) -> Check:
    """Every figure of every task, from the answers to its questions."""
    tasks = results["evaluation"]["tasks"]
    sheets: dict[str, Sheets] = {}
    differences: list[Difference] = []
    for side in ("base", "adapter"):
        sheets[side], wrong = _read_sheets(tasks, side, copies)
        differences += wrong
    differences += _unpaired(sheets["base"], sheets["adapter"], "base")
    if not differences:
        found = compare_tasks(*(_scores(sheets[side], tasks, side) for side in ("base", "adapter")))
        differences += find_differences(f"{RESULTS} evaluation.tasks", tasks, found)
    questions = sum(len(records) for records in sheets["adapter"].values())
    extent = f"{count(len(tasks), 'task')}, {count(questions, 'question')} answered twice"
    return Check("evaluation", extent, tuple(differences))


def check_gate(results: Mapping[str, Any], copies: Copies) -> Check:
    """The gate's verdict, from the figures; against an earlier run, from that run's answers, which lie beside ours."""
    gate, tasks = results["gate"], results["evaluation"]["tasks"]
    against = gate["baseline"]
    thresholds = {name: gate[name] for name in ("metric", "min_delta", "max_regression")}
    asked = {**thresholds, "baseline": against and against["results"]}
    settings = {name: results["settings"].get(f"gate.{name}", {}).get("value") for name in asked}
    differences = list(find_differences(f"{RESULTS} gate", asked, settings))
    if against is not None:
        earlier, wrong = _read_sheets(tasks, "baseline", copies)
        ours, ours_wrong = _read_sheets(tasks, "adapter", copies)
        wrong += ours_wrong or _unpaired(earlier, ours, "baseline")
        wrong += find_differences(f"{RESULTS} gate.baseline.tasks", sorted(against["tasks"]), sorted(tasks))
        differences += wrong
        if not wrong:
            pair = _scores(earlier, against["tasks"], "base"), _scores(ours, tasks, "adapter")
            against = {**against, "tasks": compare_tasks(*pair)}
    if not differences:
        differences += find_differences(f"{RESULTS} gate", gate, judge(tasks, **thresholds, baseline=against))
    outcome = {None: "none set", True: "met", False: "not met"}[gate["passed"]]
    versus = "" if against is None else f", against run {show(against['run'])}"
    return Check("gate", outcome + versus, tuple(differences))


def _read_sheets(tasks: Mapping[str, Any], side: str, copies: Copies) -> tuple[Sheets, list[Difference]]:
    """By task: one side's records, and what is wrong with them alone."""
    sheets, wrong = {}, []
    for task, claimed in tasks.items():
        path = answers_path(task, side)
        try:
            records = parse(copies[path].read_bytes())
        except KeyError:
            wrong.append(Difference(path, "the answers of a task", "nothing that can be read"))
        except ValueError as error:
            wrong.append(Difference(path, "one record a question", str(error)))
        else:
            sheets[task] = records
            wrong += find_differences(f"{RESULTS} evaluation.tasks.{task}.n", claimed["n"], len(records))
            told = ((f"{path} line {n}", contradiction(record)) for n, record in enumerate(records, start=1))
            found = [Difference(where, "an answer by its likelihoods", what) for where, what in told if what]
            wrong += found[:_MOST_TOLD]
    return sheets, wrong


def _unpaired(before: Sheets, after: Sheets, side: str) -> Iterator[Difference]:
    """The first question of each task that the two sides do not have in common."""
    for task in before.keys() & after.keys():
        for number, (one, two) in enumerate(zip(before[task], after[task], strict=False), start=1):
            if any(getattr(one, name) != getattr(two, name) for name in ("id", *HASHES)):
                where = f"{answers_path(task, side)} line {number}"
                yield Difference(where, f"question {show(two.id)} as the adapter was asked", show(one.id))
                break


def _scores(sheets: Sheets, tasks: Mapping[str, Any], side: str) -> dict[str, TaskScores]:
    """What the records add up to; where questions and answers came from is taken over from the manifest."""
    return {
        task: tally_records(
            records,
            task=task,
            source=tasks[task]["source"],
            version=tasks[task]["version"],
            reused_from=tasks[task][side]["reused_from"],
        )
        for task, records in sheets.items()
    }


def check_training(results: Mapping[str, Any], copies: Copies) -> Check:
    """What training did, from the metrics of every step, and how long it should have gone on by its settings."""
    training = results["training"]
    extent = count(training["steps"], "step")
    try:
        history = _read_steps(copies[METRICS].read_bytes())
        found = _summed(history, results)
    except KeyError:
        return Check("training", extent, (Difference(METRICS, "the metrics of a step a line", "nothing to read"),))
    except ValueError as error:
        return Check("training", extent, (Difference(METRICS, "the metrics of a step a line", str(error)),))
    differences = list(find_differences(f"{RESULTS} training", {name: training[name] for name in found}, found))
    if [step.step for step in history] != list(range(1, len(history) + 1)):
        differences.append(Difference(METRICS, "the steps from 1 up", "others"))
    return Check("training", extent, tuple(differences))


def _read_steps(data: bytes) -> list[StepMetrics]:
    """The steps in a file of metrics.

    Raises:
        ValueError: With the first line that holds none.
    """
    kind, steps = TypeAdapter(StepMetrics), []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            steps.append(kind.validate_json(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {why(error)}") from None
    return steps


def _summed(history: Sequence[StepMetrics], results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `training` that follow from the steps, or from settings and data.

    Raises:
        ValueError: The settings are not of a kind that could have been trained by.
    """
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    rows, size, epochs, most = (
        results["dataset"]["rows"],
        *(settings.get(f"train.{name}") for name in ("global_batch_size", "epochs", "max_steps")),
    )
    if not (isinstance(size, int) and isinstance(epochs, int) and isinstance(most, int | None) and size > 0):
        raise ValueError("no settings that could have been trained by")
    planned = total_steps(rows, size, epochs, most)
    if len(history) != planned:
        raise ValueError(f"{len(history)} steps, {planned} by the settings")
    last = history[-steps_per_epoch(rows, size) :]
    targets, learned = sum(step.target_tokens for step in history), sum(step.target_tokens for step in last)
    seconds = math.fsum(float(step.measured.get("seconds") or 0) for step in history)
    return {
        "steps": len(history),
        "examples": sum(step.examples for step in history),
        "target_tokens": targets,
        "loss": sum(step.loss * step.target_tokens for step in last) / learned if learned else None,
        "seconds": seconds,
        "tokens_per_second": targets / seconds if seconds else None,
        "global_batch_size": size,
    }


def check_cost(results: Mapping[str, Any]) -> Check:
    """Seconds, dollars, waste, energy and savings, from the attempts and the prices."""
    attempts = TypeAdapter(list[AttemptRecord]).validate_python(results["run"]["attempts"])
    on_demand = results["settings"].get("cost.on_demand_usd_per_hour", {}).get("value")
    found = compute_cost(attempts, results["training"]["seconds"], on_demand)
    differences = find_differences(f"{RESULTS} cost", results["cost"], found)
    return Check("cost", f"adds up over {count(len(attempts), 'attempt')}", tuple(differences))
