"""A whole run with a safety classifier: rows are left out, answers are scored, and a stopped run equals another."""

from __future__ import annotations

import json
import signal
import tempfile
from pathlib import Path

import pytest

from job.audit.audit import parse_findings
from job.results.reader import open_run
from job.runs.layout import FINDINGS, REPORT, prompts_key
from job.verification.verify import verify
from tests.chaos.small import settings
from tests.helpers import alpaca_rows, read_jsonl, write_jsonl
from tests.integration.whole_runs import attempt, kept_chances, published, signalled
from tests.toy_classifier import WORD, make_classifier

pytestmark = pytest.mark.long
UNSAFE = (1, 4, 6)
STOPPED = signalled(
    signal.SIGTERM,
    "job.model.text_classifier:TextClassifier",
    "scores",
    call=3,
    first="import job.audit.safety; job.audit.safety.CHUNK = 2",
)
"""The job, which scores two rows at a time and gets SIGTERM when it begins with the third chunk."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of one step on eight rows, three of them unsafe, which are left out, and two prompts."""
    folder = tmp_path_factory.mktemp("safety")
    found = settings(folder, rows=8, questions=4)
    rows = [{**row, "output": f"It is {WORD if n in UNSAFE else n}."} for n, row in enumerate(alpaca_rows(8))]
    write_jsonl(Path(found["JOB_DATA__SOURCE"]), rows)
    return {
        **found,
        "JOB_TRAIN__MAX_STEPS": "1",
        "JOB_EVAL__FULL_PRECISION": "off",
        "JOB_EVAL__PROMPTS": str(write_jsonl(folder / "prompts.jsonl", [{"prompt": "One?"}, {"prompt": "Two?"}])),
        "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS": "4",
        "JOB_DATA__SAFETY_MODEL": str(make_classifier(folder / "classifier")),
        "JOB_DATA__ON_FINDING": "unsafe=skip",
    }


def test_unsafe_rows_are_left_out(environment: dict[str, str], tmp_path: Path) -> None:
    """Manifest, findings and report have the three rows, the answers are scored, and the run verifies.

    A run that gets SIGTERM while rows are scored ends with 75; the next attempt scores the others only, and publishes
    the same bytes. Another classifier under the same path is refused.
    """
    done = attempt(environment, JOB_RUN__ID="whole")
    assert done.returncode == 0, done.stderr[-3000:]
    run = Path(environment["JOB_RUN__OUTPUT"]) / "whole"
    found = [one.row for one in parse_findings((run / FINDINGS).read_bytes()) if one.kind == "unsafe"]
    assert found == list(UNSAFE)
    manifest = json.loads((run / "results.json").read_bytes())
    assert manifest["dataset"]["rows"] == 5
    assert manifest["dataset"]["audit"]["safety"]["unsafe_labels"] == ["unsafe"]
    assert manifest["evaluation"]["unsafe_answers"] == {"base": 0, "adapter": 0}
    assert all(0 <= line["unsafe"] < 0.5 for line in read_jsonl(run / prompts_key("base")))
    assert "gives a probability of at least 0.5 for unsafe" in (run / REPORT).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        assert not [one for one in verify(open_run(str(run)), Path(work)) if one.differences]

    changes = {"JOB_RUN__ID": "stopped", "JOB_RUN__OUTPUT": str(tmp_path)}
    stopped = attempt(environment, STOPPED, **changes)
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert kept_chances(tmp_path / "scores") == [0, 1]
    assert attempt(environment, **changes, JOB_FAULT="kill@step=1").returncode == -9
    again = attempt(environment, **changes)
    assert again.returncode == 0
    assert "rows scored" not in again.stderr, "rows keep the scores that the run began with"
    assert published(tmp_path, "stopped") == published(run.parent, "whole")

    folder = Path(environment["JOB_DATA__SAFETY_MODEL"])
    assert attempt(environment, JOB_RUN__ID="other", JOB_FAULT="kill@step=1").returncode == -9
    make_classifier(folder, random=True)
    done = attempt(environment, JOB_RUN__ID="other")
    assert done.returncode == 65
    assert "JOB_DATA__SAFETY_MODEL: its content has changed" in done.stderr
