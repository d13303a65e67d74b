"""What commands print and write. To print gives the exit code: text that could not be written is no success."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job import log
from job.common.disk import disk_errors
from job.errors import JobError, Problem, SettingsError

REPORT_FILE = "report.html"


def print_text(text: str) -> int:
    """Prints text that ends its lines itself."""
    return 0 if log.print_result(text) else JobError.exit_code


def print_lines(lines: Iterable[str]) -> int:
    """Prints each line."""
    return print_text("".join(f"{line}\n" for line in lines))


def print_json(value: Any) -> int:
    """Prints a value as JSON, indented for people."""
    return print_text(json.dumps(value, indent=2) + "\n")


def refuse_folder(output: str) -> None:
    """Raises SettingsError if `--output` names a folder; called before anything is read or computed."""
    if Path(output).is_dir():
        raise SettingsError(
            [Problem(f"--output {output}", f"is a folder; name a file, such as {output}/{REPORT_FILE}")]
        )


def write_page(output: str, page: bytes) -> None:
    """Writes an HTML page to the file that `--output` names.

    Raises:
        SettingsError: Its folder does not exist.
        AccessDenied, Unreachable: As the disk says.
    """
    with disk_errors(f"--output {output}"):
        try:
            Path(output).write_bytes(page)
        except FileNotFoundError as error:
            raise SettingsError(
                [Problem(f"--output {output}", "its folder does not exist; create it first")]
            ) from error
