"""From rendered text to tokens and targets."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

from job.common.near_duplicates import row_hash
from job.data.fields import Rendered
from job.data.formats import RowError
from job.data.text_tokenizer import TextTokenizer
from job.records import Example

LossOn = Literal["all", "completion", "assistant", "last"]
OnLongRow = Literal["error", "skip", "truncate", "split"]

_BATCH_CHARACTERS = 4 << 20
_SHOWN = 20
_LAST_TOKENS = 4
"""Behind the token that ends an answer a chat template may still write a line break or two."""


@dataclass(frozen=True)
class Encoded:
    """An example as bytes, which processes exchange and Arrow files hold unchanged, and what it was made from.

    Attributes:
        text: The text; of several examples of one row only the first has it.
        ids: The tokens, int32, little-endian.
        targets: For each token a byte: 1 if it is a target, else 0.
        end: The last special token among the last few targets, which tells a model to stop; None if there is none.
        unused: The fields of the row that were left out.
        long: Counts of what was done because the row is too long.
        where: Location of the row, for messages.
        compared_by: The row's `near_duplicates.row_hash`, where rows are compared.
        weight: As in `Rendered`.
    """

    text: str
    ids: bytes
    targets: bytes
    end: int | None = None
    unused: tuple[str, ...] = ()
    long: tuple[tuple[str, int], ...] = ()
    where: str = ""
    compared_by: bytes = b""
    weight: float = 1.0

    @property
    def example(self) -> Example:
        """The example."""
        ids = struct.unpack(f"<{len(self.targets)}i", self.ids)
        return Example(ids, tuple(map(bool, self.targets)), weight=self.weight)

    def parts(self) -> tuple[bytes, bytes, tuple[int | None, bool | None, float]]:
        """Tokens, targets, and the rest that a file holds of it: where a second sequence begins, label and weight."""
        return self.ids, self.targets, (None, None, self.weight)

    def canonical(self) -> bytes:
        """Text, tokens, targets and weight, with the lengths in front: other examples never give the same bytes."""
        text = self.text.encode()
        weight = b"" if self.weight == 1 else struct.pack("<d", self.weight)
        return struct.pack("<2Q", len(text), len(self.targets)) + text + self.ids + self.targets + weight


def encode(
    rows: Sequence[Rendered | list[RowError]],
    tokenizer: TextTokenizer,
    *,
    templated: bool,
    loss_on: LossOn,
    max_length: int,
    vocabulary: int | None = None,
    on_long_row: OnLongRow = "error",
    compare: bool = False,
) -> Iterator[list[Encoded] | list[RowError]]:
    """Yields for each row its examples, or what is wrong with it; faults pass through.

    Args:
        rows: Rendered rows and faults.
        tokenizer: The tokenizer.
        templated: Whether the text comes from a chat template, which writes all special tokens itself; otherwise the
            tokenizer adds its own, and the end-of-sequence token is appended where it is not there yet.
        loss_on: Whether all tokens are targets, or (any other value) those of the completions and the appended end of
            sequence.
        max_length: The most tokens of an example.
        vocabulary: Rows of the model's embedding, which no token may be beyond; None if that is not known.
        on_long_row: `truncate` and `split` make examples of a row of more than `max_length` tokens, else it is a fault.
        compare: Whether rows are hashed to be compared with others.
    """
    eos = None if templated else tokenizer.eos
    bos = None if templated else tokenizer.bos
    encodings = _tokenize(rows, tokenizer, templated=templated, everything=loss_on == "all")
    for row in rows:
        if not isinstance(row, Rendered):
            yield row
            continue
        encoding = next(encodings)
        ids, targets = _ids_and_targets(row, encoding, bos, eos, loss_on)
        pieces, long = _pieces(ids, targets, max_length, on_long_row)
        fault = (
            _check(row, *pieces[0], max_length, cut=bool(long))
            or _check_ids(row, ids, vocabulary, tokenizer)
            or _check_turns(row, encoding, tokenizer.special)
        )
        if fault:
            yield [fault]
            continue
        compared_by = row_hash(row.own_texts) if compare else b""
        # The text is that of the row: only its first piece has it, and is counted as a long row.
        firsts = chain([(row.text, long)], iter(lambda: ("", ()), None))
        yield [
            Encoded(
                text,
                struct.pack(f"<{len(piece)}i", *piece),
                mask,
                _end(piece, mask, tokenizer.special),
                row.unused,
                counts,
                row.where,
                compared_by,
                row.weight,
            )
            for (piece, mask), (text, counts) in zip(pieces, firsts, strict=False)
        ]


def _pieces(
    ids: list[int], targets: bytes, max_length: int, on_long_row: OnLongRow
) -> tuple[list[tuple[list[int], bytes]], tuple[tuple[str, int], ...]]:
    """(ids, targets) of each example of a row, and what is counted if the row is too long.

    A piece begins with the last token of the piece before it, which is no target there: every token is a target once.
    """
    if len(ids) <= max_length or on_long_row not in {"truncate", "split"}:
        return [(ids, targets)], ()
    if on_long_row == "truncate":
        cut = len(ids) - max_length
        return [(ids[:max_length], targets[:max_length])], (("truncated", 1), ("tokens_cut", cut))
    step = max(1, max_length - 1)
    starts = range(0, len(ids) - 1, step)
    pieces = [(ids[at : at + max_length], b"\0" + targets[at + 1 : at + max_length]) for at in starts]
    return pieces, (("split", 1), ("pieces", len(pieces)))


def _tokenize(
    rows: Sequence[Rendered | list[RowError]], tokenizer: TextTokenizer, *, templated: bool, everything: bool
) -> Iterator[Any]:
    """The encodings of the rendered rows, in order: of many texts at once, and of fewer where they are long."""
    texts = iter([row for row in rows if isinstance(row, Rendered)])
    while batch := _take(texts):
        # Where all tokens are targets, their offsets in the text are not needed, and computing them takes time.
        offsets = not everything or any(row.ignored or row.must_end for row in batch)
        yield from tokenizer.encode([row.text for row in batch], special=not templated, offsets=offsets)


def _take(rows: Iterator[Rendered]) -> list[Rendered]:
    batch: list[Rendered] = []
    characters = 0
    while characters < _BATCH_CHARACTERS and (row := next(rows, None)) is not None:
        batch.append(row)
        characters += len(row.text)
    return batch


def _end(ids: Sequence[int], targets: bytes, special: frozenset[int]) -> int | None:
    """The last special token among the last target tokens; None if there is none."""
    learned = (token for token, target in zip(reversed(ids), reversed(targets), strict=True) if target)
    return next((token for token in islice(learned, _LAST_TOKENS) if token in special), None)


def _ids_and_targets(
    row: Rendered, encoding: Any, bos: int | None, eos: int | None, loss_on: LossOn
) -> tuple[list[int], bytes]:
    ids: list[int] = encoding.ids
    # The text begins with the token that the tokenizer puts in front as well.
    twice = bos is not None and ids[:2] == [bos, bos] and encoding.special_tokens_mask[0]
    if loss_on == "all" and not row.ignored:
        targets = bytearray(b"\1") * len(ids)
    else:
        targets = _inside(row, encoding.offsets, everything=loss_on == "all")
    if twice:
        ids, targets = ids[1:], targets[1:]
    if eos is not None:
        # The text ends with the token that the tokenizer puts behind as well.
        if ids[-2:] == [eos, eos] and encoding.special_tokens_mask[-1]:
            ids, targets = ids[:-1], targets[:-1]
        # As a token, not by writing its text behind the row's: a tokenizer may strip what precedes it.
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
            targets.append(1)
        targets[-1] = 1
    targets[:1] = b"\0"
    return ids, bytes(targets)


def _inside(row: Rendered, offsets: Sequence[tuple[int, int]], *, everything: bool) -> bytearray:
    """For each token whether it is a target: all of them, or those of the completions; but none of the ignored spans.

    By its end: a token across the border is predicted from the prompt alone, and holds part of the completion. Special
    tokens end at 0.
    """
    import numpy as np

    ends = np.fromiter((end for _, end in offsets), np.int64, len(offsets))
    targets = np.full(len(ends), everything)
    for start, stop in () if everything else row.completions:
        targets |= (ends > start) & (ends <= stop)
    for start, stop in row.ignored:
        targets &= (ends <= start) | (ends > stop)
    return bytearray(targets.tobytes())


def _check(row: Rendered, ids: list[int], targets: bytes, max_length: int, *, cut: bool) -> RowError | None:
    if len(ids) > max_length:
        what = f"makes the row {len(ids)} tokens long, {max_length} are allowed"
        return RowError("too_long", row.where, what)
    if 1 not in targets:
        why = (
            f": the {max_length} tokens that it is cut to contain no token of the completion; raise"
            " JOB_TRAIN__MAX_LENGTH"
        )
        return RowError("empty_target", row.where, "has no token to learn" + why * cut)
    return None


def _check_turns(row: Rendered, encoding: Any, special: frozenset[int]) -> RowError | None:
    """Finds the turn that does not teach the model to stop: the last token that is learned of it is no special one.

    A line break behind the special token does not count. A stand-in for a tokenizer has no special tokens.
    """
    if not row.must_end or not special:
        return None
    ends: dict[int, int] = {}
    for token, (start, end) in zip(reversed(encoding.ids), reversed(encoding.offsets), strict=True):
        if len(ends) == len(row.completions):
            break
        at = next((index for index, (first, stop) in enumerate(row.completions) if first < end <= stop), None)
        if at is not None and at not in ends and (token in special or row.text[start:end].strip()):
            ends[at] = token
    for index, (first, stop) in enumerate(row.completions):
        if ends.get(index) not in special:
            shown = row.text[max(first, stop - _SHOWN) : stop]
            message = (
                f"would be learned without an end: learned turn {index + 1} ends with {shown!a}, and with"
                " no special token that ends a turn; use"
                " JOB_TRAIN__LOSS_ON=completion or all, or a model whose chat template ends each turn"
            )
            return RowError("turn_without_end", row.where, message)
    return None


def _check_ids(row: Rendered, ids: Sequence[int], vocabulary: int | None, tokenizer: TextTokenizer) -> RowError | None:
    """Finds the token that the model has no embedding of."""
    if vocabulary is None or max(ids) < vocabulary:
        return None
    number = next(token for token in ids if token >= vocabulary)
    what = f"has the token {tokenizer.name_of(number)!r} (number {number}), and the model has embeddings"
    return RowError("unknown_token", row.where, f"{what} of {vocabulary} tokens: its tokenizer is another model's")
