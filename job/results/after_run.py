"""What is recorded of a complete run after it: where it was pushed, and what `serve-check --record` found.

These records are sealed, and written after the manifest, which therefore does not list them. The command `report` shows
them, `verify` compares them with the manifest and the run's records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

from job.common.hashing import sealed, unsealed
from job.records import Pushed
from job.runs.layout import PUSHED, SERVED, served_key
from job.storage.base import read_record
from job.storage.open import ObjectStore

NEAR = 0.2
"""Nats between the two best choices of a record below which another rounding may change the prediction."""
GREEDY_SHARE = 0.9
"""Of the greedy answers that begin with a choice, so many have to begin with the predicted one: the likeliest choice as
a whole need not be the one that begins with the likeliest token."""

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Asked:
    """One question that a server was asked.

    Attributes:
        task: Its task.
        id: In that task.
        recorded: The prediction of the record.
        served: That of the server; None if its answer is no choice.
        margin: Log-likelihood of the record's best choice less that of the second best, in nats.
        difference: The largest difference between a choice's two log-likelihoods, in nats; None without any.
    """

    task: str
    id: str
    recorded: int
    served: int | None
    margin: float
    difference: float | None

    @property
    def alike(self) -> bool:
        """Whether the server predicts what the record says."""
        return self.served == self.recorded


@dataclass(frozen=True)
class ServeCheck:
    """How a server answered the run's questions.

    Attributes:
        server: Of the table in `job/serving/servers.py`.
        way: How it was asked, see there.
        format: `adapter`, or the exported format.
        asked: Questions in order.
        seconds: For all of them.
        first_token: Median of seconds to the first token of a streamed answer.
        tokens_per_second: Median after it, one request at a time; None if none had two tokens.
        when: UTC, as the manifest writes times.
    """

    server: str
    way: str
    format: str
    asked: tuple[Asked, ...]
    seconds: float
    first_token: float
    tokens_per_second: float | None
    when: str

    @property
    def compared(self) -> list[Asked]:
        """The questions that the server gave a prediction for."""
        return [one for one in self.asked if one.served is not None]

    @property
    def alike(self) -> int:
        """How many of them it answered as the record says."""
        return sum(one.alike for one in self.asked)

    @property
    def different(self) -> list[Asked]:
        """Those that it answered otherwise, and not for a near tie."""
        return [one for one in self.compared if not one.alike and one.margin >= NEAR]

    @property
    def holds(self) -> bool:
        """Whether the server serves the model of the run."""
        if not self.compared:
            return False
        if self.way == "greedy":
            return self.alike >= GREEDY_SHARE * len(self.compared)
        return not self.different


def margin(log_likelihoods: list[float]) -> float:
    """Nats between the two best choices; 0 for a single one."""
    best = sorted(log_likelihoods)
    return best[-1] - best[-2] if len(best) > 1 else 0.0


def write_serve_check(store: ObjectStore, found: ServeCheck) -> None:
    """Records it in the run, in the place of an earlier one of this format by this kind of server."""
    store.write(served_key(found.format, found.server), sealed(asdict(found)))


def parse_push(data: bytes) -> Pushed:
    """The record of a push. Raises ValueError or TypeError if it is none."""
    return Pushed(**unsealed(data))


def parse_serve_check(data: bytes) -> ServeCheck:
    """The record of a serve check. Raises ValueError or TypeError if it is none."""
    facts = unsealed(data)
    asked = tuple(Asked(**one) for one in facts.pop("asked", ()))
    found = ServeCheck(asked=asked, **facts)
    measured = (found.seconds, found.first_token, found.tokens_per_second or 0.0, *(one.margin for one in asked))
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in measured):
        raise ValueError("a figure is no number")
    return found


@dataclass(frozen=True)
class AfterRun:
    """Where a run was pushed, and how servers of its model answered; sorted by their places."""

    pushed: tuple[Pushed, ...] = ()
    served: tuple[ServeCheck, ...] = ()


def read_after_run(store: ObjectStore) -> AfterRun:
    """The records that can be read; `verify` names the others."""
    return AfterRun(
        tuple(_readable(store, PUSHED, parse_push)),
        tuple(_readable(store, SERVED, parse_serve_check)),
    )


def _readable(store: ObjectStore, prefix: str, parse: Callable[[bytes], _Record]) -> Iterator[_Record]:
    for key in sorted(info.key for info in store.list(prefix)):
        stored = read_record(store, key)
        try:
            if stored is not None:
                yield parse(stored.data)
        except (ValueError, TypeError):
            continue
