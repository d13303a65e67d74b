"""Experiment trackers: the real libraries, offline, receive everything and cannot disturb a run."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from job.errors import JobError, Preempted, Replaced
from job.records import StepMetrics, ValidationMetrics
from job.tracking import trackers
from job.tracking.figures import final_figures, step_figures
from job.tracking.trackers import Tracking, tracking
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]
KEY = "0123456789abcdef0123456789abcdef01234567"

# In place of the real package, in the tracker's process: it writes down what it is told, and goes wrong as told.
FAKE = """
import json, os, time

def note(*words):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(words) + "\\n")

def go_wrong(place):
    how, _, where = os.environ.get("FAKE", "").partition("@")
    if where == place:
        {"hang": lambda: time.sleep(300), "die": lambda: os._exit(9), "raise": lambda: 1 / 0}[how]()

class Settings:
    def __init__(self, **_):
        print("greetings", flush=True)

class Run:
    url, dir, summary = None, "somewhere", {}
    def log(self, figures, step):
        go_wrong("log")
        note("log", step, figures)
    def mark_preempting(self):
        note("preempting")
    def finish(self, exit_code):
        go_wrong("finish")
        note("finish", exit_code, self.summary)

def init(**given):
    go_wrong("init")
    note("init", given["id"], given["project"], given["config"], given["resume"])
    return Run()
"""

RESULTS: dict[str, Any] = {
    "cost": {"seconds": 9.5, "usd": None, "wasted_seconds": 0.5, "goodput": 0.5, "energy_kwh": None},
    "evaluation": {
        "tasks": {
            "arc_easy": {
                "base": {"acc": 0.5, "acc_norm": None},
                "adapter": {"acc": 0.75, "acc_norm": None},
                "delta": 0.25,
                "mcnemar_p": 0.01,
            }
        }
    },
}
SUMMARY = {
    "cost/seconds": 9.5,
    "cost/wasted_seconds": 0.5,
    "cost/goodput": 0.5,
    "evaluation/arc_easy/base_acc": 0.5,
    "evaluation/arc_easy/adapter_acc": 0.75,
    "evaluation/arc_easy/delta": 0.25,
    "evaluation/arc_easy/mcnemar_p": 0.01,
}


def metrics(step: int) -> StepMetrics:
    """A step's."""
    measured = {"seconds": 0.5, "tokens_per_second": 100.0, "memory_bytes": 10**9}
    return StepMetrics(step, 0.1, 2.0 / step, 1e-4, None if step == 2 else 1.5, 4, 50, measured)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a tracker's process in which wandb is the stand-in; what was started is ended."""
    (tmp_path / "wandb.py").write_text(FAKE, "utf-8")
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def remembered(*arguments: Any, **options: Any) -> Any:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(trackers.subprocess, "Popen", remembered)
    yield {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "NOTES": str(tmp_path / "notes")}
    for process in started:
        process.kill()
        process.wait()


def notes(environ: Mapping[str, str]) -> list[Any]:
    """What the stand-in wrote down."""
    path = Path(environ["NOTES"])
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def track(environ: Mapping[str, str], steps: int = 3, error: BaseException | None = None) -> list[Any]:
    """Tracks an attempt that does so many steps and ends so; returns the warnings."""
    attempt = tracking({"wandb": "p"}, "a-run", {"train.epochs": 2}, environ)
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with capture_logs() as lines, expected, attempt as found:
        found.start()
        for step in range(1, steps + 1):
            found.step(metrics(step))
        if error is not None:
            raise error
        found.results(RESULTS)
    return [line for line in lines if line["log_level"] == "warning"]


def test_everything_is_told_in_order(fake: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run with its settings, each step's figures that are known, and the final figures with how it ended."""
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 120.0)
    assert track(fake) == []
    begin, *steps, end = notes(fake)
    assert begin == ["init", "a-run", "p", {"train.epochs": 2}, "allow"]
    assert [(step, found) for _, step, found in steps] == [(step, step_figures(metrics(step))) for step in (1, 2, 3)]
    assert "train/grad_norm" not in steps[1][2]
    assert end == ["finish", 0, {"outcome": "complete", **SUMMARY}]


def test_a_validation_is_told(fake: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is told with its step, by the name that TRL's users look for."""
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 120.0)
    with tracking({"wandb": "p"}, "a-run", {}, fake) as found:
        found.start()
        found.validation(ValidationMetrics(4, 0.5, 1.25, 10, 100))
        found.results(RESULTS)
    assert [note[1:] for note in notes(fake)[1:-1]] == [[4, {"eval/loss": 1.25}]]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Preempted("x"), [["preempting"], ["finish", 1, {"outcome": "preempted"}]]),
        (JobError("x"), [["finish", 1, {"outcome": "failed"}]]),
        (Replaced("x"), []),
    ],
    ids=["preempted", "failed", "replaced"],
)
def test_how_an_attempt_ended_is_told(
    fake: dict[str, str], error: JobError, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken away and failed are told apart; who was replaced says nothing, for another attempt tells the run now."""
    monkeypatch.setattr(trackers, "STOP_SECONDS", 120.0)
    assert track(fake, 0, error) == []
    assert [note for note in notes(fake) if note[0] != "init"] == told


@pytest.mark.parametrize("how", ["hang", "die", "raise"])
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_goes_wrong_costs_one_warning(
    fake: dict[str, str], how: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it hangs, crashes or fails, steps continue at once, the end comes soon, and there is one warning."""
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 2.0 if how == "hang" else 120.0)
    monkeypatch.setattr(trackers, "ANSWER_SECONDS", 60.0)
    began = time.monotonic()
    (warning,) = track(fake | {"FAKE": f"{how}@{where}"}, 500)
    assert how != "hang" or time.monotonic() - began < 60
    assert warning["tracker"] == "wandb"
    expected = {"hang": "did not end within 2 s", "die": "the tracker ended", "raise": "the tracker failed"}
    assert expected[how] in warning["event"]
    assert how != "raise" or "division by zero" in warning["why"]


def test_a_tracker_that_is_frozen_holds_up_no_step(fake: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """When pipe and queue are full, figures are left out, which is said once; a step costs next to nothing."""
    monkeypatch.setattr(trackers, "QUEUED", 10)
    found = Tracking({"wandb": "p"}, "a-run", {}, fake)
    found.start()
    found._trackers[0]._process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with capture_logs() as lines:
        for step in range(1, 3000):
            found.step(metrics(step))
    assert time.monotonic() - began < 60
    assert [line["event"] for line in lines] == ["the tracker is too slow; some metrics are left out"]
    found.leave()


def test_whoever_is_killed_leaves_the_run_open(fake: dict[str, str]) -> None:
    """If the job was killed, its tracker ends by itself without closing the run: the next attempt does that."""
    code = f"""
import os, signal, time
from job.tracking.trackers import Tracking
found = Tracking({{"wandb": None}}, "a-run", {{}}, {fake!r})
found.start()
while not os.path.exists({fake["NOTES"]!r}):
    time.sleep(0.05)
print(found._trackers[0]._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    wait_for(lambda: _is_gone(int(killed.stdout.split()[-1])))
    assert [note[0] for note in notes(fake)] == ["init"]


def _is_gone(pid: int) -> bool:
    """Ended, if perhaps not yet buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_package_that_is_missing_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for and not installed: the run goes on untracked, and says how to change that. A folder is no package."""
    for missing in (None, type("Spec", (), {"origin": None})):
        monkeypatch.setattr(trackers, "find_spec", lambda name, found=missing: found)
        (warning,) = track(dict(os.environ))
        assert warning["event"].startswith("the run is not tracked")
        assert "pip install '.[wandb]'" in warning["fix"]


def test_a_process_that_cannot_be_started_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more processes, no memory: the tracker's affair."""
    monkeypatch.setattr(trackers.sys, "executable", "/nowhere/python")
    (warning,) = track(dict(os.environ))
    assert "No such file" in warning["why"]


def test_only_known_numbers_are_told() -> None:
    """A norm that overflowed, a price or an accuracy that there is none of, are left out."""
    assert final_figures(RESULTS) == SUMMARY
    assert all(isinstance(value, float) for value in step_figures(metrics(1)).values())


def two_attempts(project: Mapping[str, str | None], environ: Mapping[str, str]) -> list[Any]:
    """A run preempted after three steps and finished by a second attempt that repeats one; returns what was logged."""
    with capture_logs() as lines:
        for steps, error in (((1, 2, 3), Preempted("gone")), ((3, 4, 5), None)):
            with (
                suppress(Preempted),
                tracking(project, "a-run", {"run.id": "a-run", "train.epochs": 2}, environ) as found,
            ):
                found.start()
                for step in steps:
                    found.step(metrics(step))
                if error is not None:
                    raise error
                found.results(RESULTS)
    return lines


@pytest.mark.long
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package without a network: both attempts' folders are of one run, with steps, settings and results.

    Nothing is left in the system's folder for temporary files.
    """
    monkeypatch.setattr(trackers, "STOP_SECONDS", 60.0)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 60.0)
    (temporary := tmp_path / "temporary").mkdir()
    environ = {**os.environ, "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}
    lines = two_attempts({"wandb": "qlora-job"}, environ | {"WANDB_API_KEY": KEY, "TMPDIR": str(temporary)})
    assert [line["event"] for line in lines] == ["the run is tracked"] * 2, lines
    first, second = (_read_wandb(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    for found in (first, second):
        assert (found["id"], found["project"]) == ("a-run", "qlora-job")
        assert found["config"]["train.epochs"] == 2
    assert [step["_step"] for step in first["history"]] == [1, 2, 3]
    assert [step["_step"] for step in second["history"]] == [3, 4, 5]
    assert second["history"][-1]["train/loss"] == 2.0 / 5
    assert (first["exit"], second["exit"]) == (1, 0)
    assert SUMMARY.items() <= second["summary"].items()
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert texts
    assert not any(KEY.encode() in text for text in texts)
    assert not list(temporary.iterdir())


def _read_wandb(path: Path) -> dict[str, Any]:
    """What an offline run's file holds: protocol buffers in LevelDB's log format. Read where wandb may be imported."""
    code = """
import json, sys
from wandb.proto.wandb_internal_pb2 import Record

data, at, whole, found = open(sys.argv[1], "rb").read(), 7, b"", {"history": [], "summary": {}}
values = lambda items: {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
while at + 7 <= len(data):
    left = 32768 - at % 32768
    if left < 7:
        at += left
        continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    whole += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):
        record, whole = Record.FromString(whole), b""
        match record.WhichOneof("record_type"):
            case "run":
                found |= {"id": record.run.run_id, "project": record.run.project}
                found["config"] = values(record.run.config.update)
            case "history":
                found["history"].append(values(record.history.item))
            case "summary":
                found["summary"] |= values(record.summary.update)
            case "exit":
                found["exit"] = record.exit.exit_code
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.long
def test_mlflow_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package with SQLite: the second attempt finds the first one's run by its tag and goes on with it."""
    monkeypatch.setattr(trackers, "STOP_SECONDS", 120.0)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 120.0)
    (temporary := tmp_path / "temporary").mkdir()
    environ = {**os.environ, "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    lines = two_attempts({"mlflow": "qlora-job"}, environ | {"TMPDIR": str(temporary)})
    assert [line["event"] for line in lines] == ["the run is tracked"] * 2, lines
    assert len({line["where"] for line in lines}) == 1
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as found:  # the package takes seconds to say the same
        (run,) = found.execute("select status, experiments.name from runs join experiments using (experiment_id)")
        parameters, tags, figures = (
            dict(found.execute(f"select key, value from {table}")) for table in ("params", "tags", "latest_metrics")
        )
        losses = dict(found.execute("select step, value from metrics where key = 'train/loss'"))
    assert run == ("FINISHED", "qlora-job")
    assert parameters == {"run.id": "a-run", "train.epochs": "2"}
    assert (tags["qlora-job.run"], tags["qlora-job.outcome"]) == ("a-run", "complete")
    assert SUMMARY.items() <= figures.items()
    assert losses == {step: 2.0 / step for step in (1, 2, 3, 4, 5)}
    assert not (ROOT / "mlruns").exists()
    assert not list(temporary.iterdir())
