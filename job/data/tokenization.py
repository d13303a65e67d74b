"""From rendered text to tokens and targets."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from job.data.formats import RowError
from job.data.schemas import Rendered
from job.records import Example

LossOn = Literal["all", "completion"]

_BATCH_ROWS = 1000


@dataclass(frozen=True)
class Encoded:
    """An example, and the text it was made from."""

    text: str
    example: Example

    def canonical(self) -> bytes:
        """Text, tokens and targets, with their lengths in front: other examples never give the same bytes."""
        text, ids = self.text.encode(), self.example.input_ids
        lengths = struct.pack("<2Q", len(text), len(ids))
        return lengths + text + struct.pack(f"<{len(ids)}i", *ids) + bytes(self.example.targets)


def encode(
    rows: Iterator[Rendered | list[RowError]],
    tokenizer: Any,
    *,
    templated: bool,
    loss_on: LossOn,
    max_length: int,
    limit: int | None,
) -> Iterator[Encoded | list[RowError]]:
    """Yields an example for each rendered row, or what is wrong with its tokens; faults pass through, in order.

    Args:
        rows: Rendered rows and faults. No row is taken behind the one that makes the last example.
        tokenizer: A `transformers.PreTrainedTokenizerFast`.
        templated: Whether the text comes from a chat template, which writes all special tokens itself; otherwise the
            tokenizer adds its own, and the end-of-sequence token is appended where it is not there yet.
        loss_on: Whether all tokens are targets, or those of the completions and the appended end of sequence.
        max_length: The most tokens of an example.
        limit: The most examples; None for no limit.
    """
    eos = None if templated else tokenizer.eos_token_id
    # Millions of tokens have few distinct values, and examples of one shape the same targets: each is kept once.
    shared_ids: dict[int, int] = {}
    shared_targets: dict[tuple[bool, ...], tuple[bool, ...]] = {}
    count = 0
    while batch := list(islice(rows, _BATCH_ROWS if limit is None else min(_BATCH_ROWS, limit - count))):
        encodings = iter(_tokenize(batch, tokenizer, special=not templated))
        for row in batch:
            if not isinstance(row, Rendered):
                yield row
                continue
            ids, targets = _ids_and_targets(row, next(encodings), eos, loss_on)
            if fault := _check(row, ids, targets, max_length):
                yield [fault]
                continue
            count += 1
            input_ids = tuple(map(shared_ids.setdefault, ids, ids))
            yield Encoded(row.text, Example(input_ids, shared_targets.setdefault(targets, targets)))


def _tokenize(rows: Sequence[Rendered | list[RowError]], tokenizer: Any, *, special: bool) -> Sequence[Any]:
    texts = [row.text for row in rows if isinstance(row, Rendered)]
    if not texts:
        return []
    # The whole text as one string: its tokens are those that plain training on the text sees. `verbose` would warn
    # about a row that is too long for the model, which is checked here anyway.
    batch = tokenizer(texts, add_special_tokens=special, padding=False, truncation=False, verbose=False)
    encodings: Sequence[Any] = batch.encodings
    return encodings


def _ids_and_targets(
    row: Rendered, encoding: Any, eos: int | None, loss_on: LossOn
) -> tuple[list[int], tuple[bool, ...]]:
    ids: list[int] = encoding.ids
    if loss_on == "all":
        targets = [True] * len(ids)
    else:
        # By its end: a token across the border is predicted from the prompt alone, and holds part of the completion.
        # Special tokens end at 0.
        targets = [any(start < end <= stop for start, stop in row.completions) for _, end in encoding.offsets]
    if eos is not None:
        # As a token, not by writing its text behind the row's: a tokenizer may strip what stands before it.
        if ids[-1:] != [eos]:
            ids, targets = [*ids, eos], [*targets, True]
        targets[-1] = True
    return ids, (False, *targets[1:])


def _check(row: Rendered, ids: list[int], targets: tuple[bool, ...], max_length: int) -> RowError | None:
    if len(ids) > max_length:
        what = f"makes the row {len(ids)} tokens long, {max_length} are allowed (JOB_TRAIN__MAX_LENGTH)"
        return RowError("too_long", row.where, what)
    if not any(targets):
        return RowError("empty_target", row.where, "gives no token to learn")
    return None
