"""Training on this CPU: the job against a plain script with TRL, PEFT and bitsandbytes at the reference settings.

Both train the same adapter on the same random model of 25 M parameters in NF4, with the same examples (1,500 rows of
Alpaca) in each optimizer step. The plain script uses 8 x 4 padded examples, activation checkpointing and 8-bit Adam;
the job its defaults. Target tokens are counted, without those of the first step. Unsloth, as `unsloth_cpu.py` runs it,
is a third column if there is an interpreter with Unsloth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.common import (
    ALPACA,
    FAMILIES,
    MODULES,
    Row,
    arguments,
    at_least,
    conditions,
    finish,
    load_ours,
    load_plain,
    make_base,
)

ROWS, MICRO_BATCH, ACCUMULATION = 1500, 8, 4
Curve = list[tuple[float, float]]
"""Loss and seconds by step."""


def read_examples(folder: Path) -> tuple[Any, Sequence[Any]]:
    """Tokenizer and examples, made by the job with its defaults."""
    from job.data.dataset import load_examples
    from job.model.tokenizer import load_tokenizer
    from job.settings.schema import Train

    tokenizer, train = load_tokenizer(folder), Train()
    examples, _ = load_examples(
        str(ALPACA),
        revision=None,
        split="train",
        limit=ROWS,
        schema="alpaca",
        on_bad_row="skip",
        loss_on=train.loss_on,
        max_length=train.max_length,
        tokenizer=tokenizer,
    )
    return tokenizer, examples


def train_ours(folder: Path, args: Any, tokenizer: Any, examples: Sequence[Any], work: Path) -> Curve:
    """The job's own training."""
    from job.records import PEFT, ExecutionPlan
    from job.settings.schema import Train
    from job.training.config import CPU_MICRO_BATCH_TOKENS, Hooks, Recipe
    from job.training.trainer import train

    defaults = Train()
    recipe = Recipe(
        seed=0,
        total_steps=args.steps,
        learning_rate=defaults.learning_rate,
        scheduler="linear",
        warmup_steps=defaults.warmup_steps,
        weight_decay=defaults.weight_decay,
        max_grad_norm=defaults.max_grad_norm,
        global_batch_size=MICRO_BATCH * ACCUMULATION,
        micro_batch_tokens=args.micro_batch_tokens or CPU_MICRO_BATCH_TOKENS,
        optimizer="adamw_8bit",
        save_every_steps=args.steps + 1,
    )
    plan = ExecutionPlan(
        kept_base=False, kept_activations=args.recompute != "on", recorded=False, reason="a benchmark", forward=PEFT
    )
    hooks = Hooks(on_metrics=lambda _: None, on_save=lambda *_: None, stop=lambda: False)
    model = load_ours(folder, args.quantization, args.dtype)
    trained = train(model, tokenizer, examples, recipe=recipe, plan=plan, hooks=hooks, folder=work)
    return [(step.loss, float(step.measured["seconds"] or 0)) for step in trained.history]


def speed(curve: Curve, targets: Sequence[int]) -> float:
    """Target tokens a second, from the second step on."""
    return sum(targets[1:]) / sum(seconds for _, seconds in curve[1:])


def labels(example: Any) -> list[int]:
    """Labels for a plain collator: token ids, or -100 for tokens that are not targets."""
    return [token if target else -100 for token, target in zip(example.input_ids, example.targets, strict=True)]


def train_plain(folder: Path, args: Any, tokenizer: Any, examples: Sequence[Any], work: Path) -> Curve:
    """What the reference's script does: SFTTrainer on padded batches, in the order of the job's plan."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from job.data import batch_plan
    from job.settings.schema import Lora, Train

    defaults, lora = Train(), Lora()
    order = [
        row for s in range(args.steps) for row in batch_plan.batch(0, len(examples), MICRO_BATCH * ACCUMULATION, s)
    ]
    data = Dataset.from_list(
        [{"input_ids": list(e.input_ids), "labels": labels(e)} for e in map(examples.__getitem__, order)]
    )
    losses: list[float] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.monotonic() - self.began)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    torch.manual_seed(0)  # the same initial adapter
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(MODULES), task_type="CAUSAL_LM")
    # transformers 5.23 renamed it
    recompute = {"activation_checkpointing", "gradient_checkpointing"} & SFTConfig.__dataclass_fields__.keys()
    trainer = InOrder(
        model=get_peft_model(load_plain(folder, args.quantization, args.dtype), config),
        args=SFTConfig(
            output_dir=str(work),
            max_steps=args.steps,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=defaults.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=defaults.warmup_steps,
            max_grad_norm=defaults.max_grad_norm,
            optim="adamw_8bit",
            **{min(recompute): True},
            bf16=args.dtype == "bf16",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return list(zip(losses, seconds, strict=True))


def train_unsloth(folder: Path, args: Any, examples: Sequence[Any], work: Path) -> Curve:
    """The same training by Unsloth, in an interpreter that has it."""
    from job.data import batch_plan
    from job.settings.schema import Lora, Train

    defaults, lora = Train(), Lora()
    order = [
        row for s in range(args.steps) for row in batch_plan.batch(0, len(examples), MICRO_BATCH * ACCUMULATION, s)
    ]
    task = {
        "base": str(folder),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[args.dtype],
        "nf4": args.quantization == "nf4",
        "max_length": defaults.max_length,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "target_modules": list(MODULES),
        "examples": [{"input_ids": e.input_ids, "labels": labels(e)} for e in map(examples.__getitem__, order)],
        "arguments": {
            "max_steps": args.steps,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": defaults.learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": defaults.warmup_steps,
            "max_grad_norm": defaults.max_grad_norm,
            "optim": "adamw_8bit",
        },
    }
    work.mkdir(parents=True, exist_ok=True)
    file = work / "task.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    done = subprocess.run(
        [args.unsloth, str(Path(__file__).with_name("unsloth_cpu.py")), str(file)],
        cwd=work,  # Unsloth writes compiled files to its current folder
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [(loss, seconds) for loss, seconds in json.loads(done.stdout.splitlines()[-1])]


def compare(ours: Curve, plain: Curve, targets: Sequence[int]) -> tuple[list[Row], dict[str, Any]]:
    """Speed from the second step on, and the difference of the losses."""
    speeds = [speed(curve, targets) for curve in (ours, plain)]
    apart = max(abs(a - b) / b for (a, _), (b, _) in zip(ours, plain, strict=True))
    print("step  target tokens  loss: ours   plain   seconds: ours   plain")
    for step, ((a, s), (b, t), n) in enumerate(zip(ours, plain, targets, strict=True), start=1):
        print(f"{step:4}  {n:13}  {a:10.4f}  {b:6.4f}  {s:13.2f}  {t:6.2f}")
    print(f"the losses are at most {100 * apart:.3f} % apart")
    rows = [
        at_least(
            "training, NF4", speeds[0], speeds[1], unit="target tokens/s", against="TRL + PEFT + bitsandbytes", goal=2
        ),
        Row(
            "training, largest difference of the losses", f"{apart:.1e}", "same curve", apart, "<= 0.01", apart <= 0.01
        ),
    ]
    return rows, {"ours": ours, "plain": plain, "target_tokens": list(targets)}


def main() -> int:
    """Measures and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both sides")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4", help="of both sides")
    parser.add_argument("--micro-batch-tokens", type=int, help="ours; default: the job's")
    parser.add_argument("--unsloth", metavar="PYTHON", help="an interpreter with Unsloth: a third column")
    parser.add_argument("--recompute", choices=("on", "off"), help="ours: activation checkpointing; default: the job's")
    parser.add_argument("--family", choices=FAMILIES, default="mistral")
    args = parser.parse_args()
    where = conditions()
    from job.data import batch_plan

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_base(work / "base", args.family)
        tokenizer, examples = read_examples(work / "base")
        plan = [batch_plan.batch(0, len(examples), MICRO_BATCH * ACCUMULATION, step) for step in range(args.steps)]
        targets = [sum(sum(examples[row].targets) for row in rows) for rows in plan]
        lengths = sum(len(example.input_ids) for example in examples) / len(examples)
        print(f"{len(examples)} rows of Alpaca, {lengths:.0f} tokens each")
        ours = train_ours(work / "base", args, tokenizer, examples, work / "ours")
        plain = train_plain(work / "base", args, tokenizer, examples, work / "plain")
        unsloth = train_unsloth(work / "base", args, examples, work / "unsloth") if args.unsloth else None
    rows, details = compare(ours, plain, targets)
    if unsloth:
        print(f"Unsloth: {unsloth}")
        speeds = speed(ours, targets), speed(unsloth, targets)
        rows.append(at_least("training, NF4, beside Unsloth", *speeds, unit="target tokens/s", against="Unsloth"))
        details["unsloth"] = unsloth
    finish(rows, {**details, "mean_tokens": lengths, "dtype": args.dtype}, where, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
