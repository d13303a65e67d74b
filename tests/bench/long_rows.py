"""Long rows on one GPU: `python tests/bench/long_rows.py [--tiny] [--layers N] [SECTION ...]` prints JSON lines.

A random model of Mistral-7B's shape in NF4, without a sliding window; all tokens but the first are targets. Sections:

- attention: kernels forward and backward, and whether they repeat bit by bit;
- exact: one gradient computed in several ways: which results differ, and which have the same bits;
- row64k: a row of 64,000 tokens by the first version (padded, in a CUDA graph, autograd over the whole) and by this;
- cap24: a row of 78,500 tokens in 24 GB, by a limit on the allocator;
- cap80: a row of 343,000 tokens in 80 GB.

`--layers N` computes N of the 32 layers in row64k, cap24 and cap80, with the weights of all in memory: except for what
is in host memory, the peak on the GPU is that of the whole model. Without it the chosen variant computes all layers,
and the variants compared with it a few. `seconds_of_all_layers` is in proportion, the loss included. --tiny tries the
script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import shapes  # lies beside this script
import torch

from job.common.resources import available_bytes
from job.data.batch_plan import Steps
from job.distributed.processes import ALONE
from job.model import packed_attention
from job.model.device import make_deterministic
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.long_attention import (
    FLASH,
    TRITON,
    CpuKernel,
    FlashKernel,
    TritonKernel,
    choose_kernel,
    copies_of,
    heads_at_once,
    processors,
)
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import add_adapter, trainable
from job.model.packed_layout import Layout, Segment, build_layout
from job.records import Example, ExecutionPlan
from job.training import activation_store, padded_shapes
from job.training.config import Hooks, Recipe
from job.training.flat_parameters import FlatParameters
from job.training.gpu_capability import fast_kernels
from job.training.memory_model import TILE_TOKENS, long_row_bytes, long_row_host_bytes
from job.training.setup_of_model import setup_of
from job.training.step import StepGradient

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
GIB = 1 << 30
FEW = padded_shapes.FEW_SEGMENTS
NOW = ExecutionPlan(
    attention=TRITON if ON_GPU else None,
    kept_base=False,
    kept_activations=False,
    recorded=False,
    reason="a benchmark",
    forward="fused all, triton",
    tile_tokens=TILE_TOKENS if ON_GPU else 64,
)
BEFORE = replace(NOW, tile_tokens=None, recorded=ON_GPU)
FLEX_BELOW = 20_000
"""Flex attention is compiled anew for each length, which takes most of a minute."""
SOME_LAYERS = 4
"""Layers for comparing variants: with all 32 a row of 64,000 tokens took three quarters of a minute at first."""


@dataclass
class Bench:
    """Shared by the sections."""

    tiny: bool
    layers: int | None
    model: Any = None
    all_layers: list[Any] = field(default_factory=list)
    examples: dict[int, Example] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, int]:
        """The model's sizes."""
        return shapes.TINY if self.tiny else shapes.MISTRAL_7B

    def size(self, tokens: int) -> int:
        """Tokens of a row; with --tiny far fewer, but still a long row."""
        return packing_long() + tokens // 1000 if self.tiny else tokens


def packing_long() -> int:
    """The number of tokens above which a row is long."""
    from job.training import long_rows

    return long_rows.LONG_ROW


@contextmanager
def few_tokens_are_long(tiny: bool) -> Iterator[None]:  # noqa: FBT001 - a rehearsal or not
    """With --tiny, rows of some hundred tokens are long within the context; otherwise nothing changes."""
    from job.training import long_rows, memory_model, micro_batch, step

    before = memory_model.LONG_ROW
    modules: tuple[Any, ...] = (long_rows, memory_model, micro_batch, step)
    try:
        for module in modules if tiny else ():
            module.LONG_ROW = 200
        yield
    finally:
        for module in modules:
            module.LONG_ROW = before


def say(what: str, **figures: Any) -> None:
    """One finding."""
    print(
        json.dumps({"what": what, **{k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}}),
        flush=True,
    )


@contextmanager
def caught(what: str) -> Iterator[None]:
    """Records an error as a finding, and continues with the next one."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises
        say("failed", where=what, error=f"{type(error).__name__}: {str(error)[:300]}")
        traceback.print_exc(limit=-6)
    clean()


def clean() -> None:
    """Frees memory, and resets the peak."""
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sync() -> None:
    """Waits for the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()


def peak() -> float | None:
    """Peak of the GiB that torch had allocated since the last `clean`."""
    return torch.cuda.max_memory_allocated() / GIB if ON_GPU else None


def reserved() -> float | None:
    """The same for reserved memory, which a limit on the allocator counts."""
    return torch.cuda.max_memory_reserved() / GIB if ON_GPU else None


# Attention.

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens, heads, head size) each -> the same, for autograd."""


def attention(bench: Bench) -> None:
    """Kernels on one causal sequence, with the heads of the model."""
    heads, kv = bench.shape["num_attention_heads"], bench.shape["num_key_value_heads"]
    width = bench.shape["hidden_size"] // heads
    for tokens in (64, 256) if bench.tiny else (16_000, 64_000):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        inputs = [torch.randn(tokens, h, width, dtype=dtype, device=DEVICE) for h in (heads, kv, kv)]
        gradient = torch.randn(tokens, heads, width, dtype=dtype, device=DEVICE)
        reference: list[torch.Tensor] = []
        if ON_GPU:
            say("heads at once", tokens=tokens, found=heads_at_once(heads, heads // kv, 1, processors(DEVICE)))
        for name, deterministic, kernel in kernels(tokens, tiny=bench.tiny):
            with caught(f"attention {name} {tokens}"):
                torch.use_deterministic_algorithms(mode=deterministic)
                results, figures = measured(kernel(), inputs, gradient)
                if not reference:
                    reference = results
                differs = [
                    float((a.float() - b.float()).norm() / b.float().norm())
                    for a, b in zip(results, reference, strict=True)
                ]
                flop = 2 * tokens**2 * heads * width
                rates = {
                    "forward_tflops": flop / figures["forward_ms"] / 1e9,
                    "backward_tflops": 2.5 * flop / figures["backward_ms"] / 1e9,
                }
                say(
                    "attention",
                    kernel=name,
                    tokens=tokens,
                    deterministic_mode=deterministic,
                    **figures,
                    **rates,
                    differs=max(differs),
                )
                del results
    torch.use_deterministic_algorithms(mode=True)


def measured(
    forward: Forward, inputs: Sequence[torch.Tensor], gradient: torch.Tensor
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Output and gradients; milliseconds of both passes, the best of three; whether bits are the same every time."""
    times, first, repeats = [], [], True
    for turn in range(4):  # the first one compiles and allocates
        leaves = [x.detach().requires_grad_() for x in inputs]
        sync()
        began = time.perf_counter()
        out = forward(*leaves)
        sync()
        between = time.perf_counter()
        gradients = torch.autograd.grad(out, leaves, gradient)
        sync()
        results = [out.detach(), *gradients]
        if turn:
            times.append((between - began, time.perf_counter() - between))
            repeats &= same(first, results)
        else:
            first = results
        del out, gradients, leaves, results
    ahead, back = (1000 * min(column) for column in zip(*times, strict=True))
    return first, {"forward_ms": ahead, "backward_ms": back, "repeats": repeats, "peak_gib": peak()}


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Whether all bits are equal."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def kernels(tokens: int, *, tiny: bool) -> Iterator[tuple[str, bool, Callable[[], Forward]]]:
    """(name, torch's deterministic mode, the function)."""
    layout = build_layout([Segment(0, tokens)], DEVICE)
    if not ON_GPU:
        yield "CPU", True, lambda: by_kernel(CpuKernel(layout, None, None))
        return
    yield "cuDNN and Triton (ours)", True, lambda: by_kernel(TritonKernel(layout, None, None))
    yield "cuDNN and Triton (ours), window of 4,096", True, lambda: by_kernel(TritonKernel(layout, None, 4096))
    yield (
        "flash, some heads at a time (ours), window of 4,096",
        True,
        lambda: by_kernel(FlashKernel(layout, None, 4096)),
    )
    yield "flash, some heads at a time (ours)", True, lambda: by_kernel(FlashKernel(layout, None, None))
    for segments in (8, 2, 1):
        yield f"flash, {segments} segments", True, lambda segments=segments: by_varlen(layout, segments)
    yield "flash, 1 segment", False, lambda: by_varlen(layout, 1)
    yield "cuDNN", False, by_cudnn
    yield "cuDNN, by its operation", True, by_cudnn_alone
    yield "flash-attn 3", True, by_flash_3
    if not tiny and tokens < FLEX_BELOW:
        yield "flex", True, lambda: by_flex(tokens)


def by_kernel(kernel: Any) -> Forward:
    """The job's kernel."""
    from job.model.fused.long_attention import _Attention

    return lambda q, k, v: _Attention.apply(q, k, v, kernel, None)[0]


def by_varlen(layout: Layout, segments: int) -> Forward:
    """Torch's variable-length kernel, with empty segments after the first."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.cat([layout.queries, layout.queries[-1:].expand(segments - 1)])
    longest, more = layout.longest_query, packed_attention._grouped_heads()
    return lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **more)


def by_cudnn() -> Forward:
    """CuDNN's by sdpa, which refuses it in deterministic mode."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = scaled_dot_product_attention(*expanded(q, k, v), is_causal=True)
        return output[0].transpose(0, 1)

    return forward


def by_cudnn_alone() -> Forward:
    """The same without the checks of sdpa."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        how = {"attn_bias": None, "compute_log_sumexp": True, "is_causal": True}
        output = torch.ops.aten._scaled_dot_product_cudnn_attention(*expanded(q, k, v), **how)
        return output[0][0].transpose(0, 1)

    return forward


def expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """(1, heads, tokens, head size) each, with keys and values repeated for each query head."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return [x.transpose(0, 1)[None] for x in (q, k, v)]


def by_flash_3() -> Forward:
    """The package flash-attention 3, if it is installed."""
    from flash_attn_interface import flash_attn_func

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = flash_attn_func(q[None], k[None], v[None], causal=True, deterministic=True)
        return (output[0] if isinstance(output, tuple) else output)[0]

    return forward


def by_flex(tokens: int) -> Forward:
    """Torch's compiled flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda _b, _h, q, k: q >= k, None, None, tokens, tokens, device=DEVICE)
    compiled = torch.compile(flex_attention)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return forward


# Steps.


def build(bench: Bench) -> None:
    """Builds the model once."""
    if bench.model is not None:
        return
    began = time.perf_counter()
    base = shapes.random_base(bench.shape, DEVICE, packed_attention.NAME)
    model = add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0)
    with torch.no_grad():  # B of a new adapter is zero, which hides errors
        for parameter in trainable(model).values():
            parameter.normal_(std=0.01)
    kernels, name = fast_kernels(DEVICE, "bfloat16")
    assert fuse_layers(model, keep_dequantized=False, kernels=kernels) == "all"
    bench.model, bench.all_layers = model.train(), list(base.model.layers)
    clean()
    say(
        "build",
        seconds=time.perf_counter() - began,
        kernels=name,
        held_gib=torch.cuda.memory_allocated() / GIB if ON_GPU else None,
    )


def example(bench: Bench, tokens: int) -> Example:
    """A row of random tokens."""
    if tokens not in bench.examples:
        draw = torch.Generator().manual_seed(tokens)
        ids = torch.randint(3, bench.shape["vocab_size"], (tokens,), generator=draw).tolist()
        bench.examples[tokens] = Example(tuple(ids), (False, *(True,) * (tokens - 1)))
    return bench.examples[tokens]


def step_of(
    bench: Bench, tokens: int, plan: ExecutionPlan, layers: int | None
) -> tuple[StepGradient, FlatParameters, int]:
    """One step on one row, with this number of layers; the weights of all layers stay in memory."""
    base, count = bench.model.get_base_model(), layers or len(bench.all_layers)
    count = min(count, len(bench.all_layers))
    base.model.layers = torch.nn.ModuleList(bench.all_layers[:count])
    recompute_activations(bench.model, on=True, random=False)
    padded_shapes.FEW_SEGMENTS = FEW if plan.tile_tokens else ()
    recipe = Recipe(
        seed=0,
        total_steps=4,
        learning_rate=1e-4,
        scheduler="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=1,
        micro_batch_tokens=16_384,
        optimizer="adamw_torch",
        save_every_steps=100,
    )
    parameters = FlatParameters(trainable(bench.model).values(), 256)
    step = StepGradient(
        bench.model,
        Steps([example(bench, tokens)], 0, 1, 4),
        parameters,
        recipe=recipe,
        plan=plan,
        hooks=Hooks(lambda _: None, lambda *_: None, lambda: False),
        processes=ALONE,
        packed_gradient=lambda *_: torch.zeros(()),
    )
    return step, parameters, count


@contextmanager
def pinning() -> Iterator[list[float]]:
    """Collects the seconds of pinning host memory, which happens once for each layer in the first step."""
    seconds: list[float] = []
    pinned = activation_store.pinned

    def timed(size: int, device: torch.device) -> torch.Tensor:
        began = time.perf_counter()
        memory = pinned(size, device)
        seconds.append(time.perf_counter() - began)
        return memory

    activation_store.pinned = timed
    try:
        yield seconds
    finally:
        activation_store.pinned = pinned


def run(
    bench: Bench,
    what: str,
    tokens: int,
    plan: ExecutionPlan,
    *,
    layers: int | None = None,
    twice: bool = False,
    **more: Any,
) -> torch.Tensor:
    """One optimizer step of one row, timed; with `twice` a second one, whose buffers already exist."""
    clean()
    step, parameters, count = step_of(bench, tokens, plan, layers)
    # A learning rate of 0: moments exist, and the next run starts from the same adapter.
    optimizer = torch.optim.AdamW([parameters.whole], lr=0.0, weight_decay=0.0)
    gradient = torch.empty(0)
    try:
        for turn in range(2 if twice else 1):
            sync()
            began = time.perf_counter()
            with pinning() as pins:
                loss = step(turn)
            if turn == 0:
                gradient = parameters.gradient.clone()
            optimizer.step()
            sync()
            seconds = time.perf_counter() - began
            whole = len(bench.all_layers)
            say(
                what,
                tokens=tokens,
                layers=count,
                of_layers=whole,
                turn=turn,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                seconds_of_all_layers=seconds * whole / count,
                tokens_per_second_of_all_layers=tokens / seconds * count / whole,
                peak_gib=peak(),
                reserved_gib=reserved(),
                loss=float(loss),
                attention=step.plan.attention,
                offloaded=step.plan.offloaded,
                kept_attention=step.plan.kept_attention,
                tile_tokens=step.plan.tile_tokens,
                recorded=step.plan.recorded,
                pinning_seconds=sum(pins),
                **more,
            )
    finally:
        step.micro_batch.release()
        padded_shapes.FEW_SEGMENTS = FEW
    return gradient


def exact(bench: Bench) -> None:
    """A row of 20,000 tokens through 2 layers: the gradient as in the first version, and by each variant, twice."""
    build(bench)
    tokens = bench.size(20_000)
    before = run(bench, "exact: as before", tokens, replace(BEFORE, recorded=False), layers=2)
    gradients = []
    for offloaded in (False, True):
        for kept_attention in (False, True):
            plan = replace(NOW, offloaded=offloaded, kept_attention=kept_attention)
            gradients += [run(bench, "exact: in tiles", tokens, plan, layers=2) for _ in range(2)]
    say(
        "exact",
        same_bits=all(torch.equal(gradients[0], one) for one in gradients),
        ways=len(gradients),
        differs_from_before=float((gradients[0] - before).norm() / before.norm()),
    )


def row64k(bench: Bench) -> None:
    """64,000 tokens: as in the first version, and now."""
    build(bench)
    tokens, some = bench.size(64_000), bench.layers or SOME_LAYERS
    with_attention = replace(NOW, kept_attention=True)
    with caught("as now"):
        run(bench, "row64k: attention kept on the GPU", tokens, with_attention, layers=bench.layers, twice=True)
    for name, plan in (
        ("row64k: as before", BEFORE),
        ("row64k: flash, attention kept on the GPU", replace(with_attention, attention=FLASH if ON_GPU else None)),
        ("row64k: attention kept on the GPU", with_attention),
        ("row64k: attention computed again", NOW),
        ("row64k: attention kept, offloaded", replace(with_attention, offloaded=True)),
    ):
        with caught(name):
            run(bench, name, tokens, plan, layers=some, twice=plan.offloaded)


def capped(bench: Bench, what: str, tokens: int, gigabytes: float, plan: ExecutionPlan) -> None:
    """A row on a GPU of so many GB, simulated by a limit on the allocator, without the CUDA context."""
    build(bench)
    clean()
    tokens = bench.size(tokens)
    setup = setup_of(bench.model, "nf4", "adamw_8bit")
    if setup is not None and ON_GPU:
        kernel = choose_kernel(setup.architecture, torch.bfloat16, DEVICE, windowed=False)
        copies = copies_of(setup.architecture, DEVICE, kernel)
        by_formula = long_row_bytes(setup, tokens, offloaded=True, kept_attention=plan.kept_attention, copies=copies)
        host = long_row_host_bytes(setup, tokens, kept_attention=plan.kept_attention)
        say(
            f"{what}: by formula",
            kernel=kernel,
            activations_gib=by_formula / GIB,
            host_gib_of_all_layers=host / GIB,
            host_gib_free=available_bytes() / GIB,
        )
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    try:
        run(bench, what, tokens, plan, layers=bench.layers, cap_gb=gigabytes)
    finally:
        if ON_GPU:
            torch.cuda.set_per_process_memory_fraction(1.0)


def cap24(bench: Bench) -> None:
    """78,500 tokens in 24 GB."""
    capped(bench, "cap24", 78_500, 24, replace(NOW, offloaded=True))


def cap80(bench: Bench) -> None:
    """343,000 tokens in 80 GB; attention is computed again, since its outputs would fill main memory."""
    capped(bench, "cap80", 343_000, 80, replace(NOW, offloaded=True))


SECTIONS = {f.__name__: f for f in (attention, exact, row64k, cap24, cap80)}


def main() -> int:
    """Runs the named sections, or all but cap80."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seconds", type=float, default=540, help="no section begins later than this")
    args = parser.parse_args()
    began = time.monotonic()
    if ON_GPU:
        make_deterministic()
    gpu = torch.cuda.get_device_name(0) if ON_GPU else None
    say(
        "machine",
        gpu=gpu,
        torch=torch.__version__,
        python=platform.python_version(),
        host_gib_free=available_bytes() / GIB,
    )
    bench = Bench(args.tiny, args.layers)
    with few_tokens_are_long(args.tiny and not ON_GPU):
        run_sections(bench, args, began)
    return 0


def run_sections(bench: Bench, args: argparse.Namespace, began: float) -> None:
    """Runs the named sections, or all but cap80; `began` is the monotonic time from which `--seconds` counts."""
    for name in args.sections or [name for name in SECTIONS if name != "cap80"]:
        if time.monotonic() - began > args.seconds:
            say("skipped", section=name)
            continue
        start = time.monotonic()
        # Memory that an error of the previous section kept is free by now, its model too.
        bench.model, bench.all_layers = None, []
        clean()
        with caught(name):
            SECTIONS[name](bench)
        say("section", name=name, seconds=time.monotonic() - start)


if __name__ == "__main__":
    raise SystemExit(main())
