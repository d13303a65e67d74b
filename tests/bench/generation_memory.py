"""Memory of generated answers on a GPU, and what happens when it runs out: `python tests/bench/generation_memory.py`.

A random model of Mistral-7B's shape in NF4, with an adapter; prints JSON lines, each with the seconds since the start.
Budget: 60 s on an H200.

    one answer     the peak memory of one long answer, and what `plan` counts for it; no dequantized weights
    batches        the sizes of the batches on smaller GPUs (by a limit on torch's allocator), and whether they fit
    given up       another tensor leaves too little memory for the dequantized weights: the answers stay the same
    words          the same without dequantized weights: the job's error

--tiny tries the script itself on a CPU, with a simulated out-of-memory error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import shapes
import torch

from job.errors import TrainingFailed
from job.evaluation import decoding
from job.evaluation.generation import GenerationOptions, answer_batch, generate
from job.evaluation.generation_batches import (
    BATCH_TOKENS,
    _cache_tokens,
    _fitting_tokens,
    _weight_bytes,
    plan_batches,
    token_bytes,
)
from job.model.device import make_deterministic
from job.model.fused.frozen_weights import forget_dequantized, fuse_layers, without_dequantized
from job.model.lora import add_adapter
from job.model.packed_attention import NAME
from job.training.gpu_capability import fast_kernels
from job.training.gpu_memory import limit_memory
from job.training.memory_model import generation_bytes
from job.training.prepare import setup_of

GIB = 2**30
CARDS = (10, 8, 6)
"""Memory of smaller GPUs, in GB."""
BEGAN = time.perf_counter()


def say(what: str, **figures: Any) -> None:
    """One finding."""
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"what": what, "at": round(time.perf_counter() - BEGAN, 1), **rounded}), flush=True)


def prompts_of(count: int, tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Random prompts, whose lengths vary by a fifth."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4 * tokens // 5, tokens + 1, (count,), generator=draw).tolist()
    return [tuple(torch.randint(3, vocabulary, (length,), generator=draw).tolist()) for length in lengths]


@contextmanager
def full(*, on_gpu: bool, leaving: int) -> Iterator[None]:
    """Leaves only so many bytes of the GPU free within the context; on a CPU the third forward pass fails instead."""
    if on_gpu:
        torch.cuda.empty_cache()
        ballast = torch.empty(max(0, torch.cuda.mem_get_info()[0] - leaving), dtype=torch.uint8, device="cuda")
        try:
            yield
        finally:
            del ballast
        return
    whole, passes = decoding._pass, []

    def failing(*arguments: Any) -> torch.Tensor:
        passes.append(1)
        if len(passes) == 3:
            raise torch.OutOfMemoryError("a rehearsal: out of memory")
        return whole(*arguments)

    decoding._pass = failing
    try:
        yield
    finally:
        decoding._pass = whole


def one_answer(model: Any, tokenizer: Any, *, prompt: int, new: int, on_gpu: bool) -> None:
    """Compares with the forecast: weights, adapter, the forward pass over the prompt, the cache."""
    asked = prompts_of(1, prompt, model.config.vocab_size)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    (answer,) = answer_batch(model, tokenizer, [(0, asked[0])], GenerationOptions(new))
    setup = setup_of(model, "nf4", "adamw_8bit")
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    counted = generation_bytes(setup, len(asked[0]), len(asked[0]) + answer.tokens) if setup is not None else 0
    # The forecast also counts gradients and moments, which do not exist yet, and the output layer's copy for scoring.
    beside = 4 * setup.adapter + 2 * setup.adapter + 2 * setup.architecture.head_parameters if setup is not None else 0
    say(
        "one answer",
        prompt=len(asked[0]),
        new=answer.tokens,
        peak_gib=None if peak is None else peak / GIB,
        counted_gib=counted / GIB,
        counted_that_is_not_there_gib=beside / GIB,
    )


def batches(
    model: Any, tokenizer: Any, asked: list[tuple[int, ...]], new: int, gigabytes: float, *, on_gpu: bool
) -> None:
    """On a GPU of so much memory."""
    if on_gpu:
        torch.cuda.empty_cache()
        limit_memory(gigabytes)
        torch.cuda.reset_peak_memory_stats()
    cache, fitting = _cache_tokens(model, BATCH_TOKENS), _fitting_tokens(model, BATCH_TOKENS)
    lengths = [len(one) for one in asked]
    planned = plan_batches(lengths, new, BATCH_TOKENS, cache_tokens=cache, fitting_tokens=fitting)
    unlimited = plan_batches(lengths, new, BATCH_TOKENS, cache_tokens=cache)
    began = time.perf_counter()
    try:
        answers, why = generate(model, tokenizer, asked, max_new_tokens=new), None
    except TrainingFailed as error:
        answers, why = [], str(error)
    say(
        "batches",
        card_gb=gigabytes,
        fitting_tokens=fitting,
        rows=sorted({len(batch) for batch in planned}),
        rows_without_the_limit=sorted({len(batch) for batch in unlimited}),
        answered=len(answers),
        seconds=time.perf_counter() - began,
        peak_gib=torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        error=why,
    )
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    on_gpu = torch.cuda.is_available() and not tiny
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if on_gpu:
        make_deterministic()
    shape = shapes.TINY if tiny else shapes.MISTRAL_7B
    base = shapes.random_base(shape, device, NAME)
    model = add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0).eval()
    kernels, name = fast_kernels(device, "bfloat16")
    fuse_layers(model, keep_dequantized=True, kernels=kernels)
    say("model", kernels=name, held_gib=_weight_bytes(model) / GIB)
    tokenizer = shapes.tokenizer()
    with without_dequantized(model):
        for prompt, more in ((30, 5),) if tiny else ((8_000, 16), (500, 48)):
            one_answer(model, tokenizer, prompt=prompt, new=more, on_gpu=on_gpu)
    asked = prompts_of(8 if tiny else 64, 20 if tiny else 500, shape["vocab_size"])
    new = 8
    how = GenerationOptions(new, pass_tokens=60 if tiny else BATCH_TOKENS)
    together = list(enumerate(asked))
    expected = answer_batch(model, tokenizer, together, how)
    cache = len(asked) * (max(map(len, asked)) + new) * token_bytes(model)
    with full(on_gpu=on_gpu, leaving=cache // 2):
        began = time.perf_counter()
        again = answer_batch(model, tokenizer, together, how)
        say("given up", same=again == expected, cache_gib=cache / GIB, seconds=time.perf_counter() - began)
    say("given up, afterwards", same=answer_batch(model, tokenizer, together, how) == expected)
    forget_dequantized(model)
    say("forgotten", same=answer_batch(model, tokenizer, together, how) == expected)
    with full(on_gpu=on_gpu, leaving=cache // 2):
        try:
            answer_batch(model, tokenizer, together, how)
            say("words", error=None)
        except TrainingFailed as error:
            say("words", error=str(error), exit_code=error.exit_code)
    for gigabytes in CARDS:
        batches(model, tokenizer, asked[: len(asked) // 2], new, gigabytes, on_gpu=on_gpu)


if __name__ == "__main__":
    main()
