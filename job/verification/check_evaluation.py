"""Recomputes the figures of evaluation and gate from the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from job.common.formatting import count
from job.errors import JobError
from job.evaluation.comparison import compare_full_precision, compare_near_ties, compare_tasks, evaluate_gate
from job.evaluation.groups import compare_groups, groups_from
from job.evaluation.near_ties import BOUNDS
from job.evaluation.policy import Policy
from job.evaluation.samples import HASHES, Sample, contradiction, parse, parse_measured, task_scores
from job.evaluation.task_metrics import compare_measured, measured_from
from job.records import Evaluated, MeasuredScores, TaskScores
from job.results.reader import scored_in
from job.runs.layout import ORIGINAL_SIDE, RESULTS, answers_key, export_side
from job.verification.differences import CheckResult, Copies, Difference, find_differences, show

_MAX_SHOWN = 5

SamplesByTask = dict[str, list[Sample]]


def check_evaluation(results: Mapping[str, Any], copies: Copies) -> CheckResult:
    """Recomputes every figure of every task from the samples."""
    tasks = results["evaluation"]["tasks"]
    by_task: dict[str, SamplesByTask] = {}
    differences: list[Difference] = []
    for side in ("base", "adapter"):
        by_task[side], wrong = read_samples(tasks, side, copies)
        differences += wrong
    differences += unpaired(by_task["base"], by_task["adapter"], "base")
    scored: dict[str, dict[str, TaskScores]] = {"base": {}, "adapter": {}}
    if not differences:
        bound = (results["evaluation"].get("near_ties") or {}).get("bound", 0.0)
        scored = {side: scores_of(records, tasks, side, bound) for side, records in by_task.items()}
        overlap = (results["dataset"].get("audit") or {}).get("overlap")
        computed = compare_tasks(scored["base"], scored["adapter"], overlap=overlap)
        differences += find_differences(f"{RESULTS} evaluation.tasks", tasks, computed)
        differences += _full_precision(results, copies, by_task)
        if (near := results["evaluation"].get("near_ties")) is not None:  # older versions did not look for them
            recomputed_near = compare_near_ties(scored["base"], scored["adapter"], scored_in(results)["dtype"], bound)
            differences += find_differences(f"{RESULTS} evaluation.near_ties", near, recomputed_near)
    questions = sum(len(records) for records in by_task["adapter"].values())
    measured = results["evaluation"].get("measured", {})
    of_measured, wrong = _measured(measured, copies)
    differences += wrong
    differences += _groups(results, *(Evaluated(scored[side], [], of_measured[side]) for side in ("base", "adapter")))
    questions += sum(task["n"] for task in measured.values())
    extent = f"{count(len(tasks) + len(measured), 'task')}, {count(questions, 'question')} for base and adapter"
    return CheckResult("evaluation", extent, tuple(differences), tuple(_other_bound(results)))


def _other_bound(results: Mapping[str, Any]) -> Iterator[str]:
    """A note if the run counted near ties by another bound than this version has."""
    near = results["evaluation"].get("near_ties")
    if near is not None and near["bound"] != BOUNDS.get(near["dtype"]):
        now = f"{BOUNDS[near['dtype']]} nats" if near["dtype"] in BOUNDS else "none"
        what = f"near ties are counted by the run's own bound, {near['bound']} nats; this version's bound for"
        yield f"{what} {show(near['dtype'])} is {now}"


def _groups(results: Mapping[str, Any], base: Evaluated, adapter: Evaluated) -> Iterator[Difference]:
    """Recomputes the figures of groups from the scores of those of their tasks that could be read."""
    claimed, where = results["evaluation"].get("groups", {}), f"{RESULTS} evaluation.groups"
    scored = {*adapter.scores, *adapter.measured}
    if unscored := sorted({task for group in claimed.values() for task in group["tasks"]} - scored):
        yield Difference(where, "groups of the tasks that were scored", show(", ".join(unscored)))
        return
    try:
        recomputed = compare_groups(groups_from(claimed), base, adapter)
    except (KeyError, ValueError, ArithmeticError):  # a figure that none of the tasks has
        yield Difference(where, "metrics that the groups' tasks have", "other metrics")
    else:
        yield from find_differences(where, claimed, recomputed)


def _measured(
    tasks: Mapping[str, Any], copies: Copies
) -> tuple[dict[str, dict[str, MeasuredScores]], list[Difference]]:
    """The scores of tasks without choices from their samples, side -> task -> scores, and the differences."""
    scores_by_side: dict[str, dict[str, MeasuredScores]] = {"base": {}, "adapter": {}}
    differences = []
    for side, scores in scores_by_side.items():
        for task, claimed in tasks.items():
            path = answers_key(task, side)
            try:
                scores[task] = measured_from(parse_measured(copies[path].read_bytes()), task, claimed, side)
            except (KeyError, ValueError) as error:
                what = "no readable file" if isinstance(error, KeyError) else str(error)
                differences.append(Difference(path, "one record for each question", what))
    if differences:
        return scores_by_side, differences
    try:
        computed = compare_measured(scores_by_side["base"], scores_by_side["adapter"])
    except (JobError, ArithmeticError) as error:
        differences.append(
            Difference(f"{RESULTS} evaluation.measured", "the same questions for base and adapter", str(error))
        )
    else:
        differences += find_differences(f"{RESULTS} evaluation.measured", tasks, computed)
    return scores_by_side, differences


def _full_precision(
    results: Mapping[str, Any], copies: Copies, by_task: Mapping[str, SamplesByTask]
) -> Iterator[Difference]:
    """Recomputes the figures of the base with its original weights, if it was scored, from its samples."""
    claimed, tasks = results["evaluation"].get("full_precision"), results["evaluation"]["tasks"]
    if claimed is None or (claimed.get("not_scored") and not claimed["tasks"]):
        return
    where = f"{RESULTS} evaluation.full_precision"
    original, wrong = read_samples(tasks, ORIGINAL_SIDE, copies)
    wrong += unpaired(original, by_task["adapter"], ORIGINAL_SIDE)
    wrong += find_differences(f"{where}.tasks", sorted(claimed["tasks"]), sorted(tasks))
    yield from wrong
    if not wrong:
        entries = {
            task: {**tasks[task], ORIGINAL_SIDE: figures["scores"]} for task, figures in claimed["tasks"].items()
        }
        pair = (scores_of(by_task[side], tasks, side) for side in ("base", "adapter"))
        recomputed = compare_full_precision(scores_of(original, entries, ORIGINAL_SIDE), *pair)
        yield from find_differences(f"{where}.tasks", claimed["tasks"], recomputed)


def check_gate(results: Mapping[str, Any], copies: Copies) -> CheckResult:
    """Recomputes the gate's verdict from the figures; with a baseline, from the copies of its samples in this run."""
    gate, tasks = results["gate"], results["evaluation"]["tasks"]
    baseline, on = gate["baseline"], gate.get("on", "adapter")
    thresholds = {name: gate[name] for name in ("metric", "min_delta", "max_regression")}
    claimed = {**thresholds, "baseline": baseline and baseline["results"], "on": on}
    settings = {name: results["settings"].get(f"gate.{name}", {}).get("value") for name in claimed}
    settings["on"] = settings["on"] or "adapter"  # versions without this setting judged the adapter
    differences = list(find_differences(f"{RESULTS} gate", claimed, settings))
    side = _gated_side(results, on)
    if side is None:
        differences.append(Difference(f"{RESULTS} gate.on", show(on), "no export of this format"))
        return CheckResult("gate", "none", tuple(differences))
    if _unscored(results, on):
        tasks, baseline = {}, baseline and {**baseline, "tasks": {}}
    elif side != "adapter" and baseline is None and not differences:
        sides = (read_samples(tasks, name, copies) for name in ("base", side))
        (before, before_wrong), (after, after_wrong) = sides
        differences += [*before_wrong, *after_wrong, *unpaired(before, after, "base")]
        if not differences:
            claimed = {task: {**comparison, side: comparison["adapter"]} for task, comparison in tasks.items()}
            tasks = compare_tasks(scores_of(before, tasks, "base"), scores_of(after, claimed, side))
    if baseline is not None and tasks:
        earlier, baseline_differences = read_samples(tasks, "baseline", copies)
        own_samples, own_differences = read_samples(tasks, side, copies)
        baseline_differences += own_differences or unpaired(earlier, own_samples, "baseline")
        baseline_differences += find_differences(
            f"{RESULTS} gate.baseline.tasks", sorted(baseline["tasks"]), sorted(tasks)
        )
        differences += baseline_differences
        if not baseline_differences:
            pair = scores_of(earlier, baseline["tasks"], "base"), scores_of(own_samples, baseline["tasks"], "adapter")
            baseline = {**baseline, "tasks": compare_tasks(*pair)}
    if side == "adapter":
        evaluation = results["evaluation"]
        tasks = {**tasks, **evaluation.get("measured", {}), **evaluation.get("groups", {})}
    policy, policy_differences = _policy(results)
    differences += policy_differences
    if not differences:
        differences += find_differences(
            f"{RESULTS} gate",
            {"on": on, **gate},
            evaluate_gate(tasks, **thresholds, on=on, baseline=baseline, policy=policy),
        )
    outcome = {None: "none set", True: "met", False: "not met"}[gate["passed"]]
    versus = "" if baseline is None else f", against run {show(baseline['run'])}"
    subject = "" if side == "adapter" else f", {on}"
    subject += f", policy {gate['policy']['outcome']}" if "policy" in gate else ""
    return CheckResult("gate", outcome + subject + versus, tuple(differences))


def _policy(results: Mapping[str, Any]) -> tuple[Policy | None, list[Difference]]:
    """The policy in the manifest; None, with the differences, if it is missing or invalid."""
    policy_file = (results["settings"].get("gate.policy") or {}).get("value")
    recorded = results["gate"].get("policy")
    if (policy_file is None) != (recorded is None):
        what = f"JOB_GATE__POLICY {show(policy_file)}"
        return None, [Difference(f"{RESULTS} gate.policy", "rules" if recorded else "no rules", what)]
    if recorded is None:
        return None, []
    try:
        return Policy.model_validate(recorded["asked"]), []
    except ValidationError as error:
        return None, [Difference(f"{RESULTS} gate.policy.asked", "a policy", f"{error.errors()[0]['msg']}")]


def _unscored(results: Mapping[str, Any], on: str) -> bool:
    """Whether the gate judges a format that was not exported or not scored; such a format does not meet it."""
    return any(
        export["format"] == on and not export["candidates"].get(export["candidate"])
        for export in results.get("exports", ())
    )


def _gated_side(results: Mapping[str, Any], on: str) -> str | None:
    """The side that the gate is about; None if it names a format that was not exported."""
    if on == "adapter":
        return on
    published = {export["format"]: export["candidate"] for export in results.get("exports", ())}
    return export_side(on, published[on]) if on in published else None


def read_samples(tasks: Mapping[str, Any], side: str, copies: Copies) -> tuple[SamplesByTask, list[Difference]]:
    """One side's samples by task, and the differences in them.

    Args:
        tasks: Task -> its entry in the manifest.
        side: `base`, `adapter`, `baseline`, or a side of an export.
        copies: Local copies by path.
    """
    by_task, differences = {}, []
    for task, claimed in tasks.items():
        path = answers_key(task, side)
        try:
            records = parse(copies[path].read_bytes())
        except KeyError:
            differences.append(Difference(path, "the answers of a task", "no readable file"))
        except ValueError as error:
            differences.append(Difference(path, "one record for each question", str(error)))
        else:
            by_task[task] = records
            differences += find_differences(f"{RESULTS} evaluation.tasks.{task}.n", claimed["n"], len(records))
            checked = ((f"{path} line {n}", contradiction(record)) for n, record in enumerate(records, start=1))
            contradictions = [
                Difference(where, "the answer that follows from its likelihoods", what)
                for where, what in checked
                if what
            ]
            differences += contradictions[:_MAX_SHOWN]
    return by_task, differences


def unpaired(before: SamplesByTask, after: SamplesByTask, side: str) -> Iterator[Difference]:
    """The first question of each task that the two sides were not asked alike.

    Args:
        before: Samples of `side`, by task.
        after: Samples of the adapter or of an export, by task.
        side: Names the file of `before` in the difference.
    """
    for task in before.keys() & after.keys():
        for number, (before_sample, after_sample) in enumerate(zip(before[task], after[task], strict=False), start=1):
            if any(getattr(before_sample, name) != getattr(after_sample, name) for name in ("id", *HASHES)):
                where = f"{answers_key(task, side)} line {number}"
                yield Difference(
                    where, f"question {show(after_sample.id)} as the adapter was asked", show(before_sample.id)
                )
                break


def scores_of(by_task: SamplesByTask, tasks: Mapping[str, Any], side: str, bound: float = 0.0) -> dict[str, TaskScores]:
    """The scores that follow from the samples; `source`, `version` and `reused_from` are taken from the manifest.

    Args:
        by_task: Samples of one side, by task.
        tasks: Task -> its entry in the manifest.
        side: The side's name in those entries.
        bound: The largest margin of a near tie in the manifest, in nats.
    """
    return {
        task: task_scores(
            records,
            task=task,
            source=tasks[task]["source"],
            version=tasks[task]["version"],
            reused_from=tasks[task][side]["reused_from"],
            num_fewshot=tasks[task].get("num_fewshot", 0),
            bound=bound,
        )
        for task, records in by_task.items()
    }
