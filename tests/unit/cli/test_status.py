"""`status` from the command line: arguments, exit codes, output, and the same for a folder and for S3."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from job.cli.main import main
from job.runs.layout import attempt_key
from tests.published_run import pairs, publish_run
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server
from tests.unit.results.test_status import attempt_at, save, train


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


NOT_STARTED = "not started, or not a run: "
Job = Callable[..., Done]


@pytest.fixture
def job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Runs a command in this process: it imports nothing that would be worth a process of its own."""
    monkeypatch.setenv("JOB_LOG__FORMAT", "json")

    def run(*words: object, **environment: str) -> Done:
        capsys.readouterr()  # what the test has logged itself
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = main([str(word) for word in words])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run in training, whose attempt goes on."""
    with attempt_at(tmp_path / "run") as attempt:
        train(attempt)
        save(tmp_path / "run", 5)
        yield tmp_path / "run"


def test_status_in_words_and_as_json(job: Job, run: Path) -> None:
    """Exit 0 with the state on the first line, or with an object whose fields are documented."""
    done = job("status", run)
    assert (done.returncode, done.stderr, done.stdout.splitlines()[0]) == (0, "", "running")
    found = json.loads(job("status", run, "--format=json").stdout)
    assert (found["state"], found["step"], found["checkpoints"], found["problems"]) == ("running", 7, [5], [])
    assert job("status", run, "--stalled-after=0.000001").stdout.startswith("stalled (nothing recorded for")


def test_status_of_a_run_on_s3(job: Job, run: Path, tmp_path: Path) -> None:
    """What a store says of a running, a finished and a missing run, it says on S3 as in a folder."""
    publish_run(tmp_path / "done", {"quiz": pairs(60, improved=30)})
    with credentials(), moto_server() as url:
        client = boto3.client("s3", endpoint_url=url)
        for path in (path for path in tmp_path.rglob("*") if path.is_file() and ".store" not in path.parts):
            client.upload_file(str(path), BUCKET, f"out/{path.relative_to(tmp_path).as_posix()}")
        reach = {**CREDENTIALS, "JOB_STORAGE__ENDPOINT_URL": url}
        for folder, state in ((run, "running"), (tmp_path / "done", "finished"), (tmp_path / "none", "not-started")):
            place = f"s3://{BUCKET}/out/{folder.name}"
            told = [job("status", at, "--format=json", **reach).stdout for at in (folder, place)]
            assert not any(CREDENTIALS["AWS_SECRET_ACCESS_KEY"] in text for text in told)
            here, there = map(json.loads, told)
            assert here["state"] == state
            assert there["run"] == place
            if state == "finished":
                assert there["result"]["adapter"] == f"{place}/artifacts/adapter"
            for facts in (here, there):
                places = json.dumps([facts["outcome"], facts["result"]])
                facts["outcome"], facts["result"] = json.loads(places.replace(facts["run"], "RUN"))
                del facts["run"], facts["silent_seconds"], facts["place"], facts["runs_beside"]
            assert here == there
        assert job("status", f"s3://{BUCKET}/out", **reach).returncode == 2
        done = job("status", f"s3://{BUCKET}/none", **reach)
        assert (done.returncode, done.stdout.splitlines()[0]) == (2, f"{NOT_STARTED}there is no object below this URI")


@pytest.mark.parametrize(
    ("at", "place", "words"),
    [
        ("none", "missing", "there is no such folder"),
        ("empty", "empty", "the folder is empty"),
        ("other", "other-files", "there are files, but none of them is a record of an attempt"),
    ],
)
def test_status_of_a_run_that_has_not_started(job: Job, tmp_path: Path, at: str, place: str, words: str) -> None:
    """Exit 2, as every command about a run that is missing; the state is printed, and says what is there instead."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("text")
    done = job("status", tmp_path / at)
    assert (done.returncode, done.stdout.splitlines()[0]) == (2, f"{NOT_STARTED}{words}")
    what = f"{tmp_path / at}: has not started, or is not a run: {words}; correct the name, or start the run first"
    assert json.loads(done.stderr)["problems"] == [what]
    found = json.loads(job("status", tmp_path / at, "--format=json").stdout)
    assert (found["state"], found["place"]) == ("not-started", place)


def test_status_of_a_damaged_run(job: Job, run: Path, tmp_path: Path) -> None:
    """Exit 4: what is whole is printed, and what is damaged is in the log, without a traceback."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / attempt_key(1)).write_bytes(b"{")
    done = job("status", copy)
    assert done.returncode == 4
    assert re.search(r"^ +step +5 \(at the last checkpoint\)$", done.stdout, re.MULTILINE)
    line = json.loads(done.stderr)
    assert (line["event"], line["problems"][0][: len(str(copy))]) == ("VerificationError", str(copy))


@pytest.mark.parametrize(
    "words", [(), ("a", "b"), ("a", "--stalled-after=soon"), ("a", "--stalled-after=0"), ("a", "--stalled-after=nan")]
)
def test_words_that_make_no_sense(job: Job, words: tuple[str, ...]) -> None:
    """Exit 2, with what is wrong."""
    done = job("status", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(done.stderr)["event"] == "SettingsError"


@pytest.mark.parametrize("command", ["status", "verify", "report", "push", "compare", "serve-check"])
def test_a_run_that_is_named_by_its_id_is_found(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The error gives the path, in the folder of JOB_RUN__OUTPUT or its default; what is a path is not looked for."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "elsewhere", "here"):
        (tmp_path / folder / "first").mkdir(parents=True)
        (tmp_path / folder / "first/results.json").write_text("{}")
    words = ["first", "second"] if command == "compare" else ["first"]
    for output, environment in (("runs", {}), ("elsewhere", {"JOB_RUN__OUTPUT": "elsewhere"})):
        done = job(command, *words, **environment)
        assert done.returncode == 2
        problem = f"first: is no path, but the id of a run; give its path, {output}/first"
        assert json.loads(done.stderr)["problems"] == [problem]
    monkeypatch.chdir(tmp_path / "here")
    assert "the id of a run" not in job(command, *words).stderr
