"""Settings as options of the command line, for `--help`: each with its documentation and a readable type."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from typing import Any, get_args

from job.settings.schema import READING, Options, Settings


def add_options(parser: ArgumentParser, *, reading: bool = False) -> None:
    """Adds every setting as an option with its documentation, for `--help`.

    Args:
        parser: Receives the options.
        reading: Add only the settings that commands use which read published runs.
    """
    from pydantic import create_model
    from pydantic_settings import BaseSettings, CliSettingsSource

    settings: type[BaseSettings] = Settings
    if reading:
        groups = {name.partition(".")[0] for name in READING}
        fields: dict[str, Any] = {n: (f.annotation, f) for n, f in Settings.model_fields.items() if n in groups}
        settings = create_model("Settings", __base__=Options, **fields)
    CliSettingsSource(settings, root_parser=parser, add_argument_method=_add_in_words)


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
