"""What vLLM cannot serve of an adapter: the rules of its LoRA reader, from the settings that choose them.

Read in vLLM 0.33: `PEFTHelper` (vllm/lora/peft_helper.py) requires `r`, `lora_alpha` and `target_modules`, applies
`use_rslora`, `rank_pattern` and `alpha_pattern` as PEFT does, and refuses `modules_to_save` and DoRA; `LoRAConfig`
knows ranks up to 512. Older releases ignore the patterns silently. A merged model has none of these limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADMITTED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank`."""
MAX_RANK = ADMITTED_RANKS[-1]
_DOUBLED = ("pissa", "olora")
"""Initializations whose adapter is published as plain LoRA of twice the rank."""


def published_rank(settings: Mapping[str, Any]) -> int:
    """The largest rank of a layer of the published adapter, which vLLM's `--max-lora-rank` must admit.

    Args:
        settings: Values by dotted name; older manifests have not all of them.
    """
    ranks = [settings.get("lora.rank") or 0, *(settings.get("lora.rank_pattern") or {}).values()]
    times = 2 if str(settings.get("lora.init")).startswith(_DOUBLED) else 1
    return times * max(map(int, ranks))


def admitted_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that admits an adapter of a rank; the rank itself where none does."""
    return next((size for size in ADMITTED_RANKS if size >= rank), rank)


def why_not_served(settings: Mapping[str, Any]) -> list[str]:
    """Why vLLM does not load the adapter; empty if it loads it unchanged.

    Args:
        settings: As above.
    """
    value = {name.removeprefix("lora."): value for name, value in settings.items() if name.startswith("lora.")}
    rank = published_rank(settings)
    obstacles = {
        "it is not plain LoRA (JOB_LORA__KIND=adalora)": value.get("kind") not in {None, "lora"},
        "it is DoRA (JOB_LORA__USE_DORA)": bool(value.get("use_dora")),
        "it has adapters of experts (JOB_LORA__EXPERTS), which were not tested with any release": bool(
            value.get("experts")
        ),
        "it has modules that are trained whole (JOB_LORA__MODULES_TO_SAVE)": bool(value.get("modules_to_save")),
        "it has new tokens (JOB_MODEL__ADD_TOKENS)": bool(settings.get("model.add_tokens")),
        f"its rank of {rank} is above {MAX_RANK}": rank > MAX_RANK,
    }
    return [reason for reason, holds in obstacles.items() if holds]


def has_patterns(settings: Mapping[str, Any]) -> bool:
    """Whether layers differ in rank or scale, which older releases of vLLM ignore."""
    return any(settings.get(f"lora.{name}") for name in ("rank_pattern", "alpha_pattern"))
