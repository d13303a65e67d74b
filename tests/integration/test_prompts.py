"""Whole runs that answer prompts: killed in between, or on several processes, they equal uninterrupted ones."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from job.runs.layout import REPORT, prompts_key
from tests import warm
from tests.chaos.small import settings
from tests.forked import Forks
from tests.helpers import alpaca_rows, read_jsonl, write_jsonl
from tests.integration.runs_of_processes import go
from tests.integration.whole_runs import attempt, published


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of one step with six prompts of a file."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"{row['instruction']} {'Really? ' * (n % 3)}"} for n, row in enumerate(alpaca_rows(6))]
    return {
        **settings(folder, rows=8, questions=4),
        "JOB_TRAIN__MAX_STEPS": "1",
        "JOB_EVAL__PROMPTS": str(write_jsonl(folder / "prompts.jsonl", rows)),
        "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS": "6",
        "JOB_EVAL__BATCH_TOKENS": "24",
    }


def test_answers_are_published_and_shown(environment: dict[str, str]) -> None:
    """The first validation rows are asked, though the loss is on all tokens; manifest, report and files have them."""
    asked = {"JOB_EVAL__PROMPTS": "2", "JOB_DATA__VALIDATION": "3", "JOB_RUN__ID": "rows"}
    done = attempt(environment, **asked)
    assert done.returncode == 0, done.stderr[-3000:]
    output = Path(environment["JOB_RUN__OUTPUT"])
    assert {prompts_key("base"), prompts_key("adapter")} <= published(output, "rows").keys()
    base, adapter = (read_jsonl(output / "rows" / prompts_key(side)) for side in ("base", "adapter"))
    assert [one["prompt"] for one in base] == [one["prompt"] for one in adapter]
    assert all(one["prompt"].endswith("### Response:\n") and one["reference"].startswith("It is") for one in base)
    manifest = json.loads((output / "rows/results.json").read_bytes())
    assert manifest["evaluation"]["prompts"]["count"] == 2
    assert "What the models write" in (output / "rows" / REPORT).read_text(encoding="utf-8")


@pytest.mark.long
def test_stopped_between_answers(environment: dict[str, str], tmp_path: Path) -> None:
    """Killed and stopped while either side answers, the run ends with the same files; what was kept is not repeated."""
    # Answers so long that the signal arrives before the last of them.
    environment = {**environment, "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS": "40"}
    assert attempt(environment, JOB_RUN__ID="whole").returncode == 0
    output = Path(environment["JOB_RUN__OUTPUT"])
    hit = {**environment, "JOB_RUN__ID": "hit", "JOB_RUN__OUTPUT": str(tmp_path)}
    for side in (1, 2):
        assert stopped_while_it_answers(hit, signal.SIGKILL, side) == -signal.SIGKILL
        assert stopped_while_it_answers(hit, signal.SIGTERM, side) == 75
        assert len(answered(tmp_path / "hit")) == side, "batches of this side are kept"
    assert attempt(hit).returncode == 0
    assert published(tmp_path, "hit") == published(output, "whole")
    kept, whole = answered(tmp_path / "hit"), answered(output / "whole")
    assert {name: sorted(rows) for name, rows in kept.items()} == {name: sorted(rows) for name, rows in whole.items()}
    assert all(len(rows) > 2 for rows in whole.values())


def answered(run: Path) -> dict[str, list[int]]:
    """Of each set of prompts, by its folder, the batches whose answers were kept, in each file that was written."""
    found: dict[str, list[int]] = {}
    for path in (run / "scores").glob("*/*.jsonl"):
        rows = [one["row"] for one in read_jsonl(path) if "answers" in one]
        if rows:
            found.setdefault(path.parent.name, []).extend(rows)
    return found


def stopped_while_it_answers(environment: dict[str, str], number: signal.Signals, side: int) -> int:
    """Starts the job and sends it a signal when the base (1) or the adapter (2) has answered some; its exit code."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    with (
        tempfile.NamedTemporaryFile("r", encoding="utf-8") as output,
        warm.followed([], {**clean, **environment}, output=Path(output.name)) as (process, log),
    ):
        sent = False
        base = Path(environment["JOB_RUN__OUTPUT"]) / environment["JOB_RUN__ID"] / prompts_key("base")
        for line in log:
            seen = json.loads(line)
            if not sent and seen.get("event") == "prompts" and seen["done"] and (side == 1 or base.exists()):
                os.kill(process.pid, number)
                sent = True
        return int(process.wait(100)[0])


@pytest.mark.long
def test_other_prompts_are_refused(environment: dict[str, str], tmp_path: Path) -> None:
    """Another text under the same path is another run: exit 65, with the setting."""
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "One?"}])
    changes = {"JOB_EVAL__PROMPTS": str(path), "JOB_RUN__ID": "other"}
    assert attempt(environment, **changes, JOB_FAULT="kill@step=1").returncode == -9
    write_jsonl(path, [{"prompt": "Two?"}])
    done = attempt(environment, **changes)
    assert done.returncode == 65
    assert "JOB_EVAL__PROMPTS: its content has changed" in done.stderr


@pytest.mark.long
def test_several_processes_answer_the_same(environment: dict[str, str], tmp_path: Path) -> None:
    """Two processes share the batches, and the base answers as it does for one."""
    forks = Forks(tmp_path)
    answers = []
    for processes in (1, 2):
        output = tmp_path / f"out-{processes}"
        assert go(forks, environment, "run", processes, JOB_RUN__OUTPUT=str(output)) == [0] * processes
        answers.append((output / "run" / prompts_key("base")).read_bytes())
    assert answers[0] == answers[1]
