"""Computes the answers of one batch, token by token, with a key/value cache.

    prompts of a batch:   . . p p p | a a a a        p prompt, a answer, . padding, which no token attends to
                          p p p p p | a a            (an answer that has ended is removed from batch and cache)

The prompts are read first (prefill), in several forward passes if one would have too many tokens (`_read_prompts`).
Then each forward pass adds one token to every answer of the batch. A model that cannot be packed answers its prompts
one by one, with transformers' own generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from job.evaluation.key_value_cache import can_be_reserved, new_cache, reserve
from job.evaluation.token_sampling import Draws, choose_tokens
from job.model.fused.fused_decoder import attention_with_cache
from job.model.load_base import PLAIN
from job.model.lora import base_of
from job.model.packed_attention import is_packed, use
from job.records import Answer

_SLACK_TOKENS = 4
"""When the end of an answer is searched for a stop text, this many more tokens before it are decoded, because the first
decoded token may be a part of a character."""


class Row:
    """One row of a batch: a prompt, and its answer so far.

    Args:
        prompt: Its token ids.
        draws: Random numbers for the answer's tokens.
    """

    def __init__(self, prompt: tuple[int, ...], draws: Draws) -> None:
        self.prompt, self.draws = prompt, draws
        self.tokens: list[int] = []
        self.text: str | None = None  # once it has ended
        self.ended_by = ""

    @property
    def answer(self) -> Answer:
        """The answer, once it has ended."""
        return Answer(text=self.text or "", tokens=len(self.tokens), ended_by=self.ended_by)


class AnswerEnd:
    """Decides when an answer has ended: by an end-of-sequence token, a stop text, or its length.

    Args:
        tokenizer: The model's tokenizer.
        end_tokens: Token ids that end an answer.
        stop: Texts before which an answer is cut off; none of them empty.
        max_new_tokens: Maximum number of tokens of an answer.
    """

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int], stop: tuple[str, ...], max_new_tokens: int) -> None:
        self._tokenizer, self._end_tokens, self._stop = tokenizer, end_tokens, stop
        self.max_new_tokens = max_new_tokens
        # A token has at least one byte, so a stop text that ends in the newest token lies within so many tokens.
        self._tail = max((len(text.encode()) for text in stop), default=0) + _SLACK_TOKENS

    def add(self, row: Row, token: int) -> bool:
        """Adds a token to the answer; returns whether the answer has ended with it."""
        if token in self._end_tokens:
            row.text, row.ended_by = self._decode(row.tokens), "eos"
            return True
        row.tokens.append(token)
        if self._stop and self._has_stop(self._decode(row.tokens[-self._tail :], special=True)):
            text = self._decode(row.tokens)
            # A stop text may be a special token. Decoding leaves it out, so the answer already ends before it.
            if self._has_stop(text) or self._has_stop(self._decode(row.tokens, special=True)):
                row.text, row.ended_by = self._cut(text), "stop"
                return True
        if len(row.tokens) >= self.max_new_tokens:
            row.text, row.ended_by = self._cut(self._decode(row.tokens)), "length"
            return True
        return False

    def _has_stop(self, text: str) -> bool:
        return any(stop in text for stop in self._stop)

    def _cut(self, text: str) -> str:
        for stop in self._stop:
            text = text.split(stop, maxsplit=1)[0]
        return text

    def _decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not special))


def decode_batch(
    model: Any, rows: Sequence[Row], end: AnswerEnd, *, pass_tokens: int, check_stop: Callable[[], None]
) -> None:
    """Answers the prompts of a batch: afterwards each row has its answer.

    Args:
        model: A causal language model, with or without an adapter.
        rows: With empty answers.
        end: Decides when an answer has ended.
        pass_tokens: Maximum number of tokens of one forward pass over prompts, with padding.
        check_stop: Called before every forward pass; an exception from it ends the work.

    Raises:
        TrainingFailed: The logits are not finite.
    """
    model.eval()
    packed = is_packed(model)
    with torch.inference_mode(), _attention_with_cache(model):
        if packed:
            _answer_together(model, rows, end, pass_tokens, check_stop)
        else:
            # A recurrent layer reads padding like any token, and a model of that kind may have a cache of its own.
            for row in rows:
                _answer_alone(model, row, end, check_stop)


@contextmanager
def _attention_with_cache(model: Any) -> Iterator[None]:
    """Within it, the model computes attention without packing, since packed attention cannot use a cache.

    Families with a fused decoder use torch's scaled dot-product attention, which is known to cover all that they need;
    other models use transformers' eager attention.
    """
    base = base_of(model)
    before = base.config._attn_implementation  # noqa: SLF001 - as in packed_attention
    use(base, attention_with_cache(base) or PLAIN)
    try:
        yield
    finally:
        use(base, before)


def _answer_together(
    model: Any, rows: Sequence[Row], end: AnswerEnd, pass_tokens: int, check_stop: Callable[[], None]
) -> None:
    """Answers the prompts of a batch: prefill, then one token of every answer in each pass."""
    logits, mask, cache = _read_prompts(model, rows, pass_tokens, end.max_new_tokens, check_stop)
    positions = mask.sum(-1, keepdim=True) - 1  # (rows, 1): of each row's last token
    unfinished = list(rows)
    while True:
        tokens = choose_tokens(logits, [row.draws for row in unfinished])
        kept = [
            index for index, (row, token) in enumerate(zip(unfinished, tokens, strict=True)) if not end.add(row, token)
        ]
        if not kept:
            return
        check_stop()
        ids, positions = torch.tensor(tokens, device=model.device)[:, None], positions + 1
        if len(kept) < len(unfinished):
            kept_rows = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(kept_rows)
            ids, positions, mask = ids[kept_rows], positions[kept_rows], mask[kept_rows]
            unfinished = [unfinished[index] for index in kept]
        mask = torch.cat([mask, mask.new_ones(len(unfinished), 1)], dim=1)
        logits = _pass(model, ids, mask, positions, cache)


def _read_prompts(
    model: Any, rows: Sequence[Row], pass_tokens: int, max_new_tokens: int, check_stop: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Prefill: forward passes over the prompts of a batch, each over as many as `pass_tokens` allows.

    The cache can grow to answers of `max_new_tokens` tokens.

    Returns:
        The logits of the next tokens, (rows, vocabulary); the attention mask, (rows, longest prompt) int64, 0 for
        padding; and the cache.
    """
    longest = max(len(row.prompt) for row in rows)
    reserving = can_be_reserved(new_cache(model))
    together = max(1, pass_tokens // longest) if reserving else len(rows)
    parts = [rows[start : start + together] for start in range(0, len(rows), together)]
    read = []
    for part in parts:
        check_stop()
        read.append(_read_together(model, part))
    logits, masks, caches = zip(*read, strict=True)
    cache = reserve(caches, longest, longest + max_new_tokens) if reserving else caches[0]
    mask = torch.cat([pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
    return torch.cat(logits), mask, cache


def _read_together(model: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """One forward pass over prompts; returns the same as `_read_prompts`."""
    device = model.device
    longest = max(len(row.prompt) for row in rows)
    paddings = [longest - len(row.prompt) for row in rows]
    filler = rows[0].prompt[0]  # padding may be any token, since none attends to it
    ids = torch.tensor(
        [[filler] * padding + list(row.prompt) for padding, row in zip(paddings, rows, strict=True)], device=device
    )
    mask = torch.tensor([[0] * padding + [1] * (longest - padding) for padding in paddings], device=device)
    cache = new_cache(model)
    return _pass(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache), mask, cache


def _pass(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """A forward pass that adds tokens to the cache; returns the logits of the next token, (rows, vocabulary).

    Args:
        model: The model.
        ids: (rows, new tokens) int64.
        mask: (rows, tokens of the cache including these) int64: 1 for a token, 0 for padding.
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


class _OnlyChosenToken(LogitsProcessor):  # type: ignore[misc]
    """Chooses the next token of one answer, adds it, and makes it the only possible one for transformers."""

    def __init__(self, row: Row, end: AnswerEnd, check_stop: Callable[[], None]) -> None:
        self._row, self._end, self._check_stop = row, end, check_stop
        self.ended = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as transformers calls it
        """Scores of which only that of the chosen token is above minus infinity; `scores` are (1, vocabulary)."""
        (token,) = choose_tokens(scores, [self._row.draws])
        self.ended = self._end.add(self._row, token)
        self._check_stop()
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([token], device=scores.device), 0)


def _answer_alone(model: Any, row: Row, end: AnswerEnd, check_stop: Callable[[], None]) -> None:
    """Answers one prompt with transformers' own generation, which knows the cache of every kind of model."""
    processor, base = _OnlyChosenToken(row, end, check_stop), base_of(model)
    # Replaced, not passed: `generate` would merge the model's own configuration, with any penalties, into one passed.
    before, base.generation_config = base.generation_config, GenerationConfig()
    ids = torch.tensor([row.prompt], device=model.device)
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=end.max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList(
                [lambda *_, **__: torch.tensor([processor.ended], device=ids.device)]
            ),
        )
    finally:
        base.generation_config = before
