"""A mixture's experts, computed in several ways: `python tests/bench/mixtures.py [--tiny]`.

A few layers of Qwen3-30B-A3B's and of Mixtral-8x7B's width with random weights, attention in NF4 with an adapter, one
packed sequence of Alpaca's lengths forward and backward through the decoder. A line of JSON for each way: tokens a
second, GiB of the weights and at the peak, whether gradients are equal when it is repeated, and how far they are from
those of transformers' plain loop. At the end, whether experts can be recorded as a CUDA graph. --tiny rehearses it on a
CPU. About 60 s on an H200.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import shapes  # lies beside this script
import torch

from job.model import experts
from job.model.adapter_options import AdapterOptions
from job.model.base import make_deterministic, recompute_activations
from job.model.fused.experts import fused_experts, use_frozen
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import NAME, Segment, build_layout

BEGAN = time.monotonic()
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS = 16384
LIMIT = 55.0
"""Seconds after which no further way is begun."""
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
    """Those that a run has here."""
    if not ON_GPU:
        return TORCH
    from job.model.fused.kernels import triton

    return triton()


def wait() -> None:
    """Until the GPU is done."""
    if ON_GPU:
        torch.cuda.synchronize()


def held() -> float:
    """GiB that are allocated."""
    return torch.cuda.memory_allocated() / 2**30 if ON_GPU else 0.0


class Sequence:
    """One packed sequence, and the gradient of what the decoder gives for it."""

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


def base_of(family: str, *, tiny: bool) -> Any:
    """Random layers of the family: attention in NF4, experts in 16 bits."""
    from transformers import AutoConfig

    shape = {**SHAPES[family], **(TINY if tiny else {}), "vocab_size": 512, "max_position_embeddings": 4096}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **shape, **tokens, use_cache=False, attn_implementation=NAME)
    return shapes.quantized(config, DEVICE, DTYPE)


def adapted(base: Any, *, of_experts: bool) -> Any:
    """With a filled adapter."""
    how: dict[str, Any] = {"rank": 16, "alpha": 16, "dropout": 0.0, "target_modules": "attention", "seed": 1}
    model = add_adapter(base, **how, options=AdapterOptions(experts=of_experts))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=draw))
    recompute_activations(model, on=False)
    return model.train()


def quantize(base: Any) -> None:
    """The experts, as loading does."""
    with experts.quantizing(experts.kinds_of(base), double=True):
        for _, module, name in list(experts.expert_tensors(base)):
            setattr(module, name, module.get_parameter(name))
    experts.finish(base)


def gradients(model: Any, sequence: Sequence, *, autocast: bool) -> list[torch.Tensor]:
    """Of the adapter, from one pass."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE.type, DTYPE, enabled=autocast and ON_GPU):
        decoder = model.get_base_model().model
        hidden = decoder(
            input_ids=sequence.ids, position_ids=sequence.positions, layout=sequence.layout, use_cache=False
        ).last_hidden_state
    hidden.backward(sequence.gradient.to(hidden.dtype))
    return [parameter.grad for parameter in trainable(model).values()]


def digest(tensors: list[torch.Tensor]) -> str:
    """Of their bits."""
    return hashlib.sha256(b"".join(t.float().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of the size of the expected gradient."""
    error = sum(float((one.float() - other.float()).square().sum()) for one, other in zip(found, expected, strict=True))
    return float((error / sum(float(other.float().square().sum()) for other in expected)) ** 0.5)


class Comparison:
    """The ways of one family."""

    def __init__(self, family: str, sequence: Sequence, rounds: int) -> None:
        self.family, self.sequence, self.rounds = family, sequence, rounds
        self.expected: list[torch.Tensor] | None = None

    def way(self, name: str, model: Any, *, autocast: bool = True, same_adapter: bool = True) -> None:
        """Measures a model as it is now; what fails is said."""
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
    """All ways of a family, each model changed from one to the next."""
    base = base_of(family, tiny=tiny)
    sequence = Sequence(400 if tiny else TOKENS, base.config.hidden_size)
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
    kind.expected = None  # quantized, they are others
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


def record(model: Any, family: str, sequence: Sequence) -> None:
    """Whether a layer's experts can be recorded forward and backward, and give the same bits then."""
    fused = next(fused_experts(model))
    hidden = sequence.gradient.shape[-1]
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(sequence.tokens, hidden, generator=draw).to(DEVICE, DTYPE).requires_grad_()
    count = model.config.num_experts_per_tok
    chosen = torch.rand(sequence.tokens, fused.count, generator=draw).topk(count).indices.to(DEVICE)
    p = torch.rand(sequence.tokens, count, generator=draw).to(DEVICE, DTYPE)
    gradient = torch.randn(sequence.tokens, hidden, generator=draw).to(DEVICE, DTYPE)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y = fused(x, chosen, p)
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
            found = run()
        graph.replay()
        wait()
        same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        say("recorded as a CUDA graph", family=family, possible=True, same_bits=same)
    except Exception as error:  # noqa: BLE001 - that is the answer
        say("recorded as a CUDA graph", family=family, possible=False, error=f"{type(error).__name__}: {error}"[:300])


def main() -> None:
    """Compares the families."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    if ON_GPU:
        make_deterministic()
        say("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    for family in SHAPES:
        try:
            compare(family, tiny=tiny)
        except Exception as error:  # noqa: BLE001 - the other family is measured all the same
            traceback.print_exc()
            say("failed", family=family, error=f"{type(error).__name__}: {error}"[:300])
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
