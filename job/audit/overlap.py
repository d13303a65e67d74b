"""Which rows have a question in them that is scored, by runs of words.

Rules, from published contamination checks of language models:

- A run is NGRAM words, and a row has a question if it has a share of at least SHARE of the question's runs: PaLM calls
  a question contaminated if 70 % of its 8-grams are in the training data (Chowdhery et al. 2022, section 8). Here all
  have to be in one row, which has a location that can be named.
- Runs that more than MOST_ROWS rows have do not count: they are templates and figures of speech. GPT-3 ignores n-grams
  in more than 10 documents for this reason (Brown et al. 2020, appendix C).
- A question that a row has word for word, from its first word to its last, counts always, however many rows have it.
- A question of fewer than NGRAM words counts if it is a whole text or a whole line of a row, a label such as
  `Question:` aside, and has at least FEWEST_WORDS words. Shorter ones are not looked for, since lines of one or two
  words are often equal by chance; the record counts them.

What is compared is the prompt of a question without the words that all prompts of its task begin or end with. Where
fewer than NGRAM words are left, it is the prompt but for labels at its ends, and counts word for word only. Letter
case, punctuation and white space do not count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from zlib import crc32

from job.common.near_duplicates import words_of

if TYPE_CHECKING:
    import numpy as np

    Hashes = np.ndarray[Any, np.dtype[np.uint64]]

NGRAM = 8
SHARE = 0.7
MOST_ROWS = 10
FEWEST_WORDS = 3
_BASE = 0x9E3779B97F4A7C15 | 1
"""Of the polynomial hash of a run of words, modulo 2 ** 64: odd, so that it has an inverse."""
_MAX_SHORT_CHARACTERS = 400
"""Characters of a line that may be a short question; a longer one is not split into words."""
_LABEL = re.compile(r"^\s*(?:[A-Za-z]{1,12}\s*(?:\d{1,4})?\s*[:.)]|\d{1,4}\s*[:.)]|[-*#]+)\s*")

_END_LABEL = re.compile(r"\s*\b[A-Za-z]{1,12}\s*:\s*$")


class Powers:
    """Powers of the base and of its inverse, for as many words as were met so far."""

    def __init__(self) -> None:
        self._size = 0

    def upto(self, size: int) -> tuple[Hashes, Hashes]:
        """(size,) uint64 each: base ** -i and base ** i."""
        import numpy as np

        if size > self._size:
            self._size = max(size, 2 * self._size, 1024)
            inverse = pow(_BASE, -1, 1 << 64)
            self._down, self._up = (
                np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(self._size - 1, base, np.uint64)]))
                for base in (inverse, _BASE)
            )
        return self._down[:size], self._up[:size]


_POWERS = Powers()


class Runs:
    """Hashes of the runs in a text, of any length: the sum of word hash * base ** (end - position), modulo 2 ** 64."""

    def __init__(self, words: Sequence[str]) -> None:
        import numpy as np

        self.count = len(words)
        down, self._up = _POWERS.upto(self.count + 1)
        hashes = np.fromiter((crc32(word.encode(errors="replace")) for word in words), np.uint64, self.count)
        # What follows wraps around, as it should.
        hashes = (hashes + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * down[:-1])])

    def of_length(self, length: int) -> Hashes:
        """(words - length + 1,) uint64: the hash of the run at each position."""
        import numpy as np

        starts = max(0, self.count - length + 1)
        if not starts:
            return np.zeros(0, np.uint64)
        hashes: Hashes = (self._sums[length : length + starts] - self._sums[:starts]) * self._up[:starts]
        return hashes


def text_hash(words: Sequence[str]) -> int:
    """The hash of a text; a short one is not hashed as a run, since each line of each row is hashed like that."""
    if len(words) < NGRAM:
        return int.from_bytes(blake2b(" ".join(words).encode(errors="replace"), digest_size=8).digest(), "little")
    return int(Runs(words).of_length(len(words))[0])


@dataclass(frozen=True)
class OverlapHits:
    """What a row has of the questions: those that it has word for word, and the numbers of the runs that it has."""

    exact: tuple[int, ...] = ()
    runs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """The questions as hashes, JSON-able; no text of them.

    Attributes:
        tasks: Name of each task, and how many questions it has; a question's number counts through all tasks.
        lengths: Words of each question.
        wholes: Hash of each question as a whole.
        firsts: Hash of its first run of NGRAM words; 0 where it is shorter.
        runs: For each question the indices in `hashes` of its runs, each once; none where it counts word for word only.
        hashes: The runs of all questions, and their first ones, ascending.
    """

    tasks: tuple[tuple[str, int], ...]
    lengths: tuple[int, ...]
    wholes: tuple[int, ...]
    firsts: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...] = field(repr=False)
    hashes: tuple[int, ...] = field(repr=False)

    def look_for(self, texts: Sequence[str], words: Sequence[str]) -> OverlapHits:
        """What a row has of the questions.

        Args:
            texts: The row's texts.
            words: Their words, one text behind the other.
        """
        import numpy as np

        lines = {line for text in texts for line in (text, *text.splitlines())}
        exact = {number for line in lines for number in self._short_questions(line)}
        row = Runs(words)
        hashes, question_hashes = row.of_length(NGRAM), self._known
        if not len(hashes) or not len(question_hashes):
            return OverlapHits(tuple(sorted(exact)))
        positions = np.searchsorted(question_hashes, hashes)
        positions[positions == len(question_hashes)] = 0
        hits = np.flatnonzero(question_hashes[positions] == hashes)
        for at in hits.tolist():
            for number in self._by_first.get(int(hashes[at]), ()):
                length = self.lengths[number]
                if at + length <= row.count and int(row.of_length(length)[at]) == self.wholes[number]:
                    exact.add(number)
        return OverlapHits(tuple(sorted(exact)), tuple(sorted(set(positions[hits].tolist()))))

    def _short_questions(self, line: str) -> Sequence[int]:
        if not self._by_text_hash or len(line) > _MAX_SHORT_CHARACTERS:
            return ()
        questions: list[int] = []
        for form in {line, _LABEL.sub("", line)}:
            words = words_of(form)
            if FEWEST_WORDS <= len(words) < NGRAM:
                questions += self._by_text_hash.get((len(words), text_hash(words)), ())
        return questions

    @cached_property
    def _known(self) -> Hashes:
        import numpy as np

        return np.array(self.hashes, np.uint64)

    @cached_property
    def _by_first(self) -> Mapping[int, Sequence[int]]:
        by_first = defaultdict(list)
        for number, (first, length) in enumerate(zip(self.firsts, self.lengths, strict=True)):
            if length >= NGRAM:
                by_first[first].append(number)
        return dict(by_first)

    @cached_property
    def _by_text_hash(self) -> Mapping[tuple[int, int], Sequence[int]]:
        by_text_hash = defaultdict(list)
        for number, (hashed, length) in enumerate(zip(self.wholes, self.lengths, strict=True)):
            if FEWEST_WORDS <= length < NGRAM:
                by_text_hash[length, hashed].append(number)
        return dict(by_text_hash)

    @property
    def too_short(self) -> int:
        """How many questions are too short to be looked for."""
        return sum(length < FEWEST_WORDS for length in self.lengths)

    def name(self, number: int) -> tuple[str, int]:
        """The task of a question, and its number in the task, from 0."""
        for task, count in self.tasks:
            if number < count:
                return task, number
            number -= count
        raise IndexError(number)


def index_questions(prompts: Mapping[str, Sequence[str]]) -> Questions:
    """The questions as hashes.

    Args:
        prompts: By task, the prompt of each question that is scored, in order.
    """
    words, runs_of_questions = [], []
    for texts in prompts.values():
        for text, compared in zip(texts, _without_template([words_of(text) for text in texts]), strict=True):
            distinct = len(compared) >= NGRAM
            words.append(compared if distinct else words_of(_END_LABEL.sub("", _LABEL.sub("", text))))
            runs_of_questions.append(Runs(compared).of_length(NGRAM) if distinct else Runs(()).of_length(NGRAM))
    firsts = [
        int(Runs(question_words[:NGRAM]).of_length(NGRAM)[0]) if len(question_words) >= NGRAM else 0
        for question_words in words
    ]
    hashes = sorted({int(run) for runs in runs_of_questions for run in runs} | {first for first in firsts if first})
    position = {run: at for at, run in enumerate(hashes)}
    return Questions(
        tuple((task, len(texts)) for task, texts in prompts.items()),
        tuple(map(len, words)),
        tuple(map(text_hash, words)),
        tuple(firsts),
        tuple(tuple(sorted({position[int(run)] for run in runs})) for runs in runs_of_questions),
        tuple(hashes),
    )


def _without_template(texts: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The texts without the words that all of them begin or end with, such as `Question:` and `Answer:`."""
    if len(texts) < 2:  # noqa: PLR2004 - of one text all is common
        return list(texts)
    before = _common(texts)
    after = _common([text[: before - 1 if before else None : -1] for text in texts])
    return [text[before : len(text) - after] for text in texts]


def _common(texts: Sequence[Sequence[str]]) -> int:
    """How many words all texts begin with."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*texts, strict=False)))
