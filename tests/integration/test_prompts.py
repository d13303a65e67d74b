"""Whole runs that answer prompts: killed in the midst of it, and on several processes, they end as undisturbed ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from job.runs.layout import REPORT, prompts_key
from tests import warm
from tests.chaos.small import settings
from tests.forked import Forks
from tests.helpers import alpaca_rows, read_jsonl, write_jsonl
from tests.integration.test_processes import go
from tests.integration.test_survival import attempt, published


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
def test_killed_between_answers(environment: dict[str, str], tmp_path: Path) -> None:
    """Killed while either side answers, the run ends with the same files, and no batch that was kept is repeated."""
    assert attempt(environment, JOB_RUN__ID="whole").returncode == 0
    output = Path(environment["JOB_RUN__OUTPUT"])
    batches = len(list((output / "whole/scores").glob("prompts-*/*.json"))) // 2
    assert batches > 2
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    killed = {**clean, **environment, "JOB_RUN__ID": "killed", "JOB_RUN__OUTPUT": str(tmp_path)}
    log = tmp_path / "log"
    log.touch()
    kept: dict[Path, int] = {}
    for enough in (2, batches + 2):
        process = warm.start([], killed, log, log)
        while process.poll() is None and len(kept) < enough:
            kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed/scores").glob("prompts-*/*.json")}
        process.kill()
        assert len(kept) >= enough
    assert attempt(killed).returncode == 0
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert published(tmp_path, "killed") == published(output, "whole")


@pytest.mark.long
def test_other_prompts_are_refused(environment: dict[str, str], tmp_path: Path) -> None:
    """Another text under the same path is another run: exit 65, with the setting."""
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "One?"}])
    changes = {"JOB_EVAL__PROMPTS": str(path), "JOB_RUN__ID": "other"}
    assert attempt(environment, **changes, JOB_FAULT="kill@step=1").returncode == -9
    write_jsonl(path, [{"prompt": "Two?"}])
    done = attempt(environment, **changes)
    assert done.returncode == 65
    assert "JOB_EVAL__PROMPTS: what it names has changed" in done.stderr


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
