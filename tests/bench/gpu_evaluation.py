"""Evaluation on a GPU: the job's scorer against lm-eval's own HFLM, at Mistral-7B's shape in NF4.

`python tests/bench/gpu_evaluation.py --alpaca FILE --arc FILE [--tiny]`: both answer the same ARC-Easy questions by
lm-eval's task with the same random weights in bf16. Random weights win by next to nothing, so how far the two sides'
log-likelihoods are apart says more than how many predictions differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from job.model.lora import add_adapter
from job.settings.schema import Eval
from job.training.prepare import prepare
from tests.bench import shapes
from tests.bench.cpu_evaluation import TASK, by_hflm, by_ours, differing
from tests.gpu.job import make_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ours(shape: dict[str, int]) -> Any:
    """The model with its adapter, made ready as the job does it."""
    model = add_adapter(
        shapes.random_base(shape, DEVICE, "flat"), rank=16, alpha=16, dropout=0.0, target_modules=shapes.MODULES, seed=0
    )
    lengths = shapes.LENGTHS["alpaca"]
    prepare(
        model,
        lengths,
        global_batch_size=32,
        quantization="nf4",
        optimizer="adamw_8bit",
        budget=16384,
        keep_base="auto",
        recompute="auto",
        gigabytes=None,
    )
    return model.eval()


def main() -> None:
    """Measures and prints JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alpaca", type=Path, required=True)
    parser.add_argument("--arc", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch-sizes", nargs="+", default=["auto", "64"], help="of HFLM")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from job.evaluation.tasks import load_tasks

    shape = shapes.TINY if asked.tiny else shapes.MISTRAL_7B
    texts = [" ".join(json.loads(row).values()) for row in asked.alpaca.read_text(encoding="utf-8").splitlines()]
    tasks = load_tasks([TASK], {TASK: asked.arc}, {TASK: asked.arc.name})
    with tempfile.TemporaryDirectory() as name:
        tokenizer = make_tokenizer(Path(name), texts, shape["vocab_size"])
        model = ours(shape)
        by_ours(tasks, model, tokenizer, 100, None)
        answers, seconds = by_ours(tasks, model, tokenizer, asked.questions, None)
        speed = len(answers) / seconds
        say = {"questions": len(answers), "batch_tokens": Eval().batch_tokens}
        print(json.dumps({"side": "ours", "seconds": seconds, "questions_per_second": speed, **say}), flush=True)
        del model
        gc.collect()
        plain = shapes.random_base(shape, DEVICE, "sdpa")
        by_hflm(tasks, plain, tokenizer, 20, "4", device=str(DEVICE))
        for size in asked.batch_sizes:
            theirs, seconds = by_hflm(tasks, plain, tokenizer, asked.questions, size, device=str(DEVICE))
            figures = {
                "seconds": seconds,
                "questions_per_second": len(theirs) / seconds,
                "ratio": speed * seconds / len(theirs),
                "predictions_that_differ": len(differing(answers, theirs)),
                "furthest_apart": max(
                    abs(a - b) for x, y in zip(answers, theirs, strict=True) for a, b in zip(x, y, strict=True)
                ),
            }
            print(json.dumps({"side": f"HFLM, batch {size}", **figures}), flush=True)


if __name__ == "__main__":
    main()
