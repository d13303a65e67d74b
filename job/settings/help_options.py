"""Settings as options of the command line, for `--help`: each with its documentation and a readable type."""

from __future__ import annotations

import re
import textwrap
from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from typing import Any, get_args

from job.settings.schema import NAMES, Group, Options, Settings
from job.settings.sources import similar_names

ALL = "all"
"""What `--help` is followed by to describe every setting."""
SHORTEST = 3
"""Characters of a part of a name: fewer are in too many names."""
WIDTH = 79
"""Columns of the list of groups, as argparse's text has without a terminal."""


def add_options(parser: ArgumentParser, names: Collection[str] = NAMES) -> None:
    """Adds settings as options with their documentation, for `--help`.

    Args:
        parser: Receives the options.
        names: Settings to add, such as `train.epochs`.
    """
    from pydantic import create_model
    from pydantic_settings import CliSettingsSource

    fields: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        if name in names:
            fields[name] = (field.annotation, field)
        elif keys := [key for group, _, key in (n.partition(".") for n in names) if group == name and key]:
            group: Any = field.annotation
            chosen: dict[str, Any] = {
                key: (option.annotation, option) for key, option in group.model_fields.items() if key in keys
            }
            fields[name] = (create_model(name, __base__=Group, __doc__=group.__doc__, **chosen), ...)
    settings = create_model("Settings", __base__=Options, **fields)
    CliSettingsSource(settings, root_parser=parser, add_argument_method=_add_in_words)


def find_settings(words: Sequence[str]) -> set[str]:
    """The settings that words after `--help` mean.

    Args:
        words: Each `all`, a group (`train`), a setting (`train.epochs`, `--train.epochs=2`, `JOB_TRAIN__EPOCHS`), or
            a part of a setting's name, of `SHORTEST` characters or more.
    """
    names = set()
    for word in words:
        name = _plain(word)
        names |= _exact(name) or {setting for setting in NAMES if len(name) >= SHORTEST and name in setting}
    return names


def _plain(word: str) -> str:
    """A word after `--help` as the dotted name that it may be: `--train.epochs=2` -> `train.epochs`."""
    name = word.lstrip("-").partition("=")[0].lower()
    return name.removeprefix("job_").replace("__", ".").replace("-", "_")


def _exact(name: str) -> set[str]:
    """The settings of the group, or the one setting, that has this name."""
    return {setting for setting in NAMES if name in {ALL, setting, setting.partition(".")[0]}}


def near_names(words: Sequence[str]) -> list[str]:
    """The groups and settings that words after `--help` may mean, for each word that is the name of none."""
    names = map(_plain, words)
    return list(dict.fromkeys(near for name in names if not _exact(name) for near in similar_names(name, NAMES)))


def near_groups(words: Sequence[str]) -> list[str]:
    """Those of them that are groups, which are described by their names."""
    return [name for name in near_names(words) if name not in NAMES]


def list_of_groups() -> str:
    """All groups, what each is about, and the names of its settings; one line or more for each."""
    lines = []
    for name, field in Settings.model_fields.items():
        group: Any = field.annotation
        if name in NAMES:
            continue
        about, _, _ = group.__doc__.strip().partition("\n")
        lines.append(f"  {name:<11} {about}")
        keys = ", ".join(group.model_fields)
        lines += textwrap.wrap(keys, WIDTH, initial_indent=" " * 14, subsequent_indent=" " * 14, break_long_words=False)
    return "\n".join(lines)


_IN_WORDS = (
    (r"tuple\[str,\.\.\.\]", "NAME,NAME,..."),
    (r"tuple\[int,\.\.\.\]", "N,N-N,..."),
    (r"tuple\[(.*),\.\.\.\]", r"\1,..."),
    (r"Mapping\[str,int\]", "NAME=N,..."),
    (r"Mapping\[str,str\]", "NAME=TEXT,..."),
    (r"Mapping\[str,Any\]", "JSON"),
    (r"Mapping\[str,(\{[a-z,]*\})\]", r"\1|KIND=\1,..."),
    (r"\{int,float\}", "NUMBER"),
    (r"\bbool\b", "true,false"),
    (r"\bint\b", "N"),
    (r"\bfloat\b", "NUMBER"),
    (r"\bstr\b|\bSecretStr\b", "TEXT"),
    (r"^true,false$", "{true,false}"),
    (r"^\{N,NUMBER,TEXT\}$", "NUMBER|TEXT"),
    (r"^\{(\{.*\}),(.*)\}$", r"\1|\2"),
)
"""Names of types as pydantic-settings writes them -> as `--help` shows them."""
_DEFAULTS = (
    (r"\(default factory:\s+_record_all\)", "(default: record)"),
    (r" \(default factory: new_run_id\)", ""),  # the field's documentation says it
    (r"\(default(?: factory)?: (?:None|dict|\(\))\)", "(default: empty)"),
    (r"\(default: (True|False)\)", lambda found: f"(default: {found[1].lower()})"),
    (r"\(default: \('(\w+)',\)\)", r"(default: \1)"),
)


def _add_in_words(parser: ArgumentParser, *names: str, **options: Any) -> Any:
    """`add_argument`, with types and defaults readable without knowing Python."""
    group, _, key = names[0].removeprefix("--").partition(".")
    fields = Settings.model_fields[group].annotation.model_fields if key else Settings.model_fields  # type: ignore[union-attr]
    choices = get_args(fields[key or group].annotation)
    if any(isinstance(choice, str) and "," in choice for choice in choices):
        options["metavar"] = f"{{{'|'.join(choices)}}}"
    for pattern, word in _IN_WORDS:
        options["metavar"] = re.sub(pattern, word, options["metavar"])
    for pattern, text in _DEFAULTS:
        options["help"] = re.sub(pattern, text, options["help"])
    return parser.add_argument(*names, **options)
