"""The base's frozen weights, as the fused layers use them: kept dequantized, or dequantized for each use."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from job.model.fused.kernels import Kernels


def fuse_layers(model: Any, *, keep_dequantized: bool, kernels: Kernels | None, fp8: bool = False) -> str:
    """Replaces the forward of the layers with an adapter, and of the modules between them, by that of `fused_decoder`.

    Args:
        model: A PEFT model over a base that is used packed.
        keep_dequantized: Whether the base's weights are dequantized once and kept, or for each use. The products are
            the same, bit by bit; keeping them takes two bytes a weight and saves a pass over memory for each product.
        kernels: What norms, SwiGLU and rotary positions are computed by; None leaves them unchanged.
        fp8: Whether training computes the products with these weights in FP8. Then what is kept is their FP8 copies,
            which take two bytes a weight, too; without training mode they are dequantized for each use.

    Returns:
        How far it got: `all`; `layers` where the decoder is not of one of `FAMILIES`, and only the layers with an
        adapter were replaced; `nothing` where an adapter is of a kind that is left to PEFT, such as DoRA.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    from job.model.fused import experts, fused_decoder
    from job.model.fused.fp8 import FrozenProducts
    from job.model.fused.kernels import TORCH

    base = model.get_base_model()
    adapted = [m for m in model.modules() if isinstance(m, LoraLayer) and not isinstance(m, ParamWrapper)]
    if not all(fused_decoder.fits(module) for module in adapted):
        return "nothing"
    family = None if kernels is None else fused_decoder.family_of(base)
    gated = None if kernels is None or family is None else kernels.gated(family.activation)
    experts.fuse_experts(model, base.dtype, keep=keep_dequantized, gated=gated)
    keep = keep_dequantized and not fp8
    weights = {
        module: FrozenWeight(partial(_weight_of, module.get_base_layer(), base.dtype), keep=keep) for module in adapted
    }
    whole_decoder = fused_decoder.adapt(base, weights, base.dtype, kernels)
    for inputs in _common_inputs(model) if fp8 else ():
        inputs.fp8 = FrozenProducts(inputs.layers, (kernels or TORCH).quantize, keep=keep_dequantized)
    return "all" if whole_decoder else "layers"


def _common_inputs(model: Any) -> list[Any]:
    """Those of a fused model, each a `CommonInput` of `FrozenWeight`s."""
    return [inputs for module in model.modules() if (inputs := module.__dict__.get("fused")) is not None]


class FrozenWeight:
    """A weight of the base in the compute dtype: dequantized once and kept, or for each use.

    It has no gradient, so autograd does not save the dequantized weight: the backward pass requests it again, and the
    largest tensor of a layer need not be kept between the passes.

    Args:
        dequantize: Gives the weight: (outputs, inputs) of a linear layer, (experts, outputs, inputs) of a mixture.
        keep: Whether it is kept from the beginning.
    """

    def __init__(self, dequantize: Callable[[], torch.Tensor], *, keep: bool) -> None:
        self._dequantize = dequantize
        self._kept = dequantize() if keep else None

    def __call__(self) -> torch.Tensor:
        """The weight, as `dequantize` gives it."""
        return self._dequantize() if self._kept is None else self._kept

    @property
    def keeps(self) -> bool:
        """Whether what is dequantized is kept."""
        return self._kept is not None

    def keep(self) -> None:
        """Dequantizes once, and keeps that."""
        self._kept = self._dequantize()

    def forget(self) -> None:
        """Dequantizes for each use from now on."""
        self._kept = None


def _weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(outputs, inputs) of a linear layer: in `dtype` if it is quantized, else unchanged."""
    if getattr(layer.weight, "quant_state", None) is None:
        weight: torch.Tensor = layer.weight
        return weight  # itself, no copy: what is frozen may be shared
    return dequantized(layer, dtype)


def dequantized(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The (outputs, inputs) weight of a 4-bit layer in `dtype`, as its products are computed with."""
    return dequantized_weight(layer.weight, dtype)


def dequantized_weight(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """The same of a 4-bit weight, in its own shape: a layer's, or that of all experts of a layer."""
    from bitsandbytes.functional import dequantize_4bit

    # `.data`: a view without the parameter's subclass, whose every operation would go through Python.
    values: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return values.to(dtype)


def dequantizer(layer: Any, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Gives the weight of a 4-bit layer in `dtype`, not rounded to the dtype of training in between."""
    return weight_dequantizer(layer.weight, dtype)


def weight_dequantizer(weight: Any, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """The same of a 4-bit weight, in its own shape."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy(weight.quant_state)
    state.dtype = dtype  # that of the result
    return partial(dequantize_4bit, weight.data, state)


def forget_dequantized(model: Any) -> None:
    """Has a fused model dequantize its base's weights for each use from now on, and frees the kept ones.

    The bits stay: what was kept is what `dequantize_4bit` gives again, and in FP8 what is quantized from that again.
    """
    for kept in _kept(model):
        kept.forget()


@contextmanager
def without_dequantized(model: Any) -> Iterator[bool]:
    """Within it `forget_dequantized`'s memory is free; afterwards what was kept is kept again, with the same bits.

    Yields whether there was any.
    """
    before = _kept(model)
    for weight in before:
        weight.forget()
    try:
        yield bool(before)
    finally:
        for weight in before:
            weight.keep()


def _kept(model: Any) -> list[Any]:
    """What keeps dequantized weights, or weights in FP8."""
    from job.model.fused.experts import fused_experts

    weights: list[Any] = [weight for fused in fused_experts(model) for weight in fused.weights]
    for inputs in _common_inputs(model):
        weights += [layer.weight for layer in inputs.layers]
        weights += [] if inputs.fp8 is None else [inputs.fp8]
    return [one for one in weights if one.keeps]
