"""The process in which auto-round quantizes a model, started by `job.export.autoround`.

auto-round changes transformers where it is imported, runs for minutes to hours without a place to stop at, and ends the
interpreter when it refuses something. So it runs in a separate process, which the job can end at any moment.

It reads a `Task` from the file that is its argument. When its input ends, the job has ended, and so does it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any


@dataclass(frozen=True)
class Task:
    """What to quantize, and how.

    Attributes:
        merged: Folder of the model.
        output: Folder in which auto-round makes a folder; it chooses that folder's name.
        layout: How the weights are written, by auto-round's name: `llm_compressor`, `auto_gptq`, `auto_awq`.
        group_size: Weights that share a scale.
        sequences: Token ids of the calibration, all of one length.
        steps: In which the rounding of a decoder layer is optimized; 0 rounds to the nearest.
        seed: Seed of the order of the sequences.
        device: `cpu`, or `cuda:0`.
        threads: Number of torch's threads, which determines the last bits on a CPU.
    """

    merged: str
    output: str
    layout: str
    group_size: int
    sequences: list[list[int]]
    steps: int
    seed: int
    device: str
    threads: int


BATCH = 8
"""Sequences of an optimization step, as auto-round has it."""


def main() -> None:
    """Quantizes, and ends with the exit code of what it raises."""
    os.dup2(2, 1)  # the output of libraries is not read, and a full pipe would block them
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Thread(target=_end_with_the_job, daemon=True).start()
    import auto_round  # noqa: F401

    # auto-round collects garbage after every layer: without this each time over the millions of objects of libraries
    gc.freeze()
    quantize(task)


def _end_with_the_job() -> None:
    # Not by sys.stdin, whose lock this thread would hold when the interpreter ends, which aborts it.
    while os.read(0, 1):
        pass
    os._exit(1)


def quantize(task: Task) -> None:
    """Writes the quantized model, with config.json, below `task.output`."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    torch.set_num_threads(task.threads)
    rows = [torch.tensor([tokens]) for tokens in task.sequences]
    # With a mask: without one auto-round takes repeated tokens at a sequence's end for padding.
    calibration: list[Any] = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    quantizer = AutoRound(
        task.merged,
        tokenizer=AutoTokenizer.from_pretrained(task.merged, trust_remote_code=False),
        scheme="W4A16",
        group_size=task.group_size,
        dataset=calibration,
        nsamples=len(calibration),
        seqlen=len(task.sequences[0]),
        batch_size=min(BATCH, len(calibration)),
        iters=task.steps,
        seed=task.seed,
        device_map=task.device,
        format=task.layout,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        enable_deterministic_algorithms=True,
        disable_model_free=True,
        trust_remote_code=False,
    )
    quantizer.quantize_and_save(task.output, format=task.layout)
