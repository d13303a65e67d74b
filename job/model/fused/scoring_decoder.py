"""The decoder of `precise_forward` for families built like Llama, with fewer passes over memory.

A linear layer with a frozen weight W, (outputs, inputs), and an adapter A, (rank, inputs), B, (outputs, rank), and
scale s computes y = x W' + s (x A') B'. With h = x A', this is a single product of wider matrices:

    y = [x | h] [W | s B]'        (tokens, inputs + rank) (inputs + rank, outputs)

so the adapter needs no further pass over y. Layers with a common input share x and h: queries, keys and values are one
product, with their W and B stacked along the outputs. Nothing is copied to form [x | h]: the operation that computes x
(a norm, attention, the activation) writes it to the left columns of a buffer, and the product with A' writes h to the
right ones. All products are summed in fp32.

The output of attention or of the feed-forward half is added to the residual stream by the kernel of the next norm. In
the last layer, everything after attention is computed only for the tokens whose logits are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from job.log import get_logger
from job.model.families import SILU, Family
from job.model.fused.kernels import TORCH
from job.model.packed_attention import packed_attention
from job.model.packed_layout import Segment, build_layout

if TYPE_CHECKING:
    from job.model.packed_layout import Layout

WIDE = 64
"""The number of columns for h is padded with zeros to a multiple of this, so that rows stay aligned in memory."""


Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "Layout", float, "int | None", torch.Tensor],
    None,
]
"""As `Operations.attend`."""


class Operations(Protocol):
    """What is computed between the products. `out` may be a view of the left columns of a wider matrix."""

    def __hash__(self) -> int:
        """Operations that compute the same are equal, so that a check of them can be cached."""

    def add_norm(
        self, x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, epsilon: float, out: torch.Tensor
    ) -> None:
        """Adds `update` to the residual stream x in place, and writes the RMS norm of the sum to `out`.

        Args:
            x: (tokens, hidden) fp32.
            update: (tokens, hidden); None to add nothing.
            weight: The norm's, (hidden,).
            epsilon: The norm's.
            out: (tokens, hidden).
        """

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
        """Writes silu(gate) * up, all (tokens, intermediate)."""

    def turn(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Applies rotary positions to x, (tokens, heads, head size), in place; angles are (tokens, head size) fp32."""

    def attend(  # noqa: PLR0917 - as attention has it
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scaling: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """Writes attention's output to `out`.

        Args:
            query: (tokens, query heads, head size).
            key: (tokens, key/value heads, head size).
            value: As `key`.
            layout: Which tokens see which.
            scaling: Factor of the scores.
            window: How many keys a query sees, its own included; None for all up to its own.
            out: As `query`.
        """


@dataclass(frozen=True)
class TorchOperations:
    """`Operations` by torch, for any device."""

    largest: float | None = None
    """Queries and keys of a larger absolute value become NaN; None for no limit."""

    def add_norm(
        self, x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, epsilon: float, out: torch.Tensor
    ) -> None:
        """As `Operations` has it."""
        if update is not None:
            x += update
        out.copy_(functional.rms_norm(x, (x.shape[-1],), weight.float(), epsilon))

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
        """As `Operations` has it."""
        out.copy_(TORCH.swiglu(gate, up))

    def turn(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """As `Operations` has it."""
        turned = TORCH.turn(x.float(), cosine, sine)
        if self.largest is not None:
            turned = turned.masked_fill(turned.abs() > self.largest, float("nan"))
        x.copy_(turned)

    def attend(  # noqa: PLR0917 - as attention has it
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scaling: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """As `Operations` has it."""
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        attended, _ = packed_attention(
            torch.nn.Module(), q, k, v, None, layout=layout, scaling=scaling, sliding_window=window
        )
        out.copy_(attended[0])


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of a model's attention.

    Attributes:
        queries: Query heads.
        keys: Key/value heads.
        size: Head size.
        windowed: Whether some layers have a sliding window.
    """

    queries: int
    keys: int
    size: int
    windowed: bool


_TORCH_IN_ALL: set[HeadSizes] = set()
"""Heads for which another process of the run cannot use Triton's attention."""


def checked_attention(operations: Operations, heads: HeadSizes, device: torch.device) -> Attend:
    """`operations.attend`, or torch's if the former fails a test on this device or `use_torch_attention` was called.

    Args:
        operations: Those whose attention is tested, in fp16.
        heads: The model's.
        device: Where it has to run.
    """
    if heads in _TORCH_IN_ALL or attention_fails(operations, heads, device):
        return TorchOperations().attend
    return operations.attend


def use_torch_attention(heads: HeadSizes) -> None:
    """Makes `checked_attention` return torch's for these heads, since another process of the run has to use it."""
    _TORCH_IN_ALL.add(heads)


@cache  # a run scores with several adapters
def attention_fails(operations: Operations, heads: HeadSizes, device: torch.device) -> bool:
    """Whether attention fails its test on this device, with a warning; arguments as for `checked_attention`."""
    if why := _why_not_attend(operations, heads, device):
        what = "Triton's attention for scoring cannot be used here; torch's is used, which is slower"
        get_logger().warning(what, why=why, change="the versions of torch and Triton that this project's image has")
    return bool(why)


def _why_not_attend(operations: Operations, heads: HeadSizes, device: torch.device) -> str:
    """Why attention fails its test, empty if it passes: a small tree of segments, compared with torch's in fp32."""
    # More tokens than one program of the kernel computes. Two roots; the first has two children, one of which has a
    # child.
    segments = [
        Segment(0, 100),
        Segment(100, 150, 0, 100),
        Segment(150, 160, 100, 150),
        Segment(160, 200, 0, 100),
        Segment(200, 230),
    ]
    layout = build_layout(segments, device)
    shape = segments[-1].end, heads.queries + 2 * heads.keys, heads.size
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().to(device)
    query, key, value = made.split_with_sizes([heads.queries, heads.keys, heads.keys], 1)
    exact = torch.empty(query.shape, device=device)
    computed = torch.empty(query.shape, dtype=made.dtype, device=device)
    scaling = heads.size**-0.5
    for window in (None, 40) if heads.windowed else (None,):
        TorchOperations().attend(query.float(), key.float(), value.float(), layout, scaling, window, exact)
        try:
            operations.attend(query, key, value, layout, scaling, window, computed)
            error = float((computed - exact).abs().max())
        except Exception as problem:  # noqa: BLE001 - Triton, its compiler and the driver raise many types
            return " ".join(f"{type(problem).__name__}: {problem}".split())[:_LONGEST_REASON]
        if not error < _LARGEST_ERROR:  # `not <`, so that NaN is an error
            return f"its results differ from torch's by {error:.3g}"
    return ""


_LONGEST_REASON = 300
"""Characters of an error's text in the log."""
_LARGEST_ERROR = 0.02
"""Largest absolute error of attention in fp16 on values of a standard normal distribution; 0.0013 on an H200."""


@dataclass(frozen=True, eq=False)
class Product:
    """The linear layers with a common input, computed as one product, or as several that write to one output.

    Attributes:
        weights: Each returns [W | s B], (its outputs, inputs + wide); (its outputs, inputs) without an adapter.
        outputs: Outputs of each of `weights`.
        a: The layers' A, stacked and padded with zeros, (wide, inputs); None without an adapter.
        bias: (all outputs,); None without.
        inputs: Inputs of the layers.
        switch: One of PEFT's layers, which says whether the adapter is switched off; None without an adapter.
    """

    weights: Sequence[Callable[[], torch.Tensor]]
    outputs: Sequence[int]
    a: torch.Tensor | None
    bias: torch.Tensor | None
    inputs: int
    switch: Any

    def buffer(self, tokens: int, like: torch.Tensor) -> torch.Tensor:
        """An uninitialized buffer for [x | h], (tokens, inputs + wide), with dtype and device of `like`."""
        wide = 0 if self.a is None else self.a.shape[0]
        return like.new_empty(tokens, self.inputs + wide)

    def __call__(self, buffer: torch.Tensor) -> torch.Tensor:
        """The outputs, (tokens, all outputs), from a buffer whose left columns have x; overwrites the right columns."""
        x = buffer[:, : self.inputs]
        if self.a is not None and not self.switch.disable_adapters:
            torch.mm(x, self.a.T, out=buffer[:, self.inputs :])
            x = buffer
        if len(self.weights) == 1:
            return functional.linear(x, self.weights[0]()[:, : x.shape[1]], self.bias)
        y = x.new_empty(x.shape[0], sum(self.outputs))
        biases = [None] * len(self.outputs) if self.bias is None else self.bias.split_with_sizes(self.outputs)
        for weight, bias, part in zip(self.weights, biases, y.split_with_sizes(self.outputs, 1), strict=True):
            factor = weight()[:, : x.shape[1]].T
            if bias is None:
                torch.mm(x, factor, out=part)
            else:
                torch.addmm(bias, x, factor, out=part)
        return y


def is_like_llama(family: Family, base: Any) -> bool:
    """Whether this module can compute a model's decoder: built like Llama's, with no module trained whole."""
    if (
        (family.norms, family.norm, family.query_norm, family.activation) != (2, "weight", None, SILU)
        or family.joined
        or family.some_rotate
        or family.caps_scores
        or family.caps_logits
        or family.divides_logits  # Granite, which multiplies what is added to the stream, too
    ):
        return False
    norms = [getattr(layer, name, None) for layer in base.model.layers for name in _NORMS]
    return (
        all({name for name, _ in layer.named_children()} == _PARTS for layer in base.model.layers)
        # a norm that is trained whole is inside a module of PEFT's, of another name
        and all(type(norm).__name__.endswith("RMSNorm") for norm in [*norms, base.model.norm])
    )


_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = {"self_attn", "mlp", *_NORMS}


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer of transformers, and the products of its linear layers."""

    module: Any
    heads: Product
    """The projections of queries, keys and values."""
    out: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True, eq=False)
class Decoder:
    """The forward pass of a causal language model."""

    base: Any
    layers: Sequence[Layer]
    head: Callable[[torch.Tensor], torch.Tensor]
    """(reads, hidden) -> (reads, vocabulary) fp32."""
    operations: Operations
    attend: Attend
    """`operations.attend` or torch's, see `checked_attention`."""
    dtype: torch.dtype
    """Of the factors of matrix products."""
    window: str | None
    """`Family.window`: which object has the window's size."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, reads: torch.Tensor) -> torch.Tensor:
        """As `job.evaluation.scoring.Forward`; the logits are fp32."""
        model = self.base.model
        # The residual stream, (tokens, hidden): a copy, since it is added to in place
        x = self.base.get_input_embeddings()(ids)[0].to(torch.float32, copy=True)
        cosine, sine = (angles[0].contiguous() for angles in model.rotary_emb(x[None], positions))
        update: torch.Tensor | None = None
        last = self.layers[-1]
        for layer in self.layers:
            buffer = self._normed(layer.module.input_layernorm, x, update, layer.heads)
            buffer = self._attention(layer, buffer, cosine, sine, layout)
            if layer is last:
                buffer, x = buffer.index_select(0, reads), x.index_select(0, reads)
            update = layer.out(buffer)
            buffer = self._normed(layer.module.post_attention_layernorm, x, update, layer.gate_up)
            gate, up = layer.gate_up(buffer).chunk(2, -1)
            buffer = layer.down.buffer(x.shape[0], gate)
            self.operations.swiglu(gate, up, buffer[:, : layer.down.inputs])
            update = layer.down(buffer)
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        self.operations.add_norm(x, update, model.norm.weight, model.norm.variance_epsilon, out)
        return self.head(out)

    def _normed(self, norm: Any, x: torch.Tensor, update: torch.Tensor | None, product: Product) -> torch.Tensor:
        buffer = product.buffer(x.shape[0], x.new_empty(0, dtype=self.dtype))
        self.operations.add_norm(x, update, norm.weight, norm.variance_epsilon, buffer[:, : product.inputs])
        return buffer

    def _attention(
        self, layer: Layer, buffer: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Attention of one layer: [x | h] of its projections -> a buffer with the output projection's x on the left."""
        attention, config = layer.module.self_attn, self.base.config
        size, heads, groups = attention.head_dim, config.num_attention_heads, config.num_key_value_heads
        projected = layer.heads(buffer).view(buffer.shape[0], heads + 2 * groups, size)
        self.operations.turn(projected[:, : heads + groups], cosine, sine)
        query, key, value = projected.split_with_sizes([heads, groups, groups], 1)
        owner = {"layer": attention, "model": config, None: None}[self.window]
        window = getattr(owner, "sliding_window", None)
        buffer = layer.out.buffer(buffer.shape[0], projected)
        out = buffer[:, : layer.out.inputs].view(buffer.shape[0], heads, size)
        self.attend(query, key, value, layout, attention.scaling, window, out)
        return buffer
