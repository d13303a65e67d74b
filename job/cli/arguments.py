"""The words after a command: runs, options, flags and settings, told apart with all problems at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from job.errors import Problem, SettingsError


@dataclass(frozen=True)
class Arguments:
    """The words after a command: runs, options with their values, flags, and settings for `load_reading`."""

    runs: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    settings: list[str] = field(default_factory=list)


def parse_arguments(
    words: Sequence[str],
    runs: Sequence[str],
    options: Collection[str] = (),
    flags: Collection[str] = (),
    formats: Sequence[str] = (),
) -> Arguments:
    """Tells the words after a command apart.

    Args:
        words: As they were typed.
        runs: What the command's arguments are called.
        options: Names with a value, beside `--format`.
        flags: Names without one.
        formats: What `--format` takes, the first by default.

    Raises:
        SettingsError: With all that is wrong.
    """
    given, problems = Arguments(), []
    known = ["--format", *options, *flags]
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            given.runs.append(word)
        elif name in flags and not equals:
            given.flags.add(name)
        elif name in known or "." in name:
            value = value if equals else next(rest, "")
            if not value:
                problems.append(Problem(name, f"needs a value: {name} VALUE"))
            elif "." in name:
                given.settings.append(f"{name}={value}")
            else:
                given.options[name] = value
        else:
            near = get_close_matches(name, known, n=1)
            problems.append(Problem(name, f"is unknown; the nearest is {near[0]}" if near else "is unknown"))
    if len(given.runs) != len(runs):
        problems.append(Problem(" ".join(runs), f"needs {_count(runs)}, path or s3:// URI; {len(given.runs)} given"))
    if given.options.setdefault("--format", formats[0]) not in formats:
        problems.append(Problem("--format", f"must be {' or '.join(formats)}"))
    if problems:
        raise SettingsError(problems)
    return given


def _count(runs: Sequence[str]) -> str:
    return "one run" if len(runs) == 1 else f"{len(runs)} runs"
