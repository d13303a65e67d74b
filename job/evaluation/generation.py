r"""Generates answers: prompts in batches, each decoded with a key/value cache.

The steps, each in a file of its own:

    generation_batches    which prompts are answered together, by the memory of a GPU
    decoding              the tokens of a batch's answers: prefill, then one token of every answer in each pass
    token_sampling        which token comes next: the most likely one (greedy decoding), or one that is drawn

A batch is computed as a whole, and batches depend only on what a restart has as well. Therefore a restarted evaluation
computes the same bits; other batches would change the last bits of the logits. If memory runs out, optimizations that
only save time are switched off for that batch (`answer_batch`).

Options of a model's generation_config.json other than the end-of-sequence tokens, such as a repetition penalty, are not
applied (`model_defaults`).

In a REPL, with a model and a tokenizer as in `job.evaluation.scorer`:

    >>> from job.evaluation.generation import generate
    >>> prompts = [tuple(tokenizer.encode("Question: What is red?\nAnswer:"))]
    >>> [answer.text for answer in generate(model, tokenizer, prompts, max_new_tokens=8, stop=["\n"])]
    ['...']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from job.common.formatting import count, size
from job.common.out_of_memory import free_caches, out_of_memory, ran_out
from job.errors import TrainingFailed
from job.evaluation.generation_batches import BATCH_TOKENS, batches_for_model, token_bytes
from job.evaluation.resumable import Keeps, complete
from job.evaluation.token_sampling import Draws, Sampling
from job.log import get_logger
from job.records import Answer


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated.

    Attributes:
        max_new_tokens: Maximum number of tokens of an answer.
        stop: An answer is cut off before the first of these texts, as in lm-eval (`until`).
        sampling: How tokens are sampled; None for greedy decoding.
        ends: Token ids that end an answer, besides the end of sequence of the tokenizer and of config.json.
        pass_tokens: Maximum number of tokens of one forward pass over prompts, with padding.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling | None = None
    ends: tuple[int, ...] = ()
    pass_tokens: int = BATCH_TOKENS


AnswerBatches = Callable[
    [Any, Any, Sequence[Sequence[int]], Mapping[int, Sequence[int]], GenerationOptions],
    Iterator[tuple[int, list[Answer]]],
]
"""Answers batches: (model, tokenizer, token ids of all prompts, batch number -> its prompts' numbers, how) -> (batch
number, its answers in the order of its prompts), batches in any order."""


class AnswerCache(Keeps, Protocol):
    """Keeps answers for a restart: `score_cache.ScoreCache`."""

    def load_answers(
        self, prompts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], options: GenerationOptions
    ) -> dict[int, list[Answer]]:
        """The cached answers by number of the batch."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    sampling: Sampling | None = None,
    ends: Sequence[int] = (),
    cache: AnswerCache | None = None,
    answer: AnswerBatches | None = None,
    processes: int = 1,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The model's answer to each prompt, in order.

    Args:
        model: A causal language model from `load_base`, with or without an adapter.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt, not empty. Prompt and answer together must fit into the model's window.
        max_new_tokens: As in `GenerationOptions`.
        stop: As in `GenerationOptions`.
        batch_tokens: Maximum tokens of one forward pass over prompts; affects only the last bits of the logits.
        sampling: As in `GenerationOptions`.
        ends: As in `GenerationOptions`.
        cache: Answers found here are not computed again; new ones are added, batch by batch.
        answer: Answers batches; None for `answer_batches`.
        processes: Number of processes that `answer` divides the batches over.
        on_progress: Called with the number of prompts answered so far.

    Raises:
        TrainingFailed: The logits are not finite, or memory ran out.
    """
    options = GenerationOptions(max_new_tokens, tuple(stop), sampling, tuple(ends), batch_tokens)
    lengths = [len(prompt) for prompt in prompts]
    batches = batches_for_model(model, lengths, max_new_tokens, batch_tokens, processes=processes)
    by_batch = {} if cache is None else cache.load_answers(prompts, batches, options)
    missing = {number: batch for number, batch in enumerate(batches) if number not in by_batch}
    complete(by_batch, (answer or answer_batches)(model, tokenizer, prompts, missing, options), cache, on_progress)
    by_prompt = {
        prompt: one for number, batch in enumerate(batches) for prompt, one in zip(batch, by_batch[number], strict=True)
    }
    return [by_prompt[number] for number in range(len(prompts))]


def answer_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batches: Mapping[int, Sequence[int]],
    options: GenerationOptions,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, list[Answer]]]:
    """Answers batches one after the other, in this process; arguments as for `answer_batch`.

    Raises:
        TrainingFailed: The logits are not finite.
    """
    for number, batch in batches.items():
        yield (
            number,
            answer_batch(model, tokenizer, [(prompt, prompts[prompt]) for prompt in batch], options, check_stop),
        )


def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, Sequence[int]]],
    options: GenerationOptions,
    check_stop: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answers to the prompts of a batch, in order; computed one by one if the model cannot be packed.

    If memory runs out, the batch is computed once more with the base's weights dequantized for each use, which gives
    the same bits. If they already are, or memory runs out again, `TrainingFailed` is raised.

    Args:
        model: As for `generate`.
        tokenizer: As for `generate`.
        prompts: (number, token ids) of each; the number seeds the prompt's random generator when tokens are sampled.
        options: How answers are generated.
        check_stop: Called before every forward pass. If it raises, for instance because the job has to stop, the batch
            has no answers; a restart computes all of it again, with the same bits.

    Raises:
        TrainingFailed: The logits are not finite, or memory ran out.
    """
    from job.model.fused.frozen_weights import without_dequantized

    try:
        return _answered(model, tokenizer, prompts, options, check_stop)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = error.with_traceback(None)  # its frames hold the cache
    with without_dequantized(model) as freed:
        if not freed:
            raise _too_small(model, prompts, options, failed) from failed
        what = "out of GPU memory: a batch of answers is computed again without the base's dequantized weights"
        change = "a smaller JOB_EVAL__BATCH_TOKENS, or JOB_MODEL__KEEP_DEQUANTIZED=false"
        get_logger().warning(what, prompts=len(prompts), change=change)
        free_caches()
        try:
            return _answered(model, tokenizer, prompts, options, check_stop)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise _too_small(model, prompts, options, error) from error


def _too_small(
    model: Any, prompts: Sequence[tuple[int, Sequence[int]]], options: GenerationOptions, error: BaseException
) -> TrainingFailed:
    """The error for a batch for which memory is too small, with its figures and the settings that it depends on."""
    longest, new = max(len(ids) for _, ids in prompts), options.max_new_tokens
    what = f"{count(len(prompts), 'prompt')} of at most {longest:,} tokens got up to {new:,} more each"
    if per_token := token_bytes(model):
        what += f", for which the cache takes up to {size(len(prompts) * (longest + new) * per_token, ' ')}"
    fewer = "JOB_EVAL__BATCH_TOKENS, so that fewer are answered at a time, or " if len(prompts) > 1 else ""
    fix = f"lower {fewer}JOB_EVAL__PROMPTS_MAX_NEW_TOKENS or the max_gen_toks of the task"
    return ran_out(what, fix, error)


def _answered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, Sequence[int]]],
    options: GenerationOptions,
    check_stop: Callable[[], None],
) -> list[Answer]:
    """`answer_batch` with the memory that there is."""
    from job.evaluation.decoding import AnswerEnd, Row, decode_batch  # torch is a heavy import

    ends = end_tokens(model, tokenizer) | set(options.ends)
    rows = [Row(tuple(ids), Draws(options.sampling, number)) for number, ids in prompts]
    end = AnswerEnd(tokenizer, ends, tuple(text for text in options.stop if text), options.max_new_tokens)
    decode_batch(model, rows, end, pass_tokens=options.pass_tokens, check_stop=check_stop)
    return [row.answer for row in rows]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those that config.json names."""
    named = model.config.get_text_config(decoder=True).eos_token_id
    return frozenset({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})
