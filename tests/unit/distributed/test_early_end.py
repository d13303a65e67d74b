"""The others do not wait for machines that end before they connect, or that belong to another run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from job import log
from job.cli.error_report import report
from job.cli.main import main
from job.distributed import early_end, other_machines, process_group, rendezvous
from job.distributed.common_exit_code import END, agree_on_end
from job.distributed.early_end import announcing_early_end
from job.distributed.launcher import Machine, launch
from job.distributed.process_group import ProcessGroup
from job.distributed.ranks import Place
from job.distributed.rendezvous import host_store, join, keyspace, reach_store
from job.errors import JobError, Killed, Problem, SettingsError, Unreachable, error_of_process
from job.platforms.detect import detect
from job.preemption.stop_flag import StopFlag
from tests.forked import free_port
from tests.waiting import wait_for

WRONG = SettingsError([Problem("JOB_TRAIN__EPOCHS", "must be at least 1")])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "REASON_SECONDS", 0.1)
    monkeypatch.setattr(early_end, "_ANNOUNCE_SECONDS", 100.0)  # a bound that a busy machine keeps
    monkeypatch.setattr(rendezvous, "_FOREIGN_PROCESS_SECONDS", 0.3)
    for module in (process_group, rendezvous):
        monkeypatch.setattr(module, "CHECK_SECONDS", 0.05)


def end_of_joining(
    run: str, rank: int, port: int, patience: float = 60.0, *, hosted: bool = True, restart: int = 0
) -> BaseException | None:
    """What one of two processes ends with that joins a run."""
    place = Place(rank, 2, host="localhost", port=port, hosted=hosted, restart=restart)
    try:
        with join(
            place, run, stop=StopFlag(), report_progress=lambda: None, timeout_seconds=patience, grace_seconds=0.1
        ):
            return None
    except JobError as error:
        return error


def end_early(machine: int, port: int, run: str | None = "r", error: JobError = WRONG) -> JobError:
    """The error with which a machine of two ends before it connects, once it has told the other one."""
    place = Machine(1, nodes=2, node_rank=machine, rendezvous=f"localhost:{port}")
    with pytest.raises(JobError) as raised, announcing_early_end(lambda: (place, run)):
        raise error
    return raised.value


def test_invalid_settings_of_a_machine_end_machine_0() -> None:
    """Both end with the code that says that no retry helps, and with the reason; the launchers do not wait either."""
    store = host_store(0, "r")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(end_of_joining, "r", 0, store.port)
        assert end_early(1, store.port) is WRONG
        told = waiting.result(timeout=60)
    assert isinstance(told, SettingsError)
    assert told.reported
    assert "process 1: JOB_TRAIN__EPOCHS: must be at least 1" in str(told)
    began = time.monotonic()
    assert agree_on_end(keyspace(store, "r"), 2, machine=0, machines=2, processes=2, seconds=60).code == 2
    assert time.monotonic() - began < 30


def test_invalid_settings_of_machine_0_end_the_others() -> None:
    """It hosts the store until the other machine has read how it ended, and no longer."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        ending = pool.submit(end_early, 0, port)
        told = end_of_joining("r", 1, port)
        assert isinstance(told, SettingsError)
        assert "JOB_TRAIN__EPOCHS" in str(told)
        there = keyspace(reach_store(Place(host="localhost", port=port)), "r")
        assert agree_on_end(there, 2, machine=1, machines=2, processes=2, seconds=60).code == 2
        assert ending.result(timeout=60) is WRONG
    assert time.monotonic() - began < early_end._ANNOUNCE_SECONDS


def test_one_without_its_launcher_does_not_keep_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it waits for the others already: the next attempt of its machine would find its rank taken."""
    store = host_store(0, "r")
    place = Place(1, 2, host="localhost", port=store.port, hosted=True, launcher=7)
    monkeypatch.setattr(os, "getppid", lambda: 1 if keyspace(store, "r").check(["here#1"]) else 7)
    joining = join(place, "r", stop=StopFlag(), report_progress=lambda: None, timeout_seconds=60, grace_seconds=0.1)
    with pytest.raises(Killed), joining:
        pass
    assert json.loads(keyspace(store, "r").get(END))["process"] == 1


@pytest.mark.parametrize("noticed_in", ["announce", "check", "a round of the waiting"])
def test_a_store_that_goes_away_while_it_is_waited_for_is_worth_a_retry(
    monkeypatch: pytest.MonkeyPatch, noticed_in: str
) -> None:
    """Machine 0 was taken away while the others were still coming: no traceback, and no waiting."""
    stores = [host_store(0, "r")]
    port = stores[0].port
    if noticed_in == "a round of the waiting":
        monkeypatch.setattr(ProcessGroup, "check", lambda _: stores.clear())  # the server ends with it
    else:
        request = getattr(ProcessGroup, noticed_in)
        monkeypatch.setattr(ProcessGroup, noticed_in, lambda group: (stores.clear(), request(group)))
    end = end_of_joining("r", 1, port)
    assert isinstance(end, Unreachable)
    assert "any more" in str(end)


def test_a_launcher_does_not_ask_a_machine_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """How that ends is not how this one ends, and it will not say so."""
    monkeypatch.setattr(other_machines, "agree_on_end", lambda *_, **__: pytest.fail("it was asked"))
    store = host_store(0, "other")
    place = Machine(1, nodes=2, node_rank=1, rendezvous=f"localhost:{store.port}")
    assert launch(["/bin/sh", "-c", "exit 75"], place, [], run="r", environ=dict(os.environ), grace_seconds=60) == 75


@pytest.mark.parametrize(("local_rank", "words"), [("0", "process 0: a reason"), ("1", "")])
def test_every_machine_says_once_why_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, words: str
) -> None:
    """Processes but the first of a run log warnings only, and the error itself is in the log of another machine."""
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    log.configure("json", "warning", ())
    assert report(error_of_process(2, "process 0", "a reason"), detect({})) == 2
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)


def test_an_end_that_a_retry_may_help_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform starts this machine again, and those that wait go on with it."""
    monkeypatch.setattr(early_end, "_report_end", lambda *_: pytest.fail("it was told"))
    end_early(1, free_port(), error=Unreachable("the store"))


def test_a_frozen_machine_0_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's client waits for its answer without a limit."""
    released = threading.Event()
    for name in ("_ANNOUNCE_SECONDS", "_ANSWER_SECONDS", "_LAST_SECONDS"):
        monkeypatch.setattr(early_end, name, 0.05)
    monkeypatch.setattr(early_end, "reach_store", lambda *_: released.wait(600))
    try:
        assert end_early(1, free_port()) is WRONG
    finally:
        released.set()


def test_nobody_is_told_for_longer_than_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine 0 may never come; a signal ends the waiting as well."""
    monkeypatch.setattr(early_end, "_ANNOUNCE_SECONDS", 0.2)
    assert end_early(1, free_port()) is WRONG
    monkeypatch.setattr(early_end, "_ANNOUNCE_SECONDS", 600)
    place = Machine(1, nodes=2, node_rank=0, rendezvous=f"localhost:{free_port()}")
    with pytest.raises(SettingsError), announcing_early_end(lambda: (place, "r"), [15]):
        raise WRONG


def test_a_silent_store_delays_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it does not answer at all until this machine has ended."""
    received, ended, in_time = list[int](), Event(), list[bool]()

    def silent(*_: object) -> None:
        received.append(signal.SIGTERM)
        in_time.append(ended.wait(20))
        raise RuntimeError("timed out")

    monkeypatch.setattr(early_end, "reach_store", silent)
    place = Machine(1, nodes=2, node_rank=1, rendezvous="localhost:1")
    with pytest.raises(SettingsError), announcing_early_end(lambda: (place, "r"), received):
        raise WRONG
    ended.set()
    assert wait_for(lambda: in_time) == [True]


@pytest.mark.parametrize("hosted_for", ["one", "two"])
def test_runs_with_different_ids_refuse_each_other(hosted_for: str) -> None:
    """Both ids are named on both machines; neither waits for the other until its patience is over."""
    store = host_store(0, hosted_for)
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(end_of_joining, run, rank, store.port) for rank, run in enumerate(("one", "two"))]
        for end in [one.result(timeout=60) for one in joining]:
            assert isinstance(end, SettingsError)
            assert end.exit_code == 2
            assert "JOB_RUN__ID" in str(end)
            assert "one" in str(end).replace("one came", "").replace("one process", "")
            assert "two" in str(end)


def test_a_machine_without_the_id_ends_the_others_too() -> None:
    """Where the id itself is missing: after a while, since it may belong to another run."""
    store = host_store(0, "r")
    missing = SettingsError([Problem("JOB_RUN__ID", "must be set")])
    assert end_early(1, store.port, None, missing) is missing
    told = end_of_joining("r", 0, store.port)
    assert isinstance(told, SettingsError)
    assert "machine 1 has ended" in str(told)


def test_a_process_left_over_from_an_earlier_run_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It still waits at the address and is refused; the run goes on once its own process has come."""
    monkeypatch.setattr(rendezvous, "_FOREIGN_PROCESS_SECONDS", 60)
    for step in ("_connect", "_disconnect"):  # torch has one group for each process
        monkeypatch.setattr(rendezvous, step, lambda *_: None)
    store = host_store(0, "new")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(end_of_joining, "new", 0, store.port)
        assert isinstance(end_of_joining("old", 1, store.port), SettingsError)
        second = pool.submit(end_of_joining, "new", 1, store.port)
        assert first.result(timeout=60) is second.result(timeout=60) is None


@pytest.mark.parametrize(("wrong", "why"), [("--train.epochs=-1", "JOB_TRAIN__EPOCHS"), ("--no.such=1", "--no.such")])
def test_the_command_tells_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str, why: str) -> None:
    """From the settings that are valid it knows where, and under which id and number."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("JOB_")]:
        monkeypatch.delenv(name)
    store = host_store(0, "r")
    words: list[Any] = ["--run.id=r", "--run.nodes=2", "--run.node-rank=1", f"--run.rendezvous=localhost:{store.port}"]
    assert main(["run", "--preset=demo", *words, wrong]) == 2
    end = json.loads(keyspace(store, "r").get(END))
    assert (end["process"], end["code"]) == (1, 2)
    assert why in end["why"]


def end_of_process(rank: int, port: int, patch: pytest.MonkeyPatch, **environment: str) -> int:
    """The exit code of one of two processes that another launcher has started, with a wrong setting."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    wrong = {"JOB_RUN__ID": "r", "JOB_TRAIN__LEARNING_RATE": "abc", **environment}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **wrong}.items():
        patch.setenv(name, value)
    return main(["run", "--preset=demo"])


@pytest.mark.parametrize("wrong", [0, 1])
def test_invalid_settings_of_a_process_end_the_other(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """Under a launcher without a store of its own; process 0 hosts it as long as the other one needs."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        waiting = pool.submit(end_of_joining, "r", 1 - wrong, port, hosted=False)
        assert end_of_process(wrong, port, monkeypatch) == 2
        told = waiting.result(timeout=60)
    assert isinstance(told, SettingsError)
    assert told.reported
    assert f"process {wrong}: JOB_TRAIN__LEARNING_RATE (environment): must be a number" in str(told)
    assert time.monotonic() - began < early_end._ANNOUNCE_SECONDS


def test_invalid_settings_of_a_process_are_told_in_torchruns_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for there, and its keys are those of the same restart of torchrun."""
    store = host_store(0, "r")
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert end_of_process(0, store.port, monkeypatch, **torchrun) == 2
    assert "process 0" in str(end_of_joining("r", 1, store.port, restart=1))
    wrong_id = {"JOB_RUN__ID": "", "JOB_FAULT": "none"}
    assert end_of_process(0, store.port, monkeypatch, **torchrun, **wrong_id) == 2
    assert "process 0 has ended" in str(end_of_joining("r", 1, store.port))


@pytest.mark.parametrize(
    "wrong", [{"RANK": "5"}, {"RANK": ""}, {"LOCAL_RANK": "x"}, {"WORLD_SIZE": "x"}, {"LOCAL_WORLD_SIZE": "0"}]
)
def test_a_process_with_an_impossible_rank_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]
) -> None:
    """Its address is enough to tell them; whatever its rank is, it takes nobody's place."""
    store = host_store(0, "r")
    assert end_of_process(1, store.port, monkeypatch, JOB_TRAIN__LEARNING_RATE="1e-4", **wrong) == 2
    told = end_of_joining("r", 0, store.port)
    assert isinstance(told, SettingsError)
    assert f"{next(iter(wrong))} (environment)" in str(told)


def test_a_process_that_is_told_to_stop_tells_nobody_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun stops the others when one has failed: they still log why they cannot take part."""
    monkeypatch.setattr(early_end, "_ANNOUNCE_SECONDS", 600)
    tell = early_end._report_end

    def stopped(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        tell(*arguments)

    monkeypatch.setattr(early_end, "_report_end", stopped)
    assert end_of_process(0, free_port(), monkeypatch) == 2


def test_a_single_process_of_a_launcher_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody, and no address."""
    monkeypatch.setattr(early_end, "_report_end", lambda *_: pytest.fail("it was told"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "JOB_TRAIN__EPOCHS": "-1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "--preset=demo"]) == 2
