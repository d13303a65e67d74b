"""What base and adapter answer to the prompts of `JOB_EVAL__PROMPTS`, greedily: part of the two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from job import log
from job.evaluation.generation import GenerationOptions, generate
from job.evaluation.model_defaults import with_model_defaults
from job.evaluation.parallel_scoring import ParallelScoring
from job.evaluation.prompt_answers import write_answers
from job.evaluation.score_cache import ScoreCache
from job.records import Answer, Artifact
from job.runs.attempt import Attempt
from job.runs.layout import prompts_key
from job.settings.schema import Eval
from job.stages.handoff import Sources
from job.stages.progress import counted
from job.stages.safety import score_answers


def answer_prompts(
    attempt: Attempt, options: Eval, sources: Sources, model: Any, *, side: str, cache: ScoreCache
) -> tuple[list[Artifact], int | None]:
    """Publishes the answers of the model in its current state; all processes call it, and process 0 returns the file.

    Also how many answers are unsafe, where JOB_DATA__SAFETY_MODEL scores them.

    Args:
        attempt: The answers are published in its run.
        options: Maximum tokens of an answer and of a forward pass.
        sources: The prompts, in process 0.
        model: The base, or the base with the adapter.
        side: `base` or `adapter`.
        cache: A separate one: that of the scores records whether all scores are reused, independently of answers.

    Raises:
        TrainingFailed: The logits are not finite.
        Preempted: The job was asked to stop; the answers to finished batches are kept.
    """
    if options.prompts is None:
        return [], None
    parallel = ParallelScoring(attempt.processes, attempt.check_stop)
    if not attempt.processes.leads:
        parallel.help(model, sources.tokenizer)
        return [], None
    prompts = [prompt.ids for prompt in sources.prompts]
    requested = GenerationOptions(options.prompts_max_new_tokens)
    with_defaults = with_model_defaults(requested, sources.folder, model, sources.tokenizer)
    answers = generate_answers(
        attempt,
        model,
        sources.tokenizer,
        prompts,
        options=with_defaults,
        batch_tokens=options.batch_tokens,
        cache=cache,
        parallel=parallel,
        title="prompts",
    )
    parallel.finish()
    key = prompts_key(side)
    unsafe, unsafe_count = None, None
    if sources.safety is not None:
        unsafe = score_answers(sources.safety, [answer.text for answer in answers], attempt.check_stop)
        unsafe_count = sum(score >= sources.safety.record.threshold for score in unsafe)
    write_answers(attempt.work / key, sources.prompts, answers, unsafe)
    log.get_logger().info(
        "answered prompts",
        side=side,
        prompts=len(prompts),
        **({} if unsafe_count is None else {"unsafe": unsafe_count}),
    )
    return [attempt.publish(attempt.work / key, key)], unsafe_count


def generate_answers(
    attempt: Attempt,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    options: GenerationOptions,
    batch_tokens: int,
    cache: ScoreCache,
    parallel: ParallelScoring,
    title: str,
) -> list[Answer]:
    """`generate` by all processes of the run, called in process 0 while the others `help`.

    Args:
        attempt: Counts the answers as its progress (JOB_RUN__MAX_IDLE_ATTEMPTS).
        model: As for `generate`.
        tokenizer: As for `generate`.
        prompts: As for `generate`.
        options: How they are answered.
        batch_tokens: Tokens of a forward pass.
        cache: Stores answers, so that a restart computes only the missing ones.
        parallel: Divides the batches over the processes.
        title: What the log calls the answers.

    Raises:
        TrainingFailed: The logits are not finite.
        Preempted: The job was asked to stop; the answers to finished batches are kept.
    """
    with counted(attempt, title, len(prompts)) as on_progress:
        return generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            stop=options.stop,
            sampling=options.sampling,
            ends=options.ends,
            batch_tokens=batch_tokens,
            cache=cache,
            answer=parallel.answer,
            processes=parallel.processes.place.world_size,
            on_progress=on_progress,
        )
