"""A finished run is found by its folder or its manifest, and what it published is checked to the last byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, SettingsError
from job.finished import fetch_artifact, open_finished
from job.records import Artifact
from tests.example_run import answers, evidence, publish, results


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    found = evidence(arc_easy=answers(3, 1, 20))
    publish(tmp_path / "run", found, results(found))
    return tmp_path / "run"


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/results.json"])
def test_a_run_is_found(run: Path, spelling: str) -> None:
    """By its folder or by its manifest."""
    assert open_finished(spelling.format(run)).results["run"]["id"] == "example"


def test_a_run_is_found_from_within(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As people type it in the folder itself."""
    monkeypatch.chdir(run)
    for where in ("results.json", ".", "./results.json"):
        assert open_finished(where).results["run"]["id"] == "example"


def test_no_run_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    """Exit code 2, naming what was asked for; nothing is created."""
    with pytest.raises(SettingsError, match=r"there is no results\.json"):
        open_finished(str(tmp_path / "nothing"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff"])
def test_what_is_no_manifest_is_an_error_of_the_data(tmp_path: Path, content: bytes) -> None:
    """Exit code 65, with what is wrong."""
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(DataError, match=r"results\.json"):
        open_finished(str(tmp_path))


def spoiled(entry: dict[str, Any], **changes: Any) -> Artifact:
    """An artefact's entry with changes."""
    return Artifact(**{**entry, **changes})


def test_what_was_published_is_what_is_read(run: Path, tmp_path: Path) -> None:
    """The file; and an error that names it where it is gone, longer, or other than it was."""
    finished = open_finished(str(run))
    entry = json.loads((run / "results.json").read_text())["artifacts"][0]
    path = fetch_artifact(finished.store, Artifact(**entry), tmp_path / "copy")
    assert path.read_bytes() == (run / entry["path"]).read_bytes()
    for changes, why in (
        ({"path": "artifacts/gone"}, "is gone"),
        ({"bytes": entry["bytes"] - 1}, "is not what was published"),
        ({"sha256": "0" * 64}, "its SHA-256 differs"),
        ({"path": "../outside"}, "is not what was published"),
    ):
        with pytest.raises(DataError, match=why):
            fetch_artifact(finished.store, spoiled(entry, **changes), tmp_path / "copy")
    assert not (tmp_path / "outside").exists()
