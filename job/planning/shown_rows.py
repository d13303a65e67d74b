"""`plan --show N`: the first rows as the model is going to read them, with the tokens marked that the loss counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from job.data.preferences import EncodedAnswers
from job.data.tokenization import Encoded

OPEN, CLOSE = "⟦", "⟧"
"""Marks around target tokens where the output is not a terminal."""
_REVERSE, _RESET = "\x1b[7m", "\x1b[0m"
_INDENT = "  "


@dataclass(frozen=True)
class ShownRow:
    """An example, or one answer of a row of preferences, decoded: pieces of text, and whether each is in the loss."""

    where: str
    tokens: int
    target_tokens: int
    pieces: tuple[tuple[str, bool], ...]
    more: tuple[ShownRow, ...] = ()


def show_row(item: Encoded | EncodedAnswers, tokenizer: Any) -> ShownRow:
    """The row of an example; a row of preferences has its second answer in `more`."""
    if isinstance(item, EncodedAnswers):
        first, *others = (show_row(side, tokenizer) for side in item.sides)
        return ShownRow(first.where, first.tokens, first.target_tokens, first.pieces, tuple(others))
    ids, targets = item.example.input_ids, item.example.targets
    return ShownRow(item.where, len(ids), sum(targets), tuple(_pieces(ids, targets, tokenizer)))


def _pieces(ids: Sequence[int], targets: Sequence[bool], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens with the same target: what it adds to the text of all tokens before it.

    Decoded alone, a run would lose the space that its first token begins with in some tokenizers.
    """
    before, end = "", 0
    for target, run in groupby(targets):
        end += len(list(run))
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield text[len(before) :], target
        before = text


def as_lines(rows: Sequence[ShownRow], *, terminal: bool) -> list[str]:
    """The rows as text: targets in reverse video on a terminal, else between markers; control characters escaped."""
    flat = [side for row in rows for side in (row, *row.more)]
    lines = []
    for row in flat:
        lines.append(f"{_escaped(row.where)}: {row.tokens:,} tokens, {row.target_tokens:,} of them in the loss")
        text = "".join(_marked(_escaped(piece), target=target, terminal=terminal) for piece, target in row.pieces)
        lines += [f"{_INDENT}{line}" for line in text.split("\n")]
    return lines


def _marked(text: str, *, target: bool, terminal: bool) -> str:
    if not target:
        return text
    if not terminal:
        return f"{OPEN}{text}{CLOSE}"
    # Line by line: reverse video that continues over a line break fills the rest of the line.
    return "\n".join(f"{_REVERSE}{line}{_RESET}" if line else line for line in text.split("\n"))


def _escaped(text: str) -> str:
    """Text as it can be printed: control characters and the markers themselves are escaped, line breaks stay."""
    return re.sub(r".", _escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable() and character not in {OPEN, CLOSE}:
        return character
    return ascii(character)[1:-1]
