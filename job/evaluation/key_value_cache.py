"""A key/value cache for generation whose memory is allocated for many tokens at a time.

transformers' `DynamicLayer` concatenates instead: with each token it copies the keys and values of all earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

RESERVED_TOKENS = 256
"""Memory is allocated for this many further tokens, not for the longest answer allowed: most end much earlier."""


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, (rows, heads, tokens, head size) each, with reserved memory for more tokens.

    Args:
        read: The layer's caches of parts of the batch's prompts, in the order of the rows. They are emptied.
        longest: Tokens to which the prompts are padded, with zeros in front (left padding).
        most: The most tokens of a row, prompt and answer together.
    """

    def __init__(self, read: Sequence[DynamicLayer], longest: int, most: int) -> None:
        super().__init__()
        self._most = most
        tokens = min(longest + RESERVED_TOKENS, most)
        self.dtype, self.device, self.is_initialized = read[0].dtype, read[0].device, True
        self._reserved = [
            _joined([layer.keys for layer in read], longest, tokens),
            _joined([layer.values for layer in read], longest, tokens),
        ]
        for layer in read:
            layer.keys = layer.values = None  # frees them, although the caller still holds the layers
        self._show(longest)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (reserved[:, :, :tokens] for reserved in self._reserved)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Appends keys and values, (rows, heads, new tokens, head size) each; returns all keys and all values."""
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if after > self._reserved[0].shape[2]:
            more = max(after, min(before + RESERVED_TOKENS, self._most)) - before
            self._reserved = [pad(reserved, (0, 0, 0, more)) for reserved in self._reserved]
        for reserved, states in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, before:after] = states
        self._show(after)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only these rows; `indices` is (kept rows,) int64."""
        tokens = self.keys.shape[-2]
        self._reserved = [reserved[indices] for reserved in self._reserved]
        self._show(tokens)


def new_cache(model: Any) -> DynamicCache:
    """An empty cache with the kinds of layers that the model's configuration asks for."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def can_be_reserved(cache: DynamicCache) -> bool:
    """Whether `reserve` takes this cache. Not, for instance, with sliding-window layers: these have dropped tokens."""
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def reserve(caches: Sequence[DynamicCache], longest: int, most: int) -> DynamicCache:
    """Joins the caches of parts of a batch to one of all rows, with reserved memory.

    Args:
        caches: Of the parts, in the order of the rows. They are emptied.
        longest: Tokens to which the prompts are padded.
        most: The most tokens of a row, prompt and answer together.
    """
    whole = caches[0]
    # Layer by layer, freeing each part's, so that only one layer's keys and values are in memory twice.
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if layers[0].is_initialized:  # layers that share the keys and values of another one stay empty
            whole.layers[number] = ReservedLayer(layers, longest, most)
    return whole


def _joined(parts: Sequence[torch.Tensor], longest: int, tokens: int) -> torch.Tensor:
    """(rows of all parts, heads, tokens, head size); prompts are padded in front with zeros to `longest` tokens."""
    rows, (_, heads, _, width) = sum(len(part) for part in parts), parts[0].shape
    whole = parts[0].new_zeros(rows, heads, tokens, width)
    start = 0
    for part in parts:
        whole[start : start + len(part), :, longest - part.shape[-2] : longest] = part
        start += len(part)
    return whole
