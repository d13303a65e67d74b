"""The command `report`: draws the report of a finished run again, from what was published."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from job.errors import DataError, Problem, SettingsError
from job.report.report import draw, read_evidence
from job.results.reader import open_run, read_published
from job.settings.load import load_reading
from job.storage.base import disk_errors
from job.storage.verified_download import fetch_artifact

OUTPUT = "report.html"


def report_command(words: Sequence[str]) -> int:
    """`RESULTS [--output FILE]`, and the settings that storage needs; returns the exit code.

    Raises:
        SettingsError: It is not clear which run, or there is none.
        VerificationError: The manifest is not what the job wrote.
        DataError: What was published is gone, or was altered.
    """
    if not words or words[0].startswith("--"):
        raise SettingsError([Problem("report", "name a finished run: its folder, or its results.json; path or s3://")])
    where, *rest = words
    output, rest = _take(rest, "output", OUTPUT)
    run = read_published(open_run(where, **load_reading(rest).storage.model_dump(exclude={"cache"})))
    with tempfile.TemporaryDirectory(prefix="qlora-job-") as folder:
        try:
            evidence = read_evidence(run.results, lambda artifact: fetch_artifact(run.store, artifact, Path(folder)))
        except (KeyError, TypeError, ValueError) as error:  # the hashes are right, so it was written like this
            raise DataError([Problem(run.store.uri, f"its records are no records of this job: {error}")]) from error
    page = draw(run.results, evidence)
    with disk_errors(f"--output {output}"):
        try:
            Path(output).write_bytes(page)
        except FileNotFoundError as error:
            raise SettingsError(
                [Problem(f"--output {output}", "its folder does not exist; create it first")]
            ) from error
    sys.stdout.write(f"report: {output}\n")
    return 0


def _take(words: list[str], name: str, default: str) -> tuple[str, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, and the other words."""
    for position, word in enumerate(words):
        if word.startswith(f"--{name}="):
            return word.partition("=")[2], words[:position] + words[position + 1 :]
        if word == f"--{name}":
            if position + 1 == len(words):
                raise SettingsError([Problem(f"command line --{name}", f"needs a value: --{name}=VALUE")])
            return words[position + 1], words[:position] + words[position + 2 :]
    return default, words
