"""What the files of a published adapter say of it: for the manifest, and to check the manifest against them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_facts(config: Path, weights: Path) -> dict[str, Any]:
    """Kind, options and size of an adapter; the fields of `records.AdapterRecord` that follow from its files.

    Raises:
        ValueError: They are not an adapter's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        with safe_open(weights, framework="np") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        ranks = [shape[0] for name, shape in shapes.items() if ".lora_A" in name]
        sizes = [prod(shape) for shape in shapes.values()]
        kind = str(settings["peft_type"]).lower()
        whole_modules = sorted(settings.get("modules_to_save") or [])
        rows = (settings.get("trainable_token_indices") or {}).values()
        trained_tokens = len({token for tokens in rows for token in tokens})
    except (SafetensorError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"no adapter's files: {str(error)[:200]}") from error
    return {
        "kind": kind,
        "use_rslora": settings.get("use_rslora") is True,
        "use_dora": settings.get("use_dora") is True,
        "modules": len(ranks),
        "ranks": sum(ranks),
        "parameters": sum(sizes),
        "modules_to_save": whole_modules,
        "trained_tokens": trained_tokens,
    }


def published_rank_pattern(config: Path) -> dict[str, list[bool]]:
    """Of AdaLoRA, which ranks of each module were published, by the name of its `lora_E`; empty for other adapters.

    Raises:
        ValueError: It is no configuration.
    """
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        return dict(settings.get("rank_pattern") or {}) if settings.get("peft_type") == "ADALORA" else {}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{CONFIG} is no adapter's: {error}") from error
