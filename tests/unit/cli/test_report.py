"""The command `report`: the page made again from a folder; other folders give an error, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.cli.report import report_command
from job.common.hashing import hash_file
from job.errors import DataError, SettingsError
from job.report.report import render_report
from tests.example_run import answers, evidence, publish, results, write_results


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, in the working directory's place."""
    found = evidence(arc_easy=answers(3, 1, 20))
    publish(tmp_path / "run", found, results(found))
    return tmp_path / "run"


def test_the_page_is_drawn(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Into `report.html` where one stands, or where `--output` says; both are the same page."""
    monkeypatch.chdir(run.parent)
    assert report_command(["run"]) == 0
    assert report_command(["run/results.json", "--output=other.html"]) == 0
    assert capsys.readouterr().out == f"report: {run.parent}/report.html\nreport: {run.parent}/other.html\n"
    expected = render_report(json.loads((run / "results.json").read_text()), evidence(arc_easy=answers(3, 1, 20)))
    assert (run.parent / "report.html").read_bytes() == (run.parent / "other.html").read_bytes() == expected


@pytest.mark.parametrize("line", ['{"step": 1}', "[]", "{", '{"unknown": 1}'])
def test_records_that_are_none_are_an_error_of_the_data(run: Path, line: str) -> None:
    """A manifest with the right hashes of wrong files was not written by this job."""
    metrics = run / "artifacts/metrics.jsonl"
    metrics.write_text(line)
    made = json.loads((run / "results.json").read_text())
    entry = next(artifact for artifact in made["artifacts"] if artifact["path"] == "artifacts/metrics.jsonl")
    entry |= {"bytes": metrics.stat().st_size, "sha256": hash_file(metrics)}
    write_results(run, made)
    with pytest.raises(DataError, match="were not written by this job"):
        report_command([str(run), "--output", str(run.parent / "x.html")])
    assert not (run.parent / "x.html").exists()


def test_a_manifest_without_its_files_is_an_error_of_the_data(run: Path) -> None:
    """A listed file that is gone, and a task whose answers are not listed."""
    (run / "artifacts/evaluation/arc_easy.base.jsonl").unlink()
    with pytest.raises(DataError, match="is missing"):
        report_command([str(run)])
    made = json.loads((run / "results.json").read_text())
    made["artifacts"] = made["artifacts"][:1]
    write_results(run, made)
    with pytest.raises(DataError, match="were not written by this job"):
        report_command([str(run)])


@pytest.mark.parametrize("words", [[], ["--output", "x"], ["{run}", "--output"], ["{run}", "--output", "no/x.html"]])
def test_mistakes_of_the_user(run: Path, words: list[str]) -> None:
    """No run, no file, no folder for it: exit code 2."""
    with pytest.raises(SettingsError):
        report_command([word.replace("{run}", str(run)) for word in words])
