"""The two evaluations: of the base, with the adapter switched off, and of the adapter as it was published."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from job import log
from job.evaluation.harness import evaluate, write_records
from job.evaluation.score_cache import ScoreCache
from job.evaluation.scorer import Scorer
from job.model.lora import adapter_off, load_adapter
from job.records import Evaluated, Trained
from job.runs.attempt import Attempt
from job.runs.layout import SCORES, answers_key
from job.settings.load import Settings
from job.stages.handoff import Loaded, Sources
from job.storage.open import ObjectStore


def evaluate_base(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, shared: ObjectStore
) -> Evaluated | None:
    """Scores all questions with the adapter off; `shared` is where runs leave the scores of their bases.

    Like all stages it gives its result in process 0, and None in the others.
    """
    kept = ScoreCache(shared, SCORES, settings.run.id)
    # Not the names, nor what belongs to the adapter: a base scores the same whatever is trained on it.
    base = {
        **asdict(replace(loaded.record, id="", revision=None, trainable_parameters=0)),
        "forward": loaded.plan.forward,
    }
    scorer = _scorer(attempt, settings, loaded, kept, base)
    with adapter_off(loaded.model):
        found = _evaluate(attempt, settings, sources, scorer, "base")
    others = kept.runs - {settings.run.id}
    if found is None or not others or scorer.scored:
        return found
    origin = f"{shared.uri}/{scorer.folder} (run {', '.join(sorted(others))})"
    log.get_logger().info("base evaluation is reused", origin=origin)
    return replace(found, scores={task: replace(s, reused_from=origin) for task, s in found.scores.items()})


def evaluate_adapter(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, trained: Trained
) -> Evaluated | None:
    """Scores all questions with the published adapter: what is evaluated is what ships."""
    weights = [artifact for artifact in trained.artifacts if "/adapter/adapter_" in artifact.path]
    paths = attempt.processes.share_on_machine(
        "adapter", lambda: [str(attempt.fetch(artifact)) for artifact in weights]
    )
    load_adapter(loaded.model, Path(paths[0]).parent)
    conditions = {
        **asdict(loaded.record),
        "forward": loaded.plan.forward,
        "adapter": [artifact.sha256 for artifact in weights],
    }
    kept = ScoreCache(attempt.store, SCORES, settings.run.id)
    scorer = _scorer(attempt, settings, loaded, kept, conditions)
    return _evaluate(attempt, settings, sources, scorer, "adapter")


def _scorer(
    attempt: Attempt, settings: Settings, loaded: Loaded, kept: ScoreCache, conditions: dict[str, Any]
) -> Scorer:
    return Scorer(
        loaded.model,
        settings.eval.batch_tokens,
        kept,
        conditions,
        processes=attempt.processes,
        alive=attempt.alive,
    )


def _evaluate(attempt: Attempt, settings: Settings, sources: Sources, scorer: Scorer, side: str) -> Evaluated | None:
    if not attempt.processes.leads or sources.tasks is None:
        scorer.help()
        return None
    found = evaluate(sources.tasks, sources.tokenizer, scorer, limit=settings.eval.limit)
    attempt.processes.share("questions", str)  # no more of them
    artifacts, figures = [], {}
    for task, (scores, records) in found.items():
        key = answers_key(task, side)
        write_records(attempt.work / key, records)
        artifacts.append(attempt.publish(attempt.work / key, key))
        figures[task] = scores
        log.get_logger().info("evaluated", task=task, n=scores.n, acc=scores.acc, acc_norm=scores.acc_norm)
    return Evaluated(figures, artifacts)
