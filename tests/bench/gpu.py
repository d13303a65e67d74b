"""The job compared with other libraries on one GPU, in one run: `python tests/bench/gpu.py [--tiny] [SECTION ...]`.

A random model of Mistral-7B's shape in NF4, Alpaca's and ARC-Easy's real lengths (`lengths.json`), or ARC-Easy's own
questions, which have common prefixes, from the files that --arc and --alpaca name. Every section prints a line per
finding and adds it to `gpu.json` in --out ($OUT); if one fails, that is a finding, and the next begins. --tiny tries
the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import gpu_evaluation  # these lie beside this script
import gpu_table
import long_rows
import shapes
import torch

from job.common.optimizers import OPTIMIZERS
from job.data import batch_plan
from job.distributed.processes import ALONE, Processes
from job.evaluation.scorer import score_sequences
from job.evaluation.scoring import plan_sequences, score_sequence, tokens_of
from job.model import packed_attention
from job.model.fused import kernels, precise_forward
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import Kernels
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import add_adapter, trainable
from job.model.packed_layout import Segment, build_layout
from job.records import PEFT, Example, ExecutionPlan, Question, StepMetrics
from job.training import packing, padded_shapes
from job.training.config import Hooks, Recipe
from job.training.cuda_graphs import CudaGraphs
from job.training.execution_plan import choose_budget
from job.training.flat_parameters import FlatParameters
from job.training.gpu_capability import fast_kernels
from job.training.trainer import train

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PARAMETERS = 7_241_732_096
WARMUP = 2
"""Steps that are not timed."""


@dataclass
class Bench:
    """Shared by all sections: sizes, the place of findings, and the machine's rate once it is measured."""

    tiny: bool
    out: Path
    steps: int
    findings: list[dict[str, Any]]
    rate: float = 0.0
    model: Any = None
    quick: bool = False
    """Whether only the fastest variants of each side are measured, for the table."""
    texts: tuple[Path, Path] | None = None
    """Files of ARC-Easy's questions, and of Alpaca's rows, on which a tokenizer is trained."""
    asked: list[Question] | None = None
    """The result of `questions`."""

    @property
    def shape(self) -> dict[str, int]:
        """The model's sizes."""
        return shapes.TINY if self.tiny else shapes.MISTRAL_7B

    @property
    def data(self) -> list[Example]:
        """The training examples."""
        return shapes.examples(self.shape["vocab_size"], 100 if self.tiny else 1500)

    def say(self, what: str, **figures: Any) -> None:
        """One finding: a line, and an entry of the file."""
        entry = {"what": what, **{k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}}
        self.findings.append(entry)
        print(json.dumps(entry), flush=True)
        (self.out / "gpu.json").write_text(json.dumps(self.findings, indent=1) + "\n")

    @contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """Records an error as a finding, too."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the next one shall have its turn
            self.say("failed", where=what, error=f"{type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc(limit=-6)
        clean()


def clean() -> None:
    """Frees memory."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sync() -> None:
    """Waits for the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds of a call: the median of seven times, each of ten calls in a row."""
    calls, repeat = (10, 7) if ON_GPU else (1, 2)
    for _ in range(3):
        function()
    times = []
    for _ in range(repeat):
        sync()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        sync()
        times.append((time.perf_counter() - began) / calls)
    return sorted(times)[len(times) // 2] * 1000


def timed_on_gpu(function: Callable[[], Any]) -> float:
    """The same of the GPU's work alone: recorded as a CUDA graph, so that nothing waits for Python."""
    if not ON_GPU:
        return timed(function)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        function()
    return timed(graph.replay)


def deterministic(*, on: bool, fill: bool = True) -> None:
    """Deterministic mode, as the job sets it, or torch's default. `fill`: whether torch then fills new memory."""
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = fill


# The machine's limits.


def machine(bench: Bench) -> None:
    """Names, versions, and the rate of a large bf16 product, with which everything else is compared."""
    import bitsandbytes
    import peft
    import transformers
    import trl

    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, trl, bitsandbytes)}
    gpu = torch.cuda.get_device_properties(0) if ON_GPU else None
    bench.say(
        "machine",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        gpu=gpu.name if gpu else platform.processor(),
        memory=gpu.total_memory if gpu else None,
        python=platform.python_version(),
        cuda=torch.version.cuda,
        **versions,
    )
    rate(bench)
    tokens = 3722 if not bench.tiny else 64
    hidden, wide = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    for name, size in {
        "q": (hidden, hidden),
        "k": (hidden, hidden // 4),
        "gate": (hidden, wide),
        "down": (wide, hidden),
    }.items():
        x = torch.randn(tokens, size[0], device=DEVICE, dtype=torch.bfloat16)
        w = torch.randn(size[1], size[0], device=DEVICE, dtype=torch.bfloat16)
        y = torch.randn(tokens, size[1], device=DEVICE, dtype=torch.bfloat16)
        flops = 2 * tokens * size[0] * size[1]
        forward, backward = timed(lambda x=x, w=w: x @ w.T), timed(lambda y=y, w=w: y @ w)
        bench.say(
            "product",
            layer=name,
            tokens=tokens,
            forward_tflops=flops / forward / 1e9,
            backward_tflops=flops / backward / 1e9,
        )


def rate(bench: Bench) -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product in bf16, measured once."""
    if not bench.rate:
        size = 256 if bench.tiny else 8192
        a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        milliseconds = timed(lambda: a @ b)
        bench.rate = 2 * size**3 / milliseconds * 1000
        bench.say("rate", tflops=bench.rate / 1e12, bound_tokens_per_second=bench.rate / (4 * PARAMETERS))
    return bench.rate


def pieces(bench: Bench) -> None:
    """Milliseconds of a step's operations other than the large products, for one layer or one step."""
    tokens = 3722 if not bench.tiny else 200
    hidden, wide = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    heads, groups = bench.shape["num_attention_heads"], bench.shape["num_key_value_heads"]
    size = hidden // heads

    def fresh(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def both(function: Callable[..., Any], *inputs: torch.Tensor) -> float:
        def once() -> None:
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, inputs, seeds.setdefault(len(outputs), [torch.randn_like(y) for y in outputs]))

        seeds: dict[int, list[torch.Tensor]] = {}

        return timed_on_gpu(once)

    from transformers.models.mistral.modeling_mistral import MistralRMSNorm, apply_rotary_pos_emb

    plain = MistralRMSNorm(hidden).to(DEVICE, torch.bfloat16).requires_grad_(False)  # noqa: FBT003
    x, gate, up = fresh(1, tokens, hidden), fresh(1, tokens, wide), fresh(1, tokens, wide)
    q, k = fresh(1, tokens, heads, size), fresh(1, tokens, groups, size)
    cosine, sine = (torch.randn(1, tokens, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bench.say(
        "pieces",
        kernels="transformers",
        norm=both(plain, x),
        swiglu=both(lambda g, u: torch.nn.functional.silu(g) * u, gate, up),
        rotate=both(
            lambda q, k: apply_rotary_pos_emb(q.transpose(1, 2) * 1, k.transpose(1, 2) * 1, cosine, sine), q, k
        ),
    )
    for name, operations in kernel_sets().items():
        with bench.caught(f"pieces {name}"):
            bench.say(
                "pieces",
                kernels=name,
                norm=both(lambda x, n=operations: n.norm(x, plain.weight, 1e-5), x),
                swiglu=both(operations.swiglu, gate, up),
                rotate=both(lambda q, k, n=operations: n.rotate(q * 1, k * 1, cosine, sine), q, k),
            )
    lengths = shapes.LENGTHS["alpaca"][:32] if not bench.tiny else [50] * 4
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    layout = build_layout([Segment(end - length, end) for end, length in zip(ends, lengths, strict=True)], DEVICE)
    row = [fresh(1, n, ends[-1], size) for n in (heads, groups, groups)]
    for mode in (True, False):
        with bench.caught("pieces attention"):
            deterministic(on=mode, fill=False)
            spent = both(lambda q, k, v: packed_attention.packed_attention(None, q, k, v, None, layout=layout)[0], *row)
            bench.say("pieces attention", deterministic=mode, milliseconds=spent)
    deterministic(on=False)


def parts(bench: Bench) -> None:
    """Milliseconds of a step's operations that are done once for all layers."""
    from bitsandbytes.optim import AdamW8bit
    from trl.kernels import ChunkedLogProbFunction

    model, data = adapted(bench), bench.data[:32]
    prepare(model, replace(BEST, keep=False))
    layers = [layer for module in model.modules() if "fused" in module.__dict__ for layer in module.fused.layers]
    weights = [torch.nn.Parameter(p.detach().clone()) for p in trainable(model).values()]
    flat = FlatParameters(weights, OPTIMIZERS["adamw_8bit"].block)
    flat.clear()
    flat.gradient.normal_().mul_(1e-6)
    refresh = next(iter(model.get_base_model().base_model._forward_pre_hooks.values()))
    bench.say(
        "parts",
        dequantize=timed_on_gpu(lambda: [layer.weight() for layer in layers] and None),
        refresh=timed(lambda: refresh(None, None)),
        clear=timed(flat.clear),
        clip=timed(lambda: torch.nn.utils.clip_grad_norm_([flat.whole], 1.0)),
        adamw_8bit=timed(AdamW8bit([flat.whole], lr=0.0).step),
        adamw_8bit_apart=timed(AdamW8bit(weights, lr=0.0).step),
        lay_out=timed(lambda: packing.padded_sequence(data, DEVICE)),
    )
    hidden = torch.randn(
        3722 if not bench.tiny else 200, bench.shape["hidden_size"], device=DEVICE, dtype=torch.bfloat16
    )
    hidden.requires_grad_()
    targets = torch.randint(0, bench.shape["vocab_size"], hidden.shape[:1], device=DEVICE)
    head = model.get_base_model().lm_head.weight

    def loss() -> None:
        log_probs = ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, 32768, None, 1.0, ())[0]
        torch.autograd.grad(log_probs.sum(), hidden)

    bench.say("parts", loss=timed_on_gpu(loss))
    unmake(model)


def kernel_sets() -> dict[str, Kernels]:
    """The sets of kernels for the operations between the products."""
    sets = {"torch": kernels.TORCH}
    if ON_GPU or os.environ.get("TRITON_INTERPRET"):
        sets["triton"] = kernels.triton()
        try:
            sets["liger"] = liger()
        except ImportError as error:
            print(f"no Liger: {error}")
    return sets


def liger() -> Kernels:
    """Liger's norm and SwiGLU, for comparison."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False)  # noqa: FBT003

    return replace(kernels.triton(), name="liger", norm=norm, swiglu=LigerSiLUMulFunction.apply)


# Training.


@dataclass(frozen=True)
class Variant:
    """A way to carry out a step. The default is that of the first version, which had no choice."""

    name: str
    lean: bool = False
    keep: bool = False
    kernels: str = ""
    recompute: bool = True
    budget: int = 4096
    deterministic: bool = True
    fill: bool = True
    padded: bool = False
    graph: bool = False
    grain: int = 256
    optimizer: str = "adamw_8bit"
    steps: int = 1
    """Multiplies the number of steps: CUDA graphs are recorded in the first ones."""


BEST = Variant(
    "graph, triton kernels",
    lean=True,
    keep=True,
    kernels="triton",
    recompute=False,
    budget=16384,
    fill=False,
    padded=True,
    graph=True,
    steps=5,
)
EAGER = replace(BEST, name="launched piece by piece, triton kernels", graph=False, steps=1)
TODAY = Variant("as it was, budget 4096")
VARIANTS = [
    TODAY,
    replace(EAGER, name="launched piece by piece, not padded, torch kernels", padded=False, kernels="torch"),
    EAGER,
    BEST,
    replace(BEST, name="graph, torch kernels", kernels="torch"),
    replace(BEST, name="graph, liger", kernels="liger"),
    replace(BEST, name="graph, not deterministic", deterministic=False),
    replace(BEST, name="graph, padded to 128", grain=128),
    replace(BEST, name="graph, NF4 per use", keep=False),
    replace(BEST, name="graph, recomputed", recompute=True),
    replace(BEST, name="graph, NF4 per use, recomputed", keep=False, recompute=True),
    replace(BEST, name="graph, budget 4096", budget=4096),
    replace(BEST, name="graph, torch's AdamW", optimizer="adamw_torch"),
]


def unmake(model: Any) -> None:
    """Removes what the job's preparation and a trainer added to a model."""
    model.get_base_model().base_model._forward_pre_hooks.clear()
    for module in model.modules():
        for name in ("forward", "fused"):
            module.__dict__.pop(name, None)


def adapted(bench: Bench) -> Any:
    """The job's model: packed attention, and a new adapter in fp32. Made once for all sections that use it."""
    if bench.model is None:
        began = time.perf_counter()
        base = shapes.random_base(bench.shape, DEVICE, packed_attention.NAME)
        bench.model = add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0)
        sync()
        clean()
        held = torch.cuda.memory_allocated() / 2**30 if ON_GPU else None
        bench.say("build", seconds=time.perf_counter() - began, held_gib=held)
    return bench.model


def put_away(bench: Bench) -> None:
    """Frees the job's model for that of another library."""
    bench.model = None
    deterministic(on=False)
    clean()


def recipe_of(bench: Bench, variant: Variant, total_steps: int | None = None, batch: int | None = None) -> Recipe:
    """The reference recipe, shortened."""
    return Recipe(
        seed=0,
        total_steps=total_steps or WARMUP + bench.steps * (variant.steps if not bench.tiny else 1),
        learning_rate=2e-4,
        scheduler="linear",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=batch or (32 if not bench.tiny else 8),
        micro_batch_tokens=variant.budget if not bench.tiny else variant.budget // 16,
        optimizer=variant.optimizer,
        save_every_steps=10_000,
    )


def plan_of(variant: Variant) -> ExecutionPlan:
    """The execution plan of a variant. Kept weights are not dropped here when memory runs out."""
    fused = "fused all" if variant.padded else "fused layers"
    return ExecutionPlan(
        kept_base=False,
        kept_activations=not variant.recompute,
        recorded=variant.graph and ON_GPU,
        reason="a benchmark",
        forward=f"{fused}, {variant.kernels or 'no kernels'}" if variant.lean else PEFT,
    )


def prepare(model: Any, variant: Variant) -> None:
    """Prepares the model, which may be prepared for another variant, for this one."""
    unmake(model)
    clean()
    deterministic(on=variant.deterministic, fill=variant.fill)
    padded_shapes.SMALLEST_INCREMENT = variant.grain
    if variant.lean:
        sets = kernel_sets()
        wanted = variant.kernels if variant.kernels in sets or not variant.kernels else "torch"
        done = fuse_layers(model, keep_dequantized=variant.keep, kernels=sets.get(wanted))
        assert done == ("all" if wanted else "layers")


def fit(
    bench: Bench,
    model: Any,
    variant: Variant,
    on_step: Callable[[StepMetrics], None] = lambda _: None,
    *,
    data: list[Example] | None = None,
    total_steps: int | None = None,
    batch: int | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Trains with one variant, from the same adapter; returns its figures.

    `steady` is the speed of steps without recording, in which a long run spends its time. `whole` is from the call of
    the trainer to the end of the last step.
    """
    weights = trainable(model)
    fresh = {name: p.detach().clone() for name, p in weights.items()}
    ended: list[float] = []
    recorded: list[int] = []
    data = bench.data if data is None else data
    began = time.perf_counter()

    def on_metrics(metrics: StepMetrics) -> None:
        ended.append(time.perf_counter())
        on_step(metrics)

    try:
        with tempfile.TemporaryDirectory() as folder, noted(lambda: recorded.append(len(ended))):
            trained = train(
                model,
                shapes.tokenizer(),
                data,
                recipe=recipe_of(bench, variant, total_steps, batch),
                plan=plan_of(variant),
                hooks=Hooks(on_metrics, lambda *_: None, lambda: False),
                folder=Path(folder),
                processes=processes,
            )
        # All processes wait for the one that records.
        recorded = [step for one in processes.gather("recorded", recorded) for step in one]
        spent = [b - a for a, b in pairwise(ended)][WARMUP - 1 :]
        targets = [step.target_tokens for step in trained.history[WARMUP:]]
        every = sum(step.target_tokens for step in trained.history)
        steady = [n for n in range(len(spent)) if n + WARMUP not in recorded]
        speed = sum(targets) / sum(spent)
        steady_speed = sum(targets[n] for n in steady) / sum(spent[n] for n in steady) if steady else 0.0
        return {
            "tokens_per_second": speed,
            "whole_tokens_per_second": every / (ended[-1] - began),
            "whole_seconds": ended[-1] - began,
            "of_bound": speed * 4 * PARAMETERS / rate(bench),
            "steady_tokens_per_second": steady_speed,
            "steady_of_bound": steady_speed * 4 * PARAMETERS / rate(bench),
            "steady_milliseconds": [round(spent[n] * 1000, 1) for n in steady][:8],
            "recordings": len(recorded),
            "recording_milliseconds": [round(spent[n] * 1000) for n in range(len(spent)) if n not in steady][:4],
            "steps": len(spent),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if ON_GPU else None,
            "budget": trained.micro_batch_tokens,
            "losses": [round(step.loss, 4) for step in trained.history][:6],
            "adapter": bits_of(model),
        }
    finally:
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(fresh[name])
                parameter.grad = None


def bits_of(model: Any) -> str:
    """A short hash of the adapter."""
    total = hashlib.sha256()
    for p in trainable(model).values():
        total.update(p.detach().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


@contextmanager
def noted(note: Callable[[], None]) -> Iterator[None]:
    """Within the context `note` is called for every recording."""
    record = CudaGraphs._record

    def noting(*arguments: Any) -> None:
        note()
        record(*arguments)

    CudaGraphs._record = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        CudaGraphs._record = record  # type: ignore[method-assign]


def variants(bench: Bench) -> None:
    """All variants of a step, on the whole model."""
    model = adapted(bench)
    for variant in VARIANTS:
        with bench.caught(variant.name):
            prepare(model, variant)
            bench.say("train", variant=variant.name, **fit(bench, model, variant))
    unmake(model)


def exact(bench: Bench) -> None:
    """Variants whose bits must be equal, and the job's compared with PEFT's own forward pass in fp32."""
    model = adapted(bench)
    short = replace(bench, steps=4)
    once = replace(BEST, steps=2)
    adapters: dict[str, str] = {}
    for name, variant in {
        "best": once,
        "again": once,
        "launched piece by piece": replace(once, graph=False),
        "NF4 per use": replace(once, keep=False),
        "recomputed": replace(once, recompute=True),
        "NF4 per use, recomputed": replace(once, keep=False, recompute=True),
    }.items():
        with bench.caught(f"exact {name}"):
            prepare(model, variant)
            done = fit(short, model, variant)
            adapters[name] = done["adapter"]
            bench.say(
                "exact", variant=name, same_bits=adapters[name] == adapters["best"], recordings=done["recordings"]
            )
    with bench.caught("exact resumed"):
        prepare(model, once)
        bench.say("exact", variant="resumed", same_bits=resumed(short, model, once) == adapters["best"])
    with bench.caught("exact scores"):
        asked = shapes.questions(bench.shape["vocab_size"], 40)
        scores = []
        for variant in (BEST, replace(BEST, keep=False), replace(BEST, kernels="torch"), TODAY):
            prepare(model, variant)
            model.eval()
            scores.append([choice.log_likelihood for q in score_sequence(model, asked) for choice in q])
        bench.say("exact scores", kept_is_per_use=scores[0] == scores[1])
        for name, other in (("torch kernels", scores[2]), ("PEFT's forward", scores[3])):
            worst = max(abs(a - b) / abs(a) for a, b in zip(scores[0], other, strict=True))
            bench.say("exact scores", against=name, largest_relative_difference=worst)
    unmake(model)


def resumed(bench: Bench, model: Any, variant: Variant) -> str:
    """The adapter of a run that was stopped in the middle and resumed by another trainer."""
    weights = trainable(model)
    fresh = {name: p.detach().clone() for name, p in weights.items()}
    recipe, seen, saved = recipe_of(bench, variant), [0], []
    with tempfile.TemporaryDirectory() as folder:
        for stop in (recipe.total_steps // 2, recipe.total_steps + 1):
            train(
                model,
                shapes.tokenizer(),
                bench.data,
                recipe=recipe,
                plan=plan_of(variant),
                hooks=Hooks(
                    lambda step: seen.append(step.step),
                    lambda path, _: saved.append(path),
                    lambda stop=stop: seen[-1] >= stop,  # type: ignore[misc]
                ),
                folder=Path(folder),
                resume=saved[-1] if saved else None,
            )
            if stop < recipe.total_steps:
                with torch.no_grad():
                    for name, parameter in weights.items():
                        parameter.copy_(fresh[name] + 1)
        bits = bits_of(model)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(fresh[name])
            parameter.grad = None
    return bits


def capped(bench: Bench) -> None:
    """A smaller GPU, simulated by a limit on the allocator (without the CUDA context): the job adapts and ends."""
    model = adapted(bench)
    for gib, budget in ((16, None), (12, None), (8, None), (8, 4096)):  # None: the job's choice for that size
        token_budget = budget or choose_budget(gib << 30)
        small = replace(BEST, name="small", keep=False, recompute=True, budget=token_budget, steps=1)
        with bench.caught(f"capped {gib}"):
            prepare(model, small)
            if ON_GPU:
                share = gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(share)
            bench.say("capped", gib=gib, asked=token_budget, **fit(bench, model, small))
    if ON_GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)


def profile(bench: Bench) -> None:
    """Where the time of a step goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    model = adapted(bench)
    for variant in (BEST, replace(BEST, kernels="torch", name="graph, torch kernels"), replace(EAGER, padded=False)):
        with bench.caught(f"profile {variant.name}"):
            prepare(model, variant)
            recorder: Any = None
            recordings: list[int] = []
            began = spent = 0.0

            def watch(metrics: StepMetrics, recordings: list[int] = recordings) -> None:
                """Profiles steps until one has recorded no CUDA graph."""
                nonlocal recorder, began, spent
                sync()
                now = time.perf_counter()
                if recorder is not None and not spent:
                    recorder.stop()
                    spent = 0.0 if recordings else now - began
                if metrics.step >= WARMUP and not spent:
                    recordings.clear()
                    recorder = profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])])
                    recorder.start()
                    began = time.perf_counter()

            with noted(lambda recordings=recordings: recordings.append(1)):  # type: ignore[misc]
                fit(bench, model, replace(variant, steps=5), watch)
            events = recorder.key_averages()
            own = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
            on_gpu = [
                e for e in events if str(e.device_type).endswith("CUDA") and not getattr(e, "is_user_annotation", False)
            ]
            busy = sum(event.self_device_time_total for event in on_gpu) / 1000
            bench.say(
                "profile",
                variant=variant.name,
                step_milliseconds=spent * 1000,
                busy_milliseconds=busy,
                kernels=sum(e.count for e in on_gpu),
                top=[
                    {"name": e.key[:90], "ms": round(e.self_device_time_total / 1000, 2), "count": e.count}
                    for e in sorted(on_gpu, key=lambda e: -e.self_device_time_total)[:30]
                ],
            )
            table = events.table(sort_by=own, row_limit=40, max_name_column_width=70)
            (bench.out / f"profile-{re.sub('[^a-z0-9]+', '-', variant.name)}.txt").write_text(table)
    unmake(model)


# Other libraries.


def plain(bench: Bench) -> None:
    """TRL, PEFT and bitsandbytes as their manuals show: batches of 8 x 4, padded, activations recomputed."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    put_away(bench)
    data, steps, size = bench.data, WARMUP + bench.steps, 8 if not bench.tiny else 2
    order = [row for step in range(steps) for row in batch_plan.batch(0, len(data), size * 4, step)]
    ended: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Records when a step has ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            sync()
            ended.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4,
            gradient_checkpointing=True,
            learning_rate=2e-4,
            warmup_steps=2,
            optim="adamw_8bit",
            bf16=True,
            use_cpu=not ON_GPU,
            train_sampling_strategy="sequential",
            max_length=2048,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            shapes.random_base(bench.shape, DEVICE, "sdpa"),
            arguments,
            train_dataset=Dataset.from_dict({"input_ids": [list(data[row].input_ids) for row in order]}),
            processing_class=shapes.tokenizer(),
            peft_config=LoraConfig(
                r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(shapes.MODULES), task_type="CAUSAL_LM"
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    targets = sum(len(data[row].input_ids) - 1 for row in order[WARMUP * size * 4 :])
    speed = targets / (ended[-1] - ended[WARMUP - 1])
    bench.say(
        "plain TRL",
        tokens_per_second=speed,
        of_bound=speed * 4 * PARAMETERS / rate(bench),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
        losses=[round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    )


def questions(bench: Bench) -> list[Question]:
    """ARC-Easy's questions as lm-eval asks them, if --arc is given; else random tokens of their lengths."""
    if bench.asked is not None:
        return bench.asked
    if bench.texts is None:
        bench.asked = shapes.questions(bench.shape["vocab_size"], 30 if bench.tiny else None)
        return bench.asked
    arc, alpaca = bench.texts
    with tempfile.TemporaryDirectory() as folder:
        words = [" ".join(row.values()) for row in gpu_evaluation.lines(alpaca)[: 500 if bench.tiny else 20_000]]
        tokenizer = gpu_evaluation.make_tokenizer(Path(folder), words, bench.shape["vocab_size"])
        bench.asked = gpu_evaluation.questions(arc, arc, tokenizer, 30 if bench.tiny else None)["0 examples"]
    return bench.asked


def score_texts(bench: Bench, asked: Sequence[Question]) -> None:
    """The job's evaluation of real questions, with the adapter, in fp16, common prefixes computed once."""
    model = adapted(bench)
    unmake(model)
    deterministic(on=True, fill=False)
    model.eval()
    way = precise_forward.precise_forward(model, torch.float16, fast_kernels(DEVICE, "float16")[0], keep=True)
    gpu_evaluation.ours(model, asked[:200], way)
    answers, seconds = gpu_evaluation.ours(model, asked, way)
    (bench.out / "scores.json").write_text(json.dumps(answers))
    bench.say(
        "score",
        variant="fp16",
        budget=gpu_evaluation.BUDGET,
        text=True,
        questions=len(asked),
        questions_per_second=len(asked) / seconds,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
    )


def score(bench: Bench) -> None:
    """The job's evaluation: packed sequences, each context once. `ahead`: launches a sequence before the last is read.

    Budget: 45 s on an H200, of which the model takes 20.
    """
    asked = questions(bench)
    if bench.texts is not None:
        score_texts(bench, asked)
        return
    model = adapted(bench)
    earlier: dict[str, list[float]] = {}
    ways = [
        ("as it was", TODAY, 8192, False),
        ("per use", replace(BEST, keep=False), 8192, True),
        ("kept", BEST, 8192, False),
        ("kept", BEST, 8192, True),
        ("kept", BEST, 16384, True),
    ]
    for name, variant, budget, ahead in ways[-2:] if bench.quick else ways:
        with bench.caught(f"score {name}"):
            prepare(model, variant)
            model.eval()
            rows = dict(enumerate(plan_sequences(asked, budget)))
            score_sequence(model, asked[rows[0].start : rows[0].stop])
            sync()
            began = time.perf_counter()
            if ahead:
                scores = [q for _, row in score_sequences(model, asked, rows) for q in row]
            else:
                scores = [q for row in rows.values() for q in score_sequence(model, asked[row.start : row.stop])]
            seconds = time.perf_counter() - began
            likelihoods = [[choice.log_likelihood for choice in q] for q in scores]
            (bench.out / "scores.json").write_text(json.dumps(likelihoods))
            flat = [one for q in likelihoods for one in q]
            tokens = sum(tokens_of(asked[row.start : row.stop]) for row in rows.values())
            bench.say(
                "score",
                variant=name,
                budget=budget,
                ahead=ahead,
                questions_per_second=len(asked) / seconds,
                tokens_per_second=tokens / seconds,
                of_bound=tokens / seconds * 2 * PARAMETERS / rate(bench),
                same_bits=None if (key := f"{name} {budget}") not in earlier else flat == earlier[key],
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
            )
            earlier.setdefault(key, flat)
    unmake(model)


def hflm(bench: Bench) -> None:
    """lm-eval's HFLM on the same questions, tokenized beforehand; every choice alone.

    Batches grow until one is slower or runs out of memory. Budget: 16 s on an H200.
    """
    from lm_eval.models.huggingface import HFLM

    put_away(bench)
    asked = questions(bench)[: 400 if bench.quick else 800]
    base = shapes.random_base(bench.shape, DEVICE, "sdpa")
    requests = [(("", ""), list(q.context), list(choice)) for q in asked for choice in q.choices]
    ours: Sequence[Sequence[float]] = []
    if (bench.out / "scores.json").exists():
        ours = json.loads((bench.out / "scores.json").read_text())[: len(asked)]
    best = 0.0
    for size in (*(() if bench.quick else ("auto", 32)), 64, 128, 256, 512):
        speed = 0.0
        with bench.caught(f"HFLM {size}"):
            model = HFLM(
                pretrained=base, tokenizer=shapes.tokenizer(), batch_size=size, max_length=2048, device=str(DEVICE)
            )
            model._loglikelihood_tokens(requests[: gpu_evaluation.warmup(size)], disable_tqdm=True)
            sync()
            began = time.perf_counter()
            answers = model._loglikelihood_tokens(requests, disable_tqdm=True)
            sync()
            speed = len(asked) / (time.perf_counter() - began)
            bench.say(
                "HFLM",
                batch_size=size,
                text=bench.texts is not None,
                questions=len(asked),
                questions_per_second=speed,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
                **_agreement(asked, [a[0] for a in answers], ours),
            )
        if size != "auto":
            if speed <= best:
                break  # larger batches would not be faster, either
            best = speed


def _agreement(asked: Sequence[Any], theirs: list[float], ours: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many predictions are the same, and the margins of those that differ."""
    if not ours:
        return {}
    same, margins = 0, []
    for q, mine in zip(asked, ours, strict=True):
        other, theirs = theirs[: len(q.choices)], theirs[len(q.choices) :]
        pick, their_pick = mine.index(max(mine)), other.index(max(other))
        same += pick == their_pick
        if pick != their_pick:
            margins.append(round(mine[pick] - mine[their_pick], 4))
    return {"same_predictions": same, "margins_of_the_others": margins[:20]}


def padding(bench: Bench) -> None:
    """Shapes and padding of runs on Alpaca's rows, by the batch plan alone: all lengths, and the chosen ones."""
    examples = shapes.examples(32000)
    price = padded_shapes.recording_tokens(32, 7_110_393_856)
    for steps, processes in ((6, 1), (20, 1), (94, 1), (470, 1), (2000, 1), (20, 2), (94, 2)):
        plan = batch_plan.Steps(examples, 0, 32, steps, 0, processes)
        sequences = plan.sequences(16384)
        tokens = sum(n for n, _ in sequences)
        for name, choose in (("every length", every_length), ("chosen", padded_shapes.choose_shapes)):
            padded = choose(sequences, price * processes)
            wasted = sum(padded.of(*one)[0] - one[0] for one in sequences)
            bench.say(
                "padding",
                shapes=name,
                steps=steps,
                processes=processes,
                recordings=len(padded.shapes),
                wasted=wasted / tokens,
                overhead=(wasted + price * len(padded.shapes)) / tokens,
            )


def every_length(sequences: Sequence[tuple[int, int]], _: int) -> padded_shapes.Shapes:
    """The shapes of the first version: each length and number of segments that occurs, rounded up."""
    came = {(padded_shapes.padded_length(tokens), padded_shapes.padded_segments(count)) for tokens, count in sequences}
    return padded_shapes.Shapes(tuple(sorted(came)), max(padded_shapes.length_increment(n) for n, _ in sequences))


def recordings(bench: Bench) -> None:
    """A complete run of 20 steps: with every length recorded, and with those chosen for the run.

    Budget: 45 s on an H200, of which the model takes 20.
    """
    model, steps = adapted(bench), 20 if not bench.tiny else 4
    by_job = padded_shapes.choose_shapes
    try:
        for name, choose in (("chosen", by_job), ("every length", every_length), ("chosen", by_job)):
            with bench.caught(f"recordings {name}"):
                prepare(model, BEST)
                padded_shapes.choose_shapes = choose
                bench.say("recordings", shapes=name, **fit(bench, model, BEST, total_steps=steps))
    finally:
        padded_shapes.choose_shapes = by_job
    unmake(model)


def buyers(bench: Bench) -> None:
    """What the table needs in addition to `score`: training on Alpaca's lengths and on rows of 4,096 tokens.

    Budget: 45 s on an H200.
    """
    model = adapted(bench)
    length = 4096 if not bench.tiny else 256
    tokens = tuple(3 + n % 900 for n in range(length))
    full = [Example(tokens, (False, *[True] * (length - 1)))] * 64
    for name, data, batch, steps in (("alpaca", bench.data, None, 14), ("4096", full, 8, 7)):
        with bench.caught(f"buyers {name}"):
            prepare(model, BEST)
            bench.say("buyers", rows=name, **fit(bench, model, BEST, data=data, total_steps=steps, batch=batch))
    unmake(model)


def long_row(bench: Bench) -> None:
    """The gradient of a row of 64,000 tokens, layer by layer, as in `long_rows.py`, after one of 17,000 tokens.

    Budget: 35 s on an H200.
    """
    model = adapted(bench)
    prepare(model, BEST)
    model.train()
    with long_rows.few_tokens_are_long(bench.tiny):
        row = long_rows.Bench(bench.tiny, None, model, list(model.get_base_model().model.layers))
        plan = replace(long_rows.NOW, kept_attention=True)
        long_rows.step_of(row, row.size(17_000), plan, None)[0](0)
        clean()
        tokens = row.size(64_000)
        step, _, _ = long_rows.step_of(row, tokens, plan, None)
        try:
            sync()
            began = time.perf_counter()
            loss = float(step(0))
            seconds = time.perf_counter() - began
            bench.say(
                "long row",
                full_attention=model.config.sliding_window is None,
                tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
                loss=loss,
            )
        finally:
            step.micro_batch.release()
            padded_shapes.FEW_SEGMENTS = long_rows.FEW
            recompute_activations(model, on=False)
            for p in trainable(model).values():  # the adapter trained before stays unchanged
                p.grad = None
    unmake(model)


def restart(bench: Bench) -> None:
    """Seconds from a process's start to its next step: the demo on this machine, killed at a step and restarted.

    The model is small, so this is the job's own start-up: imports, checks, hashes, the checkpoint. Budget: 40 s.
    """
    with tempfile.TemporaryDirectory() as folder:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("JOB_")} | {
            "JOB_PRESET": "demo",
            "JOB_MODEL__DTYPE": "auto",  # on a GPU, PEFT's layers would train the preset's fp32
            "JOB_RUN__ID": "restart",
            "JOB_RUN__OUTPUT": folder,
            "JOB_RUN__SPOT_NOTICES": "off",
            "JOB_LOG__FORMAT": "json",
            "JOB_CHECKPOINT__EVERY_STEPS": "5",
            "JOB_FAULT": "kill@step=12",
        }
        for attempt in ("killed", "restarted"):
            began = time.time()
            done = subprocess.run(
                [sys.executable, "-m", "job"],
                cwd=Path(__file__).parents[2],
                env=environ,
                capture_output=True,
                text=True,
                check=False,
            )
            lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
            moments: dict[str, float] = {}
            for line in lines:
                since = datetime.fromisoformat(line["timestamp"]).timestamp() - began
                moments.setdefault(f"{line['event']} {line['stage']}" if "stage" in line else line["event"], since)
            bench.say(
                "restart",
                attempt=attempt,
                code=done.returncode,
                first_step_seconds=moments.get("steps train"),
                owned_seconds=moments.get("this attempt owns the run"),
                data_seconds=moments.get("data is ready pull"),
                loaded_seconds=moments.get("model is loaded"),
            )
            if done.returncode != (-9 if attempt == "killed" else 0):
                bench.say("failed", where=f"restart, {attempt}", error=done.stderr[-500:])
                return


def start(bench: Bench) -> None:
    """Seconds and modules of imports before the first step, in new processes: without and with the job's changes.

    Budget: 60 s; the first process may read from a cold disk.
    """
    source = """
import gc, json, os, sys, time
gc.disable()
began, laps = time.perf_counter(), []
def lap(name): laps.append((name, round(time.perf_counter() - began, 2), len(sys.modules)))
if sys.argv[1] == "now":
    from job.cli.library_variables import configure_libraries
    configure_libraries(None)
lap("command line")
import torch
lap("torch")
torch.cuda.is_available() and torch.zeros(1, device="cuda")
lap("CUDA")
import job.pipeline
lap("pipeline")
if sys.argv[1] == "now":
    from job.stages.preload import import_libraries
    import_libraries()
else:
    import job.stages.train
lap("libraries")
import job.stages.load, job.stages.evaluate, lm_eval.tasks
lap("rest")
print(json.dumps({"laps": laps, "cpu_seconds": time.process_time()}))
"""
    for way in ("now", "now", "as it was", "now", "as it was"):
        done = subprocess.run(
            [sys.executable, "-c", source, way],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stdout.splitlines()
        bench.say("start", way=way, **(json.loads(lines[-1]) if lines else {"error": done.stderr[-300:]}))


def unsloth(bench: Bench) -> None:
    """Unsloth by its own script, if UNSLOTH names an interpreter that has it, or a folder with its packages."""
    if not (place := os.environ.get("UNSLOTH")):
        bench.say("no Unsloth", why="UNSLOTH names neither an interpreter that has it nor a folder of its packages")
        return
    script, packages = Path(__file__).with_name("unsloth_peer.py"), Path(place).is_dir()
    command = [sys.executable if packages else place, str(script), "--out", str(bench.out)]
    command += ["--tiny"] if bench.tiny else []
    command += ["--steps", "4", "--ways", *UNSLOTHS_FASTEST] if bench.quick else []
    put_away(bench)
    # Unsloth's own versions of packages, and none of the job's.
    environ = os.environ | {"PYTHONPATH": place} if packages else dict(os.environ)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    (bench.out / "unsloth.log").write_text(f"{done.stdout}\n{done.stderr}")
    for line in done.stdout.splitlines():
        if line.startswith('{"what"'):  # the trainer's own log has braces too
            entry = json.loads(line)
            what = entry.pop("what")
            bench.say("Unsloth's machine" if what == "machine" else what, **entry)
    if done.returncode:
        bench.say("failed", where="unsloth", error=done.stderr[-500:])


def table(bench: Bench) -> None:
    """The table of the main figures, of what was measured so far in --out."""
    print("\n".join(gpu_table.lines(bench.findings)), flush=True)


SECTIONS = {
    f.__name__: f
    for f in (
        *(machine, pieces, parts, exact, variants, profile, recordings, score, capped, plain, hflm),
        *(padding, start, restart, buyers, long_row, unsloth, table),
    )
}
BUYERS = ("machine", "buyers", "score", "long_row", "plain", "hflm", "restart", "unsloth", "table")
"""The sections of `make bench-gpu`, the last of which prints the table: five minutes on an H200, by their budgets."""
UNSLOTHS_FASTEST = ("packed", "padding-free, one pass, activations kept")
"""Unsloth's fastest variants, by tests/bench/results/2026-11-24-h100-unsloth.jsonl."""


def main() -> int:
    """Runs the named sections, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--buyers", action="store_true", help=f"the sections {' '.join(BUYERS)}")
    parser.add_argument("--add", action="store_true", help="to the findings in --out")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=540, help="no section begins later than this")
    parser.add_argument("--arc", type=Path, help="ARC-Easy's test questions, JSON lines; with --alpaca")
    parser.add_argument("--alpaca", type=Path, help="Alpaca's rows, JSON lines")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", tempfile.gettempdir())))
    args = parser.parse_args()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    findings_file = args.out / "gpu.json"
    findings = json.loads(findings_file.read_text()) if args.add and findings_file.exists() else []
    if (args.arc is None) != (args.alpaca is None):
        parser.error("--arc and --alpaca are given together")
    texts = None if args.arc is None else (args.arc, args.alpaca)
    bench = Bench(args.tiny, args.out, args.steps, findings, quick=args.buyers, texts=texts)
    for name in args.sections or (BUYERS if args.buyers else SECTIONS):
        if time.monotonic() - began > args.seconds and name != "table":
            bench.say("skipped", section=name)
            continue
        start = time.monotonic()
        with bench.caught(name):
            SECTIONS[name](bench)
        bench.say("section", name=name, seconds=time.monotonic() - start)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
