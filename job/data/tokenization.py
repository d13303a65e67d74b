"""From rendered text to tokens and targets."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from job.data.fields import Rendered
from job.data.formats import RowError
from job.records import Example

LossOn = Literal["all", "completion", "assistant", "last"]
OnLongRow = Literal["error", "skip", "truncate", "split"]

_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 4 << 20
_SHOWN = 20
_LAST_TOKENS = 4
"""Behind the token that ends an answer a chat template may still write a line break or two."""


@dataclass(frozen=True)
class Encoded:
    """An example, and the text it was made from.

    `end` is the last special token among the last few targets, which tells a model to stop; None if there is
    none. `unused` are the fields of the row that were left out, `where` is where it stands, `own_texts` as in
    `Rendered`; `long` counts what was done because the row is too long.
    """

    text: str
    example: Example
    end: int | None = None
    unused: tuple[str, ...] = ()
    long: tuple[tuple[str, int], ...] = ()
    where: str = ""
    own_texts: tuple[str, ...] = ()

    def canonical(self) -> bytes:
        """Text, tokens, targets and weight, with the lengths in front: other examples never give the same bytes."""
        text, ids = self.text.encode(), self.example.input_ids
        lengths = struct.pack("<2Q", len(text), len(ids))
        weight = b"" if self.example.weight == 1 else struct.pack("<d", self.example.weight)
        return lengths + text + struct.pack(f"<{len(ids)}i", *ids) + bytes(self.example.targets) + weight


def encode(
    rows: Iterator[Rendered | list[RowError]],
    tokenizer: Any,
    *,
    templated: bool,
    loss_on: LossOn,
    max_length: int,
    limit: int | None,
    vocabulary: int | None = None,
    on_long_row: OnLongRow = "error",
) -> Iterator[Encoded | list[RowError]]:
    """Yields an example for each rendered row, or what is wrong with its tokens; faults pass through, in order.

    Args:
        rows: Rendered rows and faults. No row is taken behind the one that makes the last example.
        tokenizer: A `transformers.PreTrainedTokenizerFast`.
        templated: Whether the text comes from a chat template, which writes all special tokens itself; otherwise the
            tokenizer adds its own, and the end-of-sequence token is appended where it is not there yet.
        loss_on: Whether all tokens are targets, or (any other value) those of the completions and the appended end of
            sequence.
        max_length: The most tokens of an example.
        limit: The most examples; None for no limit.
        on_long_row: `truncate` and `split` make examples of a row of more than `max_length` tokens, else it is a fault.
        vocabulary: Rows of the model's embedding, which no token may be beyond; None if that is not known.
    """
    eos = None if templated else tokenizer.eos_token_id
    bos = None if templated else getattr(tokenizer, "bos_token_id", None)
    special = frozenset(getattr(tokenizer, "all_special_ids", ())) | _added_special(tokenizer)
    # Millions of tokens have few distinct values, and examples of one shape the same targets: each is kept once.
    shared_ids: dict[int, int] = {}
    shared_targets: dict[tuple[bool, ...], tuple[bool, ...]] = {}
    count = 0
    while batch := _take(rows, _BATCH_ROWS if limit is None else min(_BATCH_ROWS, limit - count)):
        encodings = iter(_tokenize(batch, tokenizer, special=not templated))
        for row in batch:
            if not isinstance(row, Rendered):
                yield row
                continue
            encoding = next(encodings)
            whole = _ids_and_targets(row, encoding, bos, eos, loss_on)
            pieces, long = _pieces(*whole, max_length, on_long_row)
            fault = (
                _check(row, *pieces[0], max_length)
                or _check_ids(row, whole[0], vocabulary, tokenizer)
                or _check_turns(row, encoding, special)
            )
            if fault:
                yield [fault]
                continue
            for place, (ids, targets) in enumerate(pieces[: None if limit is None else limit - count]):
                count += 1
                input_ids = tuple(map(shared_ids.setdefault, ids, ids))
                example = Example(input_ids, shared_targets.setdefault(targets, targets), weight=row.weight)
                # The text is that of the row: only its first piece has it, and is counted as a long row.
                first = ("", ()) if place else (row.text, long)
                end = _end(ids, targets, special)
                yield Encoded(first[0], example, end, row.unused, first[1], row.where, row.own_texts)


def _pieces(
    ids: list[int], targets: tuple[bool, ...], max_length: int, on_long_row: OnLongRow
) -> tuple[list[tuple[list[int], tuple[bool, ...]]], tuple[tuple[str, int], ...]]:
    """(ids, targets) of each example that a row gives, and what there is to count if it is too long.

    A piece begins with the last token of the piece before it, which is no target there: every token is a target once.
    """
    if len(ids) <= max_length or on_long_row not in {"truncate", "split"}:
        return [(ids, targets)], ()
    if on_long_row == "truncate":
        cut = len(ids) - max_length
        return [(ids[:max_length], targets[:max_length])], (("truncated", 1), ("tokens_cut", cut))
    step = max(1, max_length - 1)
    starts = range(0, len(ids) - 1, step)
    pieces = [(ids[at : at + max_length], (False, *targets[at + 1 : at + max_length])) for at in starts]
    return pieces, (("split", 1), ("pieces", len(pieces)))


def _take(rows: Iterator[Rendered | list[RowError]], most: int) -> list[Rendered | list[RowError]]:
    """The next rows: up to so many, and fewer where their texts are long, whose tokens are held all at once."""
    batch: list[Rendered | list[RowError]] = []
    characters = 0
    while len(batch) < most and characters < _BATCH_CHARACTERS and (row := next(rows, None)) is not None:
        batch.append(row)
        characters += len(row.text) if isinstance(row, Rendered) else 0
    return batch


def _tokenize(rows: Sequence[Rendered | list[RowError]], tokenizer: Any, *, special: bool) -> Sequence[Any]:
    texts = [row.text for row in rows if isinstance(row, Rendered)]
    if not texts:
        return []
    # The whole text as one string: its tokens are those that plain training on the text sees. `verbose` would warn
    # about a row that is too long for the model, which is checked here anyway.
    batch = tokenizer(texts, add_special_tokens=special, padding=False, truncation=False, verbose=False)
    encodings: Sequence[Any] = batch.encodings
    return encodings


def _added_special(tokenizer: Any) -> frozenset[int]:
    """Tokens that a chat template may end a turn with, beside those that have a role: such as `<|im_end|>`."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(number for number, token in added.items() if token.special)


def _end(ids: Sequence[int], targets: Sequence[bool], special: frozenset[int]) -> int | None:
    """The last special token among the last target tokens; None if there is none."""
    learned = (token for token, target in zip(reversed(ids), reversed(targets), strict=True) if target)
    return next((token for token in islice(learned, _LAST_TOKENS) if token in special), None)


def _ids_and_targets(
    row: Rendered, encoding: Any, bos: int | None, eos: int | None, loss_on: LossOn
) -> tuple[list[int], tuple[bool, ...]]:
    ids: list[int] = encoding.ids
    offsets = encoding.offsets
    if bos is not None and ids[:2] == [bos, bos] and encoding.special_tokens_mask[0]:
        # The text begins with the token that the tokenizer puts in front as well.
        ids, offsets = ids[1:], offsets[1:]
    if loss_on == "all":
        targets = [True] * len(ids)
    else:
        # By its end: a token across the border is predicted from the prompt alone, and holds part of the completion.
        # Special tokens end at 0.
        targets = [any(start < end <= stop for start, stop in row.completions) for _, end in offsets]
    if row.ignored:
        kept = [not any(start < end <= stop for start, stop in row.ignored) for _, end in offsets]
        targets = [target and keep for target, keep in zip(targets, kept, strict=True)]
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


def _check_turns(row: Rendered, encoding: Any, special: frozenset[int]) -> RowError | None:
    """Finds the turn that does not teach the model to stop: the last token that is learned of it is no special one.

    A line break behind the special token does not count. A stand-in for a tokenizer has no special tokens.
    """
    if not row.must_end or not special:
        return None
    ends: dict[int, int] = {}
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in special or row.text[start:end].strip():
            at = next((index for index, (first, stop) in enumerate(row.completions) if first < end <= stop), None)
            if at is not None:
                ends[at] = token
    for index, (first, stop) in enumerate(row.completions):
        if ends.get(index) not in special:
            shown = row.text[max(first, stop - _SHOWN) : stop]
            what = (
                f"is learned without an end: turn {index + 1} of those that are learned ends with {shown!a}, and with"
                " no special token that ends a turn; use"
                " JOB_TRAIN__LOSS_ON=completion or all, or a model whose chat template ends each turn"
            )
            return RowError("turn_without_end", row.where, what)
    return None


def _check_ids(row: Rendered, ids: Sequence[int], vocabulary: int | None, tokenizer: Any) -> RowError | None:
    """Finds the token that the model has no embedding of."""
    if vocabulary is None or max(ids) < vocabulary:
        return None
    number = next(token for token in ids if token >= vocabulary)
    what = f"has the token {tokenizer.convert_ids_to_tokens(number)!r} (number {number}), and the model has embeddings"
    return RowError("unknown_token", row.where, f"{what} of {vocabulary} tokens: its tokenizer is another model's")
