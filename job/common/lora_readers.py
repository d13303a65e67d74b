"""What vLLM cannot serve of an adapter: the rules of its LoRA reader, from the settings that choose them.

From vLLM's `PEFTHelper` (vllm/lora/peft_helper.py) and its `LoRAConfig`: it requires `r`, `lora_alpha` and
`target_modules`, refuses `modules_to_save` and DoRA, has one scale for all layers, and knows ranks up to 512. A merged
model has none of these limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_RANK = 512
_DOUBLED = ("pissa", "olora")
"""Initializations whose adapter is published as plain LoRA of twice the rank."""


def why_not_served(settings: Mapping[str, Any]) -> list[str]:
    """Why vLLM does not load the adapter, or would load it wrong; empty if it loads it as it was trained.

    Args:
        settings: Values by dotted name; older manifests have not all of them.
    """
    value = {name.removeprefix("lora."): value for name, value in settings.items() if name.startswith("lora.")}
    init = str(value.get("init") or "default")
    rank = int(value.get("rank") or 0) * (2 if init.startswith(_DOUBLED) else 1)
    found = {
        "it is no plain LoRA (JOB_LORA__KIND=adalora)": value.get("kind") not in {None, "lora"},
        "it is DoRA (JOB_LORA__USE_DORA)": bool(value.get("use_dora")),
        "it has whole modules (JOB_LORA__MODULES_TO_SAVE)": bool(value.get("modules_to_save")),
        "it has new tokens (JOB_MODEL__ADD_TOKENS)": bool(settings.get("model.add_tokens")),
        "its layers differ in rank (JOB_LORA__RANK_PATTERN), which vLLM ignores": bool(value.get("rank_pattern")),
        "its layers differ in scale (JOB_LORA__ALPHA_PATTERN), which vLLM ignores": bool(value.get("alpha_pattern")),
        f"its rank of {rank} is above {MAX_RANK}": rank > MAX_RANK,
    }
    return [reason for reason, holds in found.items() if holds]
