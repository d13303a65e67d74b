"""How `plan` makes a check before a GPU is paid for. `preflight_store`, `_models`, `_data`, `_export` have the checks.

To add one: write a function there that returns `Found` (or raises NotChecked, or the JobError that the job would end
with), and call it by `run_check` in `input_checks.check_run_inputs`, or in `other_input_checks` if few runs need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from job.errors import JobError, Unreachable

HUB_UNREACHABLE = "the hub cannot be reached from here"
Online = Callable[[], bool]
"""Whether the hub can be reached; called only if something has to be fetched from it."""
State = Literal["ok", "note", "not checked", "wrong"]
T = TypeVar("T")


class NotChecked(Exception):
    """A check could not be made, so nothing is known about its subject."""


@dataclass(frozen=True)
class PreflightResult:
    """The result of one check; `error` is the error the job would end with, if any."""

    name: str
    state: State
    what: str
    error: JobError | None = None


Found = tuple[State, str, T]
"""What a check returns: its state, a sentence about it, and what it read."""


def run_check(
    name: str, check: Callable[[], Found[T]], *, unreachable: State = "not checked"
) -> tuple[PreflightResult, T | None]:
    """Makes one check and catches its errors, so that the other checks are made too.

    Args:
        name: What is checked, as it is printed.
        check: Makes the check.
        unreachable: State for a service that does not answer. By default that is no error, because this machine's
            network may differ from the job's.
    """
    try:
        state, text, value = check()
    except NotChecked as reason:
        return PreflightResult(name, "not checked", str(reason)), None
    except Unreachable as error:
        return PreflightResult(name, unreachable, str(error), error if unreachable == "wrong" else None), None
    except JobError as error:
        return PreflightResult(name, "wrong", str(error), error), None
    return PreflightResult(name, state, text), value


class After(Protocol):
    """`after_answers` for the stores of this plan."""

    def __call__(self, places: Iterable[str | None], check: Callable[[], T], /) -> Callable[[], T]:
        """The check, after the stores of `places` have answered."""


def after_answers(
    require: Callable[[str], None], places: Iterable[str | None], check: Callable[[], T]
) -> Callable[[], T]:
    """The check, after the stores that it reads have answered: those of the URIs among `places`.

    One that has not answered is not waited for again by each check.
    """

    def answered_check() -> T:
        for place in places:
            require(place or "")
        return check()

    return answered_check
