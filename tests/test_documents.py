"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from job.cli import COMMANDS, USAGE
from job.errors import exit_codes
from job.groups import NAMES
from job.sources import environment_name

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_exit_codes_in_the_readme() -> None:
    """The README's table of exit codes is that of `errors.py`."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.*?) ?\|$", README, re.MULTILINE)
    expected = [("0", "done, manifest published", "")]
    expected += [(str(code), meaning, retry) for code, (meaning, retry) in exit_codes().items()]
    assert rows == expected


def test_settings_in_the_readme() -> None:
    """Every `JOB_` name in the README is a setting."""
    known = {environment_name(name) for name in NAMES} | {"JOB_CONFIG", "JOB_GROUP__NAME"}
    assert set(re.findall(r"JOB_[A-Z_]+[A-Z]", README)) <= known


def test_commands_in_the_usage() -> None:
    """`--help` names every command, but for SageMaker's own word for `run`."""
    assert all(f" {command}" in USAGE or f"[{command}]" in USAGE for command in COMMANDS if command != "train")
