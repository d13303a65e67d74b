"""The part of a tokenizer that reading rows needs: many texts at once, in this process or in another one.

transformers' own call builds lists of all encodings, which are not needed here, and importing transformers takes
seconds. Its fast tokenizers are a thin layer over a tokenizer of the `tokenizers` library, which is called directly
here. A tokenizer class that does more than that is called itself, in this process only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from job.errors import DataError, Problem

_CHECKED = ("__call__", "_encode_plus", "_convert_encoding", "convert_ids_to_tokens")
"""Methods that a class may not have changed, if its tokenizer is called directly."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer of texts.

    Attributes:
        encode: Texts -> encodings of the `tokenizers` library. With `special` the tokenizer adds its special tokens;
            without `offsets` the encodings need not have offsets.
        name_of: The token of a number.
        eos: The end-of-sequence token; None if there is none.
        bos: The token at the beginning of a sequence; None if there is none.
        special: Tokens that a chat template may end a turn with.
        control: The texts of special tokens, the longest first, which rows may hold.
        edges: The texts of the tokens at the beginning and the end of a sequence; empty if there are none.
        portable: All of it as JSON; None if it cannot be taken to another process.
    """

    encode: Callable[..., Sequence[Any]]
    name_of: Callable[[int], str | None]
    eos: int | None
    bos: int | None
    special: frozenset[int]
    control: tuple[str, ...]
    edges: tuple[str, str]
    portable: Callable[[], str] | None = field(default=None)


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """What reading rows needs of a `transformers.PreTrainedTokenizerFast`, or of a stand-in that has `__call__`."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {number: token.content for number, token in added.items() if token.special}
    control_words = {*getattr(tokenizer, "all_special_tokens", ()), *marked.values()} - {""}

    def encode(texts: Sequence[str], *, special: bool, offsets: bool) -> Sequence[Any]:
        # `verbose` would warn about a row that is too long for the model, which is checked by the job.
        options = {"add_special_tokens": special, "padding": False, "truncation": False, "verbose": False}
        if not plain:
            encodings: Sequence[Any] = tokenizer(texts, **options).encodings
            return encodings
        tokenizer([""], **options)  # it configures the underlying tokenizer for this call
        return _encode(tokenizer.backend_tokenizer, texts, special=special, offsets=offsets)

    def portable() -> str:
        encode([""], special=True, offsets=True)
        backend = tokenizer.backend_tokenizer
        facts = {name: getattr(result, name) for name in ("eos", "bos", "control", "edges")}
        facts |= {"special": sorted(result.special), "split": bool(backend.encode_special_tokens)}
        return json.dumps({**facts, "tokenizer": backend.to_str()})

    plain = _is_plain(tokenizer)
    result = TextTokenizer(
        encode=encode,
        name_of=getattr(tokenizer, "convert_ids_to_tokens", str),
        eos=tokenizer.eos_token_id,
        bos=getattr(tokenizer, "bos_token_id", None),
        special=frozenset(getattr(tokenizer, "all_special_ids", ())) | marked.keys(),
        control=tuple(sorted(control_words, key=lambda word: (-len(word), word))),
        edges=(getattr(tokenizer, "bos_token", None) or "", getattr(tokenizer, "eos_token", None) or ""),
        portable=portable if plain else None,
    )
    return result


def from_portable(text: str) -> TextTokenizer:
    """The tokenizer in another process, where transformers is not imported."""
    from tokenizers import Tokenizer

    facts = json.loads(text)
    backend = Tokenizer.from_str(facts["tokenizer"])
    backend.encode_special_tokens = facts["split"]

    def encode(texts: Sequence[str], *, special: bool, offsets: bool) -> Sequence[Any]:
        return _encode(backend, texts, special=special, offsets=offsets)

    special = frozenset(facts["special"])
    control, (begin, end) = tuple(facts["control"]), facts["edges"]
    return TextTokenizer(encode, backend.id_to_token, facts["eos"], facts["bos"], special, control, (begin, end))


def _encode(backend: Any, texts: Sequence[str], *, special: bool, offsets: bool) -> Sequence[Any]:
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    with broken_tokenizer():
        encodings: Sequence[Any] = encode(list(texts), add_special_tokens=special)
    return encodings


@contextmanager
def broken_tokenizer() -> Iterator[None]:
    """Turns a panic of the `tokenizers` library, which no `except Exception` catches, into an error of the data.

    Raises:
        DataError: The tokenizer's file makes the library fail on a text.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        what = f"its tokenizer.json makes the tokenizer fail on a text: {str(error)[:200]}"
        raise DataError([Problem("JOB_MODEL__ID", what)]) from None


def _is_plain(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer only calls the underlying `tokenizers.Tokenizer`."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return False
    from transformers import PreTrainedTokenizerFast

    return all(getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name) for name in _CHECKED)


def pattern_of(words: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any of the words, of which the first that fits counts; None for no words."""
    return re.compile("|".join(map(re.escape, words))) if words else None


def sha256_of(tokenizer: TextTokenizer) -> str | None:
    """SHA-256 of everything that decides the tokens of a text; None if that is not known."""
    return None if tokenizer.portable is None else sha256(tokenizer.portable().encode()).hexdigest()
