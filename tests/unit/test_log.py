"""Logging set up by one test does not affect the next; lines logged in signal handlers."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest
import structlog

from job import log


@pytest.mark.parametrize("time", [1, 2])
def test_a_test_finds_no_logging_of_another(time: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Both times nothing is configured at first; after that lines are heard once."""
    assert not structlog.is_configured()
    assert not any(isinstance(handler, log._CurrentStderr) for handler in logging.root.handlers)
    assert logging.getLogger("job").level == logging.NOTSET
    assert log.context() == {}
    log.configure("json", "debug", run=f"r{time}")
    log.get_logger().debug("a line")
    heard = capsys.readouterr().err.splitlines()
    assert len(heard) == 1
    assert f'"run": "r{time}"' in heard[0]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_handler_of_a_signal_writes_as_the_log_does(log_format: str, capfd: pytest.CaptureFixture[str]) -> None:
    """With the fields of its lines, in its format, while the log itself is being written."""
    log.configure(log_format, "info", run="one")
    sys.stderr.write("in the buf")
    log.write_line("the end", exit_code=75)
    sys.stderr.write("fer")
    sys.stderr.flush()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "the end" in line]
    if log_format == "json":
        line = line.removeprefix("in the buf")
        fields = json.loads(line[: line.rindex("}") + 1])
        assert (fields["event"], fields["run"], fields["exit_code"], fields["level"]) == (
            "the end",
            "one",
            75,
            "warning",
        )
    else:
        assert re.search(r"\d\d-\d\d \d\d:\d\d:\d\d \[warning  \] the end exit_code=75", line)
