"""`compare --history`: runs in chronological order, the control limits, and the verdict on the newest run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.cli.compare import compare_command
from job.common.hashing import hash_file
from job.errors import DataError, GateError, SettingsError
from job.results.history import control_limits, find_runs, history
from job.storage.local import LocalStore
from job.storage.location import StorageOptions
from job.storage.open import ObjectInfo
from tests.published_run import forge, pairs, publish_run

CORRECT = (30, 32, 29, 31, 33, 30)
"""Right answers of sixty, by run, in the order of time."""


def run_of(folder: Path, number: int, improved: int, questions: int = 60) -> Path:
    """A run that finished on a day of its own."""
    made = publish_run(folder / f"run-{number}", {"quiz": pairs(questions, improved=improved)})

    def change(results: dict[str, Any]) -> None:
        results["run"]["finished"] = f"2026-02-{number:02d}T10:00:00Z"

    forge(made, change)
    return made


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six runs, whose names sort otherwise than their times."""
    folder = tmp_path_factory.mktemp("series")
    for number, improved in enumerate(CORRECT):
        run_of(folder, 9 + number, improved)
    return folder


def test_limits_by_hand() -> None:
    """Mean 10.4 and mean moving range 1.25 give limits of 10.4 -+ 3.325."""
    found = control_limits([10, 11, 9, 11, 11])
    assert found is not None
    assert (found.centre, found.low, found.high) == pytest.approx((10.4, 10.4 - 2.66 * 1.25, 10.4 + 2.66 * 1.25))
    assert control_limits([10, 11, 9, 11]) is None


def test_a_folder_in_the_order_of_time(series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run of a folder, each once, though one is named again, within the limits; the page shows them all."""
    page = tmp_path / "page.html"
    words = ["--history", str(series), str(series / "run-10"), "--format=json", "--output", str(page)]
    assert compare_command(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["run"] for point in found["points"]] == [f"run-{number}" for number in range(9, 15)]
    assert (found["metric"], found["outcome"], found["out"]) == ("quiz/acc", "within", False)
    text = page.read_text()
    assert "The newest run is within the limits." in text
    assert all(f"run-{number}" in text.replace("<wbr>", "") for number in range(9, 15))


@pytest.mark.parametrize(("improved", "where"), [(0, "below the lower"), (60, "above the upper")])
def test_the_newest_is_out(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], improved: int, where: str
) -> None:
    """Exit 3 to either side, after the table is printed."""
    newest = run_of(tmp_path, 20, improved)
    with pytest.raises(GateError, match=f"run-20 with .* is {where} limit"):
        compare_command(["--history", str(series), str(newest), "--metric", "quiz/acc"])
    assert "run-20" in capsys.readouterr().out


def test_too_few_runs(series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in words, with exit 0: nothing is judged."""
    assert compare_command(["--history", *(str(series / f"run-{number}") for number in (9, 10, 11))]) == 0
    assert "too few runs for a control limit: 2 earlier runs, 5 are needed" in capsys.readouterr().out


def test_other_questions_are_left_out(series: Path, tmp_path: Path) -> None:
    """A run with other questions has no place among values that are compared, and is named."""
    other = run_of(tmp_path, 1, 10, questions=40)
    found = history(find_runs([str(series), str(other)], StorageOptions())[0], None)
    assert len(found.points) == len(CORRECT)
    assert found.left_out == ("run-1 was asked other questions of quiz",)


def test_an_export_is_no_further_run(tmp_path: Path) -> None:
    """It has the values of the run that it exports; without that run in the list it stands for it."""
    first, second = run_of(tmp_path, 1, 7), run_of(tmp_path, 2, 7)
    exported = {"id": "run-1", "results_sha256": hash_file(first / "results.json"), "attempts": 1}
    forge(second, lambda results: results["run"].update(exported_run=exported))
    found = history(find_runs([str(second), str(first)], StorageOptions())[0], None)
    assert ([point.run for point in found.points], found.left_out) == (["run-1"], ("run-2 exports run-1",))
    alone = history(find_runs([str(second)], StorageOptions())[0], None)
    assert [point.run for point in alone.points] == ["run-2"]


def test_equal_values_have_limits_without_width(tmp_path: Path) -> None:
    """Runs that are the same, bit for bit, are within their own limits; another value is not."""
    assert control_limits([0.1] * 6) is not None
    runs = [run_of(tmp_path, number, 7) for number in range(1, 8)]
    assert history(find_runs(list(map(str, runs)), StorageOptions())[0], None).outcome == "within"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--metric=quiz/f1"], "not a metric of the newest run, run-14; it has quiz/acc, quiz/acc_norm"),
        (["--gate"], "--gate: has no effect with --history"),
        (["/nowhere"], "neither a run nor a folder"),
    ],
)
def test_words_that_make_no_sense(series: Path, words: list[str], match: str) -> None:
    """What is wrong is said, with the metrics that there are."""
    with pytest.raises(SettingsError, match=match):
        compare_command(["--history", str(series), *words])


def test_output_is_for_a_history(series: Path) -> None:
    """Two runs are compared as text alone."""
    with pytest.raises(SettingsError, match="--output: is only for --history"):
        compare_command([str(series / "run-9"), str(series / "run-10"), "--output=x"])


def test_runs_that_cannot_be_read_are_left_out(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged manifest among others and a run that was killed are named, and the others are judged."""
    folder = Path(shutil.copytree(series, tmp_path / "series"))
    damaged, killed = folder / "run-11" / "results.json", tmp_path / "killed"
    damaged.write_bytes(damaged.read_bytes().replace(b"2026-02-11", b"2026-03-11"))
    killed.mkdir()
    shutil.copy(series / "run-9" / "lease.json", killed)
    assert compare_command(["--history", str(folder), str(killed), "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["run"] for point in found["points"]] == [f"run-{number}" for number in (9, 10, 12, 13, 14)]
    assert [text.partition(" cannot be read: ")[0] for text in found["left_out"]] == [
        LocalStore(folder / "run-11").uri,
        LocalStore(killed).uri,
    ]
    with pytest.raises(DataError, match=r"there is no run to show; .*killed cannot be read: results\.json: is missing"):
        compare_command(["--history", str(killed)])


def test_a_folder_of_too_many_objects_is_refused(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is listed than the limit, and the newest run is not guessed from a part of them."""
    listed: list[str] = []
    plain = LocalStore.list

    def counted(self: LocalStore, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in plain(self, prefix):
            listed.append(info.key)
            yield info

    monkeypatch.setattr("job.results.history.MOST_LISTED", 5)
    monkeypatch.setattr(LocalStore, "list", counted)
    with pytest.raises(SettingsError, match="holds more than 5 objects; name the runs themselves"):
        find_runs([str(series)], StorageOptions())
    assert len(listed) == 6
