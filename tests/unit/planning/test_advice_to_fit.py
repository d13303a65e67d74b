"""What `plan` advises where no GPU fits: only what would help, with the place of a row that is too long."""

from __future__ import annotations

from dataclasses import replace

from job.planning.advice_to_fit import advice_to_fit
from job.planning.gpu_prices import GPUS
from tests.unit.planning.test_forecast import RUN, WORK
from tests.unit.training.test_memory_model import REFERENCE


def test_a_row_that_is_too_long_by_itself_is_named() -> None:
    """With its place and MAX_LENGTH; a lower token budget would not help, so it is not advised."""
    run = replace(RUN, workload=replace(WORK, longest=3_000_000, largest_step=3_000_000))
    advice = advice_to_fit(GPUS, run, REFERENCE, limit=None, longest_at="rows.jsonl:17")
    assert advice.startswith("the longest row, rows.jsonl:17, has 3,000,000 tokens, and about ")
    assert "JOB_TRAIN__MAX_LENGTH" in advice
    assert "MICRO_BATCH" not in advice
    assert "GPU_MEMORY_GB" not in advice


def test_a_limit_is_named_and_what_fits_without_it() -> None:
    """A cap below the base, and one below the driver: no setting of rows or batches is advised."""
    for limit, why in ((3.0, "are needed before a token is computed"), (1e-9, "the driver alone takes")):
        advice = advice_to_fit(GPUS, RUN, REFERENCE, limit=limit, longest_at="")
        limits = f"JOB_TRAIN__GPU_MEMORY_GB={limit:g} limits them: raise or remove it (without it, all of them fit); "
        assert advice.startswith(limits)
        assert why in advice
        assert "TOKENS" not in advice
        assert "MAX_LENGTH" not in advice


def test_a_budget_that_is_too_large_is_named() -> None:
    """Where every row fits alone: of training, and of an evaluation."""
    large = replace(RUN, budget=10**7, scoring_budget=10**9, workload=replace(WORK, largest_step=10**7))
    advice = advice_to_fit(GPUS, large, REFERENCE, limit=None, longest_at="rows.jsonl:17")
    assert advice == "lower JOB_TRAIN__MICRO_BATCH_TOKENS; lower JOB_EVAL__BATCH_TOKENS"
