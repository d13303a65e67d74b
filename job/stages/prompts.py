"""What base and adapter answer to the prompts of `JOB_EVAL__PROMPTS`, greedily: part of the two evaluations.

The batches are divided over the processes. Process 0 keeps the answers of each batch in the run's store as soon as they
are there, so that a restart computes the others only, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.common.hashing import code_hashes, sealed, unsealed
from job.evaluation.generation import HowToGenerate, answer_batch, plan_batches
from job.evaluation.prompt_answers import write_answers
from job.evaluation.score_cache import score_conditions
from job.records import Answer, Artifact, PromptRow
from job.runs.attempt import Attempt
from job.runs.layout import SCORES, prompts_key
from job.settings.schema import Eval
from job.stages.handoff import Sources

CODE = ("job.evaluation.generation",)
"""Modules whose code decides the answers, beside those that decide scores."""
_POLL_SECONDS = 0.01
_ROWS = TypeAdapter(list[PromptRow])
_ANSWERS = TypeAdapter(list[Answer])


def answer_prompts(
    attempt: Attempt, options: Eval, sources: Sources, model: Any, *, side: str, conditions: Mapping[str, Any]
) -> list[Artifact]:
    """Publishes the answers of the model as it is now; all processes call it, and process 0 returns the file.

    Args:
        attempt: Where it is published.
        options: How many tokens an answer may have, and those of a forward pass.
        sources: The prompts, in process 0.
        model: The base, or the base with the adapter.
        side: `base` or `adapter`.
        conditions: All that decides the bits of a forward pass.

    Raises:
        TrainingFailed: The logits are not finite.
        Preempted: The job was asked to stop; the answers to finished batches are kept.
    """
    if options.prompts is None:
        return []
    processes, most = attempt.processes, options.prompts_max_new_tokens
    prompts = _ROWS.validate_json(processes.share("prompts", lambda: _ROWS.dump_json(list(sources.prompts)).decode()))
    batches = plan_batches([len(prompt.ids) for prompt in prompts], most, options.batch_tokens)
    facts = score_conditions({**conditions, "generation": code_hashes(*CODE)})
    identity = json.dumps([facts, [prompt.ids for prompt in prompts], batches, most], sort_keys=True)
    folder = f"{SCORES}/prompts-{hashlib.sha256(identity.encode()).hexdigest()}"
    known: dict[int, list[Answer]] = {}
    if processes.leads:
        known = {
            number: found for number, batch in enumerate(batches) if (found := _kept(attempt, folder, number, batch))
        }
    done = set(processes.share("prompts that are answered", lambda: sorted(known)))
    left = [number for number in range(len(batches)) if number not in done]

    def answer(number: int) -> list[Answer]:
        rows = [(index, prompts[index].ids) for index in batches[number]]
        return answer_batch(model, sources.tokenizer, rows, HowToGenerate(most))

    own = ((number, answer(number)) for number in _share_of(attempt, left))
    if not processes.leads:
        for number, answers in own:
            processes.send([number, _ANSWERS.dump_python(answers)])
        return []
    with log.progress("prompts", len(prompts), every=max(1, len(prompts) // 10)) as show_progress:
        show_progress(sum(map(len, known.values())))
        for number, answers in _arriving(attempt, own, len(left)):
            attempt.store.write(_key(folder, number), sealed({"answers": [asdict(one) for one in answers]}))
            known[number] = answers
            attempt.questions += len(answers)  # progress, for the limit of attempts without any
            show_progress(sum(map(len, known.values())))
    of_prompt = {
        index: one for number, batch in enumerate(batches) for index, one in zip(batch, known[number], strict=True)
    }
    return [_publish(attempt, side, prompts, [of_prompt[index] for index in range(len(prompts))])]


def _share_of(attempt: Attempt, left: Sequence[int]) -> Iterator[int]:
    """The batches of this process: every n-th, where n is the number of processes."""
    place = attempt.processes.place
    for number in left[place.rank :: place.world_size]:
        attempt.alive()
        yield number


def _arriving(
    attempt: Attempt, own: Iterator[tuple[int, list[Answer]]], expected: int
) -> Iterator[tuple[int, list[Answer]]]:
    """The batches in process 0, in the order in which any process has answered them."""

    def received() -> list[tuple[int, list[Answer]]]:
        return [(number, _ANSWERS.validate_python(found)) for number, found in attempt.processes.receive()]

    for found in own:
        arrived = [found, *received()]
        expected -= len(arrived)
        yield from arrived
    while expected:
        arrived = received()
        attempt.alive(progress=bool(arrived))
        expected -= len(arrived)
        yield from arrived
        if not arrived:
            time.sleep(_POLL_SECONDS)


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number:05d}.json"


def _kept(attempt: Attempt, folder: str, number: int, batch: Sequence[int]) -> list[Answer]:
    """The answers of a batch that an earlier attempt kept; empty if there are none, or they are damaged."""
    key = _key(folder, number)
    stored = attempt.store.read(key)
    if stored is None:
        return []
    try:
        found = _ANSWERS.validate_python(unsealed(stored.data)["answers"])
    except (ValueError, KeyError) as error:  # pydantic's error is a ValueError
        why = str(error).splitlines()[0]
        log.get_logger().warning("kept answers are damaged and computed again", key=key, why=why)
        return []
    return found if len(found) == len(batch) else []


def _publish(attempt: Attempt, side: str, prompts: Sequence[PromptRow], answers: Sequence[Answer]) -> Artifact:
    key = prompts_key(side)
    write_answers(attempt.work / key, prompts, answers)
    log.get_logger().info("answered prompts", side=side, prompts=len(prompts))
    return attempt.publish(attempt.work / key, key)
