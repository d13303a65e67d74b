"""Log output at a terminal, and for programs."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from job import log


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_json_stays_json(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    """With JOB_LOG__FORMAT=json every step is a line of JSON, and no bar; else there is a bar."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log.configure(log_format, "info")
    with log.progress("steps", 2) as show:
        show(1, loss=1.5)
        show(2, loss=1.25)
    text = terminal.getvalue()
    if log_format == "json":
        assert [json.loads(line)["done"] for line in text.splitlines()] == [1, 2]
    else:
        assert "2/2" in text


def test_a_line_has_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run and attempt are on the first line only, and fields without a value on none; JSON has them all."""
    for log_format in ("console", "json"):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        log.configure(log_format, "info", run="mine")
        log.get_logger().info("this attempt owns the run", attempt=2, replaces=None)
        log.bind(attempt=2)
        log.get_logger().info("data is ready", rows=3, attention=None)
        log.clear_context()
        first, second = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
        everywhere = log_format == "json"
        assert "mine" in first
        assert ("mine" in second, "attempt" in second, "attention" in second) == (everywhere,) * 3
        assert "3" in second
