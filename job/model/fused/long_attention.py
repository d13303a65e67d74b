"""Causal attention of a long row, by the fastest kernel that is deterministic on this machine.

On a Hopper GPU that is cuDNN's forward pass with a backward pass of this project (`attention_gradient`), since cuDNN's
backward pass sums the gradient of the queries in no fixed order. Elsewhere it is torch's FlashAttention kernel in its
deterministic mode, called so that it uses all of a GPU's streaming multiprocessors (SMs).

In that mode the flash kernel's backward pass gives every thread block that adds to the gradient of the queries a
separate fp32 copy, and sums the copies in a fixed order. For b segments and h heads it launches ceil(SMs / (b h))
blocks for each segment and head, and as many copies. Two things follow for a row that is alone in its micro-batch:

- Empty segments count in b, but have no work. With eight segments, as in a padded sequence, a row with 32 heads is
  computed by 32 blocks, and 100 of an H100's 132 SMs are idle. So the row is the only segment here.
- An SM runs one block at a time. If there are a few more blocks than SMs, most SMs are idle while the last ones run:
  one segment with 32 heads is 160 blocks, hence two rounds. So heads are computed a few at a time: four heads are
  33 * 4 = 132 blocks, one full round. `heads_at_once` finds the number.

The order of the sums, and with it the bits, depends on the numbers of SMs, heads and segments only, which do not change
between attempts on one kind of GPU.

Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), and its code in torch (`flash_bwd_launch_template.h`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from job.log import get_logger
from job.model.architecture import WIDEST_HEAD, Architecture
from job.model.fused.sequence_parallel import share_heads
from job.model.packed_layout import Layout, Segment, build_layout

Output = tuple[torch.Tensor, torch.Tensor]
"""Attention's output, (tokens, heads, head size), and the log-sum-exp of its scores, (heads, tokens) float32."""


class Kernel(Protocol):
    """An attention kernel. Tensors are (tokens, heads, head size); keys and values may have fewer heads."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Output:
        """The output and the log-sum-exp; autograd records nothing."""
        ...

    def backward(self, gradient: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gradients of queries, keys and values.

        Args:
            gradient: The gradient of the output.
            saved: Queries, keys, values, output, log-sum-exp.
        """
        ...


CPU, FLASH, TRITON = "cpu", "flash", "cudnn and triton"
"""Names of kernels, which also appear in the manifest."""
_TRIED_TOKENS = 1_100
"""Tokens of the row on which the kernel is tested. Even with half of it as the window, the loops of both Triton kernels
take more steps than they prefetch, and the last block is not full."""
_TOLERANCE = 0.02
"""Largest relative difference from flash's results; both round to bf16's 8 bits."""
_BLOCK_TOKENS, _BLOCK_TOLERANCE = 64, 0.1
"""The same test for each block of tokens separately, since errors in the last keys' small gradients would not be seen
in the whole."""
_LONGEST_REASON = 300
"""Characters of an error's text in the log."""


def has_kernel(device: torch.device, head_size: int) -> bool:
    """Whether there is a kernel for this device: on a GPU, flash's is built for Ampere (8.0) and newer."""
    known = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    return known and head_size <= WIDEST_HEAD


@cache
def choose_kernel(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, *, windowed: bool, processes: int = 1
) -> str:
    """The attention kernel for long rows on this machine, a key of `KERNELS`; tested on a short row at the first call.

    Args:
        architecture: The model's sizes of attention.
        dtype: Dtype of queries, keys and values.
        device: Where it has to run.
        windowed: Whether some layers have a sliding window, for which the kernels are compiled separately.
        processes: How many may divide a row. If that leaves fewer query heads for each key/value head, the kernels are
            compiled separately for it.
    """
    if device.type == "cpu":
        return CPU
    capability = torch.cuda.get_device_capability(device)
    if not architecture.attends_by_triton(capability):
        return FLASH
    if (why := _why_not_triton(architecture, dtype, device, windowed=windowed, processes=processes)) is not None:
        what = "attention of long rows is computed by torch's flash kernel, which takes longer and more memory"
        change = "the versions of torch, cuDNN and Triton that this project's image has"
        get_logger().warning(what, why=why, change=change)
        return FLASH
    return TRITON


def _why_not_triton(
    a: Architecture, dtype: torch.dtype, device: torch.device, *, windowed: bool, processes: int = 1
) -> str | None:
    """Why the Triton kernel cannot be used: an error, or results on a short row unlike flash's; None if it can."""
    draw = torch.Generator(device).manual_seed(0)
    try:
        for heads, kv_heads in _heads_of_calls(a, processes):
            shapes = [(_TRIED_TOKENS, number, a.head_size) for number in (heads, kv_heads, kv_heads, heads)]
            *tensors, gradient = (torch.randn(shape, generator=draw, device=device, dtype=dtype) for shape in shapes)
            layout = build_layout([Segment(0, _TRIED_TOKENS)], device)
            for window in (None, _TRIED_TOKENS // 2)[: 1 + windowed]:
                expected, first, again = (
                    _both_passes(kernel(layout, None, window), tensors, gradient)
                    for kernel in (FlashKernel, TritonKernel, TritonKernel)
                )
                if not all(map(torch.equal, first, again)):
                    return "its results differ from call to call"
                if (why := _difference(first, expected)) is not None:
                    return why
    except Exception as error:  # noqa: BLE001 - Triton, its compiler, cuDNN and the loader raise many types
        return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
    return None


def _heads_of_calls(a: Architecture, processes: int) -> list[tuple[int, int]]:
    """(query heads, key/value heads) of the calls to test: one for each quotient that kernels are compiled for."""
    calls = [(a.heads, a.kv_heads)]
    if processes > a.kv_heads:
        try:
            calls.append(share_heads(a.heads, a.kv_heads, processes).counts(0))
        except ValueError:  # the heads cannot be divided by this number of processes
            return calls
    return calls if calls[-1][0] // calls[-1][1] != a.heads // a.kv_heads else calls[:1]


def _difference(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """What is wrong with the results of `_both_passes`, compared with flash's; None if they are close enough."""
    for one, other in zip(results, expected, strict=True):
        # The second result, the log-sum-exp, is (heads, tokens); transposed, all have tokens first.
        ours, flash = (x.float().T if x is sums else x.float() for x, sums in ((one, results[1]), (other, expected[1])))
        # `not <=` instead of `>`, so that NaN is an error.
        if not (error := float((ours - flash).norm() / flash.norm())) <= _TOLERANCE:
            return f"its results differ from flash's by {error:.1%}"
        blocks = [slice(start, start + _BLOCK_TOKENS) for start in range(0, len(ours), _BLOCK_TOKENS)]
        # NaN was found above.
        if (error := max(float((ours[b] - flash[b]).norm() / flash[b].norm()) for b in blocks)) > _BLOCK_TOLERANCE:
            return f"its results differ from flash's by {error:.1%} in a block of {_BLOCK_TOKENS} tokens"
    return None


def _both_passes(kernel: Kernel, tensors: Sequence[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    output = kernel.forward(*tensors)
    return [*output, *kernel.backward(gradient, *tensors, *output)]


class RowAttention:
    """Attention in one layer, used as `Layout.attend`: called in the forward pass, and again in the backward pass.

    Attributes:
        output: The kernel's output, None before the first call. If it is given, a call uses it instead of computing it;
            the kernel is deterministic, so the bits are the same.
    """

    def __init__(self, layout: Layout, kernel: str, output: Output | None = None) -> None:
        self._layout, self._kernel = layout, KERNELS[kernel]
        self.output = output

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        """(1, heads, tokens, head size) each -> (1, tokens, heads, head size); arguments as for `packed_attention`."""
        tensors = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
        kernel = self._kernel(self._layout, scaling, window)
        out, sums = _Attention.apply(*tensors, kernel, self.output)  # type: ignore[no-untyped-call]
        self.output = out.detach(), sums
        return out[None]  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it so
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: Kernel, computed: Output | None
    ) -> Output:
        out, sums = kernel.forward(query, key, value) if computed is None else computed
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.how = kernel
        ctx.mark_non_differentiable(sums)
        return out, sums

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _sums: torch.Tensor) -> Any:
        return *ctx.how.backward(gradient, *ctx.saved_tensors), None, None


@dataclass(frozen=True)
class FlashKernel:
    """Torch's FlashAttention kernel for segments of any length, in half precision on a GPU."""

    layout: Layout
    scaling: float | None
    window: int | None

    def _options(self) -> dict[str, Any]:
        left = -1 if self.window is None else self.window - 1  # keys before the query's own
        return {"scale": self.scaling, "window_size_left": left, "window_size_right": 0}

    def _lengths(self, offsets: torch.Tensor) -> tuple[Any, ...]:
        longest = self.layout.longest_query
        return offsets, offsets, longest, longest, 0.0, self.window is None  # no dropout; causal

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Output:
        """As `Kernel.forward`, all heads at once: it launches a block for every 128 queries, enough for all SMs."""
        options = {"return_debug_mask": False, **self._options()}
        results = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - what torch's varlen_attn calls
            query, key, value, *self._lengths(self.layout.queries), **options
        )
        return results[0], results[1]

    def backward(self, gradient: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `Kernel.backward`, some heads at a time, together with the key/value heads that these share."""
        query, key, value, out, sums = saved
        heads, shared_by = query.shape[1], query.shape[1] // key.shape[1]
        segments = len(self.layout.queries) - 1
        group, empty = heads_at_once(heads, shared_by, segments, processors(query.device))
        offsets = torch.cat([self.layout.queries, self.layout.queries[-1:].expand(empty)])
        # The state of a random generator, which the kernel uses for dropout only.
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        for first in range(0, heads, group):
            query_heads = slice(first, first + group)
            shared = slice(first // shared_by, (first + group) // shared_by)
            head_slices = query_heads, shared, shared
            head_gradients = torch.ops.aten._flash_attention_backward(  # noqa: SLF001 - as above
                gradient[:, query_heads],
                *(x[:, heads_of_part] for x, heads_of_part in zip((query, key, value), head_slices, strict=True)),
                out[:, query_heads],
                sums[query_heads],
                *self._lengths(offsets),
                *unused,
                **self._options(),
            )
            for whole, heads_of_part, part in zip(gradients, head_slices, head_gradients, strict=True):
                whole[:, heads_of_part] = part
        return gradients


@dataclass(frozen=True)
class TritonKernel:
    """cuDNN's forward pass with `attention_gradient` as the backward pass, in half precision on a Hopper GPU.

    Torch's binding of cuDNN has neither windows nor segments, so with these the forward pass is flash's. The backward
    pass works with either, since both return the output and the log-sum-exp.
    """

    layout: Layout
    scaling: float | None
    window: int | None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Output:
        """As `Kernel.forward`."""
        if len(self.layout.segments) > 1 or self.window is not None:
            return FlashKernel(self.layout, self.scaling, self.window).forward(query, key, value)
        outputs = torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001 - as sdpa does
            *(x.transpose(0, 1)[None] for x in (query, key, value)),
            attn_bias=None,
            compute_log_sumexp=True,
            is_causal=True,
            scale=self.scaling,
        )
        return outputs[0][0].transpose(0, 1).contiguous(), outputs[1].reshape(query.shape[1], query.shape[0])

    def backward(self, gradient: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `Kernel.backward`."""
        from job.model.fused.attention_gradient import attention_gradient  # Triton may not be installed without a GPU

        scale = saved[0].shape[2] ** -0.5 if self.scaling is None else self.scaling
        segments = [(segment.start, segment.end) for segment in self.layout.segments]
        return attention_gradient(gradient, *saved, segments=segments, scale=scale, window=self.window)


@cache
def processors(device: torch.device) -> int:
    """Number of a GPU's streaming multiprocessors; without a GPU an H100's, for forecasts."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def heads_at_once(heads: int, shared_by: int, segments: int, sms: int) -> tuple[int, int]:
    """(query heads in one call, empty segments to add) with which flash's backward pass uses the most SMs.

    Args:
        heads: Query heads.
        shared_by: Query heads that share a key/value head; a call computes all of these together.
        segments: Segments of the sequence, one of which has nearly all the work.
        sms: SMs of the GPU.
    """

    def rank_choice(choice: tuple[int, int]) -> tuple[float, int, int]:
        group, empty = choice
        splits = -(-sms // (group * (segments + empty)))
        blocks = group * splits
        rounds = -(-blocks // sms)
        # Of choices that use equally many SMs, the one with the fewest copies of the gradient, then the fewest calls.
        return blocks / (rounds * sms), -blocks, group

    groups = [group for group in range(shared_by, heads + 1, shared_by) if heads % group == 0]
    return max(((group, empty) for group in groups for empty in range(4)), key=rank_choice)


def copies_of(architecture: Architecture, device: torch.device, kernel: str) -> int:
    """How many fp32 gradients of the queries, of one head over all tokens each, the kernel holds at once for a row."""
    if kernel == TRITON:
        return architecture.triton_copies
    sms, heads = processors(device), architecture.heads
    group, empty = heads_at_once(heads, heads // architecture.kv_heads, 1, sms)
    return group * -(-sms // (group * (1 + empty)))


@dataclass(frozen=True)
class CpuKernel:
    """Torch's flash kernel for CPUs, called once for each segment."""

    layout: Layout
    scaling: float | None
    window: int | None

    def _blocks(self, *tensors: torch.Tensor) -> list[tuple[slice, dict[str, Any], list[torch.Tensor]]]:
        """(range of tokens, the kernel's options, the tensors as (1, heads, tokens, head size)) for each segment."""
        blocks = []
        for block in self.layout.blocks(self.window):
            tokens = slice(block.start, block.end)
            mask = block.mask
            if mask is not None:  # the kernel takes an additive mask
                mask = torch.zeros(mask.shape, dtype=tensors[0].dtype).masked_fill(~mask, float("-inf"))
            options = {"attn_mask": mask, "scale": self.scaling}
            blocks.append((tokens, options, [x[tokens].transpose(0, 1)[None] for x in tensors]))
        return blocks

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Output:
        """As `Kernel.forward`."""
        shared_by = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        for own, options, parts in self._blocks(query, key, value):
            part, part_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - as sdpa does
                *parts, 0.0, options["attn_mask"] is None, **options
            )
            out[own], sums[:, own] = part[0].transpose(0, 1), part_sums.reshape(query.shape[1], -1)
        return out, sums

    def backward(self, gradient: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `Kernel.backward`."""
        query, key, value, out, sums = saved
        heads, shared_by = query.shape[1], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
        gradients = [torch.empty_like(query) for _ in range(3)]
        for tokens, options, (g, q, k, v, o) in self._blocks(gradient, query, key, value, out):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # noqa: SLF001 - as above
                g, q, k, v, o, sums[None, :, tokens].contiguous(), 0.0, options["attn_mask"] is None, **options
            )
            for whole, part in zip(gradients, parts, strict=True):
                whole[tokens] = part[0].transpose(0, 1)
        grouped = [x.view(x.shape[0], heads // shared_by, shared_by, -1).sum(2) for x in gradients[1:]]
        return gradients[0], *grouped


KERNELS = {CPU: CpuKernel, FLASH: FlashKernel, TRITON: TritonKernel}
"""Kernels by their name in `ExecutionPlan.attention`; of two that run on the same machine, the slower one first."""


def slowest(names: Sequence[str]) -> str:
    """The slowest of the kernels that the processes have chosen: all of them can use it."""
    return min(names, key=list(KERNELS).index)
