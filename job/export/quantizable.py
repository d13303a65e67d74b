"""Which layers of a model are quantized, and which models are not: the same for all formats that quantize.

Quantized are the linear layers of the text part's decoder, without the head: as vLLM's own quantizer leaves it, and all
embeddings, norms and biases, in 16 bits.
"""

from __future__ import annotations

from typing import Any

from job.model.target_modules import linear_layers


class CannotMake(Exception):
    """A format cannot be made of this model, as was found when it was tried; why, in words."""


def quantizable(empty: Any) -> list[str]:
    """Full names of the linear layers that are quantized."""
    from torch import nn

    shared = _shared(empty)
    return [
        name
        for name, module in linear_layers(empty).items()
        if isinstance(module, nn.Linear) and id(module.weight) not in shared
    ]


def kept_linear(empty: Any) -> list[str]:
    """Full names of all other linear layers, which the configuration has to list for readers."""
    from torch import nn

    chosen = set(quantizable(empty))
    return [name for name, module in empty.named_modules() if isinstance(module, nn.Linear) and name not in chosen]


def why_not_quantizable(empty: Any) -> str:
    """Why a model of this architecture cannot be quantized, in words; nothing if it can.

    Args:
        empty: Without weights.
    """
    from torch import nn

    if not quantizable(empty):
        return f"{type(empty).__name__} has no linear layers that could be quantized"
    for name, module in empty.named_modules():
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2 and not convolution:  # noqa: PLR2004 - a matrix
                where = f"{name}.{own}".removeprefix(".")
                return f"{where} has the weights of many layers (experts) in one tensor, which cannot be quantized here"
    return ""


def _shared(empty: Any) -> set[int]:
    """Weights that are two modules', such as of a head that is tied to the embeddings."""
    seen, shared = set[int](), set[int]()
    for _, parameter in empty.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
