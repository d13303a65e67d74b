"""Work in background threads: its result or error is available when asked for."""

from __future__ import annotations

import pytest

from job.common.threads import in_thread


def test_the_result_or_the_error_is_there_where_it_is_asked_for() -> None:
    """Whichever it is, and not before."""
    assert in_thread(lambda: 7, "x").result(10) == 7
    failing = in_thread(lambda: 1 // 0, "x")
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
