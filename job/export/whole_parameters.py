"""Parameters that were trained without an adapter of low rank: of modules trained whole, and rows of new tokens.

PEFT puts either in place of the base's when it merges; so does this, without rounding what was trained to the dtype
that the base is loaded in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from job.model.files import build_empty

_ADAPTER = "default"


@dataclass(frozen=True)
class WholeParameter:
    """A parameter of the result.

    Attributes:
        shape: With the rows of new tokens.
        of: The tensor in the base's file -> the merged one, fp32 on the CPU.
    """

    shape: tuple[int, ...]
    of: Callable[[torch.Tensor], torch.Tensor]


def trained_whole(base: Any) -> dict[str, WholeParameter]:
    """By the name that it has in the base without an adapter; of tied ones the one that PEFT trains.

    Args:
        base: The model within PEFT's.
    """
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    parameters = {}
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for own, tensor in module.modules_to_save[_ADAPTER].state_dict().items():
                parameters[f"{name}.{own}"] = WholeParameter(tuple(tensor.shape), partial(_as_trained, tensor))
        elif isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            layer = module.token_adapter
            weight, rows = layer.get_base_layer().weight, layer.trainable_tokens_delta[_ADAPTER]
            merge = partial(_with_rows, weight, rows, layer.token_indices[_ADAPTER])
            parameters[f"{name}.weight"] = WholeParameter(tuple(weight.shape), merge)
    return parameters


def _as_trained(trained: torch.Tensor, _in_file: torch.Tensor) -> torch.Tensor:
    return trained.detach().float().cpu()


def _with_rows(weight: torch.Tensor, rows: torch.Tensor, numbers: list[int], in_file: torch.Tensor) -> torch.Tensor:
    """The base's matrix with the rows that were trained.

    Args:
        weight: (vocabulary, hidden) as it is loaded, with room for the new tokens.
        rows: (tokens, hidden) fp32.
        numbers: Which rows they are.
        in_file: (vocabulary of the file, hidden), which may have fewer rows.
    """
    merged = torch.empty(weight.shape, dtype=torch.float32)
    merged[: len(in_file)] = in_file
    merged[len(in_file) :] = weight[len(in_file) :].detach().cpu()
    merged[torch.tensor(numbers)] = rows.detach().float().cpu()
    return merged


def grown_vocabulary(base: Any, config: Any) -> int | None:
    """Rows of the embedding, if there are more than in the base's own files; else None.

    Args:
        base: As `trained_whole`.
        config: The base's own.
    """
    rows: int = base.config.get_text_config(decoder=True).vocab_size
    return rows if rows != config.get_text_config(decoder=True).vocab_size else None


def with_vocabulary(content: Mapping[str, Any], config: Any, rows: int) -> dict[str, Any]:
    """The contents of config.json, for a vocabulary of `rows` rows.

    Args:
        content: The base's config.json.
        config: The same as transformers reads it.
        rows: Number of rows of the embedding.
    """
    text = config.get_text_config(decoder=True)
    key = text.attribute_map.get("vocab_size", "vocab_size")
    part = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    if part is None:
        return {**content, key: rows}
    return {**content, part: {**content.get(part, {}), key: rows}}


def why_not_grown(source: Path, config: Any, rows: int, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why a vocabulary of `rows` rows gives a model that transformers does not load, in words; nothing if it does.

    Args:
        source: Folder of the base's own files.
        config: The base's own, which is not changed.
        rows: Number of rows of the embedding.
        shapes: Shapes of the result's tensors by the name of their parameter.
    """
    changed = deepcopy(config)
    changed.get_text_config(decoder=True).vocab_size = rows
    parameters = build_empty(source, changed).state_dict()
    for name, shape in shapes.items():
        if name in parameters and tuple(parameters[name].shape) != shape:
            return f"{name} would have the shape {shape}, and transformers expects {tuple(parameters[name].shape)}"
    return ""
