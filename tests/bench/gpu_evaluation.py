"""Evaluation on a GPU: the job's scorer against lm-eval's own HFLM, at Mistral-7B's shape in NF4 with random weights.

`python tests/bench/gpu_evaluation.py --alpaca FILE --arc FILE --train FILE [--tiny] [--short]` prints JSON lines.
Both sides score the same token ids: ARC-Easy's questions as lm-eval's task asks them, by a tokenizer of 32,000 tokens
trained on Alpaca's rows (Mistral's own is not at hand), without examples, after the same five (`sampler: first_n`),
and after five drawn for each question. The job's time is from the questions to the scores, including layout and copies.
`lengths` has random tokens in questions as long as in Mistral's own tokenizer, without common prefixes: this was
measured before questions shared prefixes.

With random weights margins are tiny, so predictions of two passes are compared with fp32's, with the margins.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from job.evaluation.scorer import score_questions, score_sequences
from job.evaluation.scoring import Forward, plan_sequences, tokens_of, tokens_to_compute
from job.model.fused import precise_forward, scoring_decoder
from job.model.lora import adapter_off, add_adapter
from job.records import Question
from job.training.gpu_capability import fast_kernels
from tests.bench import shapes
from tests.bench.cpu_evaluation import Answers, margin
from tests.gpu.job import make_tokenizer

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FP16, FP32 = torch.float16, torch.float32
SHOTS, BUDGET = 5, 8192
BEGAN = time.monotonic()
KINDS = {
    "attention": ("_attention_kernel", "flash", "fmha"),
    "norms": ("_add_norm", "_scoring_norm", "rms_norm", "layer_norm"),
    "gates": ("_swiglu", "_gated", "silu"),
    "positions": ("_turn",),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90", "cublas", "splitk"),
    "copies and gathers": ("index", "copy", "cat", "memcpy", "memset", "gather", "fill"),
    "softmax": ("softmax", "argmax", "reduce"),
}
"""Kinds of kernels by their lower-case names in the profiler; the first match counts."""


def say(what: str, **facts: Any) -> None:
    """One JSON line."""
    shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in facts.items()}
    print(json.dumps({"what": what, **shown, "at_second": round(time.monotonic() - BEGAN, 1)}), flush=True)


@contextmanager
def caught(what: str) -> Iterator[None]:
    """If a part fails, the others still run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the next parts are worth having
        say("error", where=what, error=f"{type(error).__name__}: {error}"[:1500])


def lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, compressed or not."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(row) for row in data.splitlines()]


def questions(arc: Path, train: Path, tokenizer: Any, limit: int | None) -> dict[str, list[Question]]:
    """The questions as lm-eval's `arc_easy` asks them; few-shot examples are drawn from the training rows."""
    chance, few = random.Random(0), lines(train)

    def text(row: dict[str, Any]) -> str:
        return f"Question: {row['question']}\nAnswer:"

    def example(row: dict[str, Any]) -> str:
        answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        return f"{text(row)} {answer}\n\n"

    def asked(examples: Callable[[], Iterable[dict[str, Any]]], most: int | None = None) -> list[Question]:
        parsed = []
        for row in lines(arc)[:limit][:most]:
            context = "".join(map(example, examples())) + text(row)
            ids = tokenizer.encode(context)
            whole = [tokenizer.encode(f"{context} {choice}") for choice in row["choices"]["text"]]
            parsed.append(Question(tuple(ids), tuple(tuple(one[len(ids) :]) for one in whole)))
        return parsed

    return {
        "0 examples": asked(list),
        "5 examples, the same": asked(lambda: few[:SHOTS], 1200),
        "5 examples, drawn": asked(lambda: chance.sample(few, SHOTS), 300),
    }


def sync() -> None:
    """Waits for the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()


def ours(model: Any, asked: Sequence[Question], way: Forward, budget: int = BUDGET) -> tuple[Answers, float]:
    """Log-likelihoods by question, and seconds."""

    def score(model: Any, batch: list[Question], sequences: Any) -> Any:
        return score_sequences(model, batch, sequences, way)

    sync()
    began = time.perf_counter()
    scored = score_questions(model, list(asked), budget, score=score)
    seconds = time.perf_counter() - began
    return [[choice.log_likelihood for choice in choices] for choices in scored], seconds


def best_of(times: int, measured: Callable[[], tuple[Answers, float]]) -> tuple[Answers, float]:
    """The answers, and the minimum of the seconds."""
    trials = [measured() for _ in range(times)]
    return trials[0][0], min(seconds for _, seconds in trials)


def compared(answers: Answers, exact: Answers) -> dict[str, Any]:
    """How many predictions differ, their margins in `exact`, and the differences of the log-likelihoods."""
    flips = [margin(e) for a, e in zip(answers, exact, strict=True) if a.index(max(a)) != e.index(max(e))]
    apart = [abs(a - b) for x, y in zip(answers, exact, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "predictions": len(exact),
        "differ": len(flips),
        "largest_margin_that_differs": max(flips, default=0.0),
        "furthest_apart": max(apart),
        "apart_on_average": sum(apart) / len(apart),
    }


def rates(shape: dict[str, int], tokens: int = BUDGET) -> float:
    """TFLOP/s of the products themselves, with and without the adapter's columns next to a weight; returns the best.

    A GPU is faster for a second after it was idle, so the products take turns, and the median of each counts.
    """
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    sizes = {
        "gate_up": (2 * wide, hidden),
        "gate, up": (wide, hidden),
        "down": (hidden, wide),
        "qkv": (hidden * 3 // 2, hidden),
        "out": (hidden, hidden),
    }
    operands, seconds = {}, {}
    for name, (outputs, inputs) in sizes.items():
        for more in (0, scoring_decoder.WIDE):
            a, b = (torch.randn(rows, inputs + more, device=DEVICE).half() for rows in (tokens, outputs))
            into = torch.empty(tokens, outputs * (2 if name == "gate, up" else 1), device=DEVICE).half()[:, :outputs]
            operands[f"{name} +{more}"] = a, b, into, 2e-12 * tokens * outputs * inputs
            seconds[f"{name} +{more}"] = list[float]()
    for _ in range(7 if ON_GPU else 1):
        for what, (a, b, into, _flops) in operands.items():
            sync()
            began = time.perf_counter()
            for _ in range(4):
                torch.mm(a, b.T, out=into)
            sync()
            seconds[what].append((time.perf_counter() - began) / 4)
    tflops = {what: flops / statistics.median(seconds[what]) for what, (*_, flops) in operands.items()}
    say("TFLOP/s of products", tokens=tokens, **tflops)
    return max(tflops.values())


def breakdown(model: Any, asked: Sequence[Question], way: Forward, name: str) -> None:
    """Milliseconds of a sequence by kind of kernel, and the GPU's idle time, over the first three sequences."""
    from torch.profiler import ProfilerActivity, profile

    ordered = sorted(asked, key=lambda question: question.context)
    parts = dict(enumerate(plan_sequences(ordered, BUDGET)[:3]))
    list(score_sequences(model, list(ordered), parts, way))
    sync()
    began = time.perf_counter()
    list(score_sequences(model, list(ordered), parts, way))
    wall = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as seen:
        list(score_sequences(model, list(ordered), parts, way))
        sync()
    kinds: dict[str, float] = dict.fromkeys([*KINDS, "others"], 0.0)
    kernels: dict[str, tuple[float, int]] = {}
    count = 0
    for event in seen.key_averages():
        spent = (event.self_device_time_total if ON_GPU else event.self_cpu_time_total) / 1000 / len(parts)
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key.lower() for n in names)), "others")
        kinds[kind] += spent
        count += event.count
        kernels[event.key[:70]] = round(spent, 3), event.count // len(parts)
    spans = [e.time_range for e in seen.events() if str(e.device_type).endswith("CUDA")]
    between = None  # idle time of the GPU between its first and its last kernel, in a profiled run
    if spans:
        whole = max(one.end for one in spans) - min(one.start for one in spans)
        between = (whole / 1000 - sum(kinds.values()) * len(parts)) / len(parts)
    milliseconds = 1000 * wall / len(parts)
    tokens = sum(tokens_of(ordered[part.start : part.stop]) for part in parts.values()) / len(parts)
    most = dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:14])
    say(
        "a sequence",
        name=name,
        tokens=tokens,
        milliseconds=milliseconds,
        **kinds,
        idle=milliseconds - sum(kinds.values()),
        idle_between_kernels=between,
        kernels=count / len(parts),
        milliseconds_and_launches=most,
    )


def attention(asked: Sequence[Question]) -> None:
    """Compares the kernel for trees with torch's in fp32; microseconds a layer by block sizes, and of torch's flash."""
    from job.evaluation.scoring import _pack
    from job.model.fused import triton_scoring
    from job.model.packed_layout import build_layout

    ordered = sorted(asked, key=lambda question: question.context)
    (part, *_) = plan_sequences(ordered, BUDGET)
    layout = build_layout(_pack(ordered[part.start : part.stop]).segments, DEVICE)
    qkv = torch.randn(len(layout.depths), 48, 128, device=DEVICE).half()
    parts = qkv.split_with_sizes([32, 8, 8], 1)
    output = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    by_torch = scoring_decoder.TorchOperations().attend
    for window in (None, 30):
        exact = torch.empty_like(output, dtype=FP32)
        by_torch(*(x.float() for x in parts), layout, 128**-0.5, window, exact)
        triton_scoring.TritonOperations().attend(*parts, layout, 128**-0.5, window, output)
        say("attention beside fp32", window=window, largest_error=float((output - exact).abs().max()))

    def microseconds(attend: Callable[..., None]) -> float:
        for turn in range(22):
            if turn == 2:
                sync()
                began = time.perf_counter()
            attend(*parts, layout, 128**-0.5, None, output)
        sync()
        return (time.perf_counter() - began) / 20 * 1e6

    times = {"torch's flash kernel": microseconds(by_torch)}
    for rows, keys, stages in ((64, 32, 2), (64, 64, 2), (64, 64, 3), (32, 32, 2), (128, 64, 2)):
        with (
            caught(f"attention {rows} {keys} {stages}"),
            mock.patch.multiple(triton_scoring, _ROWS=rows, _KEYS=keys, _STAGES=stages, _KNOWN=WeakKeyDictionary()),
        ):
            times[f"{rows} queries, {keys} keys, {stages} stages"] = microseconds(triton_scoring.attention)
    say("attention", tokens=len(layout.depths), segments=len(layout.segments), microseconds_a_layer=times)


def speed_of(  # noqa: PLR0917 - the first three are bound by who calls it
    model: Any,
    flops: float,
    rate: float,
    what: str,
    asked: Sequence[Question],
    way: Forward,
    budget: int = BUDGET,
    times: int = 2,
) -> Answers:
    """Questions a second; `flops` of a token, `rate` in TFLOP/s of the products."""
    _, first = ours(model, asked[:200], way)
    answers, seconds = best_of(times, lambda: ours(model, asked, way, budget))
    per_question = tokens_to_compute(asked, budget) / len(asked)
    say(
        "ours",
        questions_of=what,
        budget=budget,
        questions=len(asked),
        questions_per_second=len(asked) / seconds,
        seconds_of_the_first_200=first,
        tokens_per_question=per_question,
        of_products_rate=len(asked) / seconds * per_question * flops / 1e12 / rate,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
    )
    return answers


def shortly(model: Any, asked: list[Question], shape: dict[str, int], flops: float) -> Answers:
    """Speeds without examples only, with gate and up as two products and as one; the answers of the base."""
    kernels, name = fast_kernels(DEVICE, "float16")
    say("kernels", name=name)
    rate = rates(shape, 8162 if ON_GPU else BUDGET // 64)
    now = precise_forward.precise_forward(model, FP16, kernels, keep=True)
    speed = partial(speed_of, model, flops, rate)
    adapter = speed("ARC-Easy, 0 examples, with the adapter", asked, now)
    with adapter_off(model):
        base = speed("ARC-Easy, 0 examples, the base", asked, now)
    with caught("breakdown"):
        breakdown(model, asked, now, "with the adapter")
        with adapter_off(model):
            breakdown(model, asked, now, "the base")
    with caught("fp32"):
        exact = precise_forward.precise_forward(model, FP32, kernels, keep=False)
        right, _ = ours(model, asked[:100], exact)
        mine, _ = ours(model, asked[:100], now)
        say("with the adapter beside fp32", **compared(mine, right))
        say("repeated", same_bits=ours(model, asked[:100], now)[0] == mine)
    with caught("one product"):
        joined = precise_forward._joined
        with mock.patch.object(precise_forward, "_joined", lambda *x, keep, apart=False: joined(*x, keep=keep)):
            joined_forward = precise_forward.precise_forward(model, FP16, kernels, keep=True)
        answers = speed("gate and up as one product, with the adapter", asked, joined_forward, times=1)
        say("one product beside two", same_bits=answers == adapter)
        with adapter_off(model):
            speed("gate and up as one product, the base", asked, joined_forward, times=1)
    return base


def scoring(model: Any, asked: dict[str, list[Question]], *, tiny: bool) -> dict[str, Answers]:
    """The job's speeds; returns the answers without an adapter, since HFLM has none."""
    kernels, name = fast_kernels(DEVICE, "float16")
    say("kernels", name=name)
    flops = 2 * (sum(p.numel() for p in model.parameters()) if tiny else 6_979_321_856)  # the layers' weights
    shape = shapes.TINY if tiny else shapes.MISTRAL_7B
    rate = rates(shape)
    now = precise_forward.precise_forward(model, FP16, kernels, keep=True)
    lengths = shapes.questions(shape["vocab_size"], 30 if tiny else None)

    speed = partial(speed_of, model, flops, rate)
    with caught("lengths"):
        mine = speed("Mistral's lengths, nothing in common", lengths, now, times=1)
        some, few = lengths[:850], lengths[:100]
        with mock.patch.object(precise_forward, "is_like_llama", return_value=False):
            before = precise_forward.precise_forward(model, FP16, kernels, keep=True)
        theirs = speed("Mistral's lengths, by the modules' own forward, as before", some, before, times=1)
        say("now beside before", **compared(mine[: len(some)], theirs))
        exact = precise_forward.precise_forward(model, FP32, kernels, keep=False)
        right, _ = ours(model, few, exact)
        say("now beside fp32", **compared(mine[: len(few)], right))
        say("before beside fp32", **compared(theirs[: len(few)], right))
        breakdown(model, lengths, before, "as before, with the adapter")
        del before, exact
    if name == "triton":
        with caught("attention"):
            attention(asked["0 examples"])
    with caught("breakdown"):
        breakdown(model, asked["0 examples"], now, "now, with the adapter")
    for kind, of_kind in asked.items():
        with caught(kind):
            speed(f"ARC-Easy, {kind}, with the adapter", of_kind, now, times=2 if kind == "0 examples" else 1)
    answers: dict[str, Answers] = {}
    with adapter_off(model):
        with caught("breakdown, base"):
            breakdown(model, asked["0 examples"], now, "now, the base")
            breakdown(model, asked["5 examples, the same"], now, "now, the base, after the same 5 examples")
        for kind, of_kind in asked.items():
            with caught(f"{kind}, base"):
                answers[kind] = speed(f"ARC-Easy, {kind}, the base", of_kind, now, times=1)
        with caught("budget"):
            speed("ARC-Easy, 0 examples, the base", asked["0 examples"], now, 16384, times=1)
    again, _ = ours(model, asked["0 examples"][:300], now)
    repeated, _ = ours(model, asked["0 examples"][:300], now)
    say("repeated", same_bits=again == repeated)
    return answers


HFLM_SIZES = (
    ("0 examples", 600, (32, 64, 128, 256, 512)),
    ("5 examples, the same", 60, (16, 64, 256)),
    ("5 examples, drawn", 60, (16, 64, 256)),
)
"""Which questions, how many, in which batch sizes; the first size that is slower or runs out of memory is the last."""


def warmup(size: int | str) -> int:
    """How many requests HFLM answers before it is timed: a whole batch, so that its memory is allocated."""
    return max(64, size) if isinstance(size, int) else 64


def by_hflm(
    base: Any,
    asked: dict[str, list[Question]],
    mine: dict[str, Answers],
    kinds: Sequence[tuple[str, int, Sequence[int]]] = HFLM_SIZES,
    *,
    tiny: bool,
    adapter: bool = False,
) -> None:
    """HFLM on the first questions of each kind, with the best of its batch sizes."""
    from lm_eval.models.huggingface import HFLM

    for kind, count, sizes in kinds:
        first = asked[kind][: 20 if tiny else count]
        requests = [(("", ""), list(q.context), list(choice)) for q in first for choice in q.choices]
        best = 0.0
        for size in sizes:
            speed = 0.0
            with caught(f"HFLM {size}"):
                lm = HFLM(
                    pretrained=base, tokenizer=shapes.tokenizer(), batch_size=size, max_length=2048, device=str(DEVICE)
                )
                lm._loglikelihood_tokens(requests[: warmup(size)], disable_tqdm=True)
                sync()
                began = time.perf_counter()
                flat = [answer[0] for answer in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
                speed = len(first) / (time.perf_counter() - began)
                theirs = [[flat.pop(0) for _ in q.choices] for q in first]
                beside = compared(mine[kind][: len(first)], theirs) if kind in mine else {}
                say(
                    "HFLM",
                    questions_of=kind,
                    adapter=adapter,
                    batch=size,
                    questions=len(first),
                    questions_per_second=speed,
                    **beside,
                )
            if speed <= best:
                break
            best = speed


def main() -> None:
    """Measures and prints JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca", type=Path, required=True)
    parser.add_argument("--arc", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="rows that examples are taken from")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--short", action="store_true", help="questions without examples alone, in a minute")
    parser.add_argument("--asked", type=Path, help="the questions' ids, written there or read: they take 10 s")
    args = parser.parse_args()
    shape = shapes.TINY if args.tiny else shapes.MISTRAL_7B
    if ON_GPU:
        torch.use_deterministic_algorithms(mode=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cuda.matmul.allow_tf32 = False
        say("machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    if args.asked is not None and args.asked.exists():
        pairs = json.loads(gzip.decompress(args.asked.read_bytes()))
        asked = {k: [Question(tuple(c), tuple(map(tuple, choices))) for c, choices in v] for k, v in pairs.items()}
    else:
        rows = lines(args.alpaca)[: 500 if args.tiny else 20_000]
        with tempfile.TemporaryDirectory() as name:
            tokenizer = make_tokenizer(Path(name), [" ".join(row.values()) for row in rows], shape["vocab_size"])
        asked = questions(args.arc, args.train, tokenizer, 30 if args.tiny else None)
    if args.asked is not None and not args.asked.exists():
        pairs = {kind: [(q.context, q.choices) for q in of_kind] for kind, of_kind in asked.items()}
        args.asked.write_bytes(gzip.compress(json.dumps(pairs).encode()))
    say("questions", seconds=time.monotonic() - BEGAN, first=len(asked["0 examples"]))
    base = shapes.random_base(shape, DEVICE, "flat")
    model = with_adapter(base)
    say("model")
    if args.short:
        flops = 2 * (sum(p.numel() for p in model.parameters()) if args.tiny else 6_979_321_856)
        mine = {"0 examples": shortly(model, asked["0 examples"], shape, flops)}
    else:
        mine = scoring(model, asked, tiny=args.tiny)
    del model, base
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    with caught("HFLM"):
        base = shapes.random_base(shape, DEVICE, "sdpa")
        kinds = (("0 examples", 400, (128, 256, 512)),) if args.short else HFLM_SIZES
        by_hflm(base, asked, mine, kinds, tiny=args.tiny)
        if args.short:
            by_hflm(with_adapter(base), asked, {}, kinds, tiny=args.tiny, adapter=True)


def with_adapter(base: Any) -> Any:
    """Adds an adapter of PEFT's to all projections."""
    model = add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0)
    for parameter in (one for one in model.parameters() if one.requires_grad):
        parameter.data.normal_(0, 0.01)  # B of a new adapter is zero
    return model.eval()


if __name__ == "__main__":
    main()
