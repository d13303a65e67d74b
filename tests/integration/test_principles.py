"""Whole runs that judge answers by principles: by a local judge, killed in between, and by a server."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from job.evaluation.principles import parse_judgements
from job.runs.layout import JUDGEMENTS, REPORT
from tests.chaos.small import settings
from tests.helpers import alpaca_rows, write_jsonl
from tests.integration.whole_runs import attempt, kept_chances, published, signalled
from tests.judge_server import judge_server

pytestmark = pytest.mark.long
KEY = "sk-a-key-that-is-told-nowhere"
KILLED = signalled(
    signal.SIGKILL,
    "job.evaluation.judges:LocalJudge",
    "choose",
    call=4,
    first="""
from job.evaluation.score_cache import ScoreCache
add = ScoreCache.add
def kept(self, number, found):
    add(self, number, found)
    self.save()
ScoreCache.add = kept
""",
)
"""The job, which keeps every judgement at once, and is killed in the midst of the second pair."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of two large steps, so that the adapter answers otherwise, with four prompts and the base as the judge."""
    folder = tmp_path_factory.mktemp("principles")
    (folder / "rules.yaml").write_text("- Prefer the shorter answer.\n- Be kind.\n")
    prompts = [{"prompt": row["instruction"]} for row in alpaca_rows(4)]
    found = settings(folder, rows=8, questions=4)
    return {
        **found,
        "JOB_TRAIN__MAX_STEPS": "2",
        "JOB_TRAIN__LEARNING_RATE": "0.05",
        "JOB_EVAL__FULL_PRECISION": "off",
        "JOB_EVAL__PROMPTS": str(write_jsonl(folder / "prompts.jsonl", prompts)),
        "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS": "6",
        "JOB_EVAL__PRINCIPLES": str(folder / "rules.yaml"),
        "JOB_EVAL__JUDGE": found["JOB_MODEL__ID"],
    }


def test_a_local_judge_is_killed_and_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    """Manifest and report have the figures; killed between two answers, the run ends with the same files."""
    done = attempt(environment, JOB_RUN__ID="whole")
    assert done.returncode == 0, done.stderr[-3000:]
    run = Path(environment["JOB_RUN__OUTPUT"]) / "whole"
    figures = json.loads((run / "results.json").read_bytes())["evaluation"]["principles"]
    judgements = parse_judgements((run / JUDGEMENTS).read_bytes())
    assert figures["n"] == len(judgements) == 4
    assert sum(not one.same for one in judgements) >= 2, "the adapter answers otherwise"
    assert figures["rules"] == ["Prefer the shorter answer.", "Be kind."]
    assert "compared the answers by 2 written rules" in (run / REPORT).read_text(encoding="utf-8")
    changes = {"JOB_RUN__ID": "killed", "JOB_RUN__OUTPUT": str(tmp_path)}
    assert attempt(environment, KILLED, **changes).returncode == -9
    assert kept_chances(tmp_path / "killed/scores") == [0]
    assert attempt(environment, **changes).returncode == 0
    assert published(tmp_path, "killed") == published(run.parent, "whole")


def test_a_server_judges(environment: dict[str, str], tmp_path: Path) -> None:
    """Each pair is asked twice with the key, which is told nowhere; after a refused key, 77, the run goes on."""
    with judge_server() as server:
        changes = {
            "JOB_RUN__OUTPUT": str(tmp_path),
            "JOB_RUN__ID": "served",
            "JOB_EVAL__JUDGE": server.url,
            "JOB_EVAL__JUDGE_MODEL": "a-judge",
            "JOB_EVAL__JUDGE_KEY": KEY,
        }
        server.codes = [200, 200, 401]
        refused = attempt(environment, **changes)
        assert refused.returncode == 77, refused.stderr[-3000:]
        done = attempt(environment, **changes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert set(server.keys) == {f"Bearer {KEY}"}
    assert published(tmp_path, "served")
    judgements = parse_judgements((tmp_path / "served" / JUDGEMENTS).read_bytes())
    assert len(server.asked) == 4 + 2 * sum(not one.same for one in judgements)
    told = [path.read_bytes() for path in (tmp_path / "served").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in text for text in (*told, done.stderr.encode(), refused.stderr.encode()))
