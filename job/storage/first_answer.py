"""Whether a store answers at all: asked once with short time limits, before a command that a person waits for reads.

A request may take JOB_STORAGE__TIMEOUT_SECONDS, and a body several times as long, so that large objects can be read
over slow links. With a store that accepts connections and never answers, these limits and the repetitions add up to
minutes. A lower limit for all requests would cut off large bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from job.errors import JobError, Unreachable
from job.storage.location import Location, is_remote
from job.storage.open import StorageOptions, open_store

ANSWER_SECONDS = 6.0
ANSWER_TRIES = 4
"""Time limit of one request, and how often it is tried: with the pauses about 30 s."""
_ASKED = "answer"
"""Key of an object that need not exist."""


def require_answers(places: Iterable[str], options: StorageOptions) -> None:
    """Asks the store of each URI once; paths are passed over.

    Raises:
        Unreachable: A store does not answer within about 30 s, in all tries.
    """
    require = answers_once(options)
    for place in places:
        require(place)


def answers_once(options: StorageOptions) -> Callable[[str], None]:
    """A function that does for one place what `require_answers` does, and asks each bucket or container only once.

    It raises for all URIs of a store that has not answered the first time.
    """
    quick = replace(
        options,
        timeout_seconds=min(options.timeout_seconds, ANSWER_SECONDS),
        retries=min(options.retries, ANSWER_TRIES),
    )
    silent: dict[tuple[str, str], str] = {}

    def require(place: str) -> None:
        if not is_remote(place):
            return
        try:
            location = Location.parse(place)
            bucket = location.scheme, location.bucket
            if bucket not in silent:
                silent[bucket] = ""
                open_store(location, quick).tag(_ASKED)
        except Unreachable as error:
            silent[bucket] = str(error).partition(": cannot read: ")[2] or str(error)
        except JobError:  # a URI that makes no sense, or an answer: what reads next says what is wrong
            return
        if silent[bucket]:
            raise Unreachable(f"{place}: the store does not answer: {silent[bucket]}")

    return require
