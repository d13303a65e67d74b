"""PiSSA and OLoRA: an adapter that begins with a part of the base's weights, on an unchanged base.

Both begin with B0 A0, a part of the weights W (PiSSA: the largest singular values, OLoRA: the first columns of QR), and
take it away from the base, so that the model computes the same at first. PEFT writes the rest, W - s B0 A0, into the
base. Here the base must not change: it is evaluated without the adapter, may be quantized, and is what readers of the
adapter have. So the adapter takes the part away: it has twice the rank, half of it trained and half of it frozen,

    y = W x + s B A x - s B0 A0 x = W x + s [B, -B0] [A; A0] x

which is plain LoRA, computed and published as such. PEFT converts a finished PiSSA or OLoRA adapter into the same form
(`path_initial_model_for_weight_conversion`); a test holds that training is PEFT's own.

On a quantized base, W is the dequantized weight. QPiSSA quantizes the rest W - s B0 A0 instead of W, with a smaller
quantization error; this advantage is lost here.

Source: Meng et al. 2024, PiSSA (arXiv:2404.02948), section 3; Buyukakyuz 2024, OLoRA (arXiv:2406.01775), section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from job.errors import SettingsError
from job.model.adapter_options import too_high_rank

FROZEN = "frozen_rank"
"""Attribute of PEFT's layers: how many of the last ranks are not trained."""


def decompose(model: Any, init: str) -> None:
    """Fills an adapter of twice the rank: the first half with a part of the base, the second takes it away again.

    Args:
        model: A PEFT model with plain LoRA layers, whose ranks are even.
        init: PEFT's name, such as `pissa`, `pissa_niter_16` or `olora`. With `niter` numbers are drawn at random.

    Raises:
        SettingsError: The rank is more than a layer is wide.
    """
    from peft.tuners.lora import LoraLayer

    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        half = a.shape[0] // 2
        first_a, first_b = _begin(layer, init, half, layer.scaling["default"])
        with torch.no_grad():
            a.copy_(torch.cat([first_a, first_a]))
            b.copy_(torch.cat([first_b, -first_b], dim=1))
        setattr(layer, FROZEN, half)


def _begin(layer: Any, init: str, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 (rank, inputs) and B0 (outputs, rank) float32 of one layer, by PEFT's own code on a copy of its weights."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from peft.utils.integrations import dequantize_module_weight

    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).detach().float()
    if getattr(layer, "fan_in_fan_out", False):  # GPT-2's Conv1D holds (inputs, outputs)
        weight = weight.T
    if rank > min(weight.shape):
        raise SettingsError([too_high_rank(init, rank, min(weight.shape))])
    copy = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    copy.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    # Its alpha gives the scale of the layer, which PEFT divides the part by.
    rank_options: dict[str, Any] = {"r": rank, "lora_alpha": scale * rank}
    made = Linear(copy, "default", config=LoraConfig(**rank_options, init_lora_weights=init), **rank_options)
    return made.lora_A["default"].weight.detach(), made.lora_B["default"].weight.detach()


def trained_parts(model: Any) -> dict[str, torch.Tensor]:
    """For each parameter that is trained in part only, by name: 1 where it is trained, else 0, in its shape."""
    masks = {}
    for name, module in model.named_modules():
        if (frozen := getattr(module, FROZEN, 0)) > 0:
            for matrix, dimension in (("lora_A", 0), ("lora_B", 1)):
                weight = getattr(module, matrix)["default"].weight
                mask = torch.ones_like(weight)
                mask.narrow(dimension, weight.shape[dimension] - frozen, frozen).zero_()
                masks[f"{name}.{matrix}.default.weight"] = mask
    return masks


def frozen_parameters(model: Any) -> int:
    """How many of the adapter's numbers are not trained."""
    return sum(int((mask == 0).sum()) for mask in trained_parts(model).values())
