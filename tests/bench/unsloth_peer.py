"""Unsloth on the same model and data: `python tests/bench/unsloth_peer.py [--tiny] [--out FOLDER]`.

This is a separate script because Unsloth patches what it imports, and requires other versions of some packages. A
random Mistral-7B is written in bf16 and loaded by Unsloth in NF4; real Alpaca lengths, 8 x 4 examples a step, rank 16
on all projections, its own checkpointing. Padded, padding-free and packed training are tried, in four micro-batches a
step or one, and with kept activations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import unsloth  # noqa: F401  before what it patches
from unsloth import FastLanguageModel

# isort: split
import shapes
import torch
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

ON_GPU = torch.cuda.is_available()
PARAMETERS = 7_241_732_096
WARMUP = 4
WAYS = ["padding-free", "padding-free, one pass", "padding-free, one pass, activations kept", "packed", "padded"]


def say(out: Path, what: str, **figures: Any) -> None:
    """One finding: a line, and a line of the file."""
    line = json.dumps({"what": what, **{k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}})
    print(line, flush=True)
    with (out / "unsloth.jsonl").open("a") as file:
        file.write(line + "\n")


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A random Mistral in bf16, with a tokenizer that knows the special tokens."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=None, torch_dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    shapes.tokenizer().save_pretrained(folder)
    del model
    if ON_GPU:
        torch.cuda.empty_cache()


def rate() -> float:
    """FLOP/s of a large product in bf16, as in `gpu.py`."""
    size, device = (8192, "cuda") if ON_GPU else (256, "cpu")
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(5):
        if ON_GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        if ON_GPU:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / 10)
    return float(2 * size**3 / sorted(times)[2])


def train(out: Path, base: Path, way: str, args: argparse.Namespace, bound: float) -> None:
    """Loads, trains some steps with one variant, and prints the speed."""
    quantized = base / "nf4"
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(quantized if quantized.exists() else base), max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
    )
    if not quantized.exists():  # the next variant loads a third of the bytes
        model.save_pretrained(quantized)
        tokenizer.save_pretrained(quantized)
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=list(shapes.MODULES),
        use_gradient_checkpointing=False if "kept" in way else "unsloth",
        random_state=0,
    )
    shape = shapes.TINY if args.tiny else shapes.MISTRAL_7B
    data = shapes.examples(shape["vocab_size"], 100 if args.tiny else 1500)
    size, passes = 2 if args.tiny else 8, 4
    if "one pass" in way:
        size, passes = size * passes, 1
    if way == "packed":  # rows of 2,048 tokens: about as many examples a step
        size, passes = 2, 1
    ended: list[float] = []
    seen: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Records when a step has ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if ON_GPU:
                torch.cuda.synchronize()
            ended.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=WARMUP + args.steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
            learning_rate=2e-4,
            warmup_steps=2,
            optim="adamw_8bit",
            bf16=True,
            max_length=2048,
            packing=way == "packed",
            **({"padding_free": False} if way == "padded" else {}),
            dataset_text_field="",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        columns = {"input_ids": [list(e.input_ids) for e in data], "labels": [list(e.input_ids) for e in data]}
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict(columns),
            args=arguments,
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            learned = batch["labels"][:, 1:] != -100
            if "position_ids" in batch:
                learned &= batch["position_ids"][:, 1:] != 0
            seen.append(int(learned.sum()))
            return batch

        trainer.data_collator = counted
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    targets = sum(seen[WARMUP * passes : (WARMUP + args.steps) * passes])
    speed = targets / (ended[-1] - ended[WARMUP - 1])
    say(
        out,
        "unsloth",
        way=way,
        tokens_per_second=speed,
        of_bound=speed / bound,
        targets_per_step=targets / args.steps,
        step_milliseconds=[round((b - a) * 1000) for a, b in pairwise(ended)],
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
        losses=[round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry][:6],
    )


def main() -> int:
    """Runs every variant in turn; errors are recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=480, help="no way begins later than this")
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", tempfile.gettempdir())))
    args = parser.parse_args()
    start = time.monotonic()
    flops = rate()
    bound = flops / (4 * PARAMETERS)
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    say(args.out, "machine", gpu=name, rate_tflops=flops / 1e12, bound_tokens_per_second=bound, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_model(Path(folder), shapes.TINY if args.tiny else shapes.MISTRAL_7B)
        say(args.out, "model written", seconds=time.perf_counter() - began)
        for way in args.ways:
            if time.monotonic() - start > args.seconds:
                say(args.out, "skipped", way=way)
                continue
            try:
                train(args.out, Path(folder), way, args, bound)
            except Exception as error:  # noqa: BLE001 - the next one shall have its turn
                say(args.out, "failed", way=way, error=f"{type(error).__name__}: {str(error)[:300]}")
                traceback.print_exc(limit=-8)
            if ON_GPU:
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
