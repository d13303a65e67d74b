"""The two evaluations of every run: of the base, with the adapter switched off, and of the published adapter.

Like all stages they return their result in process 0, and None in the others, which help to score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from job import log
from job.common.hashing import seal
from job.evaluation.generation import GenerationOptions
from job.evaluation.harness import evaluate, measure
from job.evaluation.model_defaults import with_model_defaults
from job.evaluation.parallel_scoring import ParallelScoring
from job.evaluation.samples import MeasuredSample, Sample, write_samples
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.evaluation.scorer import Scores, ScoreSequences, score_questions, score_sequences
from job.evaluation.task_metrics import LARGEST_PERPLEXITY, aggregate, generation_options
from job.model.adapter_files import load_adapter
from job.model.lora import adapter_off
from job.model.packed_attention import is_packed
from job.records import (
    Answer,
    Artifact,
    Evaluated,
    MeasuredScores,
    ModelRecord,
    Question,
    ScoringPrecision,
    Trained,
)
from job.runs.attempt import Attempt
from job.runs.layout import SCORES, answers_key
from job.settings.load import Settings
from job.stages.handoff import Loaded, Sources
from job.stages.principles import judge_answers, published_answers
from job.stages.progress import counted
from job.stages.prompts import answer_prompts, generate_answers
from job.stages.scoring_precision import precision_facts, scoring_in
from job.storage.open import ObjectStore


def evaluate_base(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    loaded: Loaded,
    *,
    shared: ObjectStore,
    precision: ScoringPrecision,
) -> Evaluated | None:
    """Scores all questions, and answers the prompts that are asked, with the adapter switched off.

    `shared` is the store that contains all runs: base scores are cached there for other runs with the same base.
    """
    scoring = scoring_in(precision, lambda: loaded.model, settings.train.gpu_memory_gb)
    facts = {**base_facts(loaded), **precision_facts(precision, loaded.model.device)}
    cache = ScoreCache(shared, SCORES, settings.run.id, score_conditions(facts))
    with adapter_off(loaded.model):
        evaluated = score_model(attempt, settings, sources, loaded.model, cache=cache, side="base", scoring=scoring)
        answer_cache = ScoreCache(attempt.store, SCORES, settings.run.id, score_conditions(facts))
        answers, unsafe = answer_prompts(attempt, settings.eval, sources, loaded.model, side="base", cache=answer_cache)
    if evaluated is None:
        return None
    evaluated = replace(
        evaluated,
        artifacts=[*evaluated.artifacts, *answers],
        generation=generation_rules(settings, sources, loaded.model),
        precision=precision,
        unsafe_answers=unsafe,
    )
    if (origin := cache.reused_from) is None:
        return evaluated
    log.get_logger().info("base evaluation is reused", origin=origin)
    return replace(
        evaluated,
        scores={task: replace(s, reused_from=origin) for task, s in evaluated.scores.items()},
        measured={task: replace(s, reused_from=origin) for task, s in evaluated.measured.items()},
    )


def evaluate_adapter(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, *, base: Evaluated, trained: Trained
) -> Evaluated | None:
    """Scores all questions, and answers the prompts, with the adapter read back from the store: the published file.

    Its answers and those of `base` are then compared by the judge of JOB_EVAL__PRINCIPLES.
    """
    weights = load_published_adapter(attempt, loaded, trained)
    adapted = {**forward_facts(loaded, loaded.record), **precision_facts(base.precision, loaded.model.device)}
    adapted["adapter"] = [artifact.sha256 for artifact in weights]
    cache = ScoreCache(attempt.store, SCORES, settings.run.id, score_conditions(adapted))
    scoring = scoring_in(base.precision, lambda: loaded.model, settings.train.gpu_memory_gb)
    evaluated = score_model(attempt, settings, sources, loaded.model, cache=cache, side="adapter", scoring=scoring)
    answer_cache = ScoreCache(attempt.store, SCORES, settings.run.id, score_conditions(adapted))
    answers, unsafe = answer_prompts(attempt, settings.eval, sources, loaded.model, side="adapter", cache=answer_cache)
    if evaluated is None:
        return None
    judgements, answers_by_side = [], {}
    if sources.judge is not None:
        answers_by_side = {
            "base": published_answers(base.artifacts, "base"),
            "adapter": published_answers(answers, "adapter"),
        }
        judgements = [judge_answers(attempt, settings.eval, settings.run, sources.judge, answers_by_side)]
    return replace(
        evaluated,
        artifacts=[*evaluated.artifacts, *answers, *judgements],
        generation=generation_rules(settings, sources, loaded.model),
        precision=base.precision,
        judged=None if sources.judge is None else sources.judge.record,
        judged_answers={side: artifact.sha256 for side, artifact in answers_by_side.items()},
        unsafe_answers=unsafe,
    )


def generation_rules(settings: Settings, sources: Sources, model: Any) -> dict[str, str]:
    """`Evaluated.generation` by this version: task -> hash of the options that its answers are generated with.

    In process 0, which has the tasks.

    A later attempt may be by another version, in which other tokens end an answer. The answers of base and adapter can
    be compared only if both were generated alike.
    """
    generating = {} if sources.tasks is None else sources.tasks.only("generate_until").loaded["tasks"]
    options_by_task = {
        name: generation_options(name, task.config.generation_kwargs or {}, seed=settings.run.seed)
        for name, task in generating.items()
    }
    if settings.eval.prompts is not None:
        options_by_task["JOB_EVAL__PROMPTS"] = GenerationOptions(settings.eval.prompts_max_new_tokens)
    complete_options = {
        name: with_model_defaults(options, sources.folder, model, sources.tokenizer)
        for name, options in options_by_task.items()
    }
    return {name: seal(asdict(options)) for name, options in complete_options.items()}


def other_generation(evaluated: Evaluated, expected: Mapping[str, str]) -> str:
    """What was generated otherwise than `expected`, in words; empty if nothing was."""
    differing = sorted(
        name for name in {*evaluated.generation, *expected} if evaluated.generation.get(name) != expected.get(name)
    )
    return (
        f"the answers of {', '.join(differing)} were generated by the rules of another version of the job"
        if differing
        else ""
    )


def other_answers_judged(adapter: Evaluated, base: Evaluated) -> str:
    """A text if the judge compared other answers than the base's; empty if not, or if unknown."""
    judged = adapter.judged_answers.get("base")
    if judged is None or judged == published_answers(base.artifacts, "base").sha256:
        return ""
    return "the base's answers have changed since they were judged"


def load_published_adapter(attempt: Attempt, loaded: Loaded, trained: Trained) -> list[Artifact]:
    """Puts the adapter that was published into the model; returns its files."""
    weights = [artifact for artifact in trained.artifacts if "/adapter/adapter_" in artifact.path]
    paths = attempt.processes.broadcast_on_machine(
        "adapter", lambda: [str(attempt.fetch(artifact)) for artifact in weights]
    )
    load_adapter(loaded.model, Path(paths[0]).parent, loaded.names)
    return weights


def forward_facts(loaded: Loaded, record: ModelRecord) -> dict[str, Any]:
    """Everything that affects the bits of a forward pass, except the adapter's weights."""
    return {**asdict(record), "forward": loaded.plan.scoring_forward, "packed": is_packed(loaded.model)}


def base_facts(loaded: Loaded) -> dict[str, Any]:
    """`forward_facts` of the base alone, without its name and the adapter's properties: they do not change the bits."""
    unnamed = replace(loaded.record, id="", revision=None, trainable_parameters=0, adapted=[])
    return forward_facts(loaded, unnamed)


def score_model(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    model: Any,
    *,
    cache: ScoreCache,
    side: str,
    scoring: ScoreSequences | None = None,
    one_by_one: bool = False,
    measured: bool = True,
) -> Evaluated | None:
    """Process 0 distributes the questions and publishes the samples; the other processes score their share.

    `scoring` is how one process scores sequences, if not by the model's own forward pass; with `one_by_one` each
    sequence is one question. Without `measured`, tasks without choices are left out.
    """
    parallel = ParallelScoring(attempt.processes, attempt.check_stop, scoring or score_sequences)
    if not attempt.processes.leads or sources.tasks is None:
        parallel.help(model, sources.tokenizer)
        return None

    def score(questions: list[Question]) -> Scores:
        with counted(attempt, "questions", len(questions)) as on_progress:
            return score_questions(
                model,
                questions,
                1 if one_by_one else settings.eval.batch_tokens,
                cache=cache,
                score=parallel.score,
                on_progress=on_progress,
            )

    def answer(prompts: list[tuple[int, ...]], options: GenerationOptions) -> list[Answer]:
        return generate_answers(
            attempt,
            model,
            sources.tokenizer,
            prompts,
            options=with_model_defaults(options, sources.folder, model, sources.tokenizer),
            batch_tokens=settings.eval.batch_tokens,
            cache=cache,
            parallel=parallel,
            title="answers",
        )

    cut_to = settings.train.max_length if settings.eval.long_questions == "cut" else None
    options: dict[str, Any] = {"limit": settings.eval.limit, "cut_to": cut_to}
    multiple_choice = evaluate(sources.tasks, sources.tokenizer, score, **options)
    measured_tasks: Mapping[str, tuple[MeasuredScores, list[MeasuredSample]]] = {}
    if measured:
        options |= {"max_length": settings.train.max_length, "seed": settings.run.seed}
        measured_tasks = measure(sources.tasks, sources.tokenizer, score, answer, **options)
    parallel.finish()

    def published(task: str, samples: Sequence[Sample] | Sequence[MeasuredSample]) -> Artifact:
        key = answers_key(task, side)
        write_samples(attempt.work / key, samples)
        return attempt.publish(attempt.work / key, key)

    artifacts = [published(task, samples) for task, (_, samples) in multiple_choice.items()]
    artifacts += [published(task, samples) for task, (_, samples) in measured_tasks.items()]
    evaluated = Evaluated(
        {task: scores for task, (scores, _) in multiple_choice.items()},
        artifacts,
        {task: figures for task, (figures, _) in measured_tasks.items()},
    )
    _log_figures(evaluated, side)
    return evaluated


def _log_figures(evaluated: Evaluated, side: str) -> None:
    """Logs a line for each task."""
    for task, scores in evaluated.scores.items():
        log.get_logger().info("evaluated", task=task, model=side, n=scores.n, acc=scores.acc, acc_norm=scores.acc_norm)
    for task, figures in evaluated.measured.items():
        aggregated = {
            name: aggregate(figures.values[name], metric.aggregation) for name, metric in figures.metrics.items()
        }
        log.get_logger().info("evaluated", task=task, model=side, n=figures.n, **aggregated)
        if limited := [name for name, value in aggregated.items() if value == LARGEST_PERPLEXITY]:
            fix = "read bits_per_byte, or the comparison, which is by logarithms and has no limit"
            log.get_logger().warning("a perplexity above 1e18 is given as 1e18", task=task, metrics=limited, fix=fix)
