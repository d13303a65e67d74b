"""Checks the figures of training, validation and cost by computing them again from metrics and attempts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from job.common.formatting import count
from job.common.validation import adapter_of, first_error
from job.data.batch_plan import steps_per_epoch
from job.records import AttemptRecord, StepMetrics, ValidationMetrics
from job.results.adapter_facts import CONFIG, WEIGHTS, adapter_facts
from job.results.cost import compute_cost
from job.results.training_totals import training_totals
from job.runs.layout import ARTIFACTS, METRICS, RESULTS, VALIDATIONS
from job.training.config import total_steps
from job.training.early_stopping import due_steps, progress, validation_record
from job.verification.differences import MAX_SHOWN, CheckResult, Copies, Difference, find_differences, show

T = TypeVar("T")


def check_training(results: Mapping[str, Any], copies: Copies) -> CheckResult:
    """The totals of training from the metrics of every step, and the number of steps from the settings.

    Where training stopped early, the number of steps follows from the validation losses (`check_validation`).
    """
    training = results["training"]
    extent = count(training["steps"], "step")
    try:
        history = _read_lines(copies[METRICS].read_bytes(), StepMetrics)
        found = _totals(history, results)
    except (KeyError, ValueError) as error:
        what = "nothing to read" if isinstance(error, KeyError) else str(error)
        return CheckResult("training", extent, (Difference(METRICS, "the metrics of a step a line", what),))
    differences = list(find_differences(f"{RESULTS} training", {name: training[name] for name in found}, found))
    differences += _adapter(training.get("adapter"), copies)
    if [step.step for step in history] != list(range(1, len(history) + 1)):
        differences.append(Difference(METRICS, "the steps from 1 up", "others"))
    return CheckResult("training", extent, tuple(differences))


def _adapter(claimed: Mapping[str, Any] | None, copies: Copies) -> Iterator[Difference]:
    """What the published adapter's own files say otherwise than the manifest; older manifests say nothing of it."""
    folder = f"{ARTIFACTS}adapter/"
    if claimed is None or not {folder + CONFIG, folder + WEIGHTS} <= copies.keys():
        return  # a missing file is reported as such
    try:
        found = adapter_facts(copies[folder + CONFIG], copies[folder + WEIGHTS])
    except ValueError as error:
        yield Difference(folder, "an adapter", str(error))
        return
    known = {name: value for name, value in found.items() if name in claimed}  # some fields came later
    yield from find_differences(f"{RESULTS} training.adapter", {name: claimed[name] for name in known}, known)


def check_validation(results: Mapping[str, Any], copies: Copies) -> CheckResult:
    """From the published validation losses: when each was due, the best step, the early stop, and which step is kept.

    A run without validation has none of these.
    """
    claimed, rows = results["training"].get("validation"), results["dataset"].get("validation")
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    asked = settings.get("data.validation") is not None
    differences = [
        Difference(f"{RESULTS} {name}", "validation as the settings ask for", "another")
        for name, there in (("training.validation", claimed is not None), ("dataset.validation", rows is not None))
        if there is not asked
    ]
    if (VALIDATIONS in copies) is not asked:
        differences.append(Difference(VALIDATIONS, "validations as the settings ask for", "another"))
    if claimed is None or rows is None or differences:
        return CheckResult("validation", "none", tuple(differences))
    extent = count(claimed["count"], "validation")
    try:
        found = _read_lines(copies[VALIDATIONS].read_bytes(), ValidationMetrics)
        how = _validation_settings(settings, results["dataset"]["rows"])
    except ValueError as error:
        return CheckResult("validation", extent, (Difference(VALIDATIONS, "a validation a line", str(error)),))
    due = due_steps(how["every_steps"], how["total_steps"])
    stop = next((n for n in range(1, len(found) + 1) if progress(found[:n]).stopped(how["stop_after"])), len(due))
    if [one.step for one in found] != due[:stop]:
        steps = f"those of {show([one.step for one in found])}"
        differences.append(Difference(VALIDATIONS, f"the validations of the steps {show(due[:stop])}", steps))
    counts = {(one.examples, one.target_tokens) for one in found}
    if counts != {(rows["rows"], rows["target_tokens"])}:
        differences.append(Difference(VALIDATIONS, "all validation rows in each validation", "others"))
    computed = asdict(validation_record(found, **how))
    differences += find_differences(f"{RESULTS} training.validation", {"preference": {}} | dict(claimed), computed)
    if results["training"]["steps"] != found[-1].step:
        where = f"{RESULTS} training.steps"
        differences.append(Difference(where, show(results["training"]["steps"]), f"{found[-1].step} by the losses"))
    return CheckResult("validation", extent, tuple(differences))


def _validation_settings(settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The arguments of `validation_record` beside the validations.

    Raises:
        ValueError: The settings are not valid.
    """
    size, total = _planned_steps(settings, rows)
    every, patience, keep = (settings.get(f"train.{name}") for name in ("validate_every_steps", "stop_after", "keep"))
    if not (isinstance(every, int | None) and isinstance(patience, int | None) and keep in {"last", "best"}):
        raise ValueError("no valid settings of validation")
    return {
        "every_steps": every or steps_per_epoch(rows, size),
        "total_steps": total,
        "stop_after": patience,
        "keep": keep,
    }


def _read_lines(data: bytes, kind: type[T]) -> list[T]:
    """The steps, or validations, in a file of metrics.

    Raises:
        ValueError: With the first line that is none.
    """
    adapter, found = adapter_of(kind), []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            found.append(adapter.validate_json(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {first_error(error, MAX_SHOWN)}") from None
    return found


def _totals(history: Sequence[StepMetrics], results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `training` that follow from the steps.

    Raises:
        ValueError: The settings are not valid, or ask for another number of steps.
    """
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    rows = results["dataset"]["rows"]
    size, planned = _planned_steps(settings, rows)
    early = (results["training"].get("validation") or {}).get("stopped_early") is True  # by its own check
    if len(history) > planned or (len(history) < planned and not early):
        raise ValueError(f"{len(history)} steps, {planned} by the settings")
    return training_totals(history, steps_per_epoch(rows, size), size)


def _planned_steps(settings: Mapping[str, Any], rows: int) -> tuple[int, int]:
    """Examples of a step, and the steps of a run that does not stop early.

    Raises:
        ValueError: The settings are not valid.
    """
    size, epochs, most = (settings.get(f"train.{name}") for name in ("global_batch_size", "epochs", "max_steps"))
    if not (isinstance(size, int) and isinstance(epochs, int | float) and isinstance(most, int | None) and size > 0):
        raise ValueError("no valid training settings")
    return size, total_steps(rows, size, epochs, most)


def check_cost(results: Mapping[str, Any]) -> CheckResult:
    """Seconds, dollars, waste, energy and savings, from the attempts and the prices."""
    attempts = adapter_of(list[AttemptRecord]).validate_python(results["run"]["attempts"])
    on_demand = results["settings"].get("cost.on_demand_usd_per_hour", {}).get("value")
    found = compute_cost(attempts, results["training"]["seconds"], on_demand)
    differences = find_differences(f"{RESULTS} cost", results["cost"], found)
    return CheckResult("cost", f"adds up over {count(len(attempts), 'attempt')}", tuple(differences))
