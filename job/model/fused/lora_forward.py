"""A linear layer with its adapter, forward and backward, faster than PEFT's and with the same results up to rounding.

PEFT's forward casts, multiplies, scales and adds in separate operations, and autograd keeps the intermediate tensors.
Here a layer with an adapter is one autograd function, which needs no gradients of frozen tensors. For an input x of
(tokens, inputs), a frozen weight W of (outputs, inputs) and an adapter A of (rank, inputs), B of (outputs, rank) and
scale s = alpha / rank:

    y = x W' + bias + s (x A') B'

With g the gradient of y, and writing h = x A' (kept) and k = s g B, both (tokens, rank):

    dB = s g' h        dA = k' x        dx = g W + k A

W, the bias and s are frozen, so nothing else is computed, and of the forward pass only x and h are kept: x is one
tensor for all layers that read it. Layers with a common input (queries, keys and values; gate and up) are one
operation: their A's are one below the other in one matrix, so that x is read once for all of them, forward and back.
With dropout each layer's adapter reads another d(x), which the backward pass computes again (`dropout.py`):

    h = d(x) A'        dA = k' d(x)        dx = g W + d(k A)

The base's weights come from a function, so that they can be kept dequantized or dequantized for each use: the products
are the same, bit by bit.

Source of the formula: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from job.model.fused.fp8 import FrozenProducts

Weight = Callable[[], torch.Tensor]
"""Gives a frozen weight: (outputs, inputs) in the compute dtype."""


class _Adapted(torch.autograd.Function):
    """The formula above for all layers with a common input, with gradients for x, A and B alone.

    `trained` are the fp32 A's and then the B's: autograd has to see them to give them their gradients. What is
    multiplied are their copies in the compute dtype, which `common` holds; those of B already contain the scale, s B,
    so that the forward pass does not multiply by it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, common: CommonInput, *_trained: torch.Tensor) -> Any:
        """(..., inputs) in the compute dtype -> for each layer (..., its outputs)."""
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, inputs)
        ctx.drops = common.drops
        low = common.low(tokens, drops=ctx.drops)  # h of all layers side by side: (tokens, sum of ranks)
        outputs = []
        ctx.fp8 = common.products_in_training
        parts = low.split_with_sizes(common.ranks, dim=1)
        for layer, y, part in zip(common.layers, common.frozen(tokens, ctx.fp8), parts, strict=True):
            # In place: y was made for this round, and nothing else refers to it.
            outputs.append(y.addmm_(part, layer.b.T).view(*x.shape[:-1], -1))
        # The copies of A and B too: should they change before the backward pass, autograd would find it out.
        ctx.save_for_backward(tokens, low, common.a, *(layer.b for layer in common.layers))
        ctx.common, ctx.shape = common, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The outputs' gradients -> those of x in the compute dtype, and of all A's and B's in fp32."""
        tokens, low, a, *bs = ctx.saved_tensors
        layers, ranks = ctx.common.layers, ctx.common.ranks
        gradients = tuple(gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients)
        # k of all layers side by side, each written into its own columns: dA is then one product for all of them.
        low_gradient = torch.empty_like(low)
        parts, outs = (x.split_with_sizes(ranks, dim=1) for x in (low, low_gradient))
        b_gradients = []
        for gradient, layer, b, part, out in zip(gradients, layers, bs, parts, outs, strict=True):
            torch.mm(gradient, b, out=out)  # b is s B, so this is s g B
            b_gradient = _product_in_fp32(gradient.T, part)
            # h has no scale in it, so dB gets it here; a multiplication by 1 would be a pass over memory for nothing.
            b_gradients.append(b_gradient if layer.scale == 1 else b_gradient.mul_(layer.scale))
        a_gradients = ctx.common.a_gradients(low_gradient, tokens, drops=ctx.drops)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            # Summed in place, one weight after the other: kept for each use, only one is dequantized at a time.
            if ctx.fp8 is not None:
                x_gradient = ctx.fp8.input_gradient(gradients)
            else:
                x_gradient = gradients[0] @ layers[0].weight()
                for gradient, layer in zip(gradients[1:], layers[1:], strict=True):
                    x_gradient.addmm_(gradient, layer.weight())
            x_gradient = ctx.common.add_input_gradient(x_gradient, low_gradient, a, drops=ctx.drops).view(ctx.shape)
        return x_gradient, None, *a_gradients, *b_gradients


def _product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product in fp32, without rounding to the dtype of its factors where the machine supports that.

    A gradient is summed in fp32 over micro-batches: rounded to bf16 each time, small parts of it would be lost.
    """
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """What one layer with an adapter computes with."""

    weight: Weight
    bias: torch.Tensor | None
    """(outputs,) in the compute dtype."""
    scale: float
    """alpha / rank."""
    trained_a: torch.Tensor
    """(rank, inputs) float32."""
    trained_b: torch.Tensor
    """(outputs, rank) float32."""
    b: torch.Tensor
    """(outputs, rank): a copy of the trained one in the compute dtype, times the scale."""
    dropout: float = 0.0
    """The probability that an entry of the adapter's input is dropped in training."""
    number: int = 0
    """Of the layer, by which its masks differ from those of others."""


@dataclass(frozen=True, eq=False)
class Dropout:
    """What masks are made with: the kernel, and the numbers that `dropout.reseed` changes for each micro-batch."""

    drop: Callable[[torch.Tensor, torch.Tensor, int, float], torch.Tensor]
    state: torch.Tensor
    """(2,) int64, `dropout.new_state`."""


class CommonInput:
    """Layers with an adapter that have a common input, which is read once for all of them.

    Args:
        modules: PEFT's layers.
        weights: PEFT's layer -> its frozen weight in `dtype`.
        dtype: The compute dtype.
        dropout: Used where the layers have dropout.
        first: The number of the first layer.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        weights: Mapping[Any, Weight],
        dtype: torch.dtype,
        dropout: Dropout | None = None,
        first: int = 0,
    ) -> None:
        self.modules, self._dropout = modules, dropout
        self.layers = []
        for number, module in enumerate(modules, first):
            (name,) = module.active_adapters
            rate = getattr(module.lora_dropout[name], "p", 0.0)  # PEFT has an Identity where there is none
            bias, scale = module.get_base_layer().bias, module.scaling[name]
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            copy = b.detach().to(dtype, copy=True)
            self.layers.append(AdaptedLayer(weights[module], bias, scale, a, b, copy, rate, number))
        self.ranks = [layer.trained_a.shape[0] for layer in self.layers]
        self.a = torch.cat([layer.trained_a.detach().to(dtype) for layer in self.layers])
        """(sum of ranks, inputs): copies of the trained ones in the compute dtype, one below the other."""
        self.fp8: FrozenProducts | None = None
        """The products with the frozen weights, where training computes them in FP8."""

    @property
    def products_in_training(self) -> FrozenProducts | None:
        """`fp8` while the model is in training mode; a model that is scored computes in its own dtype."""
        return self.fp8 if self.modules[0].training else None

    def frozen(self, tokens: torch.Tensor, fp8: FrozenProducts | None) -> Iterator[torch.Tensor]:
        """(tokens, inputs) -> for each layer (tokens, its outputs) of the base alone, when it is asked for."""
        if fp8 is not None:
            return fp8.outputs(tokens)
        return (functional.linear(tokens, layer.weight(), layer.bias) for layer in self.layers)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., inputs) -> for each layer (..., its outputs); those of the base while the adapter is switched off."""
        if self.modules[0].disable_adapters:
            return tuple(functional.linear(x, layer.weight(), layer.bias) for layer in self.layers)
        trained = [layer.trained_a for layer in self.layers] + [layer.trained_b for layer in self.layers]
        outputs: tuple[torch.Tensor, ...] = _Adapted.apply(x, self, *trained)  # type: ignore[no-untyped-call]
        return outputs

    @property
    def drops(self) -> bool:
        """Whether dropout is on: it has a rate, and its modules are in training mode."""
        name = self.modules[0].active_adapters[0]
        return self.modules[0].lora_dropout[name].training and any(layer.dropout for layer in self.layers)

    def low(self, tokens: torch.Tensor, *, drops: bool) -> torch.Tensor:
        """(tokens, inputs) -> h of all layers side by side, (tokens, sum of ranks)."""
        if not drops:
            return tokens @ self.a.T
        low = tokens.new_empty(tokens.shape[0], self.a.shape[0])
        parts = zip(self.layers, self.a.split_with_sizes(self.ranks), low.split_with_sizes(self.ranks, 1), strict=True)
        for layer, a, part in parts:
            torch.mm(self._dropped(tokens, layer), a.T, out=part)
        return low

    def a_gradients(self, low_gradient: torch.Tensor, tokens: torch.Tensor, *, drops: bool) -> tuple[torch.Tensor, ...]:
        """k, (tokens, sum of ranks), and the input -> for each layer its dA, (rank, inputs) fp32."""
        if not drops:
            return _product_in_fp32(low_gradient.T, tokens).split_with_sizes(self.ranks)
        parts = zip(self.layers, low_gradient.split_with_sizes(self.ranks, 1), strict=True)
        return tuple(_product_in_fp32(part.T, self._dropped(tokens, layer)) for layer, part in parts)

    def add_input_gradient(
        self, x_gradient: torch.Tensor, low_gradient: torch.Tensor, a: torch.Tensor, *, drops: bool
    ) -> torch.Tensor:
        """Adds the adapters' part of dx, (tokens, inputs), in place, and returns it."""
        if not drops:
            return x_gradient.addmm_(low_gradient, a)
        parts = zip(
            self.layers, low_gradient.split_with_sizes(self.ranks, 1), a.split_with_sizes(self.ranks), strict=True
        )
        for layer, part, own in parts:
            x_gradient += self._dropped(part @ own, layer)
        return x_gradient

    def _dropped(self, x: torch.Tensor, layer: AdaptedLayer) -> torch.Tensor:
        """(tokens, inputs) -> the same through the layer's mask, whatever the values are."""
        if not layer.dropout:
            return x
        assert self._dropout is not None  # noqa: S101 - `fused_decoder.adapt` gives it where there is a rate
        return self._dropout.drop(x, self._dropout.state, layer.number, layer.dropout)
