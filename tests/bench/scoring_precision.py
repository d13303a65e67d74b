"""The effect of rounding on an evaluation: scoring precisions compared with fp32 on a real model and real questions.

`python tests/bench/scoring_precision.py --base FOLDER --adapter FOLDER --task arc_easy=FILE`: base and adapter are
scored by the forward pass of training (bf16) and by `job.model.fused.precise_forward` (fp16), each compared with that
pass in fp32, TF32 off. Each line is one JSON object: how many predictions are those of fp32, how far log-likelihoods
and the margin between the two best choices are off, and the seconds. fp32 has the NF4 weights as they are; `rounded`
has them rounded to bf16 first, which is what training multiplies by. `--shape mistral-7b` also times both passes on
random weights of that shape, with dequantized weights kept and not. `--tiny` tries the script itself: the demo's base,
an adapter of random numbers, 40 questions.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from job.evaluation.scoring import Forward, plan_sequences, score_sequence
from job.model.fused import kernels, precise_forward
from job.model.fused.frozen_weights import dequantized, fuse_layers
from job.records import Question
from job.settings.schema import Eval, Lora
from tests.bench import shapes
from tests.bench.common import ROOT, arguments, conditions
from tests.bench.cpu_evaluation import Answers, margin

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TRAINING, PRECISE, EXACT, ROUNDED = "bf16, the pass that trains", "fp16, precise_forward", "fp32", "fp32, rounded"
REPEATED = 3
"""Repetitions of what is timed; the best counts."""


def main() -> int:
    """Measures and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--base", type=Path, help="folder of the base model, in the hub's layout")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter that the job published")
    parser.add_argument("--task", default=f"arc_easy={ROOT / 'job/demo/questions.jsonl'}", metavar="NAME=FILE")
    parser.add_argument("--questions", type=int, default=1200, help="the first so many")
    parser.add_argument("--shape", choices=("mistral-7b", "tiny"), help="time both passes at this shape, too")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.base, args.adapter, args.questions, args.shape = ROOT / "job/demo/base", None, 40, "tiny"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from job.evaluation.tasks import load_tasks
    from job.model.device import make_deterministic
    from job.model.tokenizer import load_tokenizer

    lines: list[dict[str, Any]] = []

    def tell(**line: Any) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)

    tell(**conditions(), gpu=torch.cuda.get_device_name() if ON_GPU else None)
    task, _, file = args.task.partition("=")
    tokenizer = load_tokenizer(args.base)
    questions = ask(load_tasks([task], {task: Path(file)}, {task: Path(file).name}), tokenizer, args.questions)
    torch.set_float32_matmul_precision("highest")  # no TF32
    if ON_GPU:
        make_deterministic()
    model = adapted(args.base, args.adapter)
    measure(model, questions, tell)
    del model
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    if args.shape:
        at_shape(args.shape, tell)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


def ask(tasks: Any, tokenizer: Any, limit: int | None) -> list[Question]:
    """The questions of a task, as the job tokenizes them."""
    from job.evaluation.harness import evaluate
    from job.records import ChoiceScore

    asked: list[Question] = []

    def note(questions: list[Question]) -> list[list[ChoiceScore]]:
        asked.extend(questions)
        return [[ChoiceScore(0.0, greedy=False) for _ in question.choices] for question in questions]

    evaluate(tasks, tokenizer, note, limit=limit)
    return asked


def adapted(base: Path, adapter: Path | None) -> Any:
    """The NF4 base in bf16 with an adapter, the published one or random numbers, fused as in a run on a GPU."""
    from job.model.adapter_files import load_adapter
    from job.model.load_base import load_base
    from job.model.lora import add_adapter
    from job.model.published_names import find_published_names

    model = load_base(base, quantization="nf4", double_quantization=True, dtype=BF16, device=DEVICE, max_length=512)
    lora = Lora()
    model = add_adapter(model, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=shapes.MODULES, seed=0)
    if adapter is not None:
        load_adapter(model, adapter, find_published_names(model, base, quantized=False))
    else:
        fill(model)
    fuse_layers(model, keep_dequantized=True, kernels=fast_kernels())
    return model.eval()


def fill(model: Any) -> None:
    """Random numbers in place of the adapter's zeros."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)


def fast_kernels() -> kernels.Kernels:
    """The kernels that a run uses."""
    return kernels.triton() if ON_GPU else kernels.TORCH


def score(model: Any, questions: Sequence[Question], forward: Forward | None) -> Answers:
    """Scores questions, packed as by the job."""
    answers: Answers = []
    for span in plan_sequences(questions, Eval().batch_tokens):
        scored = score_sequence(model, questions[span.start : span.stop], forward)
        answers += [[choice.log_likelihood for choice in choices] for choices in scored]
    return answers


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and seconds; `score` ends with a copy from the GPU, so no further synchronization is needed."""
    began = time.monotonic()
    return function(), time.monotonic() - began


def measure(model: Any, questions: Sequence[Question], tell: Callable[..., None]) -> None:
    """The answers in each precision with and without the adapter, compared with fp32, and the seconds of a scoring."""
    build = partial(precise_forward.precise_forward, model, kernels=fast_kernels())
    (half, seconds), exact = timed(lambda: build(FP16, keep=True)), build(FP32, keep=False)
    tell(way=PRECISE, seconds_to_convert_the_weights=seconds)
    with mock.patch.object(precise_forward, "_weight", rounded):
        ways: dict[str, Forward | None] = {
            TRAINING: None,
            PRECISE: half,
            EXACT: exact,
            ROUNDED: build(FP32, keep=False),
        }
    best: dict[str, float] = {}
    for _ in range(REPEATED):  # in turn, so that both see the same clock rate
        for name in (TRAINING, PRECISE):
            score(model, questions[:60], ways[name])
            _, seconds = timed(partial(score, model, questions, ways[name]))
            best[name] = min(best.get(name, seconds), seconds)
    adapter: dict[str, Answers] = {}
    for name, forward in ways.items():
        adapter[name], seconds = timed(partial(score, model, questions, forward))
        best.setdefault(name, seconds)
    with model.disable_adapter():
        base = {name: score(model, questions, forward) for name, forward in ways.items() if name != ROUNDED}
    for side, answers, references in (("adapter", adapter, (EXACT, ROUNDED)), ("base", base, (EXACT,))):
        for reference in references:
            for name in [name for name in (TRAINING, PRECISE, EXACT) if name != reference]:
                tell(side=side, way=name, reference=reference, **compare(answers[name], answers[reference]))
    ratio = {name: {"seconds": best[name], "ratio": best[name] / best[TRAINING]} for name in ways}
    tell(questions=len(questions), times=ratio)


def rounded(layer: Any, dtype: torch.dtype, *, keep: bool) -> Callable[[], torch.Tensor]:
    """Replaces `precise_forward._weight`: NF4 weights rounded to bf16 first."""
    if getattr(layer.weight, "quant_state", None) is None:
        return lambda: layer.weight.to(dtype)
    return lambda: dequantized(layer, BF16).to(dtype)


def compare(answers: Answers, exact: Answers) -> dict[str, float]:
    """Errors in nats of a choice's log-likelihood, and of the margin between the reference's two best choices."""
    best = [sorted(range(len(a)), key=lambda choice, a=a: -a[choice])[:2] for a in exact]  # type: ignore[misc]
    errors = torch.tensor([abs(a - b) for x, y in zip(answers, exact, strict=True) for a, b in zip(x, y, strict=True)])
    margins = torch.tensor(
        [abs((a[i] - a[j]) - (e[i] - e[j])) for a, e, (i, j) in zip(answers, exact, best, strict=True)]
    )
    flips = [margin(e) for a, e, (i, _) in zip(answers, exact, best, strict=True) if a.index(max(a)) != i]
    return {
        "differ": len(flips),
        "share_equal": 1 - len(flips) / len(exact),
        "error_mean": float(errors.mean()),
        "error_p99": float(errors.double().quantile(0.99)),
        "margin_p99": float(margins.double().quantile(0.99)),
        "margin_largest": float(margins.max()),
        "largest_margin_that_flipped": max(flips, default=0.0),
    }


def at_shape(shape: str, tell: Callable[..., None]) -> None:
    """Seconds of both passes at a larger model's shape, with random weights, dequantized weights kept and not."""
    from job.model.lora import add_adapter

    sizes = shapes.MISTRAL_7B if shape == "mistral-7b" else shapes.TINY
    base = shapes.random_base(sizes, DEVICE, "flat")
    model = add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0).eval()
    fill(model)
    asked = shapes.questions(sizes["vocab_size"], 600 if ON_GPU else 20)
    if ON_GPU:
        torch.use_deterministic_algorithms(mode=True)
    for keep in (True, False):
        fuse_layers(model, keep_dequantized=keep, kernels=fast_kernels())
        ways: Mapping[str, Forward | None] = {
            TRAINING: None,
            PRECISE: precise_forward.precise_forward(model, FP16, fast_kernels(), keep=keep),
        }
        best: dict[str, float] = {}
        for turn in range(1 + REPEATED if ON_GPU else 2):
            for name, forward in ways.items():
                answers, seconds = timed(partial(score, model, asked, forward))
                if turn:
                    best[name] = min(best.get(name, seconds), seconds)
        finite = all(value == value and abs(value) < float("inf") for a in answers for value in a)  # noqa: PLR0124 - not NaN
        memory = torch.cuda.max_memory_allocated() if ON_GPU else None
        ratio = best[PRECISE] / best[TRAINING]
        tell(shape=shape, kept=keep, questions=len(asked), seconds=best, ratio=ratio, finite=finite, peak_bytes=memory)
        del ways
        model.get_base_model().base_model._forward_pre_hooks.clear()
        gc.collect()


if __name__ == "__main__":
    raise SystemExit(main())
