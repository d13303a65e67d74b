"""The command `config`: every setting, its value, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence

from job import log
from job.cli.output import print_json, print_lines
from job.errors import Problem, SettingsError
from job.records import RecordedSettings
from job.settings.load import Settings, describe, foreign_variables, json_schema, load_settings

_WIDEST_VALUE = 60


def config_command(argv: Sequence[str]) -> int:
    """`config`: prints a line for each setting; with `--schema` the JSON Schema of all settings.

    Raises:
        SettingsError: A setting is wrong.
    """
    if "--schema" in argv:
        if len(argv) > 1:
            raise SettingsError([Problem("--schema", "prints the schema of all settings; remove the other arguments")])
        return print_json(json_schema())
    rows = [
        (name, json.dumps(value), source)
        for name, value, source in describe(load_settings(argv, options=("schema",), of_run=settings_of_run))
    ]
    note_foreign_variables()
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return print_lines(
        f"{name:<{widths[0]}}  {value:<{min(widths[1], _WIDEST_VALUE)}}  {source}" for name, value, source in rows
    )


def settings_of_run(settings: Settings) -> RecordedSettings:
    """The settings of the run in JOB_EXPORT__RUN. Imports here, so that no other run waits for the libraries."""
    from job.results.exported_run import recorded_settings
    from job.storage.open import storage_options

    return recorded_settings(str(settings.export.run), storage_options(settings.storage))


def note_foreign_variables() -> None:
    """Logs the variables of a CI server or batch system that begin with `JOB_` and are no settings."""
    if found := foreign_variables():
        what = "variables of a CI server or batch system are ignored; a run is named with JOB_RUN__ID"
        log.get_logger().info(what, variables=found)
