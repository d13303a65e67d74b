"""A whole run on rows with planted findings: all are found, no output quotes them, and `verify` confirms them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from job.audit.audit import parse_findings
from job.common.findings import KINDS
from job.results.reader import open_run
from job.runs.layout import FINDINGS, REPORT
from job.verification.differences import CheckResult
from job.verification.verify import verify
from tests.chaos.small import settings
from tests.helpers import arc_rows, write_jsonl
from tests.integration.whole_runs import attempt, published, signalled
from tests.published_run import rewrite
from tests.unit.audit.test_audit import PLANTED, QUESTIONS, installed, planted_rows

pytestmark = [installed, pytest.mark.long]
STOPPED = signalled(signal.SIGTERM, "job.audit.audit", "group_rows")
"""The job, which gets SIGTERM while the audit compares rows."""
WITHOUT = """
import importlib.util, job.audit.detectors, job.audit.statistics, job.cli.main
missing = {}
plain = importlib.util.find_spec
job.audit.detectors.find_spec = job.audit.statistics.find_spec = lambda name: None if name in missing else plain(name)
raise SystemExit(job.cli.main.main([]))
"""
"""The job on a machine where some packages are not installed."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run of one step that changes nothing, so that the report has no changed answers to show, at debug level."""
    folder = tmp_path_factory.mktemp("audit")
    found = settings(folder)
    asked = [{**row, "question": QUESTIONS[n]} for n, row in enumerate(arc_rows(40))]
    write_jsonl(folder / "questions.jsonl", asked)
    write_jsonl(folder / "rows.jsonl", planted_rows()[0])
    return {
        **found,
        "JOB_TRAIN__MAX_STEPS": "1",
        "JOB_TRAIN__LEARNING_RATE": "0",
        "JOB_DATA__ON_LONG_ROW": "truncate",
        "JOB_LOG__LEVEL": "debug",
        "JOB_EVAL__FULL_PRECISION": "off",
    }


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A run that nobody disturbed, to its end."""
    done = attempt(environment, JOB_RUN__ID="undisturbed")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_what_is_planted_is_found_and_repeated_nowhere(
    environment: dict[str, str], undisturbed: subprocess.CompletedProcess[str]
) -> None:
    """Copied questions, keys, addresses and duplicates are all found; no output, file or log line has a text of them.

    The answers to the scored questions have these questions, as the task has them, and nothing that a row adds.
    """
    run = Path(environment["JOB_RUN__OUTPUT"]) / "undisturbed"
    found = parse_findings((run / FINDINGS).read_bytes())
    assert {kind: {one.row for one in found if one.kind == kind} for kind in KINDS} == planted_rows()[1]
    manifest = json.loads((run / "results.json").read_bytes())
    assert manifest["dataset"]["audit"]["overlap"] == {"arc_easy": list(range(20))}
    assert manifest["evaluation"]["tasks"]["arc_easy"]["without_overlap"]["n"] == 20
    outputs = {"stdout": undisturbed.stdout, "stderr": undisturbed.stderr}
    outputs |= {str(path): path.read_bytes().decode(errors="replace") for path in run.rglob("*") if path.is_file()}
    assert len(outputs) > 20
    for name, text in outputs.items():
        scored = () if "/artifacts/evaluation/" in name else QUESTIONS
        for planted in (*PLANTED.values(), *scored, "please answer this now"):
            assert planted.casefold() not in text.casefold(), name


def test_stopped_in_the_audit(
    environment: dict[str, str], undisturbed: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """A run that gets SIGTERM while rows are compared ends with 75, and the next attempt publishes the same bytes."""
    assert undisturbed.returncode == 0
    changes = {"JOB_RUN__ID": "stopped", "JOB_RUN__OUTPUT": str(tmp_path)}
    done = attempt(environment, STOPPED, **changes)
    assert done.returncode == 75, done.stderr[-3000:]
    assert not (tmp_path / "stopped" / FINDINGS).exists()
    done = attempt(environment, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    output = Path(environment["JOB_RUN__OUTPUT"])
    assert (tmp_path / "stopped" / FINDINGS).read_bytes() == (output / "undisturbed" / FINDINGS).read_bytes()
    assert published(tmp_path, "stopped") == published(output, "undisturbed")


def test_a_machine_without_the_audits_packages(environment: dict[str, str], tmp_path: Path) -> None:
    """A restart without pycld2 keeps the run's audit, and verifies; without detect-secrets it is refused in words."""
    given = {
        **environment,
        "JOB_RUN__ID": "moved",
        "JOB_RUN__OUTPUT": str(tmp_path),
        "JOB_DATA__ON_FINDING": "secret=skip",
    }
    assert attempt(given, JOB_FAULT="kill@step=1").returncode == -9
    refused = attempt(given, WITHOUT.format(["pycld2", "detect_secrets"]))
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "JOB_DATA__ON_FINDING: rows with a finding of the kind secret were searched for by detect-" in refused.stderr
    done = attempt(given, WITHOUT.format(["pycld2"]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "moved/results.json").read_bytes())["dataset"]["audit"]["languages"]
    assert not failed(tmp_path / "moved")


def test_changed_findings_are_noticed(
    environment: dict[str, str], undisturbed: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """A changed byte of the findings is named, with its hash, and also where somebody has computed the hashes again."""
    assert undisturbed.returncode == 0
    run = Path(shutil.copytree(Path(environment["JOB_RUN__OUTPUT"]) / "undisturbed", tmp_path / "undisturbed"))
    assert not failed(run)
    data = (run / FINDINGS).read_bytes()
    (run / FINDINGS).write_bytes(data.replace(b'"row": 40', b'"row": 41', 1))
    assert "artifacts" in failed(run)
    rewrite(run, FINDINGS, data.replace(b'"kind": "secret"', b'"kind": "email"'))
    assert "audit" in failed(run)
    rewrite(run, FINDINGS, data[: data.rindex(b"{")])
    assert "audit" in failed(run)


def failed(run: Path) -> Mapping[str, CheckResult]:
    """The checks that do not hold."""
    with tempfile.TemporaryDirectory() as work:
        return {found.what: found for found in verify(open_run(str(run)), Path(work)) if found.differences}


def test_a_licence_is_that_of_the_first_attempt(environment: dict[str, str], tmp_path: Path) -> None:
    """A card that changes between two attempts changes no record; manifest and report have the first one's licence."""
    rows = write_jsonl(tmp_path / "rows.jsonl", planted_rows()[0])
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: unlicense\n---\n", encoding="utf-8")
    changes = {"JOB_RUN__ID": "card", "JOB_RUN__OUTPUT": str(tmp_path / "out"), "JOB_DATA__SOURCE": str(rows)}
    assert attempt(environment, **changes, JOB_FAULT="kill@step=1").returncode == -9
    card.write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    done = attempt(environment, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert published(tmp_path / "out", "card")
    manifest = json.loads((tmp_path / "out/card/results.json").read_bytes())
    assert manifest["dataset"]["licences"] == {str(rows): "unlicense"}
    assert manifest["model"]["licence"] is None
    assert "unlicense" in (tmp_path / "out/card" / REPORT).read_text(encoding="utf-8")
