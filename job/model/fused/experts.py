"""A mixture's experts as products of groups of tokens, with frozen weights that are dequantized for each use.

Each token x goes to a few of a layer's experts. Its copies are sorted by expert, so that one grouped product multiplies
the tokens of each expert by its weights. With the router's weights p, and for each expert e

    z = G_e x        h = act(z)        y = sum over the token's experts of p_e D_e h

where G and D are the frozen weights W, or with an adapter W + s B A of each expert. With g the gradient of y:

    dp_e = (D_e' g) . h        dh = p_e D_e' g        dz = act'(z) dh        dx = sum of G_e' dz

and those of an adapter are as in `lora_forward`, a product for each expert. Of the forward pass the tokens and z are
kept; no weight is, so that no more than one layer's experts are ever in 16 bits. A token's copies are added in the
order in which the router chose its experts, by a permutation and not at indices: without atomic operations, so that
the bits repeat.

Source of the layout of an adapter: PEFT's `ParamWrapper`, whose A is (experts * rank, inputs) and B (outputs,
rank * experts), the experts innermost.
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
from job.model.fused.frozen_weights import dequantized_weight

_ROWS = 8
"""Ranks are filled up with zeros to a multiple of it: grouped products want rows of 16 bytes."""
_NAMES = ("gate_up_proj", "down_proj")

Weight = Callable[[], torch.Tensor]
"""Gives the frozen weights of a layer's experts, (experts, outputs, inputs) in the compute dtype."""


@dataclass(frozen=True)
class _Adapter:
    """Of one of the two products. `a`, (experts * rank, inputs), and `b`, (outputs, rank * experts), are trained."""

    a: Any
    b: Any
    scale: float
    experts: int

    def copies(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A, (experts, rank, inputs), and s B, (experts, outputs, rank), of a rank that products take."""
        a, b = self.a.detach(), self.b.detach()
        a = a.view(self.experts, -1, a.shape[-1])
        b = self.scale * b.view(b.shape[0], -1, self.experts).permute(2, 0, 1)
        more = -a.shape[1] % _ROWS
        a, b = functional.pad(a, (0, 0, 0, more)), functional.pad(b, (0, more))
        return a.to(dtype).contiguous(), b.to(dtype).contiguous()

    def gradients(self, da: torch.Tensor, db: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of A and s B, of copies, as those of `a` and `b`."""
        rank = self.a.shape[0] // self.experts
        da = da[:, :rank].float().reshape(self.a.shape)
        db = self.scale * db[..., :rank].float()
        return da, db.permute(1, 2, 0).reshape(self.b.shape)


@dataclass
class FusedExperts:
    """How the experts of a layer are computed."""

    weights: Sequence[FrozenExperts]
    """Of `_NAMES`."""
    gate: Callable[[torch.Tensor], torch.Tensor]
    """(rows, 2 * intermediate) -> (rows, intermediate)."""
    count: int
    adapters: Sequence[_Adapter | None] = (None, None)
    wrappers: Sequence[Any] = field(default=())
    """PEFT's modules of the adapters."""

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As transformers' experts: (tokens, hidden), and for each token (tokens, count) its experts and their weights.

        Returns:
            (tokens, hidden) in the dtype of x.
        """
        ids, order = chosen.reshape(-1).sort(stable=True)
        experts = torch.arange(self.count, device=ids.device, dtype=ids.dtype)
        groups = _Groups(order, order.argsort(), torch.searchsorted(ids, experts, right=True, out_int32=True))
        off = any(wrapper.disable_adapters for wrapper in self.wrappers)
        adapters = [None if off else adapter for adapter in self.adapters]
        trained = [one for adapter in adapters if adapter is not None for one in (adapter.a, adapter.b)]
        found: torch.Tensor = _Experts.apply(x, weights, groups, self, adapters, *trained)  # type: ignore[no-untyped-call]
        return found


@dataclass(frozen=True)
class _Groups:
    """Copies of tokens sorted by expert."""

    order: torch.Tensor
    """(rows,) int64: which copy each row is; copy c of token t is number t * count + c."""
    inverse: torch.Tensor
    """(rows,) int64: in which row each copy is."""
    offsets: torch.Tensor
    """(experts,) int32: behind which row each expert's end."""

    def product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(rows, inputs), (experts, inputs, outputs) -> (rows, outputs)."""
        made: torch.Tensor = grouped_mm(rows, weight, offs=self.offsets)
        return made

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(rows, m), (rows, n) -> (experts, m, n): the sum over an expert's rows, 0 where it has none."""
        found: torch.Tensor = grouped_mm(left.T, right, offs=self.offsets)
        empty = self.offsets.diff(prepend=self.offsets.new_zeros(1)) == 0
        return found.masked_fill_(empty[:, None, None], 0)  # a kernel need not have written there


class _Experts(torch.autograd.Function):
    """The formulas above, with gradients for x, p and adapters."""

    @staticmethod
    def forward(  # noqa: PLR0917 - as autograd has it
        ctx: Any,
        x: torch.Tensor,
        p: torch.Tensor,
        groups: _Groups,
        how: FusedExperts,
        adapters: Sequence[_Adapter | None],
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        count = p.shape[-1]
        z = _product(x[groups.order // count], how.weights[0], adapters[0], groups)
        y = _product(how.gate(z), how.weights[1], adapters[1], groups)
        ctx.save_for_backward(x, p, z, *trained)
        ctx.groups, ctx.how, ctx.adapters = groups, how, adapters
        return (y[groups.inverse].view(-1, count, y.shape[-1]) * p[..., None]).sum(1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, p, z, *_trained = ctx.saved_tensors  # asked for, so that autograd finds out if they were changed
        groups, how, (first, second) = ctx.groups, ctx.how, ctx.adapters
        count, order = p.shape[-1], groups.order
        with torch.enable_grad():
            z.requires_grad_()
            h = how.gate(z)
        share = p.reshape(-1)[order].to(z.dtype)[:, None]
        g = gradient.to(z.dtype)[order // count]
        dh, low = _input_gradient(g, how.weights[1], second, groups)
        found = []
        if second is not None:
            found = _adapter_gradients(second, h.detach() * share, g, low, groups)
        dp = (dh * h.detach()).sum(-1, dtype=torch.float32)[groups.inverse].view(p.shape).to(p.dtype)
        (dz,) = torch.autograd.grad(h, z, dh.mul_(share))
        z.requires_grad_(requires_grad=False)
        dx, low = _input_gradient(dz, how.weights[0], first, groups)
        if first is not None:
            found = [*_adapter_gradients(first, x[order // count], dz, low, groups), *found]
        dx = dx[groups.inverse].view(-1, count, dx.shape[-1]).sum(1)
        return dx.to(x.dtype), dp, None, None, None, *found


def _product(x: torch.Tensor, weight: Weight, adapter: _Adapter | None, groups: _Groups) -> torch.Tensor:
    y = groups.product(x, weight().transpose(1, 2))
    if adapter is not None:
        a, b = adapter.copies(x.dtype)
        y += groups.product(groups.product(x, a.transpose(1, 2)), b.transpose(1, 2))
    return y


def _input_gradient(
    g: torch.Tensor, weight: Weight, adapter: _Adapter | None, groups: _Groups
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of (rows, outputs) gradients: (rows, inputs), and of an adapter s g B, (rows, rank)."""
    dx = groups.product(g, weight())
    if adapter is None:
        return dx, None
    a, b = adapter.copies(g.dtype)
    low = groups.product(g, b)
    dx += groups.product(low, a)
    return dx, low


def _adapter_gradients(
    adapter: _Adapter, x: torch.Tensor, g: torch.Tensor, low: torch.Tensor | None, groups: _Groups
) -> list[torch.Tensor]:
    """Of A and B; a factor of a row may be in x or in g and `low`, since both gradients are products of the two."""
    assert low is not None  # noqa: S101 - there is an adapter
    a, _ = adapter.copies(x.dtype)
    db = groups.outer(g, groups.product(x, a.transpose(1, 2)))
    return list(adapter.gradients(groups.outer(low, x), db))


class FrozenExperts:
    """Gives the weights of one of the products of a layer's experts, in `dtype`: kept, or dequantized for each use."""

    def __init__(self, module: Any, name: str, dtype: torch.dtype, *, keep: bool) -> None:
        self._module, self._name, self._dtype = module, name, dtype
        self._kept = self._made() if keep else None

    def __call__(self) -> torch.Tensor:
        """(experts, outputs, inputs), in `dtype`."""
        return self._made() if self._kept is None else self._kept

    def forget(self) -> None:
        """Dequantizes for each use from now on."""
        self._kept = None

    def _made(self) -> torch.Tensor:
        weight = packed(self._module, self._name)
        plain = getattr(self._module, self._name).detach() if weight is None else None
        made = dequantized_weight(weight, self._dtype) if plain is None else plain
        return made.transpose(1, 2) if self._module.is_transposed else made


def fits(module: Any) -> bool:
    """Whether the experts of a module are computed here: with a gate, and nothing that only some families have."""
    own = module.has_bias or not module.has_gate or getattr(module, "has_post_expert_norm", False)
    return not own and {name for _, _, name in expert_tensors(module)} == set(_NAMES)


def why_not_adapted(model: Any) -> str:
    """Why experts of a model, which may be without weights, get no adapter here; empty if they do.

    PEFT's own modules would leave their part in 4-bit weights after each pass (0.21), so that it adds up.
    """
    modules = _modules(model)
    if not modules:
        return "is no mixture of experts that are one tensor a layer"
    if not all(fits(module) for module in modules):
        return "has experts that the job does not compute: with biases, norms of their own or without a gate"
    return ""


def use_frozen(model: Any, dtype: torch.dtype) -> None:
    """Has the quantized experts of a base be computed here, in `dtype`."""
    for module in _modules(model):
        if fits(module) and packed(module, _NAMES[0]) is not None:
            module.forward = MethodType(partial(_forward, _fused(module, dtype)), module)


def fuse_experts(
    model: Any, dtype: torch.dtype, *, keep: bool = False, gated: Callable[..., torch.Tensor] | None = None
) -> None:
    """Has the experts of a PEFT model be computed here, with their adapters.

    Args:
        model: PEFT's.
        dtype: The compute dtype.
        keep: Whether dequantized weights are kept.
        gated: What multiplies the gate's activation by the other half; None for the family's own code.
    """
    chains = {wrappers[-1].base_layer: wrappers for wrappers in _wrappers(model)}
    for module in filter(fits, _modules(model)):
        wrappers = chains.get(module, ())
        fused = _fused(module, dtype, keep=keep, gated=gated, wrappers=wrappers)
        module.fused_experts = fused
        outer = wrappers[0] if wrappers else module
        outer.forward = MethodType(partial(_forward, fused), outer)


def fused_experts(model: Any) -> Iterator[FusedExperts]:
    """Those of `fuse_experts`."""
    return (found for module in model.modules() if (found := module.__dict__.get("fused_experts")) is not None)


def adapter_of_experts(model: Any) -> int:
    """How many numbers of a PEFT model's adapter are of experts."""
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
    weights = [FrozenExperts(module, name, dtype, keep=keep) for name in _NAMES]
    gate = module._apply_gate if gated is None else partial(_gate, gated)  # noqa: SLF001 - the family's own
    return FusedExperts(weights, gate, module.num_experts, [adapters.get(name) for name in _NAMES], wrappers)


def _gate(gated: Callable[..., torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    return gated(*z.chunk(2, -1))


def _forward(fused: FusedExperts, _module: Any, x: torch.Tensor, chosen: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return fused(x, chosen, p)


def _modules(model: Any) -> list[Any]:
    """The modules that hold experts, each once."""
    return list(dict.fromkeys(module for _, module, _ in expert_tensors(model)))


def _is_wrapper(module: Any) -> bool:
    """Whether it is PEFT's module around experts, for one of their parameters."""
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A")


def _wrappers(model: Any) -> Iterator[tuple[Any, ...]]:
    """Those around each module, the outermost first."""
    inner: set[Any] = set()
    for module in model.modules():
        if _is_wrapper(module) and module not in inner:
            chain = [module]
            while _is_wrapper(chain[-1].base_layer):
                chain.append(chain[-1].base_layer)
            inner.update(chain)
            yield tuple(chain)
