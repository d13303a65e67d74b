"""Work in numbered parts (sequences to score, batches to answer), each of which is cached as soon as it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Keeps(Protocol):
    """A cache of computed parts: `score_cache.ScoreCache`."""

    def add(self, number: int, results: list[Any]) -> None:
        """Adds a part to the cache."""

    def save(self) -> None:
        """Writes the added parts."""


def complete(
    results: dict[int, list[T]],
    computed: Iterator[tuple[int, list[T]]],
    cache: Keeps | None,
    on_progress: Callable[[int], None],
) -> dict[int, list[T]]:
    """Adds the missing parts to `results`, and returns it.

    Args:
        results: Number of a part -> the result for each of its questions.
        computed: The missing parts with their numbers, in any order.
        cache: Receives the computed parts; may be None.
        on_progress: Called with the number of finished questions.
    """
    on_progress(sum(map(len, results.values())))
    try:
        for number, result in computed:
            results[number] = result
            if cache is not None:
                cache.add(number, result)
            on_progress(sum(map(len, results.values())))
    finally:
        if cache is not None:
            cache.save()  # also after an error or a request to stop
    return results
