"""What rounding does to an evaluation: ways to score, each compared with fp32 on a real model and real questions.

`python tests/bench/scoring_precision.py --base FOLDER --adapter FOLDER --task arc_easy=FILE`: base and adapter are
scored with weights that are the same for all ways (NF4, dequantized to bf16), by the job's own pass, by lm-eval's HFLM,
and by `job.model.precise_forward` with several choices of dtypes (`WAYS`). The reference computes everything in fp32,
TF32 off; that HFLM in fp32 agrees with it shows that both are right. A table says how many predictions are those of
fp32, how far the log-likelihoods are off, and how many questions are answered in a second. `SINGLY` rounds one kind of
number only, the rest in fp32: it says where the errors come from. `--shape` also times each way on random weights of
Mistral-7B's shape, where the large products decide. On a CPU take `--questions 40`. How to add a way:
an entry in `WAYS`.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from job.common import tables
from job.evaluation.scoring import plan_sequences, score_sequence
from job.model.fused import kernels
from job.model.fused.frozen_weights import fuse_layers
from job.model.precise_forward import Precision, logits_of, sums_in_fp32
from job.records import Question
from job.settings.schema import Eval, Lora
from tests.bench import shapes
from tests.bench.common import arguments, conditions
from tests.bench.cpu_evaluation import Answers, by_hflm, margin

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EXACT = Precision(FP32)
AS_BEFORE = Precision(BF16, residual=BF16, added=BF16, logits=BF16, angles=BF16)
WAYS: Mapping[str, Precision] = {
    "bf16, by the other pass": AS_BEFORE,
    "bf16, logits in fp32": Precision(BF16, residual=BF16, added=BF16, angles=BF16),
    "and rotary angles": Precision(BF16, residual=BF16, added=BF16),
    "and residual stream": Precision(BF16, added=BF16),
    "and what is added to it": Precision(BF16),
    "and the adapter": Precision(BF16, adapter=FP32),
    "fp16, nothing in fp32": Precision(FP16, residual=FP16, added=FP16, logits=FP16, angles=FP16),
    "fp16, logits in fp32": Precision(FP16, residual=FP16, added=FP16, angles=FP16),
    "and residual stream, angles": Precision(FP16, added=FP16),
    "and what is added to it (fp16)": Precision(FP16),
    "and the adapter (fp16)": Precision(FP16, adapter=FP32),
}
AT_SHAPE = [*list(WAYS)[1:2], *list(WAYS)[4:]]
"""Which of them are timed at a larger shape."""
SINGLY: Mapping[str, Precision] = {
    "logits": Precision(FP32, logits=BF16),
    "rotary angles": Precision(FP32, angles=BF16),
    "residual stream": Precision(FP32, residual=BF16),
    "what is added to it": Precision(FP32, added=BF16),
    "adapter": Precision(FP32, adapter=BF16),
}
JOB, HFLM, HFLM_FP32 = "the job's training pass, bf16", "HFLM, bf16", "HFLM, fp32"
Score = Callable[[list[Question]], Answers]
"""By question the log-likelihood of each choice."""


def main() -> int:
    """Measures and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model, in the hub's layout")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter that the job published")
    parser.add_argument("--task", required=True, metavar="NAME=FILE", help="questions of a task")
    parser.add_argument("--questions", type=int, help="the first so many")
    parser.add_argument("--batch-size", default="128", help="of HFLM")
    parser.add_argument("--hflm-questions", type=int, help="the first so many for HFLM, which is slow; 0 leaves it out")
    parser.add_argument("--shape", choices=("mistral-7b", "tiny"), help="time the ways at this shape, too")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from job.evaluation.tasks import load_tasks
    from job.model.base import load_tokenizer, make_deterministic

    where = conditions()
    task, _, file = args.task.partition("=")
    tokenizer = load_tokenizer(args.base)
    tasks = load_tasks([task], {task: Path(file)}, {task: Path(file).name})
    questions = ask(tasks, tokenizer, args.questions)
    torch.set_float32_matmul_precision("highest")  # no TF32
    if ON_GPU:
        make_deterministic()
    model = adapted(args.base, args.adapter)
    found = by_the_job(model, questions)
    weights = dequantized_weights(model)
    del model
    clean()
    if args.hflm_questions != 0:
        torch.use_deterministic_algorithms(mode=False)
        found |= by_plain(args, tasks, tokenizer, weights)
    sides = ("adapter", "base")
    compared = {side: compare({name: way[side] for name, way in found.items() if side in way}) for side in sides}
    for side in sides:
        print(f"\n{side}, {len(questions)} questions\n", *tables.markdown(HEAD, rows(compared[side], found)), sep="\n")
    print(*pairs({name: way["adapter"] for name, way in found.items()}), sep="\n", flush=True)
    speeds = at_shape(args.shape) if args.shape else {}
    if args.json is not None:
        kept = {name: {side: way[side] for side in sides if side in way} for name, way in found.items()}
        content = {
            **where,
            "questions": len(questions),
            "compared": compared,
            "seconds": {name: way["seconds"] for name, way in found.items()},
            "seconds_at_shape": speeds,
            "log_likelihoods": kept,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content) + "\n", encoding="utf-8")
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


def adapted(base: Path, adapter: Path) -> Any:
    """The NF4 base in bf16 with the published adapter, its layers fused as in a run on a GPU."""
    from job.model.adapter_files import load_adapter
    from job.model.base import load_base
    from job.model.lora import add_adapter
    from job.model.published_names import find_published_names

    model = load_base(
        base,
        quantization="nf4",
        double_quantization=True,
        dtype=BF16,
        device=DEVICE,
        max_length=512,
    )
    lora = Lora()
    model = add_adapter(model, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=shapes.MODULES, seed=0)
    load_adapter(model, adapter, find_published_names(model, base, quantized=False))
    fuse_layers(model, keep_dequantized=True, kernels=fast_kernels())
    return model.eval()


def fast_kernels() -> Any:
    """The kernels of a run."""
    return kernels.triton() if ON_GPU else kernels.TORCH


def dequantized_weights(model: Any) -> dict[str, torch.Tensor]:
    """The base's tensors by their names in transformers, those of NF4 layers dequantized as the job does it."""
    from job.model.precise_forward import _kept_weights

    base = model.get_base_model()
    found = {layer: weight() for layer, weight in _kept_weights(model).items()}
    names = {f"{name}.weight": found[module] for name, module in base.named_modules() if module in found}
    others = {n: p for n, p in base.state_dict().items() if "_proj." not in n}
    return {name: tensor.detach().cpu() for name, tensor in {**names, **others}.items()}


@contextmanager
def deterministic(how: Precision | None) -> Iterator[None]:
    """With the partial sums of a product in fp32, unless it is the job's training pass."""
    if how is None:
        yield
        return
    with sums_in_fp32():
        yield


def score(model: Any, questions: Sequence[Question], how: Precision | None) -> Answers:
    """Packed as the job packs."""
    forward = None if how is None else partial(logits_of, model, how=how, kernels=fast_kernels())
    answers: Answers = []
    with deterministic(how):
        for span in plan_sequences(questions, Eval().batch_tokens):
            scored = score_sequence(model, questions[span.start : span.stop], forward)
            answers += [[choice.log_likelihood for choice in choices] for choices in scored]
    return answers


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and seconds; `score` ends with a copy from the GPU, so nothing is left to wait for."""
    began = time.monotonic()
    return function(), time.monotonic() - began


def by_the_job(model: Any, questions: list[Question]) -> dict[str, dict[str, Any]]:
    """Every way's log-likelihoods for base and adapter, and the seconds with the adapter, the better of two times."""
    ways: dict[str, Precision | None] = {"fp32": EXACT, JOB: None, **WAYS}
    ways |= {f"fp32, but in bf16: {name}": how for name, how in SINGLY.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, how in ways.items():
        score(model, questions[:60], how)
        times = 2 if ON_GPU and name in {JOB, *WAYS} else 1
        runs = [timed(partial(score, model, questions, how)) for _ in range(times)]
        found[name] = {"adapter": runs[0][0], "seconds": min(seconds for _, seconds in runs)}
        if name in {"fp32", JOB, *WAYS}:
            with model.disable_adapter():
                found[name]["base"] = score(model, questions, how)
        print(f"{name}: {found[name]['seconds']:.2f} s", flush=True)
    return found


def by_plain(args: Any, tasks: Any, tokenizer: Any, weights: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """HFLM with transformers' own model, its weights the job's dequantized ones, and PEFT's adapter."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    found, limit = {}, args.hflm_questions or args.questions
    for name, dtype in {HFLM: BF16, HFLM_FP32: FP32}.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.base), dtype=dtype)
        model.load_state_dict({n: t.to(dtype) for n, t in weights.items()}, strict=False)
        model.tie_weights()
        model = PeftModel.from_pretrained(model.to(DEVICE), args.adapter).eval()
        asked = partial(by_hflm, tasks, model, tokenizer, limit, args.batch_size, device=str(DEVICE))
        answers, seconds = asked()
        with model.disable_adapter():
            base, _ = asked()
        found[name] = {"adapter": answers, "base": base, "seconds": seconds}
        print(f"{name}: {seconds:.2f} s", flush=True)
        del model
        clean()
    return found


def clean() -> None:
    """Gives memory back."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


HEAD = (
    *("way", "predictions as fp32", "differ", "error, mean", "99th percentile", "largest"),
    *("margins, 99th percentile", "questions/s", "time"),
)


def compare(found: Mapping[str, Answers]) -> dict[str, dict[str, float]]:
    """Each way beside fp32: nats of a choice's log-likelihood, and of the margin between the two best by fp32."""
    compared = {}
    for name, answers in found.items():
        exact = found["fp32"][: len(answers)]
        best = [sorted(range(len(a)), key=lambda choice, a=a: -a[choice])[:2] for a in exact]  # type: ignore[misc]
        errors = torch.tensor(
            [abs(a - b) for x, y in zip(answers, exact, strict=True) for a, b in zip(x, y, strict=True)]
        )
        margins = torch.tensor(
            [abs((a[i] - a[j]) - (e[i] - e[j])) for a, e, (i, j) in zip(answers, exact, best, strict=True)]
        )
        flips = [margin(e) for a, e, (i, _) in zip(answers, exact, best, strict=True) if a.index(max(a)) != i]
        compared[name] = {
            "differ": len(flips),
            "share": 1 - len(flips) / len(exact),
            "mean": float(errors.mean()),
            "p99": float(errors.double().quantile(0.99)),
            "largest": float(errors.max()),
            "margin_p99": float(margins.double().quantile(0.99)),
            "margin_largest": float(margins.max()),
            "largest_margin_that_flipped": max(flips, default=0.0),
        }
    return compared


def rows(compared: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The table's lines; time against the job's training pass."""
    seconds = {name: way["seconds"] for name, way in found.items()}
    return [
        [
            name,
            f"{100 * of['share']:.2f} %",
            str(of["differ"]),
            f"{of['mean']:.4f}",
            f"{of['p99']:.4f}",
            f"{of['largest']:.4f}",
            f"{of['margin_p99']:.4f}",
            f"{len(found[name]['adapter']) / seconds[name]:,.0f}",
            f"{seconds[name] / seconds[JOB]:.2f}",
        ]
        for name, of in compared.items()
    ]


def pairs(found: Mapping[str, Answers]) -> list[str]:
    """Of the questions that the job and HFLM answer differently: which of them answers as fp32 does."""
    if HFLM not in found:
        return []
    chosen = [[a.index(max(a)) for a in found[name][: len(found[HFLM])]] for name in ("fp32", JOB, HFLM)]
    apart = [(e, j, h) for e, j, h in zip(*chosen, strict=True) if j != h]
    ours, theirs = sum(e == j for e, j, _ in apart), sum(e == h for e, _, h in apart)
    said = f"The job's training pass and HFLM, both in bf16, differ in {len(apart)} of {len(found[HFLM])} predictions: "
    return ["", f"{said}the job's is that of fp32 in {ours}, HFLM's in {theirs}."]


def at_shape(shape: str) -> dict[str, float]:
    """Seconds of each way at a larger model's shape, with random weights; the better of two times, in turn."""
    from job.model.lora import add_adapter

    sizes = shapes.MISTRAL_7B if shape == "mistral-7b" else shapes.TINY
    base = shapes.random_base(sizes, DEVICE, "flat")
    model = add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0).eval()
    asked = shapes.questions(sizes["vocab_size"], 600 if ON_GPU else 20)
    ways: dict[str, Precision | None] = {JOB: None} | {name: how for name, how in WAYS.items() if name in AT_SHAPE}
    if ON_GPU:
        torch.use_deterministic_algorithms(mode=True)
    best: dict[str, float] = {}
    for kept in (True, False):
        fuse_layers(model, keep_dequantized=kept, kernels=fast_kernels())
        for turn in range(3 if ON_GPU else 1):
            for way, how in ways.items():
                name = f"{way}, weights {'kept' if kept else 'dequantized for each use'}"
                _, seconds = timed(partial(score, model, asked, how))
                if turn or not ON_GPU:
                    best[name] = min(best.get(name, seconds), seconds)
        model.get_base_model().base_model._forward_pre_hooks.clear()
    print("", f"{len(asked)} questions at the shape of {shape}, seconds:", "", sep="\n")
    for name, seconds in best.items():
        kept_as = name.partition(", weights ")[2]
        print(f"{seconds:8.3f} s  {seconds / best[f'{JOB}, weights {kept_as}']:.3f}  {name}", flush=True)
    return best


if __name__ == "__main__":
    raise SystemExit(main())
