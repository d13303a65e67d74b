"""Checks what is computed from the manifest: the ML-BOM, and the floating point operations of training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from job.results import bom
from job.results.compute import compute_spent
from job.runs.layout import BOM, RESULTS
from job.verification.differences import CheckResult, Copies, Difference, find_differences


def check_bom(results: Mapping[str, Any], copies: Copies) -> CheckResult | None:
    """Compares the ML-BOM with the manifest. None if there is no ML-BOM, as in runs of older versions."""
    listed = {artifact["path"] for artifact in results["artifacts"]}
    if BOM not in listed:
        return None
    try:
        claimed = json.loads(copies[BOM].read_bytes())
        form = bom.form_of(claimed)
    except (KeyError, TypeError, ValueError, RecursionError):
        return CheckResult("ML-BOM", "", (Difference(BOM, "a CycloneDX ML-BOM", "nothing that can be read"),))
    if form != bom.FORM:
        return CheckResult("ML-BOM", "not compared", (), ("was written by another version of the job",))
    recomputed = json.loads(bom.build(results))
    return CheckResult("ML-BOM", "follows from the manifest", tuple(find_differences(BOM, claimed, recomputed)))


def check_compute(results: Mapping[str, Any]) -> CheckResult | None:
    """Recomputes the operations of training and their ratio to pre-training; None for runs of older versions.

    A number of pre-training tokens from the table of known bases is not checked: newer versions may correct the table.
    """
    claimed = results.get("compute")
    if claimed is None:
        return None
    recomputed = compute_spent(results, claimed)
    differences = tuple(find_differences(f"{RESULTS} compute", claimed, recomputed))
    return CheckResult("compute", f"{claimed['training_pflop']:.4g} PFLOP", differences)
