"""What a run that exports a finished one copies; whole runs are in tests/integration/test_exported_run.py."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from job.common.hashing import sealed
from job.errors import DataError, SettingsError
from job.records import ExportedRun
from job.results import exported_run
from job.results.promotion import pointer_location, promote
from job.results.reader import PublishedRun, open_run, read_published
from job.runs.layout import EXPORTED_RUN, WEIGHTS, attempt_key, stage_key
from job.runs.run_log import parse_logged, read_exported_run
from job.runs.stage_records import RUN
from job.storage.local import LocalStore
from job.storage.open import StorageOptions
from tests.example_run import ATTEMPTS
from tests.published_run import forge, pairs, publish_run
from tests.wrapped_store import WrappedStore


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return publish_run(tmp_path_factory.mktemp("runs") / "a-run", {"quiz": pairs(4)})


def copy(run: PublishedRun, own: Path, work: Path) -> list[str]:
    """Copies what is taken over; returns the keys that were written, without the records, which are always."""
    written: list[str] = []
    store = WrappedStore(LocalStore(own), after=lambda verb, key: verb == "upload" and written.append(key))
    exported_run._copy(run, ("before", "own"), store, work, attempt=2, check_stop=lambda: None)
    return written


def test_what_an_earlier_attempt_copied_stays(finished: Path, tmp_path: Path) -> None:
    """An attempt copies what is missing or damaged, not everything again: a large run would never get to its export."""
    run, own = read_published(open_run(str(finished))), tmp_path / "own"
    assert WEIGHTS in (first := copy(run, own, tmp_path))
    assert copy(run, own, tmp_path) == []
    (own / WEIGHTS).write_bytes(b"\0" * (own / WEIGHTS).stat().st_size)
    (own / "artifacts/metrics.jsonl").unlink()
    assert sorted(copy(run, own, tmp_path)) == [WEIGHTS, "artifacts/metrics.jsonl"]
    assert all((own / key).read_bytes() == (finished / key).read_bytes() for key in first)


def test_marks_of_sagemaker_are_not_looked_for(finished: Path, tmp_path: Path) -> None:
    """Manifests of earlier versions list them, but S3 never has them."""
    run = Path(shutil.copytree(finished, tmp_path / "a-run"))
    mark = {"path": "stages/base.json.sagemaker-uploaded", "bytes": 0, "sha256": "0" * 64}
    forge(run, lambda results: results["evidence"].append(mark))
    assert WEIGHTS in copy(read_published(open_run(str(run))), tmp_path / "own", tmp_path)


@pytest.mark.parametrize(
    ("own", "refused"),
    [
        ("runs/exported", False),
        ("runs/a-run-merged", False),
        ("runs/a-run/exported", True),
        ("runs/a-run/artifacts/exported", True),
        ("runs/other/exported", True),
        ("link/exported", True),
        ("runs", True),
    ],
)
def test_no_run_lies_in_another(finished: Path, tmp_path: Path, own: str, *, refused: bool) -> None:
    """With files of another one, it would not verify any more: the finished one, any other, or the new one itself."""
    for name in ("a-run", "other"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    (tmp_path / "link").symlink_to(tmp_path / "runs/a-run")
    run = read_published(open_run(str(tmp_path / "runs/a-run")))
    with pytest.raises(SettingsError, match="JOB_RUN__OUTPUT") if refused else nullcontext():
        exported_run._check_place(LocalStore(tmp_path / own), run, StorageOptions())


def test_where_a_run_is_put_that_is_not_told(finished: Path, tmp_path: Path) -> None:
    """Beside the finished one; beside the whole run if that is a first stage; a pointer names the run it points to."""
    whole = tmp_path / "runs/whole"
    first = Path(shutil.copytree(finished, whole / "sft"))
    forge(first, lambda results: results["run"].update(part_of="whole"))
    assert exported_run.recorded_settings(str(first), StorageOptions()).output == str(tmp_path / "runs")
    run, pointer = read_published(open_run(str(finished))), str(tmp_path / "current")
    promote(pointer_location(pointer, StorageOptions()), run)
    recorded = exported_run.recorded_settings(pointer, StorageOptions())
    assert (recorded.run_id, recorded.output) == ("a-run", str(finished.parent))


def test_the_runs_before_the_exported_one_are_recorded(finished: Path, tmp_path: Path) -> None:
    """By their last attempts: each of them needed a start."""
    run = Path(shutil.copytree(finished, tmp_path / "a-run"))
    before = {"id": "first", "results_sha256": "0" * 64, "attempts": 3}
    forge(run, lambda results: results["run"].update(exported_run=before))
    published = read_published(open_run(str(run)))
    copy(published, tmp_path / "own", tmp_path)
    assert read_exported_run(LocalStore(tmp_path / "own")) == ExportedRun("a-run", published.sha256, 1, [3])


def test_a_damaged_record_of_the_exported_run_is_not_none(finished: Path, tmp_path: Path) -> None:
    """Without it, the manifest would say that the run trained by itself."""
    own = LocalStore(tmp_path / "own")
    assert read_exported_run(own) is None
    copy(read_published(open_run(str(finished))), tmp_path / "own", tmp_path)
    record = tmp_path / "own" / stage_key(EXPORTED_RUN)
    record.write_bytes(record.read_bytes().replace(b"a-run", b"b-run"))
    with pytest.raises(DataError, match=r"stages/exported-run.json: .*remove the folder of this run"):
        read_exported_run(own)


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
