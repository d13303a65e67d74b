"""Unsloth's column of `cpu_training.py --unsloth PYTHON`, by an interpreter that has Unsloth and its requirements.

Unsloth patches what it imports, and requires other versions of some packages, so this is a separate script: it reads
the base and the examples, in the order of the job's plan, from files, and prints loss and seconds of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

import unsloth  # noqa: F401  before what it patches
from unsloth import FastLanguageModel

# isort: split
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """Loss and seconds by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self.began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops the clock."""
        self.seconds.append(time.monotonic() - self.began)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Records the step's loss."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class InOrder(SFTTrainer):  # type: ignore[misc]
    """Yields the examples in order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def main() -> int:
    """Trains with the settings of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", type=Path, help="JSON: base, examples, the recipe")
    task = json.loads(parser.parse_args().task.read_text(encoding="utf-8"))
    dtype = getattr(torch, task["dtype"])
    model, tokenizer = FastLanguageModel.from_pretrained(
        task["base"], max_seq_length=task["max_length"], dtype=dtype, load_in_4bit=task["nf4"]
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=task["rank"],
        lora_alpha=task["alpha"],
        lora_dropout=0,
        bias="none",
        target_modules=task["target_modules"],
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        InOrder(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(task["examples"]),
            args=SFTConfig(
                output_dir=folder,
                max_length=None,
                dataset_text_field="",
                dataset_kwargs={"skip_prepare_dataset": True},
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **task["arguments"],
            ),
            callbacks=[clock],
        ).train()
    print(json.dumps(list(zip(clock.losses, clock.seconds, strict=True))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
