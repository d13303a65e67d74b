"""The third evaluation: the base with its original weights, before it is quantized, on the same questions.

Without it a gain of training cannot be distinguished from a recovered loss of quantization. It is part of the stage
that evaluates the base, and comes first in it. It is a separate model, loaded in addition to the quantized base and
freed afterwards. Its scores are cached like the base's, so that other runs with the same base need not load it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from job import log
from job.common.formatting import size
from job.common.out_of_memory import out_of_memory
from job.common.resources import available_bytes
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.evaluation.scorer import Scores, score_sequences
from job.model.device import short_name
from job.model.files import MAX_CONFIG_BYTES, quantization_method, read_json
from job.model.free_model import free_model
from job.model.load_base import PLAIN, load_base
from job.model.packed_attention import NAME, use
from job.model.whole_modules import grow_embeddings
from job.records import Evaluated, Exported, FullPrecision, Question, ScoringPrecision
from job.runs.attempt import Attempt
from job.runs.layout import FULL_PRECISION, ORIGINAL_SIDE, SCORES, Stage
from job.settings.load import Settings
from job.stages.evaluate import evaluate_base, generation_rules, other_generation, score_model
from job.stages.handoff import Loaded, Sources
from job.stages.pull_model import fetch_original
from job.stages.scoring_precision import choose_precision, other_precision, precision_facts, scoring_in
from job.storage.open import ObjectStore, open_store, storage_options
from job.training.gpu_memory import free_gpu_bytes, give_back_memory
from job.training.memory_model import ORIGINAL_SHARE, evaluation_bytes, weight_bytes
from job.training.setup_of_model import setup_of


def evaluate_bases(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Evaluated | None:
    """Scores the base with its original weights, if that is set and possible, and then the base of training.

    Base scores are cached in the store that contains all runs, for other runs with the same base.

    Raises:
        DataError, Unreachable, AccessDenied: The original weights have to be fetched again, and that fails.
    """
    shared = open_store(settings.run.output, storage_options(settings.storage))
    precision = choose_precision(attempt, settings.eval, sources, loaded, settings.train.gpu_memory_gb)
    original = _evaluate_original(attempt, settings, sources, loaded, shared=shared, precision=precision)
    evaluated = evaluate_base(attempt, settings, sources, loaded, shared=shared, precision=precision)
    if loaded.model.device.type == "cuda":
        give_back_memory()  # of the converted weights: recording a CUDA graph cannot use memory that torch has cached
    if evaluated is None or original is None:
        return evaluated
    return replace(
        evaluated, artifacts=[*evaluated.artifacts, *original.artifacts], full_precision=original.full_precision
    )


def objection_to_base(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, base: Evaluated) -> str:
    """Why the base has to be evaluated again although an earlier attempt did it, in words; empty if it has not.

    Adapter and exports are compared with the base. Those that this attempt evaluates must be evaluated like the base;
    those that an earlier attempt evaluated have been compared already.
    """
    adapter = attempt.recorded(Stage.EVALUATE_ADAPTER, Evaluated)
    rules = generation_rules(settings, sources, loaded.model) if adapter is None else adapter.generation
    if why := other_generation(base, rules):
        return why
    exported = not settings.export.formats or attempt.recorded(Stage.EXPORT, Exported) is not None
    return "" if adapter is not None and exported else other_precision(base, settings.eval, loaded)


def _evaluate_original(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    loaded: Loaded,
    *,
    shared: ObjectStore,
    precision: ScoringPrecision,
) -> Evaluated | None:
    """The evaluation of the original base, as `full_precision` and `artifacts` of a record without other scores.

    None where there is nothing to score: the base is not quantized, or the setting is off; and in all processes but 0.
    """
    if settings.eval.full_precision == "off" or loaded.record.quantization == "none":
        return None
    recorded = attempt.recorded(FULL_PRECISION, Evaluated) if attempt.processes.leads else None
    if recorded is not None and (_scored_otherwise(recorded, precision) or attempt.damaged(recorded.artifacts)):
        recorded = None
    if attempt.processes.broadcast("original base of before", lambda: recorded is not None):
        log.get_logger().info("the original base was evaluated by an earlier attempt")
        return recorded
    folder = attempt.processes.broadcast_on_machine("original base", lambda: str(_folder(attempt, settings, sources)))
    if why := _why_not_scored(attempt, settings, loaded, Path(folder)):
        log.get_logger().warning("the original base is not scored, so the cost of quantization is not known", why=why)
        result = FullPrecision(precision.dtype, {}, why)
        return Evaluated({}, [], full_precision=result) if attempt.processes.leads else None
    try:
        scored = _score(attempt, settings, sources, loaded, folder=Path(folder), shared=shared, precision=precision)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or attempt.processes.place.world_size > 1:  # the others are scoring, and would wait
            raise
        log.get_logger().warning("the original base is not scored: memory ran out", why=str(error).partition("\n")[0])
        return Evaluated(
            {}, [], full_precision=FullPrecision(precision.dtype, {}, "memory ran out while it was scored")
        )
    if scored is None:
        return None
    original = FullPrecision(precision.dtype, scored.scores)
    evaluated = Evaluated({}, scored.artifacts, full_precision=original, precision=precision)
    attempt.write_record(FULL_PRECISION, json.dumps(asdict(evaluated)))
    return evaluated


def _scored_otherwise(recorded: Evaluated, precision: ScoringPrecision) -> bool:
    """Whether an earlier attempt, on another kind of machine, scored it in another precision than the base will be."""
    earlier = recorded.full_precision
    if earlier is None or not earlier.scores:
        return False
    # Older versions recorded no precision, and scored in the dtype of training.
    sums = earlier.dtype if recorded.precision is None else recorded.precision.sums
    return (earlier.dtype, sums) != (precision.dtype, precision.sums)


def _folder(attempt: Attempt, settings: Settings, sources: Sources) -> Path:
    """The base's own files. An attempt that began with the quantized base fetches them again."""
    if sources.original is not None:
        return sources.original
    return fetch_original(attempt, settings.model.id, storage_options(settings.storage), sources.record)


def _why_not_scored(attempt: Attempt, settings: Settings, loaded: Loaded, folder: Path) -> str:
    """Why the original base cannot be scored, in words; empty if it can. One answer for all processes."""
    if quantization_method(read_json(folder / "config.json", MAX_CONFIG_BYTES)) is not None:
        return "the base is only published quantized"
    need, free = _needed_bytes(settings, loaded), _free_bytes(attempt, settings, loaded)
    short = (
        f"it takes {size(need, ' ')} beside the quantized base, and {size(free, ' ')} are free" if need > free else ""
    )
    return next(filter(None, attempt.processes.gather("memory for the original base", short)), "")


def _needed_bytes(settings: Settings, loaded: Loaded) -> int:
    """Bytes of the original weights, and of scoring with them. Logits are assumed to be read at every second token."""
    width: int = loaded.model.get_base_model().dtype.itemsize
    weights = loaded.record.parameters * width
    setup = setup_of(loaded.model, "none", settings.train.optimizer)
    if setup is None:
        return weights
    tokens = settings.eval.batch_tokens
    return weights + evaluation_bytes(setup, tokens, tokens // 2) - weight_bytes(setup)


def _free_bytes(attempt: Attempt, settings: Settings, loaded: Loaded) -> int:
    """Bytes of device memory that scoring the original base may use in this process."""
    if loaded.model.device.type == "cuda":
        return int(ORIGINAL_SHARE * free_gpu_bytes(settings.train.gpu_memory_gb))
    return int(ORIGINAL_SHARE * available_bytes()) // attempt.processes.place.local_world_size


def _score(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    loaded: Loaded,
    *,
    folder: Path,
    shared: ObjectStore,
    precision: ScoringPrecision,
) -> Evaluated | None:
    """Scores with the original weights, which are loaded only if a score is missing in the cache."""
    dtype, device = loaded.model.get_base_model().dtype, loaded.model.device
    facts = {
        "full_precision": loaded.record.sha256,
        "added_tokens": loaded.record.added_tokens,
        "dtype": short_name(dtype),
        "device": device.type,
        "packed": loaded.packing.packed,
        **precision_facts(precision, device),
    }
    score_cache = ScoreCache(shared, SCORES, settings.run.id, score_conditions(facts))

    @cache
    def original() -> Any:
        log.get_logger().info("loading the original base", dtype=short_name(dtype))
        model = load_base(
            folder,
            quantization="none",
            double_quantization=False,
            dtype=dtype,
            device=device,
            max_length=settings.train.max_length,
        )
        if settings.model.add_tokens:
            grow_embeddings(model, len(sources.tokenizer))
        use(model, NAME if loaded.packing.packed else PLAIN)
        return model

    def as_trained(
        _model: Any, questions: list[Question], sequences: Mapping[int, range]
    ) -> Iterator[tuple[int, Scores]]:
        return score_sequences(original(), questions, sequences)

    scoring = scoring_in(precision, original, settings.train.gpu_memory_gb) or as_trained

    try:
        evaluated = score_model(
            attempt, settings, sources, None, cache=score_cache, side=ORIGINAL_SIDE, scoring=scoring, measured=False
        )
    finally:
        if original.cache_info().currsize:
            free_model(original())
    if evaluated is None or (origin := score_cache.reused_from) is None:
        return evaluated
    log.get_logger().info("evaluation of the original base is reused", origin=origin)
    return replace(evaluated, scores={task: replace(s, reused_from=origin) for task, s in evaluated.scores.items()})
