r"""Generates answers: prompts in left-padded batches, with a key/value cache.

    prompts of a batch:   . . p p p | a a a a        p prompt, a answer, . padding, which no token attends to
                          p p p p p | a a            (an answer that has ended is removed from batch and cache)

The prompts of a batch are read first (prefill), in several forward passes if one would have too many tokens
(`_read_prompts`). Then each forward pass adds one token to every answer of the batch (decoding). On a GPU such a pass
takes as long for a hundred answers as for ten, so batches are as large as the memory for the cache allows
(`_cache_tokens`, `_fitting_tokens`). If memory still runs out, optimizations that only save time are switched off for
that batch (`answer_batch`).

Batches depend only on all prompts, the model, the kind of device and the number of processes (`plan_batches`), and a
batch is computed as a whole. Therefore a restarted evaluation computes the same bits; other batches would change the
last bits of the logits.

Greedy decoding takes the most likely token. Sampling draws from the softmax (`Sampling`), with a random generator for
each prompt. Other options of a model's generation_config.json, such as a repetition penalty, are not applied
(`model_defaults`).

In a REPL, with a model and a tokenizer as in `job.evaluation.scorer`:

    >>> from job.evaluation.generation import generate
    >>> prompts = [tuple(tokenizer.encode("Question: What is red?\nAnswer:"))]
    >>> [answer.text for answer in generate(model, tokenizer, prompts, max_new_tokens=8, stop=["\n"])]
    ['...']
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from job.common.formatting import count, size
from job.common.out_of_memory import free_caches, out_of_memory, ran_out
from job.errors import TrainingFailed
from job.evaluation.resumable import Keeps, complete
from job.log import get_logger
from job.records import Answer

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 8192
"""Maximum number of tokens of one forward pass over prompts, with padding."""
CACHE_BATCHES = 4
"""A batch of one prefill pass may have this many times `BATCH_TOKENS` in its cache, prompts and answers together."""
_CACHE_SHARE = 1 / 16
"""Share of a GPU's memory that the cache of a larger batch, read in several passes, may take; a batch read in one pass
may take twice as much. A token of a model without shared key/value heads takes half a megabyte."""
_FITTING_SHARE = 0.9
"""Share of the memory that weights and forward pass leave, which a cache may take: the allocator cannot use it all."""
_CONTEXT_BYTES = 600 << 20
"""Memory of the driver and the libraries' workspaces on a GPU. Assumed, like `CONTEXT_BYTES` of the forecast."""
_MOST_ROWS = 256
"""Maximum number of prompts in a batch that is read in several passes: its logits are (prompts, vocabulary)."""
_DRAWN_ROWS = 32
"""Rows that are sampled at once: each takes about 50 bytes for each entry of the vocabulary meanwhile."""
_SLACK_TOKENS = 4
"""When the end of an answer is searched for a stop text, this many more tokens before it are decoded, because the first
decoded token may be a part of a character."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, with transformers' names and semantics.

    Attributes:
        temperature: The logits are divided by it; above 0.
        top_k: Only this many of the most likely tokens are drawn from; 0 for all.
        top_p: Only the smallest set of most likely tokens whose probabilities sum to at least this is drawn from.
        seed: The random generator of a prompt is seeded with this and the prompt's number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class HowToGenerate:
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
    [Any, Any, Sequence[Sequence[int]], Mapping[int, Sequence[int]], HowToGenerate], Iterator[tuple[int, list[Answer]]]
]
"""Answers batches: (model, tokenizer, token ids of all prompts, batch number -> its prompts' numbers, how) -> (batch
number, its answers in the order of its prompts), batches in any order."""


class AnswerCache(Keeps, Protocol):
    """Keeps answers for a restart: `score_cache.ScoreCache`."""

    def load_answers(
        self, prompts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], how: HowToGenerate
    ) -> dict[int, list[Answer]]:
        """The cached answers by number of the batch."""


def plan_batches(
    lengths: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int,
    *,
    cache_tokens: int = 0,
    fitting_tokens: int | None = None,
    processes: int = 1,
) -> list[list[int]]:
    """Divides prompts into batches, the longest first: this needs little padding, and lack of memory shows at once.

    Args:
        lengths: Tokens of each prompt.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_tokens: Maximum number of tokens of one forward pass, with padding; a longer prompt is a batch by itself.
        cache_tokens: Maximum number of tokens, prompts and answers together, of a batch that is read in several passes;
            a batch that is read in one pass may have twice as many. 0: every batch is read in one pass, without this
            limit.
        fitting_tokens: Maximum number of tokens, prompts and answers together, of any batch of more than one prompt;
            None if the memory for them is not limited.
        processes: Number of processes that share the batches; larger batches are limited so that each process gets one.

    Returns:
        For each batch the numbers of its prompts.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    share = min(_MOST_ROWS, -(-len(lengths) // processes))
    batches: list[list[int]] = []
    while order:
        longest = lengths[order[0]]
        rows = min(batch_tokens // longest, CACHE_BATCHES * batch_tokens // (longest + max_new_tokens))
        if cache_tokens:
            fits = cache_tokens // (longest + max_new_tokens)
            rows = max(min(rows, 2 * fits), min(fits, share))
        if fitting_tokens is not None:
            rows = min(rows, fitting_tokens // (longest + max_new_tokens))
        rows = max(1, rows)
        batches.append(order[:rows])
        order = order[rows:]
    return batches


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
        max_new_tokens: As in `HowToGenerate`.
        stop: As in `HowToGenerate`.
        batch_tokens: Maximum tokens of one forward pass over prompts; affects only the last bits of the logits.
        sampling: As in `HowToGenerate`.
        ends: As in `HowToGenerate`.
        cache: Answers found here are not computed again; new ones are added, batch by batch.
        answer: Answers batches; None for `answer_batches`.
        processes: Number of processes that `answer` divides the batches over.
        on_progress: Called with the number of prompts answered so far.

    Raises:
        TrainingFailed: The logits are not finite, or memory ran out.
    """
    how = HowToGenerate(max_new_tokens, tuple(stop), sampling, tuple(ends), batch_tokens)
    lengths = [len(prompt) for prompt in prompts]
    fitting = _fitting_tokens(model, batch_tokens)
    _warn_of_memory(model, max(lengths, default=0), max_new_tokens, fitting)
    batches = plan_batches(
        lengths,
        max_new_tokens,
        batch_tokens,
        cache_tokens=_cache_tokens(model, batch_tokens),
        fitting_tokens=fitting,
        processes=processes,
    )
    by_batch = {} if cache is None else cache.load_answers(prompts, batches, how)
    missing = {number: batch for number, batch in enumerate(batches) if number not in by_batch}
    complete(by_batch, (answer or answer_batches)(model, tokenizer, prompts, missing, how), cache, on_progress)
    by_prompt = {
        prompt: one for number, batch in enumerate(batches) for prompt, one in zip(batch, by_batch[number], strict=True)
    }
    return [by_prompt[number] for number in range(len(prompts))]


def answer_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batches: Mapping[int, Sequence[int]],
    how: HowToGenerate,
    *,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, list[Answer]]]:
    """Answers batches one after the other, in this process; arguments as for `answer_batch`.

    Raises:
        TrainingFailed: The logits are not finite.
    """
    for number, batch in batches.items():
        yield number, answer_batch(model, tokenizer, [(prompt, prompts[prompt]) for prompt in batch], how, alive)


def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, Sequence[int]]],
    how: HowToGenerate,
    alive: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answers to the prompts of a batch, in order; computed one by one if the model cannot be packed.

    If memory runs out, the batch is computed once more with the base's weights dequantized for each use, which gives
    the same bits. If they already are, or memory runs out again, `TrainingFailed` is raised.

    Args:
        model: As for `generate`.
        tokenizer: As for `generate`.
        prompts: (number, token ids) of each; the number seeds the prompt's random generator when tokens are sampled.
        how: How answers are generated.
        alive: Called before every forward pass. If it raises, for instance because the job has to stop, the batch has
            no answers; a restart computes all of it again, with the same bits.

    Raises:
        TrainingFailed: The logits are not finite, or memory ran out.
    """
    from job.model.fused.frozen_weights import without_dequantized

    try:
        return _answered(model, tokenizer, prompts, how, alive)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = error.with_traceback(None)  # its frames hold the cache
    with without_dequantized(model) as freed:
        if not freed:
            raise _too_small(model, prompts, how, failed) from failed
        what = "out of GPU memory: a batch of answers is computed again without the base's dequantized weights"
        change = "a smaller JOB_EVAL__BATCH_TOKENS, or JOB_MODEL__KEEP_DEQUANTIZED=false"
        get_logger().warning(what, prompts=len(prompts), change=change)
        free_caches()
        try:
            return _answered(model, tokenizer, prompts, how, alive)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise _too_small(model, prompts, how, error) from error


def _too_small(
    model: Any, prompts: Sequence[tuple[int, Sequence[int]]], how: HowToGenerate, error: BaseException
) -> TrainingFailed:
    """The error for a batch for which memory is too small, with its figures and the settings that it depends on."""
    longest, new = max(len(ids) for _, ids in prompts), how.max_new_tokens
    what = f"{count(len(prompts), 'prompt')} of at most {longest:,} tokens got up to {new:,} more each"
    if per_token := _token_bytes(model):
        what += f", for which the cache takes up to {size(len(prompts) * (longest + new) * per_token, ' ')}"
    fewer = "JOB_EVAL__BATCH_TOKENS, so that fewer are answered at a time, or " if len(prompts) > 1 else ""
    fix = f"lower {fewer}JOB_EVAL__PROMPTS_MAX_NEW_TOKENS or the max_gen_toks of the task"
    return ran_out(what, fix, error)


def _answered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, Sequence[int]]],
    how: HowToGenerate,
    alive: Callable[[], None],
) -> list[Answer]:
    """`answer_batch` with the memory that there is."""
    import torch

    from job.model.packed_attention import is_packed

    ends = end_tokens(model, tokenizer) | set(how.ends)
    rows = [_Row(tuple(ids), _Draws(how.sampling, number)) for number, ids in prompts]
    finish = _Finish(tokenizer, ends, tuple(text for text in how.stop if text), how.max_new_tokens)
    model.eval()
    packed = is_packed(model)
    with torch.inference_mode(), _own_attention(model):
        if packed:
            _answer_together(model, rows, finish, how.pass_tokens, alive)
        else:
            # A recurrent layer reads padding like any token, and a model of that kind may have a cache of its own.
            for row in rows:
                _answer_alone(model, row, finish, alive)
    return [finish.answer(row) for row in rows]


class _Draws:
    """The random numbers for one prompt's tokens."""

    def __init__(self, sampling: Sampling | None, number: int) -> None:
        self.sampling = sampling
        self._random = random.Random(f"{sampling.seed}:{number}") if sampling else None  # noqa: S311 - no secret

    def next(self) -> float:
        """Uniform in [0, 1)."""
        return self._random.random() if self._random else 0.0


class _Row:
    """One prompt and its answer so far."""

    def __init__(self, prompt: tuple[int, ...], draws: _Draws) -> None:
        self.prompt, self.draws = prompt, draws
        self.tokens: list[int] = []
        self.text: str | None = None  # once it has ended
        self.ended_by = ""


class _Finish:
    """Decides when an answer has ended: by an end-of-sequence token, a stop text, or its length."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], stop: tuple[str, ...], most: int) -> None:
        self._tokenizer, self._ends, self._stop, self.most = tokenizer, ends, stop, most
        # A token has at least one byte, so a stop text that ends in the newest token lies within so many tokens.
        self._tail = max((len(text.encode()) for text in stop), default=0) + _SLACK_TOKENS

    def add(self, row: _Row, token: int) -> bool:
        """Adds a token to the answer; returns whether the answer has ended with it."""
        if token in self._ends:
            row.text, row.ended_by = self._decode(row.tokens), "eos"
            return True
        row.tokens.append(token)
        if self._stop and self._in(self._decode(row.tokens[-self._tail :], special=True)):
            text = self._decode(row.tokens)
            # A stop text may be a special token. Decoding leaves it out, so the answer already ends before it.
            if self._in(text) or self._in(self._decode(row.tokens, special=True)):
                row.text, row.ended_by = self._cut(text), "stop"
                return True
        if len(row.tokens) >= self.most:
            row.text, row.ended_by = self._cut(self._decode(row.tokens)), "length"
            return True
        return False

    @staticmethod
    def answer(row: _Row) -> Answer:
        """The answer of a row that has ended."""
        return Answer(text=row.text or "", tokens=len(row.tokens), ended_by=row.ended_by)

    def _in(self, text: str) -> bool:
        return any(stop in text for stop in self._stop)

    def _cut(self, text: str) -> str:
        for stop in self._stop:
            text = text.split(stop, maxsplit=1)[0]
        return text

    def _decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not special))


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those that config.json names."""
    named = model.config.get_text_config(decoder=True).eos_token_id
    return frozenset({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """Within it, the model computes attention without packing, since packed attention cannot use a cache.

    Families with a fused decoder use torch's scaled dot-product attention, which is known to cover all that they need;
    other models use transformers' eager attention.
    """
    from job.model.base import PLAIN
    from job.model.fused.fused_decoder import attention_with_cache
    from job.model.packed_attention import use

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation  # noqa: SLF001 - as in packed_attention
    use(base, attention_with_cache(base) or PLAIN)
    try:
        yield
    finally:
        use(base, before)


def _cache_tokens(model: Any, batch_tokens: int) -> int:
    """The most tokens in the cache of a batch that is read in several forward passes; 0 if such batches are not used.

    They are used on a GPU only, since a CPU gains nothing by them, and for families with a fused decoder, of which the
    size of a token's keys and values is known. The number depends on the GPU's total memory, not on what is free, so
    that a restart makes the same batches. Lowering the tokens of a forward pass, as after memory ran out, lowers it in
    proportion.
    """
    from job.evaluation.key_value_cache import can_be_reserved
    from job.model.fused.fused_decoder import attention_with_cache
    from job.model.packed_attention import is_packed

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # What is not packed answers one prompt after the other: a larger batch would only be more to lose by a stop.
    if base.device.type != "cuda" or attention_with_cache(base) is None or not is_packed(model):
        return 0
    if not can_be_reserved(_new_cache(model)):
        return 0
    return int(_gpu_bytes(base) * _CACHE_SHARE * min(1.0, batch_tokens / BATCH_TOKENS) / _token_bytes(model))


def _fitting_tokens(model: Any, batch_tokens: int) -> int | None:
    """The most tokens of a cache that fits into a GPU's memory beside the model and a forward pass over prompts.

    None where it is not known: on a CPU, where main memory is not this process's alone, and for a cache of another
    kind. Counted are the GPU's total memory and the model's weights, not what is free, so that a restart makes the
    same batches. A step of decoding also needs, of one layer, keys and values for each head of the queries.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.device.type != "cuda" or not (token := _token_bytes(model)):
        return None
    config = base.config.get_text_config(decoder=True)
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    forward = batch_tokens * 4 * (wide + config.hidden_size) * base.dtype.itemsize
    repeated = 2 * config.num_attention_heads * _head_size(config) * base.dtype.itemsize
    left = _gpu_bytes(base) - _CONTEXT_BYTES - _held_bytes(model) - forward
    return max(0, int(_FITTING_SHARE * left / (token + repeated)))


def _warn_of_memory(model: Any, longest: int, max_new_tokens: int, fitting: int | None) -> None:
    """Warns where one prompt with its answer alone may not fit. Most answers end early, so it is tried."""
    if fitting is None or fitting >= longest + max_new_tokens:
        return
    get_logger().warning(
        "the longest prompt with its answer may not fit into the GPU's memory",
        tokens=longest + max_new_tokens,
        cache=size((longest + max_new_tokens) * _token_bytes(model), " "),
        tokens_that_fit=fitting,
        change="JOB_EVAL__PROMPTS_MAX_NEW_TOKENS, or the max_gen_toks of the task",
    )


def _gpu_bytes(base: Any) -> float:
    """The GPU memory that this process may use, whether or not it is free."""
    import torch

    allowed = torch.cuda.get_per_process_memory_fraction(base.device)
    return float(torch.cuda.get_device_properties(base.device).total_memory * allowed)


def _held_bytes(model: Any) -> int:
    """The model's weights on its device, each memory once: tied weights, and layers that pass through the same slots.

    Numbers are counted by their shape, since training lays the adapter's into one memory, with padding.
    """
    held = dict[int, int]()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != model.device.type:
            continue
        if tensor.is_floating_point():
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        else:
            memory = tensor.untyped_storage()
            held[memory.data_ptr()] = memory.nbytes()
    return sum(held.values())


def _token_bytes(model: Any) -> int:
    """Bytes of a token's keys and values in all layers; 0 for a model whose cache may be of another kind."""
    from job.model.packed_attention import is_packed

    if not is_packed(model):
        return 0
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config(decoder=True)
    layers = len(_new_cache(model).layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * layers * heads * _head_size(config) * base.dtype.itemsize)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _read_prompts(
    model: Any, rows: Sequence[_Row], pass_tokens: int, most_new: int, alive: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Prefill: forward passes over the prompts of a batch, each over as many as `pass_tokens` allows.

    The cache has room for answers of `most_new` tokens.

    Returns:
        The logits of the next tokens, (rows, vocabulary); the attention mask, (rows, longest prompt) int64, 0 for
        padding; and the cache.
    """
    import torch
    from torch.nn.functional import pad

    from job.evaluation.key_value_cache import can_be_reserved, reserve

    longest = max(len(row.prompt) for row in rows)
    reserving = can_be_reserved(_new_cache(model))
    together = max(1, pass_tokens // longest) if reserving else len(rows)
    parts = [rows[start : start + together] for start in range(0, len(rows), together)]
    read = []
    for part in parts:
        alive()
        read.append(_read_together(model, part))
    logits, masks, caches = zip(*read, strict=True)
    cache = reserve(caches, longest, longest + most_new) if reserving else caches[0]
    mask = torch.cat([pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
    return torch.cat(logits), mask, cache


def _read_together(model: Any, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """One forward pass over prompts; returns the same as `_read_prompts`."""
    import torch

    device = model.device
    longest = max(len(row.prompt) for row in rows)
    pads = [longest - len(row.prompt) for row in rows]
    filled = rows[0].prompt[0]  # padding may be any token, since none attends to it
    ids = torch.tensor([[filled] * pad + list(row.prompt) for pad, row in zip(pads, rows, strict=True)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    cache = _new_cache(model)
    return _pass(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache), mask, cache


def _pass(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """A forward pass that adds tokens to the cache; returns the logits of the next token, (rows, vocabulary).

    Args:
        model: The model.
        ids: (rows, new tokens) int64.
        mask: (rows, tokens of the cache including these): 1 for a token, 0 for padding.
        positions: (rows, new tokens) int64; not (1, new tokens), which the fused decoder's rotary kernel cannot
            broadcast.
        cache: Of the earlier tokens.
    """
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits


def _answer_together(
    model: Any, rows: Sequence[_Row], finish: _Finish, pass_tokens: int, alive: Callable[[], None]
) -> None:
    """Answers the prompts of a batch: prefill, then one token of every answer in each pass."""
    import torch

    logits, mask, cache = _read_prompts(model, rows, pass_tokens, finish.most, alive)
    positions = mask.sum(-1, keepdim=True) - 1  # (rows, 1): of each row's last token
    going = list(rows)
    while True:
        tokens = _choose(logits, going)
        kept = [at for at, (row, token) in enumerate(zip(going, tokens, strict=True)) if not finish.add(row, token)]
        if not kept:
            return
        alive()
        ids, positions = torch.tensor(tokens, device=model.device)[:, None], positions + 1
        if len(kept) < len(going):
            index = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(index)
            ids, positions, mask = ids[index], positions[index], mask[index]
            going = [going[at] for at in kept]
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        logits = _pass(model, ids, mask, positions, cache)


def _answer_alone(model: Any, row: _Row, finish: _Finish, alive: Callable[[], None]) -> None:
    """Answers one prompt with transformers' own generation, which knows the cache of every kind of model."""
    import torch
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

    class Chosen(LogitsProcessor):  # type: ignore[misc]
        """Makes the chosen token the only possible one. Defined here because its base class is a heavy import."""

        ended = False

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as transformers calls it
            (token,) = _choose(scores, [row])
            self.ended = finish.add(row, token)
            alive()
            return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([token], device=scores.device), 0)

    chosen = Chosen()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Replaced, not passed: `generate` would merge the model's own configuration, with any penalties, into one passed.
    before, base.generation_config = base.generation_config, GenerationConfig()
    ids = torch.tensor([row.prompt], device=model.device)
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=finish.most,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([chosen]),
            stopping_criteria=StoppingCriteriaList([lambda *_, **__: torch.tensor([chosen.ended], device=ids.device)]),
        )
    finally:
        base.generation_config = before


def _choose(logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
    """The next token of each row; `logits` are (rows, vocabulary).

    Raises:
        TrainingFailed: The logits of a row are not finite; `max` of NaN would silently choose some token.
    """
    import torch

    sampling = rows[0].draws.sampling
    best, tokens = logits.max(-1)
    if sampling is not None:
        drawn = torch.tensor([[row.draws.next()] for row in rows], dtype=torch.float64, device=logits.device)
        parts = [slice(start, start + _DRAWN_ROWS) for start in range(0, len(rows), _DRAWN_ROWS)]
        tokens = torch.cat([_drawn(logits[part], sampling, drawn[part]) for part in parts])
    found: list[int] = tokens.where(best.isfinite(), -1).tolist()  # the only synchronization with the GPU of a token
    if -1 in found:
        raise TrainingFailed(
            "the model's logits are not finite. With an adapter: it diverged; lower JOB_TRAIN__LEARNING_RATE. "
            "Without: the base's numbers are too large for its dtype; set JOB_MODEL__DTYPE to bf16 or fp32"
        )
    return found


def _drawn(logits: torch.Tensor, sampling: Sampling, drawn: torch.Tensor) -> torch.Tensor:
    """Samples by inverting the cumulative distribution at `drawn`, (rows, 1) float64 in [0, 1); gives (rows,) int64."""
    scores, order = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scores[:, sampling.top_k :] = float("-inf")
    shares = scores.softmax(-1)  # (rows, vocabulary), the likeliest token first
    before = shares.cumsum(-1) - shares
    shares = shares.where(before < sampling.top_p, 0)  # the most likely token always remains
    total = shares.cumsum(-1)
    # Clamped, since a rounded sum may give an index behind the last one
    at = (total <= drawn * total[:, -1:]).sum(-1, keepdim=True).clamp(max=order.shape[-1] - 1)
    return order.gather(1, at)[:, 0]
