"""Each family on fused layers and on PEFT's layers: `python tests/bench/fused_families.py [--tiny] [FAMILY ...]`.

Four layers of a published model's width with random NF4 weights, Alpaca's lengths, one optimizer step's gradient of 64
examples. A line of JSON for each family: target tokens a second of both, the differences of loss and gradient, whether
the step was recorded as a CUDA graph, and whether bits are equal when it is repeated, and launched kernel by kernel.
Then Mistral in fp16 with loss scaling, and with dropout. --tiny tries the script itself on a CPU.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import shapes  # lies beside this script
import torch

from job.data.batch_plan import Steps, targets_of
from job.distributed.processes import ALONE
from job.model.device import make_deterministic
from job.model.families import FAMILIES
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import NAME
from job.records import PEFT, ExecutionPlan
from job.training.config import Hooks, Recipe
from job.training.flat_parameters import FlatParameters
from job.training.lm_head_loss import add_head
from job.training.prepare import prepare
from job.training.step import StepGradient

BEGAN = time.monotonic()
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LAYERS = 4
HALF_WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def sizes(*numbers: int) -> dict[str, int]:
    """By the names of config.json."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return dict(zip(names, numbers, strict=True))


SHAPES: dict[str, dict[str, Any]] = {
    "mistral": sizes(4096, 14336, 32, 8, 128, 32000) | {"sliding_window": 4096},  # Mistral-7B-v0.1
    "gemma": sizes(3072, 24576, 16, 16, 256, 256000),  # gemma-7b
    "gemma2": sizes(3584, 14336, 16, 8, 256, 256000) | {"query_pre_attn_scalar": 256},  # gemma-2-9b
    "gemma3_text": sizes(3840, 15360, 16, 8, 256, 262208)  # gemma-3-12b's text part
    | {"sliding_window": 1024, "query_pre_attn_scalar": 256, "layer_types": HALF_WINDOWS},
    "granite": sizes(4096, 12800, 32, 8, 128, 49155)  # granite-3.1-8b
    | {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0}
    | {"residual_multiplier": 0.22},
    "llama": sizes(4096, 14336, 32, 8, 128, 128256),  # Llama-3.1-8B
    "olmo2": sizes(4096, 11008, 32, 32, 128, 100352),  # OLMo-2-1124-7B
    "phi3": sizes(5120, 17920, 40, 10, 128, 100352),  # phi-4
    "qwen2": sizes(3584, 18944, 28, 4, 128, 152064),  # Qwen2.5-7B
    "qwen3": sizes(4096, 12288, 32, 8, 128, 151936),  # Qwen3-8B
    "smollm3": sizes(2048, 11008, 16, 4, 128, 128256) | {"no_rope_layers": [1, 1, 1, 0]},  # SmolLM3-3B
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096,
    "factor": 32.0,
}
"""Phi-4-mini's rotary embedding: of three quarters of a head, with frequencies that depend on the length."""
TINY = sizes(64, 128, 4, 2, 16, 400)


def say(what: str, **figures: Any) -> None:
    """A line of JSON."""
    entry = {"what": what, **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}}
    print(json.dumps(entry | {"at": round(time.monotonic() - BEGAN, 1)}), flush=True)


def adapted(family: str, *, tiny: bool, dtype: torch.dtype, dropout: float, changes: dict[str, Any]) -> Any:
    """A random decoder of the family in NF4, with a filled adapter."""
    from transformers import AutoConfig

    shape = {**SHAPES[family], **(TINY if tiny else {}), "num_hidden_layers": LAYERS, **changes}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **shape, **tokens, use_cache=False, attn_implementation=NAME)
    base = shapes.quantized(config, DEVICE, dtype)
    model = add_adapter(base, rank=16, alpha=16, dropout=dropout, target_modules=None, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=draw))
    return model.train()


def step_of(model: Any, plan: ExecutionPlan, data: Any, *, batch: int, scaler: Any = None) -> Any:
    """(the step, the flat adapter). PEFT's layers compute under autocast and with TRL's loss, as in the trainer."""
    base = model.get_base_model()
    if not plan.fused:
        add_head(base)
        recompute_activations(model, on=False)

    def gradient(inputs: dict[str, Any], targets: float) -> torch.Tensor:
        with torch.autocast(DEVICE.type, base.dtype, enabled=base.dtype is not torch.float32):
            loss = -model(**inputs, fused_lm_head=True, use_cache=False).log_probs.sum() / targets
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    parameters = FlatParameters(trainable(model).values(), 256)
    recipe = Recipe(
        seed=1,
        total_steps=2,
        learning_rate=1e-4,
        scheduler="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=batch,
        micro_batch_tokens=16384,
        optimizer="adamw_torch",
        save_every_steps=1000,
    )
    step = StepGradient(
        model,
        Steps(data, 1, batch, 2),
        parameters,
        recipe=recipe,
        plan=plan,
        hooks=Hooks(lambda _: None, lambda *_: None, lambda: False),
        processes=ALONE,
        packed_gradient=gradient,
        scaler=scaler,
    )
    return step, parameters


def computed(step: Any, parameters: FlatParameters, scaler: Any = None) -> tuple[float, torch.Tensor]:
    """(loss, gradient) of the first step, the gradient without the scaler's factor."""
    loss = float(step(0))
    if scaler is None:
        return loss, parameters.gradient.clone()
    return loss, parameters.gradient / scaler.get_scale()


def timed(step: Any, times: int) -> float:
    """Seconds of a step: the minimum of several."""
    seconds = []
    for _ in range(times):
        if ON_GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(0)
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def digest(gradient: torch.Tensor) -> str:
    """A hash of all bits."""
    return hashlib.sha256(gradient.cpu().numpy().tobytes()).hexdigest()[:16]


def clean() -> None:
    """Frees memory."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def fused_plan(model: Any, lengths: list[int], batch: int) -> ExecutionPlan:
    """The plan that the job chooses; with --tiny on a CPU, the fused layers instead of PEFT's."""
    if ON_GPU:
        return prepare(
            model,
            lengths,
            global_batch_size=batch,
            quantization="nf4",
            optimizer="adamw_torch",
            budget=16384,
            keep_base="auto",
            recompute="auto",
            gigabytes=None,
        )
    parts = fuse_layers(model, keep_dequantized=True, kernels=TORCH)
    return ExecutionPlan(
        kept_base=True, kept_activations=True, recorded=False, reason="a rehearsal", forward=f"fused {parts}, torch"
    )


def measure(family: str, *, tiny: bool, dtype: torch.dtype, dropout: float = 0.0, long_rope: bool = False) -> None:
    """One line: PEFT's layers, then the fused ones over the same model."""
    batch, times = (8, 1) if tiny else (64, 3)
    vocabulary = (TINY if tiny else SHAPES[family])["vocab_size"]
    data = shapes.examples(vocabulary, 2 * batch)
    lengths = [len(example.input_ids) for example in data]
    scaled = dtype is torch.float16
    width = round(LONG_ROPE["partial_rotary_factor"] * (TINY if tiny else SHAPES[family])["head_dim"]) // 2
    factors = {"short_factor": [1.1] * width, "long_factor": [4.0] * width}
    changes = {"rope_parameters": LONG_ROPE | factors} if long_rope else {}
    model = adapted(family, tiny=tiny, dtype=dtype, dropout=dropout, changes=changes)
    plain = ExecutionPlan(kept_base=False, kept_activations=True, recorded=False, reason="", forward=PEFT)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0) if scaled else None
    step, parameters = step_of(model, plain, data, batch=batch, scaler=scaler)
    theirs = computed(step, parameters, scaler)
    peft_seconds = timed(step, 1 if tiny else 2)
    targets = targets_of(step._steps.of(0))
    del step, parameters
    del model.get_base_model().forward  # TRL's head
    clean()

    plan = fused_plan(model, lengths, batch)
    recompute_activations(model, on=not plan.kept_activations, random=not plan.padded)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0) if scaled else None
    step, parameters = step_of(model, plan, data, batch=batch, scaler=scaler)
    ours = computed(step, parameters, scaler)
    again = computed(step, parameters, scaler)
    seconds = timed(step, times)
    figures: dict[str, Any] = {
        "repeated_bits_equal": digest(ours[1]) == digest(again[1]) and ours[0] == again[0],
        "recorded": step.plan.recorded,
    }
    if dropout:
        step._seed += 1  # the same examples, and the same CUDA graph if there is one
        other = computed(step, parameters, scaler)
        step._seed -= 1
        figures["masks_change_with_the_seed"] = other[0] != ours[0]
        recompute_activations(model, on=True, random=False)
        step.micro_batch.release()
        figures["recomputed_bits_equal"] = digest(computed(step, parameters, scaler)[1]) == digest(ours[1])
        recompute_activations(model, on=False)
    if step.plan.recorded:
        step.micro_batch.plan = step.plan.give_up("recorded")
        step.micro_batch.release()
        one_by_one = computed(step, parameters, scaler)
        figures["unrecorded_bits_equal"] = digest(one_by_one[1]) == digest(ours[1])
        figures["unrecorded_tokens_per_second"] = targets / timed(step, 1)
    apart = float((ours[1] - theirs[1]).norm() / theirs[1].norm())
    say(
        family,
        dtype=str(dtype).removeprefix("torch."),
        dropout=dropout,
        long_rope=long_rope,
        fused_tokens_per_second=targets / seconds,
        peft_tokens_per_second=targets / peft_seconds,
        ratio=peft_seconds / seconds,
        loss=ours[0],
        loss_apart=abs(ours[0] - theirs[0]),  # with dropout the masks differ
        gradient_apart=apart,
        finite=bool(ours[1].isfinite().all()),
        **figures,
        forward=plan.forward,
        reason=plan.reason,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0,
    )


def main() -> None:
    """Measures all families, or the named ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", default=list(SHAPES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=80.0, help="none is begun so long after the imports")
    args = parser.parse_args()
    make_deterministic()
    if missing := sorted(FAMILIES.keys() - SHAPES.keys()):
        say("no shapes", families=missing)
    half = torch.float32 if args.tiny else torch.bfloat16
    runs: list[tuple[str, dict[str, Any]]] = [(family, {"dtype": half}) for family in args.families]
    if "mistral" in args.families:
        fp16 = [("mistral", {"dtype": torch.float16}), ("mistral", {"dtype": half, "dropout": 0.05})]
        runs[1:1] = fp16
    if "phi3" in args.families:
        runs.append(("phi3", {"dtype": half, "long_rope": True}))
    for family, how in runs:
        if time.monotonic() - BEGAN > args.seconds:
            say("skipped", family=family)
            continue
        try:
            measure(family, tiny=args.tiny, **how)
        except Exception as error:  # noqa: BLE001 - the next one shall have its turn
            say("failed", family=family, error=f"{type(error).__name__}: {str(error)[:400]}")
            traceback.print_exc(limit=-8)
        clean()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
    say("done", seconds=time.monotonic() - BEGAN)


if __name__ == "__main__":
    main()
