"""The errors of the job, and the exit code of each.

    JobError                    1   a bug, or a process was killed; the base of the tree
    ├── Killed                  1   a process of several was killed
    ├── SettingsError           2   settings are wrong
    ├── GateError               3   quality gate not met; results are published
    ├── VerificationError       4   results do not verify
    ├── DataError              65   data is wrong
    ├── Unreachable            69   storage or hub cannot be reached after retries, or a disk is full
    ├── TrainingFailed         70   training diverged, or memory is too small for it
    ├── NoProgress             71   attempts in a row made no progress
    ├── UnfitMachine           72   this machine cannot run the job; another one may
    ├── Stalled                74   no progress for too long; a restart resumes the run
    ├── Preempted              75   preempted; a restart resumes the run
    ├── Replaced               76   another attempt owns this run
    └── AccessDenied           77   access denied

The table exists once, here. README, Kubernetes' podFailurePolicy and the SageMaker launcher are tested against
`exit_codes()`. Codes 65 to 77 are those of BSD's sysexits.h where it has a matching one.

To add one: a subclass of `JobError` with its code, meaning and `retry`, and an entry in `_KINDS`, the most serious kind
first. The tests then name every place that needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

Retry = Literal["no", "yes", "yes, free", "counts against the limit"]

MAX_SHOWN = 20
_REPEATED = 3
"""How often the same fix has to stand in the problems of an error to be said once instead."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    Attributes:
        where: A setting, as `environment_name` writes it, or a file with line and field.
        what: What is wrong, and after a semicolon how to fix it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def environment_name(setting: str) -> str:
    """How messages name a setting, wherever its value came from: `train.epochs` -> `JOB_TRAIN__EPOCHS`."""
    return "JOB_" + setting.upper().replace(".", "__")


class JobError(Exception):
    """Base of all errors that the job raises on purpose. Any other exception is a bug, with the same exit code, 1."""

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "a bug, or a process was killed"
    retry: ClassVar[Retry] = "counts against the limit"
    reported: bool = False
    """Whether another process of the run has logged it already."""


class Killed(JobError):
    """One of several processes was killed or crashed. Counts like a bug: each restart may run out of memory again."""

    meaning = "a process was killed"


class _ManyProblems(JobError):
    """An error that lists all problems at once: the first `MAX_SHOWN`, and the number of all.

    `total` may exceed `len(problems)`: beyond some number, problems are only counted. `advice` are the fixes that many
    of them have in common, each said once at the end, on a line of its own.
    """

    def __init__(self, problems: list[Problem], total: int | None = None, advice: str = "") -> None:
        self.problems = tuple(problems[:MAX_SHOWN])
        self.total = len(problems) if total is None else total
        self.advice = advice
        lines = [str(problem) for problem in self.problems]
        if self.total > len(self.problems):
            lines.append(f"... and {self.total - len(self.problems):,} more")
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))


class SettingsError(_ManyProblems):
    """The settings are wrong: unknown names, wrong types, impossible combinations."""

    exit_code = 2
    meaning = "settings are wrong"
    retry = "no"


class GateError(JobError):
    """The adapter did not meet the quality gate. Raised after the results are published."""

    exit_code = 3
    meaning = "quality gate not met (results are published)"
    retry = "no"


class VerificationError(_ManyProblems):
    """A published run does not match its manifest: a file was changed or is missing, or a figure is wrong."""

    exit_code = 4
    meaning = "results do not verify"
    retry = "no"


class DataError(_ManyProblems):
    """The data is wrong: a row without a field, of the wrong type, empty, broken or too long."""

    exit_code = 65
    meaning = "data is wrong"
    retry = "no"

    def __init__(self, problems: list[Problem], total: int | None = None, advice: str = "") -> None:
        """A fix that stands in several problems is said once, at the end."""
        shown, fixes = _without_repeated_fixes(problems[:MAX_SHOWN])
        advice = _joined([*fixes, advice])
        super().__init__(shown, len(problems) if total is None else total, advice)


def _without_repeated_fixes(problems: Sequence[Problem]) -> tuple[list[Problem], list[str]]:
    """The problems, and the fixes (what follows the last semicolon) that were taken out of them as repeated."""
    parts = [problem.what.rpartition("; ") for problem in problems]
    counts = Counter(fix for what, _, fix in parts if what)
    repeated = [fix for fix, count in counts.items() if count >= _REPEATED]
    shown = [
        replace(problem, what=what) if what and fix in repeated else problem
        for problem, (what, _, fix) in zip(problems, parts, strict=True)
    ]
    return shown, repeated


def _joined(advice: Iterable[str]) -> str:
    """Each line of the advice once."""
    return "\n".join(dict.fromkeys(line for text in advice for line in text.splitlines()))


class Unreachable(JobError):
    """After all retries, storage or the hub did not answer, or not with a usable answer; or a disk is too small."""

    exit_code = 69
    meaning = "storage or hub cannot be reached after retries, or a disk is full"
    retry = "yes"


class TrainingFailed(JobError):
    """Training cannot continue here: a loss that is not finite, or too little memory for one example.

    The same settings, data and machine would fail in the same way, so the run is not to be retried.
    """

    exit_code = 70
    meaning = "training diverged, or memory is too small for it"
    retry = "no"


class NoProgress(JobError):
    """Several attempts in a row were stopped without progress: with 75 the platform would retry without limit."""

    exit_code = 71
    meaning = "several attempts in a row made no progress"
    retry = "counts against the limit"


class UnfitMachine(JobError):
    """The machine has no GPU that works, or too old a driver, though the settings require a GPU.

    Only where a retry may get another machine, on Kubernetes; elsewhere it is a `SettingsError`. `entrypoint.sh` ends
    with this code, too.
    """

    exit_code = 72
    meaning = "this machine cannot run the job; another one may"


class Stalled(JobError):
    """A job that made no progress was ended by the watchdog, or by the processes that waited for a stopped process 0.

    A restart resumes it, but may stall again, so it counts.
    """

    exit_code = 74
    meaning = "no progress for too long; a restart resumes the run"


class Preempted(JobError):
    """The machine is being taken away. What was saved is durable: a restart resumes."""

    exit_code = 75
    meaning = "preempted; a restart resumes the run"
    retry = "yes, free"


class Replaced(JobError):
    """Another attempt has taken this run's lease; this one must not write any more."""

    exit_code = 76
    meaning = "another attempt owns this run"
    retry = "no"


class AccessDenied(JobError):
    """Storage or the hub refused a request: credentials or permissions are missing.

    A retry may help: a cloud's role may reach a new machine later than the job does.
    """

    exit_code = 77
    meaning = "access denied"


_KINDS: tuple[type[JobError], ...] = (
    SettingsError,
    DataError,
    VerificationError,
    TrainingFailed,
    GateError,
    Replaced,
    AccessDenied,
    UnfitMachine,
    JobError,
    NoProgress,
    Stalled,
    Unreachable,
    Preempted,
)
"""All kinds, the most serious first: what a retry cannot fix, then what counts, then the rest.

Where several inputs, processes or machines fail in different ways, the kind that comes first is that of all together.
"""


def most_serious(exit_codes: Iterable[int]) -> int:
    """The most serious of at least one exit code of the table."""
    order = [kind.exit_code for kind in _KINDS]
    return min(exit_codes, key=order.index)


def combine(errors: Sequence[tuple[str, JobError]]) -> JobError:
    """One error with the problems of several: of the most serious kind, which has its exit code.

    Args:
        errors: At least one, with the name of what is wrong, a prefix for errors that list no problems.
    """
    if len(errors) == 1:
        return errors[0][1]
    code = most_serious(error.exit_code for _, error in errors)
    kind = next(kind for kind in _KINDS if kind.exit_code == code)
    if not issubclass(kind, _ManyProblems):
        first = next(error for _, error in errors if error.exit_code == code)
        return type(first)("; ".join(f"{name}: {error}" for name, error in errors))
    listed = [
        error if isinstance(error, _ManyProblems) else kind([Problem(name, str(error))]) for name, error in errors
    ]
    few_first = sorted(listed, key=lambda error: error.total)  # so that many bad rows hide no other problem
    advice = _joined(error.advice for error in few_first)
    problems = [problem for error in few_first for problem in error.problems]
    return kind(problems, sum(error.total for error in few_first), advice)


def check_all(checks: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Makes all checks, and raises what they find as one error.

    Args:
        checks: (name, function) of each check. The function raises what is wrong; the name is a prefix for errors
            that list no problems.

    Raises:
        JobError: As `combine`. Preempted or Replaced at once, since then nothing further matters.
    """
    errors: list[tuple[str, JobError]] = []
    for name, check in checks:
        try:
            check()
        except (Preempted, Replaced):
            raise
        except JobError as error:
            errors.append((name, error))
    if errors:
        raise combine(errors)


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raises a SettingsError with these problems, if there are any."""
    if found := list(dict.fromkeys(problems)):
        raise SettingsError(found)


@contextmanager
def named_by(setting: str, between: str = " ") -> Iterator[None]:
    """Within it, problems of a place name the setting that gives it: `JOB_DATA__SOURCE: /x.jsonl does not exist`.

    `between` separates the place from what is wrong with it.
    """
    try:
        yield
    except (DataError, SettingsError) as error:
        problems = [Problem(setting, f"{one.where}{between}{one.what}") for one in error.problems]
        raise type(error)(problems, error.total, error.advice) from None


@contextmanager
def naming(setting: str, instead_of: str = "JOB_MODEL__ID") -> Iterator[None]:
    """Within it, problems that would name one setting name another: for a second model besides JOB_MODEL__ID."""
    try:
        yield
    except (DataError, SettingsError) as error:
        problems = [
            Problem(one.where.replace(instead_of, setting), one.what.replace(instead_of, setting))
            for one in error.problems
        ]
        raise type(error)(problems, error.total, error.advice) from None


def exit_codes() -> dict[int, tuple[str, Retry]]:
    """The table of exit codes: code -> (meaning, whether to retry), in ascending order, without 0."""
    kinds = sorted(_KINDS, key=lambda kind: kind.exit_code)
    return {kind.exit_code: (kind.meaning, kind.retry) for kind in kinds}


def error_of_process(exit_code: int, where: str, why: str) -> JobError:
    """The error that another process ended with, as an exception that ends this one with the same exit code.

    An exit code that is not in the table becomes a `JobError`.
    """
    kind = next((kind for kind in _KINDS if kind.exit_code == exit_code), JobError)
    error = kind([Problem(where, why)]) if issubclass(kind, _ManyProblems) else kind(f"{where}: {why}")
    error.reported = True
    return error
