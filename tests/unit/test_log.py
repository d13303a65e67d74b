"""The tests themselves: what one of them logs, and how, is not heard in the next."""

from __future__ import annotations

import logging

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
