"""Checks method and reference model in the manifest of a run that was trained on preferences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from job.common.formatting import count
from job.common.methods import METHODS
from job.runs.layout import LOG_PROBS, RESULTS
from job.verification.differences import CheckResult, Copies, Difference, find_differences, show

MAX_LINES = 3
"""Maximum number of wrong lines of the reference that are reported."""


def check_preferences(results: Mapping[str, Any], copies: Copies) -> CheckResult | None:
    """Checks that method, beta and reference follow from the settings, and that the reference has every row.

    The log-probabilities themselves cannot be recomputed without the weights of the reference model.

    Returns:
        None if settings, manifest and files are those of plain fine-tuning.
    """
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    training, methods = results["training"], str(settings.get("train.method", "sft"))
    name = methods.rpartition(",")[2]
    claimed = {field: training.get(field, usual) for field, usual in (("method", "sft"), ("beta", None))}
    if name == claimed["method"] == "sft" and training.get("reference") is None and LOG_PROBS not in copies:
        return None
    method = METHODS.get(name)
    if method is None:
        return CheckResult("preferences", "", (Difference(f"{RESULTS} settings", "a method of training", show(name)),))
    start = "base" if settings.get("lora.start") is None and name == methods else "start"
    expected = {
        "method": name,
        "beta": None if name == "sft" else settings.get("train.beta"),
        "reference": start if method.reference else None,
    }
    claimed["reference"] = training.get("reference")
    differences = list(find_differences(f"{RESULTS} training", claimed, expected))
    rows, validation = results["dataset"]["rows"], results["dataset"].get("validation")
    if method.reference:
        differences += _check_reference(copies, rows + (validation["rows"] if validation else 0))
    elif LOG_PROBS in copies:
        differences.append(Difference(LOG_PROBS, "nothing: the method has no reference", "a file"))
    return CheckResult("preferences", f"{name}, {count(rows, 'row')}", tuple(differences))


def _check_reference(copies: Copies, rows: int) -> list[Difference]:
    """Every row, validation rows last, must have the log-probabilities of two answers (see `Example`)."""
    if LOG_PROBS not in copies:
        return [Difference(LOG_PROBS, "the reference's log-probabilities", "no readable file")]
    lines = copies[LOG_PROBS].read_bytes().splitlines()
    if len(lines) != rows:
        return [Difference(LOG_PROBS, f"a line for each of {rows} rows", f"{len(lines)} lines")]
    wrong = [number for number, line in enumerate(lines, start=1) if not _are_log_probs(line)]
    what = "two log-probabilities, at most 0"
    shown = [(number, lines[number - 1].decode("ascii", "replace")) for number in wrong[:MAX_LINES]]
    return [Difference(f"{LOG_PROBS} line {number}", what, show(line)) for number, line in shown]


def _are_log_probs(line: bytes) -> bool:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(values, list)
        and len(values) == 2  # noqa: PLR2004 - two sequences
        and all(isinstance(value, float) and math.isfinite(value) and value <= 0 for value in values)
    )
