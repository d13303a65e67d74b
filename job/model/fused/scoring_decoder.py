"""The decoder of `precise_forward` for families built like Llama, with fewer passes over memory.

A layer with a frozen weight W of (outputs, inputs), an adapter A of (rank, inputs), B of (outputs, rank) and scale s
computes y = x W' + s (x A') B'. With h = x A', that is one product of wider matrices:

    y = [x | h] [W | s B]'        (tokens, inputs + rank) (inputs + rank, outputs)

so that the adapter costs no pass over y. Layers with a common input share x and h: queries, keys and values are one
product, whose W and B lie one below the other. What makes an x (a norm, attention, the activation) writes it into the
left columns of a wider matrix, and the product with A' writes h into the others, so that nothing is copied. All is
summed in fp32.

What adds to the residual stream is added by the norm that comes next. In the last layer, everything behind attention is
computed for the tokens alone whose logits are read.
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
from job.model.packed_attention import Segment, build_layout, packed_attention

if TYPE_CHECKING:
    from job.model.packed_attention import Layout

WIDE = 64
"""The columns for h are a multiple of it, so that rows begin where a GPU reads fastest; the others are zeros."""


Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "Layout", float, "int | None", torch.Tensor],
    None,
]
"""As `Operations.attend`."""


class Operations(Protocol):
    """What is computed between the products; `out` is a view into a wider matrix."""

    def __hash__(self) -> int:
        """Equal ones compute the same."""

    def add_norm(
        self, x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, epsilon: float, out: torch.Tensor
    ) -> None:
        """Adds `update` to the residual stream x, (tokens, hidden) fp32, in place, and writes its norm to `out`."""

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
        """Writes silu(gate) * up, all (tokens, intermediate)."""

    def turn(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Gives x, (tokens, heads, head size), its positions, in place; the others are (tokens, head size) fp32."""

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
        """Writes attention's outputs; all (tokens, heads, head size)."""


@dataclass(frozen=True)
class TorchOperations:
    """By torch's own operations, for any device."""

    largest: float | None = None
    """Queries and keys beyond it become NaN."""

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
        found, _ = packed_attention(
            torch.nn.Module(), q, k, v, None, layout=layout, scaling=scaling, sliding_window=window
        )
        out.copy_(found[0])


@dataclass(frozen=True)
class Heads:
    """Sizes of a model's attention."""

    queries: int
    keys: int
    """And values: each is shared by a group of queries."""
    size: int
    windowed: bool
    """Whether layers may have a window."""


@cache  # a run scores with several adapters
def checked_attention(operations: Operations, heads: Heads, device: torch.device) -> Attend:
    """The operations' attention, or torch's if theirs cannot compute a model's heads in fp16 here, which is logged."""
    if why := _why_not_attend(operations, heads, device):
        what = "Triton's attention for scoring cannot be used here; torch's takes its place, which is slower"
        get_logger().warning(what, why=why)
        return TorchOperations().attend
    return operations.attend


def _why_not_attend(operations: Operations, heads: Heads, device: torch.device) -> str:
    """Computes attention once, in a tree longer than what a program of a kernel computes, beside torch's in fp32."""
    # Two texts, of which the first goes on in two ways, one of them in one more
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
    found = torch.empty(query.shape, dtype=made.dtype, device=device)
    scaling = heads.size**-0.5
    for window in (None, 40) if heads.windowed else (None,):
        TorchOperations().attend(query.float(), key.float(), value.float(), layout, scaling, window, exact)
        try:
            operations.attend(query, key, value, layout, scaling, window, found)
            error = float((found - exact).abs().max())
        except Exception as problem:  # noqa: BLE001 - whatever Triton, its compiler or the driver raises
            return " ".join(f"{type(problem).__name__}: {problem}".split())[:_LONGEST_REASON]
        if not error < _LARGEST_ERROR:  # also if it is not a number
            return f"a number is {error:.3g} away from what torch computes"
    return ""


_LONGEST_REASON = 300
"""Characters of an error's text in the log."""
_LARGEST_ERROR = 0.02
"""Of attention in fp16 over values of a standard normal distribution. An H200's largest was 0.0013."""


@dataclass(frozen=True, eq=False)
class Product:
    """The linear layers with a common input, as one product or several into one matrix."""

    weights: Sequence[Callable[[], torch.Tensor]]
    """Each gives (its outputs, inputs + wide): W and s B."""
    outputs: Sequence[int]
    """Of each weight."""
    a: torch.Tensor | None
    """(wide, inputs), all A's; None without an adapter."""
    bias: torch.Tensor | None
    """(all outputs,)."""
    inputs: int
    switch: Any
    """One of PEFT's layers, which says whether the adapter is switched off."""

    def room(self, tokens: int, like: torch.Tensor) -> torch.Tensor:
        """(tokens, inputs + wide), to be filled in the left columns; the dtype is that of the factors."""
        wide = 0 if self.a is None else self.a.shape[0]
        return like.new_empty(tokens, self.inputs + wide)

    def __call__(self, room: torch.Tensor) -> torch.Tensor:
        """(tokens, all outputs)."""
        x = room[:, : self.inputs]
        if self.a is not None and not self.switch.disable_adapters:
            torch.mm(x, self.a.T, out=room[:, self.inputs :])
            x = room
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
    """Whether this module computes the decoder of a causal language model."""
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
        # not those that are trained whole, in a module of PEFT's
        and all(type(norm).__name__.endswith("RMSNorm") for norm in [*norms, base.model.norm])
    )


_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = {"self_attn", "mlp", *_NORMS}


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer and its products."""

    module: Any
    heads: Product
    """Of queries, keys and values."""
    out: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model, ready to be computed."""

    base: Any
    layers: Sequence[Layer]
    head: Callable[[torch.Tensor], torch.Tensor]
    """(reads, hidden) -> (reads, vocabulary) fp32."""
    operations: Operations
    attend: Attend
    """`Operations.attend`, of these operations or torch's."""
    dtype: torch.dtype
    """Of the factors."""
    window: str | None
    """`Family.window`."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, reads: torch.Tensor) -> torch.Tensor:
        """As `job.evaluation.scoring.Forward`; the logits are fp32."""
        model = self.base.model
        # (tokens, hidden), the residual stream: a tensor of its own, since it is added to in place
        x = self.base.get_input_embeddings()(ids)[0].to(torch.float32, copy=True)
        cosine, sine = (angles[0].contiguous() for angles in model.rotary_emb(x[None], positions))
        update: torch.Tensor | None = None
        last = self.layers[-1]
        for layer in self.layers:
            room = self._normed(layer.module.input_layernorm, x, update, layer.heads)
            room = self._attention(layer, room, cosine, sine, layout)
            if layer is last:
                room, x = room.index_select(0, reads), x.index_select(0, reads)
            update = layer.out(room)
            room = self._normed(layer.module.post_attention_layernorm, x, update, layer.gate_up)
            gate, up = layer.gate_up(room).chunk(2, -1)
            room = layer.down.room(x.shape[0], gate)
            self.operations.swiglu(gate, up, room[:, : layer.down.inputs])
            update = layer.down(room)
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        self.operations.add_norm(x, update, model.norm.weight, model.norm.variance_epsilon, out)
        return self.head(out)

    def _normed(self, norm: Any, x: torch.Tensor, update: torch.Tensor | None, into: Product) -> torch.Tensor:
        room = into.room(x.shape[0], x.new_empty(0, dtype=self.dtype))
        self.operations.add_norm(x, update, norm.weight, norm.variance_epsilon, room[:, : into.inputs])
        return room

    def _attention(
        self, layer: Layer, room: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """What the output projection reads."""
        attention, config = layer.module.self_attn, self.base.config
        size, heads, groups = attention.head_dim, config.num_attention_heads, config.num_key_value_heads
        found = layer.heads(room).view(room.shape[0], heads + 2 * groups, size)
        self.operations.turn(found[:, : heads + groups], cosine, sine)
        query, key, value = found.split_with_sizes([heads, groups, groups], 1)
        owner = {"layer": attention, "model": config, None: None}[self.window]
        window = getattr(owner, "sliding_window", None)
        room = layer.out.room(room.shape[0], found)
        out = room[:, : layer.out.inputs].view(room.shape[0], heads, size)
        self.attend(query, key, value, layout, attention.scaling, window, out)
        return room
