"""The records that one stage passes to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.examples import Examples
from job.evaluation.policy import Policy
from job.evaluation.tasks import Tasks
from job.model.published_names import PublishedNames
from job.model.quantized_cache.layout import CachedBase, CacheEntry
from job.records import Example, ExecutionPlan, ModelRecord, Packing, PromptRow, Pulled
from job.results.baseline import Baseline
from job.stages.principles import FoundJudge
from job.stages.safety import SafetyModel


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The result of the pull stage. `folder` holds the model's files, or those of a cached quantized base.

    `examples` are the training examples, `validation` those for validation, empty if there is none.
    `start` is the folder of the adapter that training starts from; None for a new one.
    `findings` is the file of what the audit found in the rows.
    `prompts` are those of JOB_EVAL__PROMPTS; empty if nothing is asked.
    `original` is the folder of the base's own files; None if a restart has only the quantized base.

    Only the process that pulled, the first on its machine, has `tasks`, `prompts`, `baseline` (results of an earlier
    run that the gate compares with), `policy` (the rules that the gate judges by), `cache_entry` (where the quantized
    base is cached), `safety` (the classifier of JOB_DATA__SAFETY_MODEL) and, in process 0 only, `judge` (that of
    JOB_EVAL__PRINCIPLES); the others have none.
    """

    record: Pulled
    folder: Path
    quantized: bool
    tokenizer: Any
    examples: Examples
    validation: Sequence[Example]
    start: Path | None = None
    tasks: Tasks | None = None
    baseline: Baseline | None = None
    policy: Policy | None = None
    cache_entry: CacheEntry | None = None
    original: Path | None = None
    prompts: Sequence[PromptRow] = ()
    findings: Path | None = None
    safety: SafetyModel | None = None
    judge: FoundJudge | None = None


@dataclass(frozen=True)
class Loaded:
    """The model in memory, its record for the manifest, and how it will be trained.

    `kept_base` is where a restart finds the same quantized base, bit for bit; `names` are the tensor names in the
    adapter's file.
    """

    model: Any
    record: ModelRecord
    micro_batch_tokens: int
    plan: ExecutionPlan
    kept_base: CachedBase
    packing: Packing
    names: PublishedNames
