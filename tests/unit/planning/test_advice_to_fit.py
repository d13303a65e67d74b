"""What `plan` advises if no GPU fits: only what would help, with the place of a row that is too long."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from job.planning.advice_to_fit import advice_to_fit, with_memory_limit
from job.planning.forecast import forecast_gpu
from job.planning.forecast_input import RunShape
from job.planning.gpu_prices import GPUS
from tests.unit.planning.test_forecast import BY_NAME, RUN, WORK
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


L4 = BY_NAME["L4"]
LONG = replace(RUN, budget=60_000, workload=replace(WORK, longest=60_000, largest_step=60_000))
FIRST = replace(RUN, workload=replace(WORK, longest=3_000_000, largest_step=3_000_000))


def test_what_fits_without_a_limit_is_said() -> None:
    """The GPUs are named, unless all of several fit; only the limit is advised if nothing else prevents the run."""
    limited = "JOB_TRAIN__GPU_MEMORY_GB={} limits them: raise or remove it (without it, {})"
    for names, run, limit, words in (
        (["T4", "L4", "L40S"], LONG, 12, "L40S fits"),
        (["T4", "L40S", "H100"], LONG, 12, "L40S and H100 fit"),
        (["T4", "L4"], LONG, 12, "none fits"),
        (["L4"], RUN, 8, "L4 fits"),
        (["T4", "L4"], RUN, 8, "all of them fit"),
    ):
        gpus = [BY_NAME[name] for name in names]
        advice = advice_to_fit(gpus, run, REFERENCE, limit=limit, longest_at="")
        assert advice.split("; ")[0] == limited.format(limit, words)
    assert advice_to_fit([L4], RUN, REFERENCE, limit=14.0, longest_at="") == limited.format(14, "L4 fits")
    assert advice_to_fit([L4], RUN, REFERENCE, limit=None, longest_at="") == "what each lacks is said above"
    assert with_memory_limit(L4, 14.0).memory_bytes == 14 * 10**9  # in GB, of 1000^3 bytes
    assert with_memory_limit(L4, 99.0) == with_memory_limit(L4, None) == L4


@pytest.mark.parametrize(
    ("run", "advice"),
    [
        # The base and, in a run that trains, the adapter with its gradients and optimizer do not fit into 4 GiB.
        (RUN, "a smaller model, JOB_MODEL__PLACEMENT=auto, or a lower JOB_LORA__RANK"),
        (replace(RUN, trains=False), "a smaller model, JOB_MODEL__PLACEMENT=auto"),
    ],
)
def test_a_base_that_does_not_fit(run: RunShape, advice: str) -> None:
    """A run that exports a finished one has no rank to lower."""
    found = advice_to_fit([replace(L4, memory_bytes=4 << 30)], run, REFERENCE, limit=None, longest_at="rows.jsonl:17")
    assert found.partition(" can be used: ")[2] == advice


@pytest.mark.parametrize(
    ("run", "memory", "advice"),
    [
        (replace(RUN, answered=(10**6, 10**7)), 24, "lower JOB_EVAL__PROMPTS_MAX_NEW_TOKENS, or the max_gen_toks of"),
        (replace(RUN, scoring_budget=10**9, trains=False), 24, "lower JOB_EVAL__BATCH_TOKENS"),
        (replace(RUN, merges=1), 12, "leave out the formats of JOB_EXPORT__FORMATS that are made of the merged model"),
        (RUN, 8, "lower JOB_TRAIN__MICRO_BATCH_TOKENS"),
        (replace(RUN, first_stage=FIRST), 24, "the longest row has 3,000,000 tokens"),  # its place is not known here
        (FIRST, 24, "the longest row, rows.jsonl:17, has 3,000,000 tokens"),
    ],
)
def test_only_what_would_help_is_advised(run: RunShape, memory: int, advice: str) -> None:
    """One setting, of what does not fit into so many GB; with it the run fits the memory, by the forecast."""
    gpu = replace(L4, memory_bytes=memory * 10**9)
    found = advice_to_fit([gpu], run, REFERENCE, limit=None, longest_at="rows.jsonl:17")
    assert found.startswith(advice)
    assert "; " not in found
    assert not forecast_gpu(gpu, run, REFERENCE).fits
    lower = replace(run, answered=(0, 0), scoring_budget=64, budget=64, merges=0, first_stage=None, workload=WORK)
    assert forecast_gpu(gpu, lower, REFERENCE).fits


@pytest.mark.parametrize("memory", [7, 9, 12])
def test_so_many_tokens_fit_as_are_said_to(memory: int) -> None:
    """A row of as many fits by the forecast, and a row of one more does not."""
    gpu = replace(L4, memory_bytes=memory * 10**9)
    found = re.search(r"about ([\d,]+) fit into", advice_to_fit([gpu], LONG, REFERENCE, limit=None, longest_at=""))
    assert found is not None
    most = int(found[1].replace(",", ""))
    for longest in (most, most + 1):
        work = replace(WORK, longest=longest, largest_step=longest)
        run = replace(LONG, workload=work, budget=longest, scoring_budget=1)
        assert forecast_gpu(gpu, run, REFERENCE).fits == (longest == most)
