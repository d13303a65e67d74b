"""What slows training down is logged, with the setting that changes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from job.records import PEFT, ExecutionPlan
from job.training.speed_advice import slower_ways

FAST = ExecutionPlan(
    kept_base=True, kept_activations=True, recorded=True, reason="", forward="fused all, triton", base_held="gpu"
)
LONG = replace(FAST, kept_base=False, kept_activations=False, recorded=False, tile_tokens=8192)
"""A plan for rows that are all computed layer by layer."""
EACH_USE, AGAIN, GRAPHS = "dequantized for each use", "recomputed in the backward pass", "without CUDA graphs"


@pytest.mark.parametrize(
    ("plan", "how", "said"),
    [
        (FAST, {}, {}),
        (replace(FAST, forward="fused all, triton, fp8"), {}, {}),
        (replace(FAST, kept_base=False), {}, {EACH_USE: "JOB_TRAIN__MICRO_BATCH_TOKENS"}),
        (replace(FAST, kept_base=False), {"keep_base": False}, {EACH_USE: "JOB_MODEL__KEEP_DEQUANTIZED=auto"}),
        (replace(FAST, kept_base=False), {"quantized": False}, {}),
        (
            replace(FAST, kept_base=False, forward="fused all, triton, fp8"),
            {},
            {"quantized to FP8 for each use": "JOB_TRAIN__MICRO_BATCH_TOKENS"},
        ),
        (replace(FAST, kept_activations=False), {}, {AGAIN: "JOB_TRAIN__MICRO_BATCH_TOKENS"}),
        (
            replace(FAST, kept_activations=False),
            {"recompute": True},
            {AGAIN: "JOB_TRAIN__GRADIENT_CHECKPOINTING=auto"},
        ),
        (replace(FAST, recorded=False), {"noise": True}, {GRAPHS: "JOB_TRAIN__NEFTUNE_NOISE_ALPHA=0"}),
        (replace(FAST, recorded=False), {"method": "dpo"}, {GRAPHS: "JOB_TRAIN__METHOD=dpo"}),
        (replace(FAST, recorded=False, forward="fused layers, triton"), {}, {GRAPHS: "JOB_MODEL__ID"}),
        (
            replace(FAST, recorded=False, kept_base=False, base_held="host"),
            {},
            {"fetched from main memory": "JOB_MODEL__PLACEMENT=gpu", GRAPHS: "JOB_MODEL__PLACEMENT=gpu"},
        ),
        (
            replace(FAST, offloaded=True),
            {},
            {"long rows are copied to main memory": "JOB_TRAIN__OFFLOAD_ACTIVATIONS=false"},
        ),
        (replace(FAST, kept_base=False, recorded=False, forward=PEFT), {"on_gpu": False}, {}),
        (LONG, {"only_long": True}, {}),
        (LONG, {}, {EACH_USE: "JOB_TRAIN__MICRO", AGAIN: "JOB_TRAIN__MICRO", GRAPHS: "no setting"}),
        (
            replace(LONG, tile_tokens=None),
            {"only_long": True},
            {EACH_USE: "JOB_TRAIN__MICRO", AGAIN: "JOB_TRAIN__MICRO", GRAPHS: "no setting"},
        ),
        (
            replace(LONG, forward="fused all, triton, fp8"),
            {"only_long": True},
            {"quantized to FP8 for each use": "JOB_TRAIN__MICRO"},
        ),
    ],
)
def test_each_way_is_said_once(plan: ExecutionPlan, how: dict[str, Any], said: dict[str, str]) -> None:
    """Of the fastest plan nothing is said."""
    usual: dict[str, Any] = {"on_gpu": True, "quantized": True, "keep_base": "auto", "recompute": "auto"}
    found = list(slower_ways(plan, **(usual | {"method": "sft", "noise": False} | how)))
    assert len(found) == len(said)
    for one, (what, change) in zip(found, said.items(), strict=True):
        assert what in one.what
        assert change in one.change
