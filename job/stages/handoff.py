"""What one stage hands to the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.evaluation.tasks import Tasks
from job.model.lora import PublishedNames
from job.model.quantized_cache.layout import CachedBase, CacheEntry
from job.records import Example, ExecutionPlan, ModelRecord, Packing, Pulled
from job.results.baseline import Baseline


@dataclass(frozen=True)
class Sources:
    """What was pulled, in memory; `folder` holds the model's files, which may be those of a kept quantized base.

    `tasks` are where it was pulled, and `baseline`, which the gate looks back to, in process 0; `cache_entry`, where
    the quantized base is to be kept, in the process that pulled.
    """

    record: Pulled
    folder: Path
    quantized: bool
    tokenizer: Any
    examples: list[Example]
    tasks: Tasks | None
    baseline: Baseline | None
    cache_entry: CacheEntry | None


@dataclass(frozen=True)
class Loaded:
    """The model in memory, what the manifest says of it, and how it is going to be trained.

    `kept_base` is where a restart finds the base with these very bits; `names` are those of the adapter's file.
    """

    model: Any
    record: ModelRecord
    micro_batch_tokens: int
    plan: ExecutionPlan
    kept_base: CachedBase
    packing: Packing
    names: PublishedNames
