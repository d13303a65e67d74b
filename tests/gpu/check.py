"""Checks that need a GPU, as a script: `python tests/gpu/check.py` prints one JSON line per finding.

The variable-length kernel and those of long rows compared with a simple reference; killed and resumed runs compared
with uninterrupted ones, with long rows too; FP8 with any number of tokens, with dropout in CUDA graphs, and with a base
that is not on the GPU;
speed and memory of training and scoring on a random model of Mistral-7B's shape. Token lengths may be given as a JSON
list in the file that GPU_LENGTHS names. `python tests/gpu/check.py --tiny fp8` tries the part itself on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # before this folder, in which job.py lies

from job.data.batch_plan import Steps
from job.distributed.processes import ALONE
from job.evaluation.scoring import plan_sequences, score_sequence, tokens_of
from job.model import placed_weights
from job.model.device import make_deterministic
from job.model.fused import fp8, kernels
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.long_attention import FLASH, KERNELS, TRITON
from job.model.load_base import load_base
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import _block_by_block, _varlen_kernel
from job.model.packed_layout import Segment, build_layout
from job.planning.known_models_and_data import ARCHITECTURES
from job.planning.workload import count
from job.records import PEFT, Example, ExecutionPlan, Question
from job.tracking.energy import open_meter, visible_gpus
from job.training.config import Hooks, Recipe
from job.training.memory_model import Setup, training_memory
from job.training.prepare import prepare
from job.training.trainer import train

TINY = "--tiny" in sys.argv
DEVICE = torch.device("cpu" if TINY else "cuda")
LONG = (20_001, 17_000)
"""Tokens of long rows."""
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def say(what: str, **figures: Any) -> None:
    """One finding."""
    print(json.dumps({"what": what, **figures}), flush=True)


def kernel() -> None:
    """The kernel agrees with the reference, forward and backward, with shared prefixes and grouped heads."""
    layouts = {
        "segments": [Segment(0, 100), Segment(100, 357), Segment(357, 400)],
        "prefixes": [Segment(0, 100), Segment(100, 110, 0, 100), Segment(110, 111, 0, 100), Segment(111, 400)],
    }
    for name, segments in layouts.items():
        torch.manual_seed(0)
        layout = build_layout(segments, DEVICE)
        shapes = [(1, 8, 400, 64), (1, 2, 400, 64), (1, 2, 400, 64)]
        exact = [torch.randn(shape, device=DEVICE, dtype=torch.float32, requires_grad=True) for shape in shapes]
        half = [x.detach().bfloat16().requires_grad_() for x in exact]
        weight = torch.randn(1, 400, 8, 64, device=DEVICE)
        reference = _block_by_block(*exact, layout, None, None)
        found = _varlen_kernel(*half, layout, None, None)
        (reference * weight).sum().backward()
        (found.float() * weight).sum().backward()
        worst = max((a.grad - b.grad.float()).abs().max().item() for a, b in zip(exact, half, strict=True))
        say("kernel", layout=name, output=(reference - found.float()).abs().max().item(), gradient=worst)
        again = [x.detach().clone().requires_grad_() for x in half]
        (_varlen_kernel(*again, layout, None, None).float() * weight).sum().backward()
        same = all(torch.equal(a.grad, b.grad) for a, b in zip(half, again, strict=True))
        say("kernel gradient twice", layout=name, identical=same)


def long_kernel() -> None:
    """The kernels of long rows compared with fp32: relative errors of output and gradients; repeated."""
    for tokens, size, segments, window in (
        (4000, 128, [(0, 4000)], None),
        (4000, 64, [(0, 4000)], None),
        (4001, 128, [(0, 4001)], 1000),
        (4000, 128, [(0, 1), (1, 1500), (1500, 4000)], None),
    ):
        torch.manual_seed(0)
        layout = build_layout([Segment(*one) for one in segments], DEVICE)
        draw = [torch.randn(heads, tokens, size, device=DEVICE).bfloat16() for heads in (8, 2, 2, 8)]
        *tensors, gradient = (x.transpose(0, 1) for x in draw)
        exact = [x.float().transpose(0, 1)[None].requires_grad_() for x in tensors]
        reference = _block_by_block(*exact, layout, None, window)
        wanted = torch.autograd.grad(reference, exact, gradient.float()[None])
        wanted = [reference[0], *(x[0].transpose(0, 1) for x in wanted)]
        for name in (FLASH, TRITON):
            kernel = KERNELS[name](layout, None, window)
            both = []
            for _ in range(2):
                out, sums = kernel.forward(*tensors)
                both.append([out, *kernel.backward(gradient, *tensors, out, sums)])
            errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(both[0], wanted, strict=True)]
            same = all(map(torch.equal, *both))
            about = {"tokens": tokens, "head_size": size, "segments": len(segments), "window": window}
            say("kernel of long rows", kernel=name, **about, errors=errors, identical=same)


def examples(count: int, vocabulary: int) -> list[Example]:
    """Random tokens of real lengths."""
    path = os.environ.get("GPU_LENGTHS")
    lengths = json.loads(Path(path).read_text()) if path else [40 + (37 * i) % 200 for i in range(count)]
    made = []
    for i, length in enumerate(lengths[:count]):
        draw = torch.Generator().manual_seed(i)
        ids = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        made.append(Example(tuple(ids), (False, *[True] * (length - 1))))
    return made


def shape(folder: Path, **sizes: int) -> Path:
    """A random Mistral of the given sizes, saved in bf16, without a tokenizer."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"] // 4, sliding_window=4096)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()
    return folder


def load(folder: Path, dropout: float, place: str = "gpu") -> Any:
    """Loads the model as the job does."""
    base = load_base(
        folder,
        quantization="nf4",
        double_quantization=True,
        dtype=torch.bfloat16,
        device=DEVICE,
        max_length=2048,
        placement=place,
        group=ALONE,
    )
    return add_adapter(base, rank=16, alpha=16, dropout=dropout, target_modules=MODULES, seed=0)


def recipe(steps: int, budget: int) -> Recipe:
    """The reference recipe, shortened."""
    return Recipe(
        seed=0,
        total_steps=steps,
        learning_rate=2e-4,
        scheduler="linear",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=32,
        micro_batch_tokens=budget,
        optimizer="adamw_8bit",
        save_every_steps=4,
    )


def go(
    model: Any,
    data: list[Example],
    how: Recipe,
    folder: Path,
    *,
    recompute: bool,
    stop_after: int = 0,
    resume: Path | None = None,
    plan: ExecutionPlan | None = None,
) -> Any:
    """Trains, with PEFT's own layers unless a plan is given; returns the result of `train`, and the saved states."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Fast(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<s>",
    )
    saved: list[Path] = []
    seen: list[int] = []
    hooks = Hooks(
        lambda metrics: seen.append(metrics.step),
        lambda path, _step: saved.append(path),
        lambda: stop_after > 0 and len(seen) >= stop_after,
    )
    plan = plan or ExecutionPlan(
        kept_base=False, kept_activations=not recompute, recorded=False, reason="a check", forward=PEFT
    )
    trained = train(model, tokenizer, data, recipe=how, plan=plan, hooks=hooks, folder=folder, resume=resume)
    return trained, saved


def exactness(folder: Path) -> None:
    """A stopped and resumed run ends with the bits of an uninterrupted one."""
    small = shape(
        folder / "small",
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    data = examples(200, 1000)
    bits = []
    for name, stops in (("whole", [0]), ("again", [0]), ("resumed", [5, 0])):
        resume = None
        for stop in stops:
            model = load(small, dropout=0.1)
            _, saved = go(model, data, recipe(12, 1024), folder / name, recompute=True, stop_after=stop, resume=resume)
            resume = saved[-1]
        bits.append([p.detach().clone() for p in trainable(model).values()])
    for name, other in (("twice", bits[1]), ("resumed", bits[2])):
        say("exactness", run=name, identical=all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True)))


def long_rows(folder: Path) -> None:
    """The same with rows of more than 16,384 tokens, prepared as by the job; resumed with other placement."""
    small = shape(
        folder / "long",
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    data = examples(6, 1000)
    for i, length in enumerate(LONG):
        draw = torch.Generator().manual_seed(100 + i)
        ids = torch.randint(3, 1000, (length,), generator=draw).tolist()
        data.append(Example(tuple(ids), (False, *[True] * (length - 1))))
    how, bits, seen = replace(recipe(6, 1024), global_batch_size=4, save_every_steps=1), [], set()
    recorded = []
    for name, stops in (("whole", [0]), ("again", [0]), ("resumed", [3, 0])):
        resume = None
        for stop in stops:
            model = load(small, dropout=0.0)
            plan = prepare(
                model,
                [len(one.input_ids) for one in data],
                global_batch_size=how.global_batch_size,
                quantization="nf4",
                optimizer=how.optimizer,
                budget=how.micro_batch_tokens,
                keep_base="auto",
                recompute="auto",
                gigabytes=None,
                offload=resume is not None,
            )
            seen.add((plan.forward, plan.attention, plan.offloaded))
            trained, saved = go(
                model, data, how, folder / f"long-{name}", recompute=True, stop_after=stop, resume=resume, plan=plan
            )
            recorded.append((plan.recorded, trained.plan.recorded))
            resume = saved[-1]
        bits.append([p.detach().clone() for p in trainable(model).values()])
    say("long rows", plans=sorted(map(str, seen)))
    # Rows of every step are mixed, so graphs are recorded after a long row, too.
    say("long rows", recorded_before_and_after=recorded, right=all(begun and ended for begun, ended in recorded))
    for name, other in (("twice", bits[1]), ("resumed", bits[2])):
        say("long rows", run=name, identical=all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True)))


def fp8_tokens() -> None:
    """Products of any number of tokens equal those of a CPU, up to the order of the sums; repeated."""
    quantize = kernels.TORCH.quantize if TINY else kernels.triton().quantize
    torch.manual_seed(0)
    weight = torch.randn(256, 512, device=DEVICE, dtype=torch.bfloat16) / 512**0.5
    bias = torch.randn(256, device=DEVICE, dtype=torch.bfloat16)
    rows = quantize([weight])
    for tokens in (1, 2, 7, 15, 16, 17, 100, 129, 1000, 4095):
        x = quantize([torch.randn(tokens, 512, device=DEVICE, dtype=torch.bfloat16)])
        found, again = (fp8.product(x, rows, torch.bfloat16, bias) for _ in range(2))
        expected = fp8.product(*(fp8.Rows(one.values.cpu(), one.scale.cpu()) for one in (x, rows)), torch.float32)
        error = (found.cpu().float() - expected - bias.cpu().float()).norm() / expected.norm()
        same = torch.equal(found, again)
        say("fp8 tokens", tokens=tokens, error=error.item(), identical=same, right=same and error.item() < 0.01)


def fp8_ways(folder: Path) -> None:
    """Runs in FP8 with dropout give the same adapter, however they are carried out; so do those on unpadded sequences.

    Recorded as CUDA graphs, launched one by one, resumed; with the base in main memory, and sharded over one process.
    """
    sides = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    if TINY:
        sides |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    small = shape(folder / "fp8", vocab_size=1000, **sides)
    data = examples(8 if TINY else 100, 1000)
    kit, name = (kernels.TORCH, "torch") if TINY else (kernels.triton(), "triton")
    fast = ExecutionPlan(
        kept_base=True,
        kept_activations=True,
        recorded=not TINY,
        reason="a check",
        forward=f"fused all, {name}, fp8",
    )
    plain = replace(fast, recorded=False)
    each_use = replace(plain, kept_base=False)
    #            plan, place, recomputed, stops after these steps
    ways: dict[str, tuple[ExecutionPlan, str, list[int]]] = {
        "recorded": (fast, "gpu", [0]),
        "one by one": (plain, "gpu", [0]),
        "resumed": (fast, "gpu", [3, 0]),
        "recomputed": (replace(each_use, kept_activations=False), "gpu", [0]),
        "host": (each_use, "host", [0]),
        "sharded": (each_use, "sharded", [0]),
        "unpadded": (replace(plain, forward=f"fused layers, {name}, fp8"), "gpu", [0]),
        "unpadded, resumed": (replace(plain, forward=f"fused layers, {name}, fp8"), "gpu", [3, 0]),
    }
    bits: dict[str, list[torch.Tensor]] = {}
    for way, (plan, place, stops) in ways.items():
        resume, began, trained = None, time.monotonic(), None
        say("fp8 begins", way=way)
        for stop in stops:
            model = load(small, dropout=0.1, place=place)
            fuse_layers(model, keep_dequantized=plan.kept_base, kernels=kit, fp8=True)
            how = recipe(6, 1024)
            where = folder / way
            trained, saved = go(model, data, how, where, recompute=False, stop_after=stop, resume=resume, plan=plan)
            resume = saved[-1]
        bits[way] = [p.detach().cpu().clone() for p in trainable(model).values()]
        placed_weights.release(model)
        other = bits["unpadded" if way.startswith("unpadded") else "recorded"]
        same = all(torch.equal(a, b) for a, b in zip(bits[way], other, strict=True))
        ended, losses = trained.plan, [round(m.loss, 4) for m in trained.history]
        right = same and ended.recorded == plan.recorded and all(map(math.isfinite, losses))
        say("fp8", way=way, right=right, losses=losses, recorded=ended.recorded, seconds=time.monotonic() - began)
    lengths = [tokens for tokens, _ in Steps(data, 0, 32, 6).sequences(1024)]
    odd = sum(tokens % fp8.MULTIPLE > 0 for tokens in lengths)
    say("fp8 sequences", sequences=len(lengths), no_multiple_of_16=odd, right=odd > 0)


def fp8_part(folder: Path) -> None:
    """FP8 as used on a GPU."""
    fp8_tokens()
    fp8_ways(folder)


def speed(folder: Path) -> None:
    """Training and scoring at Mistral-7B's shape."""
    big = shape(
        folder / "big",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    began = time.monotonic()
    model = load(big, dropout=0.0)
    adapter = sum(p.numel() for p in trainable(model).values())
    say("load", seconds=time.monotonic() - began, bytes=torch.cuda.memory_allocated(), trainable=adapter)
    data = examples(400, 32000)
    for budget, recompute in ((4096, True), (16384, True), (16384, False)):
        torch.cuda.reset_peak_memory_stats()
        lengths = [len(example.input_ids) for example in data]
        plan = count(lengths, lengths, seed=0, global_batch_size=32, steps=6)
        micro_batch = min(budget, plan.largest_step)
        setup = Setup(
            architecture=ARCHITECTURES["mistralai/Mistral-7B-v0.1"],
            rank=16,
            targets=MODULES,
            quantization="nf4",
            double_quantization=True,
            value_bytes=2,
            optimizer="adamw_8bit",
            recompute=recompute,
        )
        trained, _ = go(model, data, recipe(6, budget), folder / f"b{budget}{recompute}", recompute=recompute)
        steady = trained.history[2:]
        say(
            "train",
            budget=budget,
            recompute=recompute,
            tokens_per_second=sum(m.target_tokens for m in steady) / sum(m.measured["seconds"] for m in steady),
            peak_bytes=torch.cuda.max_memory_allocated(),
            micro_batch=micro_batch,
            predicted_bytes=training_memory(setup, micro_batch).total,
            losses=[round(m.loss, 3) for m in trained.history],
        )
    model.eval()
    choices = tuple(tuple(range(5, 10 + j)) for j in range(4))
    questions = [Question(tuple(range(3, 33 + i % 20)), choices) for i in range(400)]
    rows = plan_sequences(questions, 8192)
    score_sequence(model, questions[:10])
    torch.cuda.synchronize()
    began = time.monotonic()
    for row in rows:
        score_sequence(model, questions[row.start : row.stop])
    seconds = time.monotonic() - began
    tokens = sum(tokens_of(questions[row.start : row.stop]) for row in rows)
    say("score", questions_per_second=len(questions) / seconds, tokens_per_second=tokens / seconds)


def energy() -> None:
    """The energy counter increases while the GPU works."""
    joules, began = open_meter(visible_gpus()), time.monotonic()
    big = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    while time.monotonic() - began < 5:
        big = (big @ big).clamp(-1, 1)
        torch.cuda.synchronize()
    took = joules()
    say("energy", joules=took, watts=None if took is None else took / (time.monotonic() - began))


def main() -> int:
    """Runs the named parts, or all."""
    make_deterministic()
    gpu = "none" if TINY else torch.cuda.get_device_name()
    say("machine", gpu=gpu, torch=torch.__version__, cuda=torch.version.cuda)
    parts = {
        "kernel": lambda _: kernel(),
        "long_kernel": lambda _: long_kernel(),
        "exactness": exactness,
        "long_rows": long_rows,
        "fp8": fp8_part,
        "speed": speed,
        "energy": lambda _: energy(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in [word for word in sys.argv[1:] if word != "--tiny"] or parts:
            try:
                parts[name](Path(folder))
            except RuntimeError as error:
                # CUDA reports errors asynchronously: run again with synchronization, to find the call that failed.
                if TINY or "CUDA_LAUNCH_BLOCKING" in os.environ:
                    raise
                traceback.print_exc()
                say("failed", part=name, error=str(error)[:300])
                environ = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}
                subprocess.run([sys.executable, __file__, name], env=environ, check=False)
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
