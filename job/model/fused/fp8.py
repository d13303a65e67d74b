"""FP8 products with the frozen weights, in training: twice the operations a second of bf16, on GPUs that have them.

Each operand is a matrix in e4m3 (one sign bit, 4 of exponent, 3 of mantissa) whose rows have one scale each, so that
the largest number of a row becomes the largest of e4m3. A row is along the dimension that a product sums over: only
then can the scales be applied to the sums afterwards. With x of (tokens, inputs), a frozen weight W of (outputs,
inputs) and g of (tokens, outputs):

    y = x W'    rows are tokens of x, and outputs of W
    dx = g W    rows are tokens of g, and inputs of W'

So the weights are held twice, once along each dimension: one byte each, together the size of one copy in bf16. Hopper's
FP8 products need both operands with the summed dimension contiguous, so the second copy would be needed with one common
scale, too. Gradients are in e4m3 as well: with one scale for each token, e4m3's longer mantissa matters more than
e5m2's wider range.

Layers with a common input have one gradient of it, dx = g1 W1 + g2 W2 + ...: here one product, whose rows are those of
g1, g2, ... side by side, summed in fp32 throughout.

The adapter's own products stay in the compute dtype, and a model that is not in training mode computes as without FP8:
what is scored is the model as it is published, and base and adapter are scored alike.

Sources: Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv:2209.05433), section 3, for the formats; the
cuBLAS manual, "Outer Vector Scaling for FP8 Data Types", for one scale for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from job.model.fused.lora_forward import AdaptedLayer

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of the format."""
SMALLEST = 2.0**-100
"""A row whose largest number is less is scaled as if it were this: a row of zeros has no scale, and the reciprocal of
this is still a number of fp32."""
MULTIPLE = 16
"""Inputs and outputs of a layer must be multiples of this, for the GPU's products."""
FAST_ACCUMULATION = True
"""Whether Hopper's matrix units add up a whole row of products in their own registers, of fewer bits than fp32, instead
of moving the sums to fp32 registers every 128 products."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A matrix whose rows are `values`, each multiplied by its own scale."""

    values: torch.Tensor
    """(rows, columns) float8_e4m3fn."""
    scale: torch.Tensor
    """(rows, 1) float32."""


Quantize = Callable[[Sequence[torch.Tensor]], Rows]
"""Matrices (rows, columns of each) in the compute dtype -> as one, (rows, all columns), side by side."""


def quantize(parts: Sequence[torch.Tensor]) -> Rows:
    """`Quantize` in torch's operations, for any device; the Triton kernel is tested to give the same bits."""
    whole = torch.cat([part.float() for part in parts], 1)
    largest = whole.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    # A tensor: torch divides by a number of Python's by multiplying with its reciprocal on a GPU, which rounds twice.
    limit = largest.new_full((1, 1), LARGEST)
    return Rows((whole * (limit / largest)).to(FORMAT), largest / limit)


def product(left: Rows, right: Rows, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product left right' + bias: (rows of left, rows of right) in `dtype`, summed in fp32.

    On a CPU the same numbers are multiplied in fp32, for tests. A GPU's differ from that by how they are added up.

    Args:
        left: (rows of left, columns).
        right: (rows of right, columns).
        dtype: bf16 on a GPU.
        bias: (rows of right,) in `dtype`.
    """
    if left.values.is_cuda:
        # Not a public name, but what torch's FP8 layers use. No sum in it is by atomic operations: it repeats its bits.
        return torch._scaled_mm(  # noqa: SLF001
            left.values,
            right.values.T,
            scale_a=left.scale,
            scale_b=right.scale.reshape(1, -1),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )
    sums = left.values.float() @ right.values.float().T
    scaled = sums * left.scale * right.scale.reshape(1, -1)
    return (scaled if bias is None else scaled + bias.float()).to(dtype)


class FrozenProducts:
    """The products with the frozen weights of layers that have a common input.

    Args:
        layers: Linear layers; the weight and the bias of each are used.
        quantize: How rows are quantized.
        keep: Whether the quantized weights are kept, or made for each use. The bits are the same.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], quantize: Quantize, *, keep: bool) -> None:
        self._layers, self._quantize = layers, quantize
        self._by_output: list[Rows] | None = None
        self._by_input: Rows | None = None
        if keep:
            self.keep()

    def outputs(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """(tokens, inputs) -> for each layer (tokens, its outputs), in the same dtype."""
        rows = self._quantize([x])
        for number, layer in enumerate(self._layers):
            by_output = self._of_outputs(layer) if self._by_output is None else self._by_output[number]
            yield product(rows, by_output, x.dtype, layer.bias)

    def input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each layer (tokens, its outputs) -> (tokens, inputs), the sum over the layers; all in one dtype."""
        by_input = self._of_inputs() if self._by_input is None else self._by_input
        return product(self._quantize(gradients), by_input, gradients[0].dtype)

    @property
    def keeps(self) -> bool:
        """Whether the quantized weights are kept."""
        return self._by_input is not None

    def keep(self) -> None:
        """Quantizes the weights once, and keeps them."""
        self._by_output = [self._of_outputs(layer) for layer in self._layers]
        self._by_input = self._of_inputs()

    def forget(self) -> None:
        """Quantizes the weights for each use from now on."""
        self._by_output = self._by_input = None

    def _of_outputs(self, layer: AdaptedLayer) -> Rows:
        """A row an output, along the inputs."""
        return self._quantize([layer.weight()])

    def _of_inputs(self) -> Rows:
        """A row an input, along the outputs of all layers side by side; one weight is dequantized at a time."""
        one = self._layers[0].b  # for dtype and device
        sizes = [layer.trained_b.shape[0] for layer in self._layers]
        whole = one.new_empty(self._layers[0].trained_a.shape[1], sum(sizes))
        for layer, part in zip(self._layers, whole.split_with_sizes(sizes, dim=1), strict=True):
            part.copy_(layer.weight().T)
        return self._quantize([whole])


def why_not_here(device: torch.device) -> str | None:
    """Why torch cannot compute such a product on this GPU; None if it can. Tries some, since there is no query for it.

    Sequences have any number of tokens: a packed one that is not padded, the last tile of a long row.
    """
    size = 8 * MULTIPLE
    try:
        weight = quantize([torch.ones(size, size, dtype=torch.bfloat16, device=device)])
        for tokens in (size, MULTIPLE + 1, 1):
            rows = quantize([torch.ones(tokens, size, dtype=torch.bfloat16, device=device)])
            product(rows, weight, torch.bfloat16).sum().item()
    except RuntimeError as error:
        return " ".join(f"torch's FP8 products with one scale a row do not run on this GPU: {error}".split())[:300]
    return None
