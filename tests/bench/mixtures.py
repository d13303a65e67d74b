"""A mixture's experts, computed in several ways: `python tests/bench/mixtures.py [--train] [--tiny]`.

A few layers of Qwen3-30B-A3B's and of Mixtral-8x7B's width with random weights, attention in NF4 with an adapter, one
packed sequence of Alpaca's lengths forward and backward through the decoder. A line of JSON for each variant: tokens a
second, GiB of the weights and at the peak, whether gradients are equal when repeated, and how far they are from those
of transformers' plain loop, also with its routing. At the end, whether experts can be recorded as a CUDA graph. About
60 s on an H200.

With --train whole runs of `train` instead, as the job plans them: twice, resumed, and without CUDA graphs; whether
their bits are equal, and target tokens a second. At the end, how far the fused layers' gradients are from PEFT's, with
and without PEFT's routing. About 30 s. --tiny tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import shapes  # lies beside this script
import torch

from job.model import experts
from job.model.adapter_options import AdapterOptions
from job.model.device import make_deterministic
from job.model.fused.experts import fused_experts, use_frozen
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import NAME
from job.model.packed_layout import Segment, build_layout
from job.records import ExecutionPlan
from job.training.config import Hooks, Recipe
from job.training.prepare import prepare
from job.training.trainer import train

BEGAN = time.monotonic()
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS = 16384
LIMIT = 55.0
"""Seconds after which no further variant is started; with --train half as many."""
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {  # Qwen3-30B-A3B
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
    },
    "mixtral": {  # Mixtral-8x7B
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
}
TINY = {
    "num_experts": 16,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
}


def say(what: str, **figures: Any) -> None:
    """A line of JSON."""
    entry = {"what": what, **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}}
    print(json.dumps(entry | {"at": round(time.monotonic() - BEGAN, 1)}), flush=True)


def kernels() -> Any:
    """The kernels that a run uses here."""
    if not ON_GPU:
        return TORCH
    from job.model.fused.kernels import triton

    return triton()


def wait() -> None:
    """Waits for the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()


def held() -> float:
    """Allocated GiB."""
    return torch.cuda.memory_allocated() / 2**30 if ON_GPU else 0.0


class Packed:
    """One packed sequence, and the gradient of the decoder's output."""

    def __init__(self, tokens: int, hidden: int) -> None:
        segments, at = [], 0
        for length in shapes.LENGTHS["alpaca"]:
            if at + length > tokens:
                break
            segments.append(Segment(at, at + length))
            at += length
        draw = torch.Generator().manual_seed(3)
        self.tokens = at
        self.ids = torch.randint(0, 500, (1, at), generator=draw).to(DEVICE)
        self.positions = torch.cat([torch.arange(s.end - s.start) for s in segments])[None].to(DEVICE)
        self.layout = build_layout(segments, DEVICE)
        self.gradient = (torch.randn(1, at, hidden, generator=draw) / at).to(DEVICE, DTYPE)


def base_of(family: str, *, tiny: bool, vocabulary: int = 512) -> Any:
    """Random layers of the family: attention in NF4, experts in 16 bits."""
    from transformers import AutoConfig

    shape = {**SHAPES[family], **(TINY if tiny else {}), "vocab_size": vocabulary, "max_position_embeddings": 4096}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **shape, **tokens, use_cache=False, attn_implementation=NAME)
    return shapes.quantized(config, DEVICE, DTYPE)


def adapted(base: Any, *, of_experts: bool) -> Any:
    """The model with a filled adapter."""
    how: dict[str, Any] = {"rank": 16, "alpha": 16, "dropout": 0.0, "target_modules": "attention", "seed": 1}
    model = add_adapter(base, **how, options=AdapterOptions(experts=of_experts))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=draw))
    recompute_activations(model, on=False)
    return model.train()


def quantize(base: Any) -> None:
    """Quantizes the experts as loading does."""
    with experts.quantizing(experts.kinds_of(base), double=True):
        for _, module, name in list(experts.expert_tensors(base)):
            setattr(module, name, module.get_parameter(name))
    experts.finish(base)


def gradients(model: Any, sequence: Packed, *, autocast: bool) -> list[torch.Tensor]:
    """The adapter's gradients of one pass."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE.type, DTYPE, enabled=autocast and ON_GPU):
        decoder = model.get_base_model().model
        hidden = decoder(
            input_ids=sequence.ids, position_ids=sequence.positions, layout=sequence.layout, use_cache=False
        ).last_hidden_state
    hidden.backward(sequence.gradient.to(hidden.dtype))
    return [parameter.grad for parameter in trainable(model).values()]


def digest(tensors: list[torch.Tensor]) -> str:
    """A hash of their bits."""
    return hashlib.sha256(b"".join(t.float().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def apart(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The difference as a share of the expected gradient's norm."""
    error = sum(
        float((one.float() - other.float()).square().sum()) for one, other in zip(actual, expected, strict=True)
    )
    return float((error / sum(float(other.float().square().sum()) for other in expected)) ** 0.5)


class Comparison:
    """The variants of one family."""

    def __init__(self, family: str, sequence: Packed, rounds: int) -> None:
        self.family, self.sequence, self.rounds = family, sequence, rounds
        self.expected: list[torch.Tensor] | None = None

    def way(self, name: str, model: Any, *, autocast: bool = True, same_adapter: bool = True) -> None:
        """Measures a model in its current state; errors are recorded."""
        if time.monotonic() - BEGAN > LIMIT:
            say(name, family=self.family, left_out="time")
            return
        try:
            self._measure(name, model, autocast=autocast, same_adapter=same_adapter)
        except Exception as error:  # noqa: BLE001 - the other ways are measured all the same
            traceback.print_exc()
            say(name, family=self.family, error=f"{type(error).__name__}: {error}"[:300])
        model.zero_grad(set_to_none=True)
        gc.collect()

    def _measure(self, name: str, model: Any, *, autocast: bool, same_adapter: bool) -> None:
        def run() -> list[torch.Tensor]:
            return gradients(model, self.sequence, autocast=autocast)

        weights, first = held(), [one.clone() for one in run()]
        again = digest(run()) == digest(first)
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        wait()
        began = time.perf_counter()
        for _ in range(self.rounds):
            run()
        wait()
        took = (time.perf_counter() - began) / self.rounds
        figures: dict[str, Any] = {"tokens_per_second": self.sequence.tokens / took, "ms": 1000 * took}
        if ON_GPU:
            figures |= {"weights_gib": weights, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        if same_adapter:
            self.expected = self.expected or first
            figures["gradient_apart"] = apart(first, self.expected)
        say(name, family=self.family, repeats=again, **figures)


def compare(family: str, *, tiny: bool) -> None:
    """All variants of a family, each by changing the model of the one before."""
    base = base_of(family, tiny=tiny)
    sequence = Packed(400 if tiny else TOKENS, base.config.hidden_size)
    kind = Comparison(family, sequence, 1 if tiny else 4)
    say("shape", family=family, tokens=sequence.tokens, segments=len(sequence.layout.segments))
    model = adapted(base, of_experts=False)
    for name in ("eager", "grouped_mm"):
        base.set_experts_implementation(name)
        kind.way(f"experts in 16 bits, transformers' {name}, PEFT's layers", model)
    torch.use_deterministic_algorithms(mode=False)
    base.set_experts_implementation("eager")
    kind.way("the same loop, without torch.use_deterministic_algorithms", model)
    torch.use_deterministic_algorithms(mode=True)
    base.set_experts_implementation("grouped_mm")
    kind.expected = None  # quantization changes them
    quantize(base)
    kind.way("NF4 by bitsandbytes' parametrization, transformers' grouped_mm, PEFT's layers", model)
    use_frozen(base, DTYPE)
    kind.way("NF4, dequantized for each use, PEFT's layers", model)
    fuse_layers(model, keep_dequantized=False, kernels=kernels())
    kind.way("NF4, dequantized for each use, fused layers", model, autocast=False)
    record(model, family, sequence)
    fuse_layers(model, keep_dequantized=True, kernels=kernels())
    kind.way("NF4, dequantized and kept, fused layers", model, autocast=False)
    del model, base
    gc.collect()
    base = base_of(family, tiny=tiny)
    quantize(base)
    model = adapted(base, of_experts=True)
    fuse_layers(model, keep_dequantized=False, kernels=kernels())
    kind.way("NF4, fused layers, adapters of experts too", model, autocast=False, same_adapter=False)
    fuse_layers(model, keep_dequantized=True, kernels=kernels())
    kind.way("NF4, kept, fused layers, adapters of experts too", model, autocast=False, same_adapter=False)


def record(model: Any, family: str, sequence: Packed) -> None:
    """Whether a layer's experts can be recorded forward and backward, with the same bits."""
    fused = next(fused_experts(model))
    hidden = sequence.gradient.shape[-1]
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(sequence.tokens, hidden, generator=draw).to(DEVICE, DTYPE).requires_grad_()
    count = model.config.num_experts_per_tok
    experts = torch.rand(sequence.tokens, fused.count, generator=draw).topk(count).indices.to(DEVICE)
    p = torch.rand(sequence.tokens, count, generator=draw).to(DEVICE, DTYPE)
    gradient = torch.randn(sequence.tokens, hidden, generator=draw).to(DEVICE, DTYPE)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y = fused(x, experts, p)
        return y.detach(), torch.autograd.grad(y, x, gradient)[0]

    try:
        expected = [one.clone() for one in run()]
        if not ON_GPU:
            say("recorded as a CUDA graph", family=family, possible=None)
            return
        stream: Callable[..., Any] = torch.cuda.Stream
        with torch.cuda.stream(side := stream()):
            run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        graph.replay()
        wait()
        same = all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
        say("recorded as a CUDA graph", family=family, possible=True, same_bits=same)
    except Exception as error:  # noqa: BLE001 - that is the answer
        say("recorded as a CUDA graph", family=family, possible=False, error=f"{type(error).__name__}: {error}"[:300])


STEPS, SAVED = 8, 4
BATCH = 64


def plan_of(model: Any, lengths: list[int], batch: int) -> ExecutionPlan:
    """The plan that the job chooses; with --tiny on a CPU, the fused layers instead of PEFT's."""
    if ON_GPU:
        how: dict[str, Any] = {"quantization": "nf4", "optimizer": "adamw_8bit", "budget": TOKENS, "gigabytes": None}
        return prepare(model, lengths, global_batch_size=batch, keep_base="auto", recompute="auto", **how)
    forward = f"fused {fuse_layers(model, keep_dequantized=True, kernels=TORCH)}, torch"
    return ExecutionPlan(kept_base=True, kept_activations=True, recorded=False, reason="a rehearsal", forward=forward)


def trained(family: str, *, tiny: bool, of_experts: bool) -> None:
    """Whole runs with one model, each with a new adapter."""
    vocabulary, batch = (512, 2) if tiny else (32000, BATCH)
    base = base_of(family, tiny=tiny, vocabulary=vocabulary)
    quantize(base)
    model = adapted(base, of_experts=of_experts)
    data = shapes.examples(vocabulary, STEPS * batch)
    plan = plan_of(model, [len(one.input_ids) for one in data], batch)
    say("plan", family=family, of_experts=of_experts, forward=plan.forward, recorded=plan.recorded, reason=plan.reason)
    first = [parameter.detach().clone() for parameter in trainable(model).values()]
    recipe = Recipe(
        seed=3,
        total_steps=STEPS,
        learning_rate=1e-3,
        scheduler="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=batch,
        micro_batch_tokens=TOKENS,
        optimizer="adamw_8bit",
        save_every_steps=SAVED,
    )
    results: dict[str, tuple[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("whole", "again", "resumed", "without CUDA graphs"):
            if way.startswith("without") and not plan.recorded and ON_GPU:
                break
            with torch.no_grad():
                for parameter, value in zip(trainable(model).values(), first, strict=True):
                    parameter.copy_(torch.zeros_like(value) if way == "resumed" else value)
            at: list[float] = []

            def note(_: Any, at: list[float] = at) -> None:
                wait()
                at.append(time.perf_counter())

            resume = Path(folder) / "whole" / f"step-{SAVED:08d}" if way == "resumed" else None
            work = Path(folder) / way
            result = train(
                model,
                shapes.tokenizer(),
                data,
                recipe=recipe,
                plan=plan.give_up("recorded") if way.startswith("without") and plan.recorded else plan,
                hooks=Hooks(note, lambda *_: None, lambda: False),
                folder=work,
                resume=resume,
            )
            losses = [step.loss for step in result.history]
            bits = digest([parameter.detach() for parameter in trainable(model).values()]) + digest(
                [torch.tensor(losses, dtype=torch.float64)]
            )
            seconds = sum(after - before for before, after in pairwise(at[-4:]))
            tokens = sum(step.target_tokens for step in result.history[-3:])
            results[way] = bits, losses
            say(
                way,
                family=family,
                of_experts=of_experts,
                same_bits=bits == results["whole"][0],
                tokens_per_second=tokens / seconds,
                loss=losses[-1],
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0,
            )


@contextmanager
def routing(model: Any, forced: Sequence[torch.Tensor] | None = None) -> Iterator[list[torch.Tensor]]:
    """Collects the experts that each router chooses, or makes it choose the given ones."""
    routed: list[torch.Tensor] = []

    def chosen(_module: Any, _inputs: Any, output: Any) -> Any:
        logits, weights, ids = output
        routed.append(ids)
        if forced is None:
            return output
        ids = forced[len(routed) - 1]
        p = logits.float().softmax(-1).gather(-1, ids)
        return logits, (p / p.sum(-1, keepdim=True)).to(weights.dtype), ids

    handles = [m.register_forward_hook(chosen) for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    try:
        yield routed
    finally:
        for handle in handles:
            handle.remove()


def compare_routing(family: str, *, tiny: bool) -> None:
    """How far the fused layers' gradients are from PEFT's, with the routers' own choices and with those under PEFT."""
    base = base_of(family, tiny=tiny)
    sequence = Packed(400 if tiny else TOKENS, base.config.hidden_size)
    base.set_experts_implementation("eager")
    model = adapted(base, of_experts=False)
    quantize(base)
    with routing(model) as theirs:
        expected = [one.clone() for one in gradients(model, sequence, autocast=True)]
    use_frozen(base, DTYPE)
    fuse_layers(model, keep_dequantized=False, kernels=kernels())
    with routing(model) as ours:
        own = apart(gradients(model, sequence, autocast=False), expected)
    with routing(model, theirs):
        same = apart(gradients(model, sequence, autocast=False), expected)
    others = [
        float((one.sort().values != other.sort().values).any(-1).float().mean())
        for one, other in zip(ours, theirs, strict=True)
    ]
    say(
        "fused layers against PEFT's with transformers' loop",
        family=family,
        gradient_apart=own,
        with_the_same_routing=same,
        tokens_routed_otherwise=[float(f"{share:.3g}") for share in others],
    )


def main() -> None:
    """Compares the families."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    tiny = args.tiny
    if ON_GPU:
        make_deterministic()
        say("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    whole: list[tuple[Callable[..., None], dict[str, Any]]] = [
        (trained, {"of_experts": False}),
        (compare_routing, {}),
        (trained, {"of_experts": True}),
    ]
    ways = whole if args.train else [(compare, dict[str, Any]())]
    for (way, how), family in ((one, family) for one in ways for family in SHAPES):
        if not tiny and time.monotonic() - BEGAN > LIMIT / (1 + args.train):
            say("left out", family=family, way=way.__name__, **how)
            continue
        try:
            way(family, tiny=tiny, **how)
        except Exception as error:  # noqa: BLE001 - the others are measured all the same
            traceback.print_exc()
            say("failed", family=family, error=f"{type(error).__name__}: {error}"[:300])
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
