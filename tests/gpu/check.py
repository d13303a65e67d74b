"""What only a GPU can show, as a script: `python tests/gpu/check.py` prints one JSON line a finding.

The variable-length kernel against the plain reference, a killed and resumed run against a whole one, and the speed and
memory of training and scoring on a random model of Mistral-7B's shape. Token lengths may be given as a JSON list in the
file that GPU_LENGTHS names.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from job.evaluation.scoring import plan_sequences, score_sequence, tokens_of
from job.model.base import load_base, make_deterministic
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import Segment, _block_by_block, _varlen_kernel, build_layout
from job.planning.known_models_and_data import ARCHITECTURES
from job.planning.workload import count
from job.records import PEFT, Example, ExecutionPlan, Question
from job.tracking.energy import open_meter, visible_gpus
from job.training.config import Hooks, Recipe
from job.training.memory_model import Setup, training_memory
from job.training.trainer import train

DEVICE = torch.device("cuda")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def say(what: str, **figures: Any) -> None:
    """One finding."""
    print(json.dumps({"what": what, **figures}), flush=True)


def kernel() -> None:
    """The kernel agrees with the reference, forwards and backwards, with shared prefixes and grouped heads."""
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
    """A random Mistral of the given sizes, saved in bf16; and its tokenizer is not needed."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"] // 4, sliding_window=4096)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()
    return folder


def load(folder: Path, dropout: float) -> Any:
    """Loaded as the job loads it."""
    base = load_base(
        folder,
        quantization="nf4",
        double_quantization=True,
        dtype=torch.bfloat16,
        device=DEVICE,
        max_length=2048,
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
) -> Any:
    """Trains by PEFT's own layers; returns what train returns, and the folder of the last saved state."""
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
    plan = ExecutionPlan(
        kept_base=False, kept_activations=not recompute, recorded=False, reason="a check", forward=PEFT
    )
    trained = train(model, tokenizer, data, recipe=how, plan=plan, hooks=hooks, folder=folder, resume=resume)
    return trained, saved


def exactness(folder: Path) -> None:
    """A stopped and resumed run ends with the bits of a whole one."""
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
    """The meter counts while the GPU works."""
    joules, began = open_meter(visible_gpus()), time.monotonic()
    big = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    while time.monotonic() - began < 5:
        big = (big @ big).clamp(-1, 1)
        torch.cuda.synchronize()
    took = joules()
    say("energy", joules=took, watts=None if took is None else took / (time.monotonic() - began))


def main() -> int:
    """Runs the parts that were named, or all."""
    make_deterministic()
    say("machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda)
    parts = {"kernel": lambda _: kernel(), "exactness": exactness, "speed": speed, "energy": lambda _: energy()}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or parts:
            parts[name](Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
