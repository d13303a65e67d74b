"""A mixture's experts as grouped matmuls, with frozen weights that are dequantized for each use.

The router sends each token x to a few of a layer's experts (top-k). The token is copied for each of them, and the
copies are sorted by expert, so that one grouped matmul (`grouped_mm`) multiplies the tokens of each expert by its
weights. With the router's weights p, and for each expert e

    z = G_e x        h = act(z)        y = sum over the token's experts of p_e D_e h

where G (gate and up) and D (down) are the expert's frozen weights W, or W + s B A with an adapter of scale s. With g
the gradient of y, and ' for the transpose:

    dp_e = (D_e' g) . h        dh = p_e D_e' g        dz = act'(z) dh        dx = sum of G_e' dz

The gradients of an adapter are those of `lora_forward`, for each expert. The forward pass keeps x and z for the
backward pass, and no weights, so that the experts of only one layer are in 16 bits at a time. The outputs of a token's
experts are summed in the order in which the router chose them: a permutation brings them side by side, where
`index_add` would need atomic operations, whose order varies. So the bits repeat.

Source of an adapter's layout: PEFT's `ParamWrapper`, whose A is (experts * rank, inputs), experts outermost, and whose
B is (outputs, rank * experts), experts innermost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import grouped_mm

from job.model.experts import expert_tensors, packed
from job.model.fused.frozen_weights import FrozenWeight, dequantized_weight

_ROWS = 8
"""Ranks are padded with zeros to a multiple of this: grouped matmuls need rows of a multiple of 16 bytes."""
_NAMES = ("gate_up_proj", "down_proj")

Weight = Callable[[], torch.Tensor]
"""Gives the frozen weights of a layer's experts, (experts, outputs, inputs) in the compute dtype."""


@dataclass(frozen=True)
class _Adapter:
    """The adapter of one of `_NAMES`, for all experts of a layer.

    Attributes:
        a: (experts * rank, inputs), trained.
        b: (outputs, rank * experts), trained.
        scale: s.
        experts: How many there are.
    """

    a: Any
    b: Any
    scale: float
    experts: int

    def copies(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, (experts, rank, inputs); s B, (experts, outputs, rank)) in `dtype`, the rank padded to `_ROWS`."""
        a, b = self.a.detach(), self.b.detach()
        a = a.view(self.experts, -1, a.shape[-1])
        b = self.scale * b.view(b.shape[0], -1, self.experts).permute(2, 0, 1)
        more = -a.shape[1] % _ROWS
        a, b = functional.pad(a, (0, 0, 0, more)), functional.pad(b, (0, more))
        return a.to(dtype).contiguous(), b.to(dtype).contiguous()

    def gradients(self, da: torch.Tensor, db: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp32 gradients of `a` and `b`, from those of the two matrices that `copies` returns."""
        rank = self.a.shape[0] // self.experts
        da = da[:, :rank].float().reshape(self.a.shape)
        db = self.scale * db[..., :rank].float()
        return da, db.permute(1, 2, 0).reshape(self.b.shape)


@dataclass
class FusedExperts:
    """Computes the experts of one layer."""

    weights: Sequence[FrozenWeight]
    """In the order of `_NAMES`."""
    gate: Callable[[torch.Tensor], torch.Tensor]
    """The gated activation, (rows, 2 * intermediate) -> (rows, intermediate)."""
    count: int
    """How many experts the layer has."""
    adapters: Sequence[_Adapter | None] = (None, None)
    """In the order of `_NAMES`; None for a product without an adapter."""
    wrappers: Sequence[Any] = field(default=())
    """PEFT's modules of the adapters, which say whether they are switched off."""

    def __call__(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer's output; called as transformers calls its experts.

        Args:
            x: (tokens, hidden).
            expert_ids: The experts of each token, (tokens, experts per token) int64.
            weights: The router's weights of these, of the same shape.

        Returns:
            (tokens, hidden) in the dtype of x.
        """
        ids, order = expert_ids.reshape(-1).sort(stable=True)
        experts = torch.arange(self.count, device=ids.device, dtype=ids.dtype)
        routing = _Routing(order, order.argsort(), torch.searchsorted(ids, experts, right=True, out_int32=True))
        off = any(wrapper.disable_adapters for wrapper in self.wrappers)
        adapters = [None if off else adapter for adapter in self.adapters]
        trained = [one for adapter in adapters if adapter is not None for one in (adapter.a, adapter.b)]
        out: torch.Tensor = _Experts.apply(x, weights, routing, self, adapters, *trained)  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True)
class _Routing:
    """How the copies of the tokens, one for each chosen expert, are sorted by expert; a row is a sorted copy."""

    order: torch.Tensor
    """(rows,) int64: the copy in each row; the copy of token t for its c-th expert has number t * per_token + c."""
    inverse: torch.Tensor
    """(rows,) int64: the row of each copy."""
    offsets: torch.Tensor
    """(experts,) int32: where the rows of each expert end, exclusive."""

    def product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Each row times its expert's matrix: (rows, inputs), (experts, inputs, outputs) -> (rows, outputs)."""
        made: torch.Tensor = grouped_mm(rows, weight, offs=self.offsets)
        return made

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(rows, m), (rows, n) -> (experts, m, n): outer products summed over an expert's rows; 0 without rows."""
        products: torch.Tensor = grouped_mm(left.T, right, offs=self.offsets)
        empty = self.offsets.diff(prepend=self.offsets.new_zeros(1)) == 0
        return products.masked_fill_(empty[:, None, None], 0)  # the kernel may leave these uninitialized


class _Experts(torch.autograd.Function):
    """The module docstring's formulas, with gradients for x, p and the adapters."""

    @staticmethod
    def forward(  # noqa: PLR0917 - as autograd has it
        ctx: Any,
        x: torch.Tensor,
        p: torch.Tensor,
        routing: _Routing,
        layer: FusedExperts,
        adapters: Sequence[_Adapter | None],
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        per_token = p.shape[-1]
        z = _product(x[routing.order // per_token], layer.weights[0], adapters[0], routing)
        y = _product(layer.gate(z), layer.weights[1], adapters[1], routing)
        ctx.save_for_backward(x, p, z, *trained)
        ctx.routing, ctx.how, ctx.adapters = routing, layer, adapters
        return (y[routing.inverse].view(-1, per_token, y.shape[-1]) * p[..., None]).sum(1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, p, z, *_trained = ctx.saved_tensors  # reading these lets autograd detect that a parameter was changed
        routing, layer, (first, second) = ctx.routing, ctx.how, ctx.adapters
        per_token, order = p.shape[-1], routing.order
        with torch.enable_grad():
            z.requires_grad_()
            h = layer.gate(z)
        share = p.reshape(-1)[order].to(z.dtype)[:, None]
        g = gradient.to(z.dtype)[order // per_token]
        dh, low = _input_gradient(g, layer.weights[1], second, routing)
        adapter_gradients = []
        if second is not None:
            adapter_gradients = _adapter_gradients(second, h.detach() * share, g, low, routing)
        dp = (dh * h.detach()).sum(-1, dtype=torch.float32)[routing.inverse].view(p.shape).to(p.dtype)
        (dz,) = torch.autograd.grad(h, z, dh.mul_(share))
        z.requires_grad_(requires_grad=False)
        dx, low = _input_gradient(dz, layer.weights[0], first, routing)
        if first is not None:
            adapter_gradients = [
                *_adapter_gradients(first, x[order // per_token], dz, low, routing),
                *adapter_gradients,
            ]
        dx = dx[routing.inverse].view(-1, per_token, dx.shape[-1]).sum(1)
        return dx.to(x.dtype), dp, None, None, None, *adapter_gradients


def _product(x: torch.Tensor, weight: Weight, adapter: _Adapter | None, routing: _Routing) -> torch.Tensor:
    y = routing.product(x, weight().transpose(1, 2))
    if adapter is not None:
        a, b = adapter.copies(x.dtype)
        y += routing.product(routing.product(x, a.transpose(1, 2)), b.transpose(1, 2))
    return y


def _input_gradient(
    g: torch.Tensor, weight: Weight, adapter: _Adapter | None, routing: _Routing
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the gradient of a product's input, (rows, inputs); s g B, (rows, rank), None without an adapter).

    `g` is the gradient of its output, (rows, outputs).
    """
    dx = routing.product(g, weight())
    if adapter is None:
        return dx, None
    a, b = adapter.copies(g.dtype)
    low = routing.product(g, b)
    dx += routing.product(low, a)
    return dx, low


def _adapter_gradients(
    adapter: _Adapter, x: torch.Tensor, g: torch.Tensor, low: torch.Tensor | None, routing: _Routing
) -> list[torch.Tensor]:
    """The fp32 gradients of an adapter's A and B.

    Both are products of x with g, or with `low` = s g B. So a factor of a row, such as the router's weight, may be
    multiplied to x or to g and `low`.
    """
    assert low is not None  # noqa: S101 - there is an adapter
    a, _ = adapter.copies(x.dtype)
    db = routing.outer(g, routing.product(x, a.transpose(1, 2)))
    return list(adapter.gradients(routing.outer(low, x), db))


def _frozen_weights(module: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
    """(experts, outputs, inputs) of one of `_NAMES`: in `dtype` if they are quantized, else unchanged."""
    quantized = packed(module, name)
    weights = getattr(module, name).detach() if quantized is None else dequantized_weight(quantized, dtype)
    return weights.transpose(1, 2) if module.is_transposed else weights


def fits(module: Any) -> bool:
    """Whether the job computes a module's experts: they have a gate, and neither biases nor norms."""
    own = module.has_bias or not module.has_gate or getattr(module, "has_post_expert_norm", False)
    return not own and {name for _, _, name in expert_tensors(module)} == set(_NAMES)


def why_not_adapted(model: Any) -> str:
    """Why a model's experts cannot get an adapter, as the end of a sentence; empty if they can.

    Those that the job does not compute cannot: PEFT's own modules (0.21) add their part to 4-bit weights in each pass
    without removing it, so that it accumulates. The model may be without weights.
    """
    modules = _modules(model)
    if not modules:
        return "has no experts that transformers holds in one tensor for each layer"
    if not all(fits(module) for module in modules):
        return "has experts that the job does not support: with biases, with norms, or without a gate"
    return ""


def use_frozen(model: Any, dtype: torch.dtype) -> None:
    """Makes the job compute a base's quantized experts, in `dtype`, without adapters; changes `forward` of modules."""
    for module in _modules(model):
        if fits(module) and packed(module, _NAMES[0]) is not None:
            module.forward = MethodType(partial(_forward, _fused(module, dtype)), module)


def fuse_experts(
    model: Any, dtype: torch.dtype, *, keep: bool = False, gated: Callable[..., torch.Tensor] | None = None
) -> None:
    """Makes the job compute the experts of a PEFT model, with their adapters; changes `forward` of modules.

    Args:
        model: A PEFT model.
        dtype: The compute dtype.
        keep: Whether dequantized weights are kept.
        gated: act(gate) * up, such as a SwiGLU kernel; None for the family's own code.
    """
    chains = {wrappers[-1].base_layer: wrappers for wrappers in _wrappers(model)}
    for module in filter(fits, _modules(model)):
        wrappers = chains.get(module, ())
        fused = _fused(module, dtype, keep=keep, gated=gated, wrappers=wrappers)
        module.fused_experts = fused
        outer = wrappers[0] if wrappers else module
        outer.forward = MethodType(partial(_forward, fused), outer)


def fused_experts(model: Any) -> Iterator[FusedExperts]:
    """The experts that `fuse_experts` has fused, layer by layer."""
    return (fused for module in model.modules() if (fused := module.__dict__.get("fused_experts")) is not None)


def adapter_of_experts(model: Any) -> int:
    """How many parameters of a PEFT model's adapter belong to experts."""
    wrappers = {wrapper for chain in _wrappers(model) for wrapper in chain}
    parts = (part for wrapper in wrappers for part in (wrapper.lora_A, wrapper.lora_B))
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def _fused(
    module: Any,
    dtype: torch.dtype,
    *,
    keep: bool = False,
    gated: Callable[..., torch.Tensor] | None = None,
    wrappers: Sequence[Any] = (),
) -> FusedExperts:
    adapters: dict[str, _Adapter] = {}
    for wrapper in wrappers:
        (name,) = wrapper.active_adapters
        a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        adapters[wrapper.parameter_name] = _Adapter(a, b, wrapper.scaling[name], module.num_experts)
    weights = [FrozenWeight(partial(_frozen_weights, module, name, dtype), keep=keep) for name in _NAMES]
    gate = module._apply_gate if gated is None else partial(_gate, gated)  # noqa: SLF001 - the family's own
    return FusedExperts(weights, gate, module.num_experts, [adapters.get(name) for name in _NAMES], wrappers)


def _gate(gated: Callable[..., torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    return gated(*z.chunk(2, -1))


def _forward(
    fused: FusedExperts, _module: Any, x: torch.Tensor, expert_ids: torch.Tensor, p: torch.Tensor
) -> torch.Tensor:
    return fused(x, expert_ids, p)


def _modules(model: Any) -> list[Any]:
    """The modules that hold experts, each once."""
    return list(dict.fromkeys(module for _, module, _ in expert_tensors(model)))


def _is_wrapper(module: Any) -> bool:
    """Whether this is a PEFT `ParamWrapper`: a module around experts that adapts one of their parameters."""
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A")


def _wrappers(model: Any) -> Iterator[tuple[Any, ...]]:
    """For each module with experts the nested PEFT wrappers around it, the outermost first."""
    inner: set[Any] = set()
    for module in model.modules():
        if _is_wrapper(module) and module not in inner:
            chain = [module]
            while _is_wrapper(chain[-1].base_layer):
                chain.append(chain[-1].base_layer)
            inner.update(chain)
            yield tuple(chain)
