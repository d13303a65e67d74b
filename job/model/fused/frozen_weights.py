"""The base's frozen weights, as the lean forward pass uses them: kept as they are, or dequantized for each use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from job.model.fused.kernels import Kernels


def fuse_layers(model: Any, *, keep_dequantized: bool, kernels: Kernels | None) -> str:
    """Replaces the forward of the adapted layers, and of what lies between them, by that of `lean`.

    Args:
        model: A PEFT model over a base loaded with flat attention.
        keep_dequantized: Whether the base's weights are dequantized once and kept, or anew for each use. The products
            are the same, bit by bit.
        kernels: What lies between the layers is computed by; None leaves it as it is.

    Returns:
        How far it got: `all`; `layers` where the decoder is not one that it knows, and only the adapted layers were
        replaced; `nothing` where there is dropout, which is left to PEFT.
    """
    from peft.tuners.lora import LoraLayer

    from job.model.fused import lora_forward

    base = model.get_base_model()
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not all(lora_forward.fits(module) for module in adapted):
        return "nothing"
    weights = {module: _Frozen(module.get_base_layer(), base.dtype, keep=keep_dequantized) for module in adapted}
    return "all" if lora_forward.adapt(base, weights, base.dtype, kernels) else "layers"


class _Frozen:
    """Gives the weight of a linear layer of the base, in `dtype`: kept, or dequantized for each use."""

    def __init__(self, layer: Any, dtype: torch.dtype, *, keep: bool) -> None:
        self._layer, self._dtype = layer, dtype
        self._kept = self._made() if keep else None

    def __call__(self) -> torch.Tensor:
        """The weight."""
        return self._made() if self._kept is None else self._kept

    def forget(self) -> None:
        """Dequantizes for each use from now on."""
        self._kept = None

    def _made(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = self._layer.weight
        if getattr(weight, "quant_state", None) is None:
            return weight
        values: torch.Tensor = dequantize_4bit(weight.data, self._layer.weight.quant_state)
        return values.to(self._dtype)


def forget_dequantized(model: Any) -> None:
    """Has a lean model dequantize its base's weights for each use, and frees the kept ones."""
    for module in model.modules():
        if (group := module.__dict__.get("lean")) is not None:
            for layer in group.layers:
                layer.weight.forget()
