"""The value of JOB_DATA__SOURCE: one source, or several with how much of each is used.

    rows.jsonl                                  a path, URI or hub id
    a.jsonl,s3://bucket/c.parquet               several: all rows of the first, then all of the second
    a.jsonl=2x,b.jsonl=0.5x,c.jsonl=1000rows    each row twice, every second row, the first 1,000 rows
    org/name@3f5c2a1=2x                         its own revision, for a hub id

A path that exists is one source, even with commas and equals signs in its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

EXAMPLES = ":examples"
"""Behind a task's name in JOB_EVAL__DATA: the file has the examples of its prompts, not its questions."""
_AMOUNT = re.compile(r"(.+)=(?:(\d{1,4}(?:\.\d{1,6})?)x|(\d{1,9})rows)", re.ASCII)
_NUMBER = re.compile(r".+=\d+(\.\d+)?", re.ASCII)
_NO_AMOUNT = re.compile(r".+=\s*[-+]?\d[\d._]*(e[-+]?\d+)?\s*(x|rows?)", re.ASCII | re.IGNORECASE)
_PINNED = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)@([\w./-]+)", re.ASCII)


@dataclass(frozen=True)
class Source:
    """One source.

    Attributes:
        location: Path, URI or hub id where it is read from.
        name: What to call it in messages and records: as the user wrote it, without the amount.
        revision: Revision of a hub id, if the entry names one.
        times: How often each row is used; a part of 1 takes that share of the rows, evenly spaced.
        rows: The number of valid rows to take, the first ones; None for all.
    """

    location: str
    name: str
    revision: str | None = None
    times: Fraction = Fraction(1)
    rows: int | None = None


def parse_sources(text: str) -> tuple[Source, ...]:
    """The sources that a setting names; one that is the text itself if it names a single one without an amount.

    Raises:
        ValueError: An item is empty, has an invalid amount, or a number of which the unit is missing.
    """
    if os.path.exists(text):  # noqa: PTH110 - a path of any length and with any characters
        return (Source(text, text),)
    items = [item.strip() for item in text.split(",")]
    found = tuple(_parse(item, several=len(items) > 1) for item in items)
    if len({source.location for source in found}) < len(found):
        raise ValueError("names the same source twice; give it once, with =2x after it to use each row twice")
    return found


def _parse(item: str, *, several: bool) -> Source:
    if not item:
        raise ValueError("has an empty item between commas; remove one comma")
    amount = _AMOUNT.fullmatch(item)
    if amount is None and several and _NUMBER.fullmatch(item):
        raise ValueError(
            "has a number without a unit: write =2x to use each row twice, or =1000rows to take 1,000 rows"
        )
    if amount is None and _NO_AMOUNT.fullmatch(item) and not os.path.exists(item):  # noqa: PTH110 - as in parse_sources
        raise ValueError(
            f"has an invalid amount, {item.rpartition('=')[2]!a}: a number above 0 with x, such as =0.5x, or "
            "a whole number with rows, such as =1000rows"
        )
    location = amount[1] if amount else item
    times = Fraction(amount[2]) if amount and amount[2] else Fraction(1)
    rows = int(amount[3]) if amount and amount[3] else None
    if not times or rows == 0:
        raise ValueError("has a source with the amount 0; remove the source, or use more than 0")
    pinned = None if os.path.exists(location) else _PINNED.fullmatch(location)  # noqa: PTH110 - as in parse_sources
    location, revision = (pinned[1], pinned[2]) if pinned else (location, None)
    return Source(location, location, revision, times, rows)


def locate_sources(text: str, locate: Callable[[str, str], str]) -> str | tuple[Source, ...]:
    """What `load_examples` reads: the location of a single source, or all sources with their locations.

    Args:
        text: The setting.
        locate: Given a location and the name of a folder for copies, returns the path or hub id to read it from.
    """
    sources = parse_sources(text)
    if is_single(sources):
        return locate(sources[0].location, "data")
    return tuple(
        replace(source, location=locate(source.location, f"data/{index}")) for index, source in enumerate(sources)
    )


def is_single(sources: tuple[Source, ...]) -> bool:
    """Whether the setting's text is the location of one source, all of whose rows are used once."""
    return len(sources) == 1 and sources[0] == Source(sources[0].location, sources[0].location)
