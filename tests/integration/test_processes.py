"""Several processes train on the same examples as one, end alike, and save state that any number can resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from job.common.hashing import sealed, unsealed
from job.runs.layout import facts_of
from tests import warm
from tests.forked import ROOT, Forks, Group, free_port
from tests.helpers import alpaca_rows, arc_rows, read_jsonl, write_jsonl
from tests.integration.runs_of_processes import CLOSE, EXACT, go, metrics, results, run_folder
from tests.waiting import wait_for

STEPS = 6


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, str]:
    """Only the order of additions can differ: fp32, no dropout. 6 steps in two epochs, a checkpoint every other one."""
    folder = tmp_path_factory.mktemp("processes")
    write_jsonl(folder / "rows.jsonl", alpaca_rows(14))
    write_jsonl(folder / "questions.jsonl", arc_rows(10))
    return {
        "JOB_RUN__OUTPUT": str(folder / "out"),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_MODEL__ID": str(base_folder),
        "JOB_MODEL__QUANTIZATION": "none",
        "JOB_DATA__SOURCE": str(folder / "rows.jsonl"),
        "JOB_EVAL__DATA": f"arc_easy={folder / 'questions.jsonl'}",
        "JOB_EVAL__BATCH_TOKENS": "150",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": "6",  # by four it does not divide, and an epoch's last step has two
        "JOB_TRAIN__LEARNING_RATE": "2e-3",
        "JOB_TRAIN__MAX_LENGTH": "512",
        "JOB_TRAIN__OPTIMIZER": "adamw_torch",
        "JOB_TRAIN__MICRO_BATCH_TOKENS": "300",
        "JOB_CHECKPOINT__EVERY_STEPS": "2",
        "JOB_LOG__FORMAT": "json",
    }


@pytest.fixture(scope="module")
def one(forked: Forks, environment: dict[str, str]) -> str:
    """The name of a run by one process."""
    assert go(forked, environment, "one", 1) == [0]
    return "one"


def assert_same_steps(environment: Mapping[str, str], name: str, other: str) -> None:
    """Each step saw the same examples, and its loss and gradient are the same but for the order of additions."""
    steps, expected = metrics(environment, name), metrics(environment, other)
    assert len(steps) == len(expected) == STEPS
    for step, whole in zip(steps, expected, strict=True):
        assert {key: step[key] for key in ("step", "examples", "target_tokens", "learning_rate")} == {
            key: whole[key] for key in ("step", "examples", "target_tokens", "learning_rate")
        }
        assert step["loss"] == pytest.approx(whole["loss"], rel=CLOSE)
        assert step["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_number_of_processes_changes_no_step(
    forked: Forks, environment: dict[str, str], one: str, processes: int
) -> None:
    """2 and 4 processes end with 0, the same losses as one, and the same answers of the base; one serves figures."""
    name = f"by-{processes}"
    changes = {"JOB_RUN__OUTPUT": f"{environment['JOB_RUN__OUTPUT']}-{processes}"}  # so that nothing is reused
    given = {**environment, **changes, "JOB_RUN__ID": name, "JOB_METRICS__PORT": str(free_port())}
    codes, group = forked.run(given, processes, f"{name}-{processes}")
    logs = [log.read_text("utf-8") for log in group.logs]
    assert codes == [0] * processes, logs
    assert "".join(logs).count("metrics are served for Prometheus") == 1
    assert "figures are not exported" not in "".join(logs)
    shutil.copytree(run_folder(changes, name), run_folder(environment, name))
    assert_same_steps(environment, name, one)
    first, second = (
        (run_folder(environment, run) / "artifacts/evaluation/arc_easy.base.jsonl").read_bytes() for run in (name, one)
    )
    assert first == second
    found = results(environment, name)
    assert found["training"]["world_size"] == processes
    assert [attempt["world_size"] for attempt in found["run"]["attempts"]] == [processes]
    for key in ("loss", "examples", "steps"):
        assert found["training"][key] == pytest.approx(results(environment, one)["training"][key], rel=CLOSE)


@pytest.mark.long
def test_a_run_moves_between_numbers_of_processes(forked: Forks, environment: dict[str, str], one: str) -> None:
    """Killed with 2 processes, killed with 1, and finished with 3, a run has seen the same, with the same losses."""
    changes = {"JOB_FAULT": "kill@step=3,kill@step=5"}
    assert go(forked, environment, "moving", 2, **changes) == [-9, 1]
    assert go(forked, environment, "moving", 1, **changes) == [-9]
    assert go(forked, environment, "moving", 3, **changes) == [0] * 3
    assert_same_steps(environment, "moving", one)
    attempts = results(environment, "moving")["run"]["attempts"]
    assert [(attempt["world_size"], attempt["outcome"]) for attempt in attempts] == [
        (2, "killed"),
        (1, "killed"),
        (3, "complete"),
    ]


@pytest.mark.long
def test_the_same_number_of_processes_gives_the_same_bits(forked: Forks, environment: dict[str, str]) -> None:
    """NF4, dropout, 8-bit Adam, 2 processes: killed while the unquantized base is scored and in training, same bits."""
    output = environment["JOB_RUN__OUTPUT"]
    undisturbed, cut = ({**EXACT, "JOB_RUN__OUTPUT": f"{output}-{name}"} for name in ("exact", "exact-cut"))
    assert go(forked, environment, "whole", 2, **undisturbed) == [0, 0]
    group = forked.start({**environment, **cut, "JOB_RUN__ID": "killed"}, 2, "killed-early")
    wait_for(lambda: any(line["event"] == "loading the original base" for line in group.lines(0)))
    os.kill(group.pids[1], signal.SIGKILL)
    assert group.wait() == [1, -9]
    answers = "artifacts/evaluation/arc_easy.original.jsonl"
    assert not (run_folder(cut, "killed") / answers).exists()
    assert go(forked, environment, "killed", 2, **cut, JOB_FAULT="kill@step=5") == [-9, 1]
    assert go(forked, environment, "killed", 2, **cut) == [0, 0]
    first, second = (run_folder(cut, "killed") / answers, run_folder(undisturbed, "whole") / answers)
    assert first.read_bytes() == second.read_bytes()
    found, expected = results(cut, "killed"), results(undisturbed, "whole")
    assert found["evaluation"]["full_precision"] == expected["evaluation"]["full_precision"]
    assert found["evaluation"]["full_precision"]["tasks"]["arc_easy"]["n"] == 10
    assert facts_of(found) == facts_of(expected)


def last_step(group: Group) -> int:
    """The last step that the log of process 0 tells of; 0 for none."""
    return max((line["done"] for line in group.lines(0) if line["event"] == "steps"), default=0)


@pytest.mark.long
def test_a_signal_to_one_stops_all(forked: Forks, environment: dict[str, str], one: str) -> None:
    """SIGTERM to the last of 2 processes: all end with 75 after the same step, which is saved; nothing is repeated."""
    group = forked.start({**environment, "JOB_RUN__ID": "stopped"}, 2, "stopped")
    wait_for(lambda: last_step(group) >= 3)
    os.kill(group.pids[1], signal.SIGTERM)
    assert group.wait() == [75, 75]
    last = last_step(group)
    (preempted,) = [line for line in group.lines(0) if line["event"] == "Preempted"]
    assert f"step {last} of {STEPS} is saved" in preempted["why"]
    assert go(forked, environment, "stopped", 1) == [0]
    first, second = results(environment, "stopped")["run"]["attempts"]
    assert (first["outcome"], second["outcome"]) == ("preempted", "complete")
    assert first["repeated_steps"] == second["repeated_steps"] == 0
    assert_same_steps(environment, "stopped", one)


@pytest.mark.long
def test_a_process_that_dies_ends_the_others(forked: Forks, environment: dict[str, str]) -> None:
    """SIGKILL to one: the others end with 1 within seconds, and process 0 saves what was done."""
    group = forked.start({**environment, "JOB_RUN__ID": "dies", "JOB_CHECKPOINT__EVERY_STEPS": "100"}, 2, "dies")
    wait_for(lambda: last_step(group) >= 3)
    began = time.monotonic()
    os.kill(group.pids[1], signal.SIGKILL)
    assert group.wait() == [1, -9]
    assert time.monotonic() - began < 60
    saved = {path.parent.name for path in run_folder(environment, "dies").rglob("COMMITTED.json")}
    assert saved == {f"step-{last_step(group):08d}"}


@pytest.mark.long
def test_a_run_that_is_replaced_ends_in_all_processes(forked: Forks, environment: dict[str, str]) -> None:
    """When another attempt takes the lease, process 0 notices, and all end with 76."""
    group = forked.start({**environment, "JOB_RUN__ID": "replaced", "JOB_CHECKPOINT__EVERY_STEPS": "1"}, 2, "replaced")
    wait_for(lambda: last_step(group) >= 1)
    lease = run_folder(environment, "replaced") / "lease.json"
    record = unsealed(lease.read_bytes())
    lease.write_bytes(sealed({**record, "epoch": 2, "holder": "somebody else"}))
    assert group.wait() == [76, 76]


def test_an_error_of_one_is_told_once(forked: Forks, environment: dict[str, str], tmp_path: Path) -> None:
    """Bad rows, which only process 0 reads, end all with 65; the log says once which they are."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{**alpaca_rows(1)[0], "output": ""}])
    changes = {"JOB_RUN__ID": "bad", "JOB_DATA__SOURCE": str(rows), "JOB_DATA__ON_BAD_ROW": "error"}
    codes, group = forked.run({**environment, **changes, "JOB_LOG__LEVEL": "debug"}, 2, "bad")
    assert codes == [65, 65]
    assert [line["event"] for line in group.lines(0) if line["level"] == "error"] == ["DataError"]
    assert [line["event"] for line in group.lines(1) if line["level"] == "error"] == []
    (told,) = [line for line in group.lines(1) if line["event"] == "this process ends because another process failed"]
    assert told["problems"][0].splitlines()[0] == f"process 0: {rows}:1 output: is empty: there is nothing to learn"


def start(environment: Mapping[str, str], log: Path, **changes: str) -> subprocess.Popen[str]:
    """Starts the job as a user does; its log goes to a file, and what it says in the end is lost."""
    command, settings = [sys.executable, "-m", "job"], {**os.environ, **environment, **changes}
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.DEVNULL, stderr=file, text=True)


@pytest.mark.long
def test_two_machines(environment: dict[str, str], one: str, tmp_path: Path) -> None:
    """Two launchers, each with its own number and one address: both end with 0, and the losses are those of one."""
    common = {"JOB_RUN__ID": "machines", "JOB_RUN__NODES": "2", "JOB_RUN__RENDEZVOUS": f"127.0.0.1:{free_port()}"}
    started = [start(environment, tmp_path / str(rank), **common, JOB_RUN__NODE_RANK=str(rank)) for rank in (1, 0)]
    assert [process.wait(timeout=240) for process in started] == [0, 0], (tmp_path / "0").read_text()[-3000:]
    assert_same_steps(environment, "machines", one)
    assert results(environment, "machines")["training"]["world_size"] == 2
    assert {line["level"] for rank in (0, 1) for line in read_jsonl(tmp_path / str(rank))} == {"info"}
    # A machine that comes back when the others have gone home finds nothing to do, and waits for nobody.
    again = warm.run([], {**os.environ, **environment, **common, "JOB_RUN__NODE_RANK": "1"}, timeout=240)
    assert again.returncode == 0
    assert "complete already" in again.stderr
