"""Presets: named sets of values that replace the defaults in `schema`.

To add one: an entry here, and its name in the type of `Settings.preset`. Values for the groups `model` and `data`, and
for other settings marked with `BelongsTo`, apply only while the preset's own model or data is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_DEMO = Path(__file__).parents[1] / "demo"

PRESETS: Mapping[str, Mapping[str, object]] = {
    # The reference recipe: the defaults, on pinned revisions of the hub.
    "mistral-7b-alpaca": {
        "run.device": "gpu",
        "model.id": "mistralai/Mistral-7B-v0.1",
        "model.revision": "27d67f1b5f57dc0953326b2601d68371d40ea8da",
        "data.source": "tatsu-lab/alpaca",
        "data.revision": "dce01c9b08f87459cf36a430d809084718273017",
        "data.limit": 1500,
        "data.on_bad_row": "skip",  # 28 rows of Alpaca have an empty output
    },
    # No GPU and no network: everything it needs is in the package.
    "demo": {
        "run.device": "auto",
        "model.id": str(_DEMO / "base"),
        "model.dtype": "fp32",
        "data.source": str(_DEMO / "instructions.jsonl"),
        "data.limit": None,
        "train.epochs": 4,
        "train.learning_rate": 4e-3,
        "train.max_length": 512,
        "checkpoint.every_steps": 20,
        "eval.data": {"arc_easy": str(_DEMO / "questions.jsonl")},
    },
    # The same with pairs of a right and a wrong answer instead of instructions.
    "demo-dpo": {
        "run.device": "auto",
        "model.id": str(_DEMO / "base"),
        "model.dtype": "fp32",
        "data.source": str(_DEMO / "preferences.jsonl"),
        "data.limit": None,
        "train.method": "dpo",
        "train.epochs": 3,
        "train.learning_rate": 4e-3,
        "train.max_length": 512,
        "checkpoint.every_steps": 20,
        "eval.data": {"arc_easy": str(_DEMO / "questions.jsonl")},
    },
}
