"""`verify` and `compare` from the command line: arguments, exit codes, and output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import boto3
import pytest

from job.cli.arguments import COMMANDS, parse_arguments
from job.cli.compare import compare_command
from job.errors import SettingsError
from tests import warm
from tests.published_run import forge, pairs, publish_run
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server


def job(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    return warm.run(words, {**clean, "JOB_LOG__FORMAT": "json", **environment})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `a`, a clearly worse `b`, and `other`, which was asked other questions."""
    folder = tmp_path_factory.mktemp("runs")
    publish_run(folder / "a", {"quiz": pairs(60, improved=30)})
    publish_run(folder / "b", {"quiz": pairs(60, regressed=30)})
    publish_run(folder / "other", {"quiz": pairs(40)})
    return folder


def test_a_run_that_verifies(runs: Path) -> None:
    """Exit 0, with a line a check on stdout and nothing in the log."""
    done = job("verify", str(runs / "a/results.json"))
    assert (done.returncode, done.stderr) == (0, "")
    *each, last = done.stdout.splitlines()
    assert all(line.startswith("holds ") for line in each)
    assert last == f"verified: all {len(each)} checks hold"
    found = json.loads(job("verify", str(runs / "a"), "--format=json").stdout)
    assert found["verified"] is True
    assert found["results"] == str(runs / "a")


def test_a_run_that_does_not_verify(runs: Path, tmp_path: Path) -> None:
    """Exit 4, with what differs on stdout, and as one line of the log."""
    run = Path(shutil.copytree(runs / "a", tmp_path / "run"))
    forge(run, lambda results: results["training"].update(loss=0.5))
    done = job("verify", str(run), "--format", "json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["verified"] is False
    line = json.loads(done.stderr)
    assert (line["event"], line["exit_code"], line["level"]) == ("VerificationError", 4, "error")
    assert line["problems"][0].startswith("results.json training.loss: claimed 0.5, found ")


def test_an_environment_that_is_meant_for_a_run_does_not_matter(runs: Path, tmp_path: Path) -> None:
    """What a run would refuse, such as an output that cannot be written, is no concern of a reader."""
    (tmp_path / "file").write_text("")
    done = job("verify", str(runs / "a"), JOB_RUN__OUTPUT=str(tmp_path / "file"), WORLD_SIZE="3")
    assert done.returncode == 0
    done = job("verify", str(runs / "a"), "--train.epochs=3", JOB_RUN__OUTPTU="x")
    assert done.returncode == 2
    assert json.loads(done.stderr)["total"] == 2


def test_a_run_on_s3_verifies(runs: Path) -> None:
    """The storage's settings are the job's."""
    with credentials(), moto_server() as url:
        client = boto3.client("s3", endpoint_url=url)
        for path in (path for path in (runs / "a").rglob("*") if path.is_file() and ".store" not in path.parts):
            client.upload_file(str(path), BUCKET, f"out/{path.relative_to(runs).as_posix()}")
        reach = {**CREDENTIALS, "JOB_STORAGE__ENDPOINT_URL": url}
        assert job("verify", f"s3://{BUCKET}/out/a/results.json", **reach).returncode == 0
        client.put_object(Bucket=BUCKET, Key="out/a/artifacts/more", Body=b"1")
        done = job("verify", f"s3://{BUCKET}/out/a", "--storage.endpoint_url", url, **CREDENTIALS)
        assert done.returncode == 4
        assert "artifacts/more: claimed no such file, found a file of 1 bytes" in done.stdout


def test_compare_and_its_gate(runs: Path) -> None:
    """Exit 0 without a gate; 3 where B is significantly worse, or does not meet a threshold, which asks for a gate."""
    a, b = str(runs / "a"), str(runs / "b/results.json")
    plain = job("compare", a, b, "--format=markdown")
    assert plain.returncode == 0
    assert plain.stdout.splitlines()[0] == "### Runs"
    assert "gate" not in plain.stdout.splitlines()[-1]
    gated = job("compare", a, b, "--gate", "--format=json")
    assert gated.returncode == 3
    assert json.loads(gated.stdout)["gate"]["passed"] is False
    assert json.loads(gated.stderr)["why"].startswith("quiz: acc regressed by 0.5000, p = ")
    wanted = job("compare", b, a, "--min-delta", "0.9")
    assert wanted.returncode == 3
    assert wanted.stdout.splitlines()[-1].startswith("gate: not met: quiz: acc may have gained only")


def test_what_cannot_be_compared(runs: Path) -> None:
    """Exit 65 with the reason."""
    done = job("compare", str(runs / "a"), str(runs / "other"), "--gate")
    assert (done.returncode, done.stdout) == (65, "")
    assert json.loads(done.stderr)["problems"] == ["quiz: the runs were asked other questions, 60 and 40 of them"]


def test_thresholds_are_the_jobs_kinds(runs: Path) -> None:
    """Exit 2, all at once, under the names that were typed."""
    done = job("compare", "a", "b", "--min-delta=2", "--max-regression=-1")
    assert done.returncode == 2
    names = [problem.split(":")[0] for problem in json.loads(done.stderr)["problems"]]
    assert names == ["--min-delta", "--max-regression"]
    done = job("compare", str(runs / "a"), str(runs / "b"), "--metric=loss")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--metric: is loss, which no task has that both runs were asked" in done.stderr


def test_both_runs_that_are_not_there_are_told() -> None:
    """Not the first of them alone."""
    with pytest.raises(SettingsError) as caught:
        compare_command(["/no-a", "/no-b"])
    assert [problem.where for problem in caught.value.problems] == ["/no-a", "/no-b"]


def test_words_are_told_apart() -> None:
    """Runs, options in both spellings, flags, and settings, in any order."""
    words = ["--min-delta", "-0.01", "a", "--gate", "--storage.region=x", "b", "--log.level", "error", "--format=json"]
    given = parse_arguments(words, COMMANDS["compare"].arguments)
    assert given.runs == ["a", "b"]
    assert given.options == {"--min-delta": "-0.01", "--format": "json"}
    assert given.flags == {"--gate"}
    assert given.settings == ["--storage.region=x", "--log.level=error"]


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ([], ["RUN: is missing; give the path or URI of a run"]),
        (["a", "b"], ["b: is one argument too many: the command takes RUN only; remove it"]),
        (["a", "--fromat=json"], ["--fromat: is unknown; the nearest is --format"]),
        (["a", "--format=xml"], ["--format: must be table or json"]),
        (["a", "--format"], ["--format: needs a value: --format {table,json}"]),
        (["--what", "--format=xml"], ["--what: is unknown", "RUN: is missing", "--format: must be"]),
    ],
)
def test_words_that_make_no_sense(words: list[str], problems: list[str]) -> None:
    """All that is wrong, at once."""
    with pytest.raises(SettingsError) as error:
        parse_arguments(words, COMMANDS["verify"].arguments)
    assert len(error.value.problems) == len(problems)
    for found, expected in zip(error.value.problems, problems, strict=True):
        assert str(found).startswith(expected)
