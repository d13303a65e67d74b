"""What a run that exports a finished one copies; whole runs are in tests/integration/test_exported_run.py."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from job.common.hashing import sealed
from job.results import exported_run
from job.results.reader import PublishedRun
from job.runs.layout import attempt_key
from job.runs.run_log import parse_logged
from job.runs.stage_records import RUN
from job.storage.local import LocalStore
from tests.example_run import ATTEMPTS


@pytest.mark.parametrize("noted", ["complete", "running"])
def test_the_attempt_that_published_is_complete(tmp_path: Path, noted: str) -> None:
    """Also if it was killed right after that, before it noted its end: it would be called killed, and its time lost."""
    store, last = LocalStore(tmp_path), replace(ATTEMPTS[-1], outcome="complete")
    record = (
        asdict(last) if noted == "complete" else asdict(last) | {"outcome": noted, "finished": None, "seconds": 1.0}
    )
    store.write(attempt_key(last.number), sealed({**record, RUN: "a"}))
    run = PublishedRun(store, {"run": {"attempts": [asdict(last)]}, "evidence": []}, "")
    ((key, copied),) = exported_run._attempts(run)
    logged = parse_logged(copied)
    assert (key, logged.record, logged.run) == (attempt_key(last.number), last, "a")
