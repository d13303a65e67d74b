"""Recomputes the figures of training, validation and cost from metrics and attempts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from job.common.formatting import count
from job.common.validation import adapter_of, first_error
from job.data.batch_plan import steps_per_epoch
from job.records import AttemptRecord, ExportedRun, StepMetrics, ValidationMetrics
from job.results.adapter_facts import CONFIG, WEIGHTS, adapter_facts
from job.results.cost import compute_cost
from job.results.training_totals import training_totals
from job.runs.layout import ARTIFACTS, METRICS, RESULTS, VALIDATIONS
from job.training.config import total_steps
from job.training.early_stopping import due_steps, progress, validation_record
from job.verification.differences import MAX_SHOWN, CheckResult, Copies, Difference, find_differences, show

T = TypeVar("T")


def check_training(results: Mapping[str, Any], copies: Copies) -> CheckResult:
    """Recomputes the totals of training from the metrics of every step, and the number of steps from the settings.

    If training stopped early, `check_validation` checks the number of steps.
    """
    training = results["training"]
    extent = count(training["steps"], "step")
    try:
        history = _read_lines(copies[METRICS].read_bytes(), StepMetrics)
        recomputed = _totals(history, results)
    except (KeyError, ValueError) as error:
        what = "no readable file" if isinstance(error, KeyError) else str(error)
        return CheckResult("training", extent, (Difference(METRICS, "the metrics of one step on each line", what),))
    differences = list(
        find_differences(f"{RESULTS} training", {name: training[name] for name in recomputed}, recomputed)
    )
    differences += _adapter(training.get("adapter"), copies)
    if [step.step for step in history] != list(range(1, len(history) + 1)):
        differences.append(Difference(METRICS, "the steps 1, 2, 3 and so on", "other steps"))
    return CheckResult("training", extent, tuple(differences))


def _adapter(claimed: Mapping[str, Any] | None, copies: Copies) -> Iterator[Difference]:
    """Where the published adapter's files differ from the manifest; older manifests do not describe the adapter."""
    folder = f"{ARTIFACTS}adapter/"
    if claimed is None or not {folder + CONFIG, folder + WEIGHTS} <= copies.keys():
        return  # a missing file is reported as such
    try:
        recomputed = adapter_facts(copies[folder + CONFIG], copies[folder + WEIGHTS])
    except ValueError as error:
        yield Difference(folder, "an adapter", str(error))
        return
    common = {name: value for name, value in recomputed.items() if name in claimed}  # older manifests lack some fields
    yield from find_differences(f"{RESULTS} training.adapter", {name: claimed[name] for name in common}, common)


def check_validation(results: Mapping[str, Any], copies: Copies) -> CheckResult:
    """Recomputes from the published validation losses the best step, the early stop and the step whose adapter is kept.

    Also checks that each validation was due, and that a run without JOB_DATA__VALIDATION has none.
    """
    claimed, rows = results["training"].get("validation"), results["dataset"].get("validation")
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    expected = settings.get("data.validation") is not None
    descriptions = {True: "a validation", False: "no validation"}
    differences = [
        Difference(f"{RESULTS} {name}", f"{descriptions[expected]}, as in the settings", descriptions[not expected])
        for name, exists in (("training.validation", claimed is not None), ("dataset.validation", rows is not None))
        if exists is not expected
    ]
    if (VALIDATIONS in copies) is not expected:
        differences.append(
            Difference(VALIDATIONS, f"{descriptions[expected]}, as in the settings", descriptions[not expected])
        )
    if claimed is None or rows is None or differences:
        return CheckResult("validation", "none", tuple(differences))
    extent = count(claimed["count"], "validation")
    try:
        validations = _read_lines(copies[VALIDATIONS].read_bytes(), ValidationMetrics)
        options = _validation_settings(settings, results["dataset"]["rows"])
    except ValueError as error:
        return CheckResult("validation", extent, (Difference(VALIDATIONS, "one validation on each line", str(error)),))
    due = due_steps(options["every_steps"], options["total_steps"])
    stop = next(
        (n for n in range(1, len(validations) + 1) if progress(validations[:n]).stopped(options["stop_after"])),
        len(due),
    )
    if [validation.step for validation in validations] != due[:stop]:
        steps = f"validations at the steps {show([validation.step for validation in validations])}"
        differences.append(Difference(VALIDATIONS, f"validations at the steps {show(due[:stop])}", steps))
    counts = {(validation.examples, validation.target_tokens) for validation in validations}
    if counts != {(rows["rows"], rows["target_tokens"])}:
        differences.append(Difference(VALIDATIONS, "all validation rows in each validation", "other numbers of rows"))
    computed = asdict(validation_record(validations, **options))
    differences += find_differences(f"{RESULTS} training.validation", {"preference": {}} | dict(claimed), computed)
    if results["training"]["steps"] != validations[-1].step:
        where = f"{RESULTS} training.steps"
        differences.append(
            Difference(where, show(results["training"]["steps"]), f"{validations[-1].step} by the losses")
        )
    return CheckResult("validation", extent, tuple(differences))


def _validation_settings(settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The arguments of `validation_record` apart from the validations.

    Raises:
        ValueError: The settings are not valid.
    """
    size, total = _planned_steps(settings, rows)
    every, patience, keep = (settings.get(f"train.{name}") for name in ("validate_every_steps", "stop_after", "keep"))
    if not (isinstance(every, int | None) and isinstance(patience, int | None) and keep in {"last", "best"}):
        raise ValueError("invalid settings of validation")
    return {
        "every_steps": every or steps_per_epoch(rows, size),
        "total_steps": total,
        "stop_after": patience,
        "keep": keep,
    }


def _read_lines(data: bytes, kind: type[T]) -> list[T]:
    """The steps, or validations, in a file with one of them on each line.

    Raises:
        ValueError: A line is not of this kind; the message names the first.
    """
    adapter, records = adapter_of(kind), []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            records.append(adapter.validate_json(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {first_error(error, MAX_SHOWN)}") from None
    return records


def _totals(history: Sequence[StepMetrics], results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `training` that follow from the steps.

    Raises:
        ValueError: The settings are not valid, or require another number of steps.
    """
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    rows = results["dataset"]["rows"]
    size, planned = _planned_steps(settings, rows)
    early = (results["training"].get("validation") or {}).get("stopped_early") is True  # `check_validation` checks it
    if len(history) > planned or (len(history) < planned and not early):
        raise ValueError(f"{len(history)} steps, but {planned} by the settings")
    return training_totals(history, steps_per_epoch(rows, size), size)


def _planned_steps(settings: Mapping[str, Any], rows: int) -> tuple[int, int]:
    """Examples in a step, and number of steps of a run that does not stop early.

    Raises:
        ValueError: The settings are not valid.
    """
    size, epochs, most = (settings.get(f"train.{name}") for name in ("global_batch_size", "epochs", "max_steps"))
    if not (isinstance(size, int) and isinstance(epochs, int | float) and isinstance(most, int | None) and size > 0):
        raise ValueError("invalid settings of training")
    return size, total_steps(rows, size, epochs, most)


def check_cost(results: Mapping[str, Any]) -> CheckResult:
    """Recomputes seconds, dollars, waste, energy and savings from the attempts and the prices."""
    attempts = adapter_of(list[AttemptRecord]).validate_python(results["run"]["attempts"])
    on_demand = results["settings"].get("cost.on_demand_usd_per_hour", {}).get("value")
    exported = results["run"].get("exported_run")
    taken_over = () if exported is None else adapter_of(ExportedRun).validate_python(exported).last_attempts
    recomputed = compute_cost(attempts, results["training"]["seconds"], on_demand, taken_over=taken_over)
    if "repeated_steps_exact" not in results["cost"]:  # earlier versions wrote what was recorded, without saying so
        del recomputed["repeated_steps_exact"]
        recomputed["repeated_steps"] = sum(attempt.repeated_steps for attempt in attempts)
    differences = find_differences(f"{RESULTS} cost", results["cost"], recomputed)
    return CheckResult("cost", f"adds up over {count(len(attempts), 'attempt')}", tuple(differences))
