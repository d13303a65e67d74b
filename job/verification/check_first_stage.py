"""Verifies the first stage of a run that trained in two stages, like any other run, and compares it with the second.

The names of its checks begin with the name of its folder, so that one call of `verify` reports on both stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from job.common.methods import FIRST_STAGE, FIRST_STAGE_SETTINGS, INHERITED, METHODS
from job.errors import SettingsError, VerificationError
from job.results.first_stage import adapter_hash, first_stage_record
from job.results.reader import parse
from job.runs.layout import RESULTS
from job.storage.open import ObjectStore, TooLarge
from job.verification.differences import CheckResult, Difference, find_differences, show

_FIRST_MANIFEST = f"{FIRST_STAGE}/{RESULTS}"
_CLAIM = f"{RESULTS} training.first_stage"


def check_first_stage(
    results: Mapping[str, Any], store: ObjectStore, verify_first_stage: Callable[[], list[CheckResult]]
) -> list[CheckResult]:
    """Checks that the manifest agrees with the results of the first stage, and that these verify.

    Args:
        results: The manifest of the run.
        store: The run's store.
        verify_first_stage: Runs all checks of the first stage.

    Returns:
        An empty list if the run has one stage.
    """
    claimed = results["training"].get("first_stage")
    methods = str(results["settings"].get("train.method", {}).get("value", "sft"))
    stages = [name for name in methods.split(",") if name in METHODS]
    if claimed is None:
        wrong = [Difference(_CLAIM, "nothing", f"train.method {show(methods)}")] if len(stages) > 1 else []
        return [CheckResult("first stage", "", tuple(wrong))] if wrong else []
    differences = list(_differences(results, claimed, store))
    if len(stages) < 2:  # noqa: PLR2004 - two stages
        differences.append(Difference(_CLAIM, "a first stage", f"train.method {show(methods)}"))
    extent = f"{show(claimed['method'])}, {claimed['steps']} steps, in {FIRST_STAGE}"
    return [CheckResult("first stage", extent, tuple(differences)), *_checks_of_first_stage(verify_first_stage)]


def _differences(results: Mapping[str, Any], claimed: Mapping[str, Any], store: ObjectStore) -> Iterator[Difference]:
    """Compares the first stage's manifest with the run's: hash, figures, settings, and the adapter handed over."""
    try:
        stored = store.read(_FIRST_MANIFEST)
    except TooLarge as error:
        yield Difference(_FIRST_MANIFEST, "a manifest", str(error))
        return
    if stored is None:
        yield Difference(_FIRST_MANIFEST, "a file of the run", "nothing")
        return
    try:
        first = parse(stored.data)
        recomputed = first_stage_record(first, stored.data)
    except (KeyError, ValueError) as error:
        yield Difference(_FIRST_MANIFEST, "the job's manifest", str(error))
        return
    yield from find_differences(_CLAIM, claimed, asdict(recomputed))
    where = f"{RESULTS} training.start_sha256"
    yield from find_differences(where, results["training"].get("start_sha256"), adapter_hash(first))
    if "exported_run" not in results["run"]:  # else the first stage is part of a run that was trained under another id
        yield from find_differences(f"{_FIRST_MANIFEST} run.part_of", first["run"].get("part_of"), results["run"]["id"])
    for name, of_run in FIRST_STAGE_SETTINGS.items():
        # Runs of versions before this setting lack it. If it is empty, the first stage has the second stage's value.
        expected = results["settings"].get(of_run, {}).get("value")
        if of_run in results["settings"] and (expected is not None or name not in INHERITED):
            found_value = first["settings"].get(name, {}).get("value")
            yield from find_differences(f"{_FIRST_MANIFEST} settings {name}", found_value, expected)
    model = [manifest["model"]["sha256"] for manifest in (first, results)]
    yield from find_differences(f"{_FIRST_MANIFEST} model.sha256", *model)


def _checks_of_first_stage(verify_first_stage: Callable[[], list[CheckResult]]) -> Iterator[CheckResult]:
    try:
        checks = verify_first_stage()
    except (SettingsError, VerificationError) as error:
        yield CheckResult(f"{FIRST_STAGE}: manifest", "", (Difference(_FIRST_MANIFEST, "a published run", str(error)),))
        return
    for check in checks:
        yield replace(
            check,
            what=f"{FIRST_STAGE}: {check.what}",
            differences=tuple(
                replace(difference, where=f"{FIRST_STAGE}/{difference.where}") for difference in check.differences
            ),
            notes=tuple(f"{FIRST_STAGE}/{note}" for note in check.notes),
        )
