"""Work in numbered parts, each of which is kept as soon as it is computed: sequences to score, batches to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Keeps(Protocol):
    """Where computed parts are kept: `score_cache.ScoreCache`."""

    def add(self, number: int, found: list[Any]) -> None:
        """Keeps a part."""

    def save(self) -> None:
        """Writes what was added."""


def complete(
    known: dict[int, list[T]],
    computed: Iterator[tuple[int, list[T]]],
    cache: Keeps | None,
    on_progress: Callable[[int], None],
) -> dict[int, list[T]]:
    """Adds to `known` the parts that are still missing; returns it.

    Args:
        known: By number of the part, what was found of each question.
        computed: The other parts, in any order.
        cache: Where they are kept, if anywhere.
        on_progress: Called with the number of questions that are done.
    """
    on_progress(sum(map(len, known.values())))
    try:
        for number, found in computed:
            known[number] = found
            if cache is not None:
                cache.add(number, found)
            on_progress(sum(map(len, known.values())))
    finally:
        if cache is not None:
            cache.save()  # also what was computed before an error or a request to stop
    return known
