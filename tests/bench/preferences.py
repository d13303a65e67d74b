"""DPO compared with TRL's DPOTrainer: pairs a second and peak memory of both, on this machine's GPU or CPU.

Both train the same adapter on the same base in NF4, on the same pairs in the same order, 32 in each optimizer step, or
8 on a CPU, where seconds are processor time, so that other load of the machine does not count.
The model has random weights and, on a GPU, Mistral-7B's shape. A pair is a prompt, its answer, and the next row's
answer as the rejected one, with the lengths of Alpaca's rows. The first steps of each side are not counted. The job
computes the reference's log-probabilities once before training, TRL by default in every step: the time of that is
counted for both. `--tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import shapes  # lies beside this script
import torch

from job.data import batch_plan
from job.data.preferences import join
from job.model.lora import adapter_off, add_adapter
from job.model.packed_attention import NAME
from job.records import Example
from job.training.config import Hooks, Preference, Recipe
from job.training.gpu_memory import memory_in_use
from job.training.preference_gradient import reference_log_probs
from job.training.prepare import prepare, token_budget
from job.training.trainer import train

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""For a CPU: 5 million parameters, and a vocabulary small enough that logits are not most of the work."""
BETA, BATCH, MICRO_BATCH, WARMUP, ANSWER = 0.1, 32 if ON_GPU else 8, 8, 2, 0.6
"""ANSWER: an answer's share of the tokens of a row; in Alpaca the mean is 0.57."""


def make_pairs(vocabulary: int, count: int) -> list[Example]:
    """Random tokens of real lengths."""
    rows = shapes.examples(vocabulary, count + 1)
    pairs = []
    for row, following in pairwise(rows):
        prompt = row.input_ids[: max(1, int(len(row.input_ids) * (1 - ANSWER)))]
        answers = [one.input_ids[max(1, int(len(one.input_ids) * (1 - ANSWER))) :] for one in (row, following)]
        sides = [Example((*prompt, *answer), (*(False,) * len(prompt), *(True,) * len(answer))) for answer in answers]
        pairs.append(join(*sides))
    return pairs


def clock() -> float:
    """Seconds: wall time on a GPU, processor time on a CPU."""
    return time.perf_counter() if ON_GPU else time.process_time()


def sync() -> None:
    """Waits for the GPU, and resets its memory peak."""
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train_ours(shape: dict[str, int], pairs: Sequence[Example], steps: int) -> dict[str, Any]:
    """The job's reference pass and its training, prepared as the job does it."""
    base = shapes.random_base(shape, DEVICE, NAME)
    model = add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0)
    sync()
    budget = token_budget(DEVICE, None, None)
    plan = prepare(
        model,
        [len(pair.input_ids) for pair in pairs],
        global_batch_size=BATCH,
        quantization="nf4",
        optimizer="adamw_8bit",
        budget=budget,
        keep_base="auto",
        recompute="auto",
        gigabytes=None,
    )
    compute = reference_log_probs(model, fused=plan.fused)
    began = clock()
    known: list[Example] = []
    with adapter_off(model):
        for start in range(0, len(pairs), MICRO_BATCH):
            part = pairs[start : start + MICRO_BATCH]
            references = compute(part)
            known += [replace(pair, reference=tuple(sums)) for pair, sums in zip(part, references, strict=True)]
    reference = clock() - began
    recipe = Recipe(
        seed=0,
        total_steps=steps,
        learning_rate=2e-4,
        scheduler="linear",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        global_batch_size=BATCH,
        micro_batch_tokens=budget,
        optimizer="adamw_8bit",
        save_every_steps=10_000,
        preference=Preference("dpo", beta=BETA),
    )
    ended: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            model,
            shapes.tokenizer(),
            known,
            recipe=recipe,
            plan=plan,
            hooks=Hooks(lambda _: ended.append(clock()), lambda *_: None, lambda: False),
            folder=Path(folder),
        )
    return {
        "side": "this job",
        "forward": plan.forward,
        "losses": [step.loss for step in trained.history],
        "seconds": [b - a for a, b in pairwise(ended)][WARMUP - 1 :],
        "reference_seconds_per_pair": reference / len(pairs),
        "peak_gib": memory_in_use() / 2**30,
    }


def train_trl(shape: dict[str, int], pairs: Sequence[Example], steps: int) -> dict[str, Any]:
    """TRL's DPOTrainer with its defaults on the same base, padded batches of 8, activation checkpointing."""
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    order = [row for step in range(steps) for row in batch_plan.batch(0, len(pairs), BATCH, step)]
    rows = []
    for pair in map(pairs.__getitem__, order):
        chosen, rejected = pair.sequences
        prompt = chosen.input_ids[: chosen.targets.index(True)]
        sides = {"chosen_ids": chosen.input_ids[len(prompt) :], "rejected_ids": rejected.input_ids[len(prompt) :]}
        rows.append({"prompt_ids": list(prompt), **{name: list(ids) for name, ids in sides.items()}})
    losses: list[float] = []
    ended: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if ON_GPU:
                torch.cuda.synchronize()
            ended.append(clock())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # the pairs are already tokenized

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    recompute = {"activation_checkpointing", "gradient_checkpointing"} & DPOConfig.__dataclass_fields__.keys()
    base = shapes.random_base(shape, DEVICE, "sdpa")
    torch.manual_seed(0)
    sync()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=base,
            args=DPOConfig(
                output_dir=folder,
                beta=BETA,
                max_steps=steps,
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=BATCH // MICRO_BATCH,
                learning_rate=2e-4,
                lr_scheduler_type="linear",
                warmup_steps=2,
                optim="adamw_8bit",
                **{min(recompute): True},
                bf16=True,
                use_cpu=not ON_GPU,
                logging_steps=1,
                save_strategy="no",
                max_length=None,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=shapes.tokenizer(),
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=list(shapes.MODULES), task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
    return {
        "side": "TRL's DPOTrainer",
        "losses": losses,
        "seconds": [b - a for a, b in pairwise(ended)][WARMUP - 1 :],
        "reference_seconds_per_pair": 0.0,
        "peak_gib": memory_in_use() / 2**30,
    }


def main() -> int:
    """Measures both sides, each in a separate process, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", choices=("ours", "trl"), help="one side, in this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = args.steps or (22 if ON_GPU else 6)
    if args.side is None:
        words = ["--steps", str(steps), *(["--tiny"] if args.tiny else [])]
        return compare(words, args.json)
    shape = shapes.TINY if args.tiny else shapes.MISTRAL_7B if ON_GPU else SMALL
    pairs = make_pairs(shape["vocab_size"], 1000 if ON_GPU and not args.tiny else 64)
    figures = {"ours": train_ours, "trl": train_trl}[args.side](shape, pairs, steps)
    each = sum(figures["seconds"]) / (len(figures["seconds"]) * BATCH)
    figures["pairs_per_second"] = 1 / (each + figures["reference_seconds_per_pair"])
    figures["pairs_per_second_without_reference"] = 1 / each
    print(json.dumps(figures), flush=True)
    return 0


def compare(words: Sequence[str], path: Path | None) -> int:
    """Runs each side in a process, so that memory peaks are separate."""
    import subprocess

    sides = []
    for side in ("ours", "trl"):
        done = subprocess.run(
            [sys.executable, __file__, *words, "--side", side], stdout=subprocess.PIPE, text=True, check=True
        )
        sides.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps({name: value for name, value in sides[-1].items() if name != "seconds"}), flush=True)
    ours, theirs = sides
    print(f"pairs a second: {ours['pairs_per_second']:.2f} and {theirs['pairs_per_second']:.2f}")
    print(f"ratio {ours['pairs_per_second'] / theirs['pairs_per_second']:.2f}")
    if path is not None:
        path.write_text(json.dumps(sides, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
