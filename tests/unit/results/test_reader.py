"""A manifest from any folder: content that no job writes is refused with a message, whatever it contains."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from job.cli.report import report_command
from job.cli.verify import verify_command
from job.errors import DataError, SettingsError, VerificationError
from job.results.reader import parse
from tests.published_run import forge, pairs, publish_run, rewrite


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The manifest of a run of two attempts."""
    folder = publish_run(tmp_path_factory.mktemp("runs") / "run", {"arc_easy": pairs(8)}, attempts=2)
    return (folder / "results.json").read_bytes()


@pytest.mark.parametrize("number", [10**30, -(10**30), 10**400, 1e300], ids=["30", "-30", "400", "float"])
@pytest.mark.parametrize(
    "place",
    ["run.attempts.0.number", "evaluation.tasks.arc_easy.n", "training.seconds", "artifacts.0.bytes", "gate.min_delta"],
)
def test_numbers_beyond_all_measure_are_refused(published: bytes, place: str, number: float) -> None:
    """Wherever one is: its place is named, or the schema's, and nothing computes with it."""
    results = json.loads(published)
    *above, last = place.split(".")
    part: Any = results
    for name in above:
        part = part[int(name) if isinstance(part, list) else name]
    part[last] = number
    with pytest.raises(ValueError, match=rf"{place} is a number above 10\^18"):
        parse(json.dumps(results).encode())


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"3.0", b"[" * 100_000])
def test_what_is_no_number_is_refused(published: bytes, text: bytes) -> None:
    """What Python's own JSON reads as a number, a fraction as a count, and lists without end."""
    steps = b'"steps": 4,'
    assert steps in published
    with pytest.raises(ValueError, match=r"."):
        parse(published.replace(steps, b'"steps": ' + text + b",", 1))


@pytest.mark.parametrize("command", [verify_command, report_command])
@pytest.mark.parametrize("size", [300 << 20])
def test_a_manifest_of_any_size_is_refused_by_its_size(tmp_path: Path, command: Any, size: int) -> None:
    """It is not read."""
    (tmp_path / "results.json").touch()
    with (tmp_path / "results.json").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(VerificationError, match=r"results\.json"):
        command([str(tmp_path)])


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"step": NaN}', b"[1]", b"7", b'{"step": "x"}'])
def test_records_that_only_hashes_agree_with_are_refused(tmp_path: Path, line: bytes) -> None:
    """Metrics and answers whose hashes and seal somebody computed again: `verify` says 4, `report` says 65."""
    for name in ("artifacts/evaluation/arc_easy.base.jsonl", "artifacts/metrics.jsonl"):
        folder = publish_run(tmp_path / name.replace("/", "-") / "run", {"arc_easy": pairs(8)})
        try:
            rewrite(folder, name, line + b"\n")
        except ValueError:  # metrics that have no facts keep the hash of those they had
            data = line + b"\n"
            (folder / name).write_bytes(data)
            forge(folder, lambda results, name=name, data=data: _claim(results, name, data))
        with pytest.raises(VerificationError):
            verify_command([str(folder)])
        with pytest.raises(DataError):
            report_command([str(folder), "--output", str(tmp_path / "page.html")])


def _claim(results: dict[str, Any], name: str, data: bytes) -> None:
    (entry,) = [entry for entry in results["artifacts"] if entry["path"] == name]
    entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_a_folder_of_runs_is_no_run(tmp_path: Path) -> None:
    """The output folder given in place of a run is answered with one that lies in it; so is a folder as a file."""
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/results.json").write_text("{}")
    with pytest.raises(SettingsError, match=rf"contains runs, but is not a run itself; .* {tmp_path}/runs/one$"):
        verify_command([str(tmp_path / "runs")])
    run = publish_run(tmp_path / "run", {"arc_easy": pairs(8)})
    with pytest.raises(SettingsError, match=rf"is a folder; name a file, such as {tmp_path}/report.html"):
        report_command([str(run), f"--output={tmp_path}"])
