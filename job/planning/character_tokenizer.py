"""A substitute for a tokenizer that cannot be downloaded: tokens of equal length, which is right only on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any
from zlib import crc32

_ID = 0


@dataclass(frozen=True)
class _Encoding:
    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class _Batch:
    encodings: list[_Encoding]


class CharacterTokenizer:
    """The part of a tokenizer that reading data and questions uses; each token is `characters_per_token` long."""

    eos_token_id = 1
    chat_template = "stand-in"

    def __init__(self, characters_per_token: float) -> None:
        self._width = characters_per_token

    def __call__(self, texts: Sequence[str], **_: Any) -> _Batch:
        """Ids and character offsets of each text."""
        return _Batch([self._encode(text) for text in texts])

    def encode(self, text: str, **_: Any) -> list[int]:
        """Ids of one text, each a number made of the token's characters: texts that begin alike have the same first."""
        edges = self._encode(text).offsets
        return [crc32(text[start:end].encode(errors="surrogatepass")) for start, end in edges]

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **_: Any) -> str:
        """The messages one after the other, each with its role."""
        return "".join(f"<{message['role']}>{message['content']}\n" for message in messages)

    def _encode(self, text: str) -> _Encoding:
        count = ceil(len(text) / self._width)
        edges = [min(len(text), round(index * self._width)) for index in range(count + 1)]
        return _Encoding([_ID] * count, list(pairwise(edges)))
