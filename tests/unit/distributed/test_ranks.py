"""Rank and number of processes: from torchrun's variables, and from what platforms say about their machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.distributed.ranks import VARIABLES, Machines, Place, find_faults, find_machines, find_place, visible_gpu
from job.platforms.detect import Platform

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"MASTER_ADDR": "node-0"}])
def test_without_torchrun_there_is_no_place(environ: dict[str, str]) -> None:
    """An address alone, or the number 1, makes no process one of several."""
    assert list(find_faults(environ)) == []
    assert find_place(environ) is None


def test_torchrun_gives_a_place() -> None:
    """Everything is taken from the variables; the first process of a machine is the one with local rank 0."""
    assert list(find_faults(TORCHRUN)) == []
    place = find_place(TORCHRUN)
    assert place == Place(3, 4, 1, 2, "node-0", 29400, hosted=True, restart=2)
    assert place.first_of_machine == 2


def test_a_start_without_a_launcher_gives_a_place() -> None:
    """What is optional may be missing: process 0 then hosts the store."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert find_place({name: TORCHRUN[name] for name in names}) == Place(3, 4, 1, 1, "node-0", 29400)
    assert find_place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == Place()


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"RANK": ""}, ["RANK"]),
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, ["LOCAL_RANK", "MASTER_PORT"]),
        ({"WORLD_SIZE": "x"}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE"]),
        ({"RANK": "-1"}, ["RANK"]),
        ({"RANK": "٣"}, ["RANK"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT"]),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE"]),
        ({"RANK": "4"}, ["RANK"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK"]),
    ],
)
def test_variables_that_make_no_sense_are_named(changes: dict[str, str], wrong: list[str]) -> None:
    """All that are missing or are no numbers at once; then those that do not go together."""
    assert [name for name, _ in find_faults({**TORCHRUN, **changes})] == wrong


@given(st.dictionaries(st.sampled_from([*VARIABLES, "TORCHELASTIC_USE_AGENT_STORE"]), st.text(max_size=8)))
def test_whatever_they_hold_they_are_read_or_refused(environ: dict[str, str]) -> None:
    """Without a fault the place can be read; nothing else can happen."""
    if not list(find_faults(environ)):
        find_place(environ)


@pytest.mark.parametrize(
    ("shown", "local_rank", "expected"),
    [(None, 0, "0"), (None, 3, "3"), ("4,6", 1, "6"), ("MIG-a, MIG-b", 1, "MIG-b"), ("", 0, ""), ("4", 1, "")],
)
def test_each_process_sees_its_own_gpu(shown: str | None, local_rank: int, expected: str) -> None:
    """Of those that are shown, in their order, by whatever name; none where there are fewer."""
    environ = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert visible_gpu(environ, local_rank) == expected


def test_kubernetes_numbers_the_pods() -> None:
    """The index of a pod in its Indexed Job is the machine's; how many there are and where, the template says."""
    assert find_machines(Platform(name="kubernetes", completion_index=2)) == Machines({"run.node_rank": 2})
    assert find_machines(Platform(name="kubernetes")) == Machines({})


def resources(folder: Path, content: str) -> Platform:
    """A SageMaker job with this resourceconfig.json."""
    (folder / "resourceconfig.json").write_text(content, encoding="utf-8")
    return Platform(name="sagemaker", resources=folder / "resourceconfig.json")


def test_sagemaker_lists_its_hosts(tmp_path: Path) -> None:
    """The order of the hosts in the file is not the same everywhere; their names decide who is first."""
    config = {"current_host": "algo-1", "hosts": ["algo-2", "algo-1"], "network_interface_name": "lo"}
    assert find_machines(resources(tmp_path, json.dumps(config))) == Machines(
        {"run.nodes": 2, "run.node_rank": 0, "run.rendezvous": "algo-1:29400"}, interface="lo"
    )


@pytest.mark.parametrize("name", ["ethwe", "", None, 7, ["lo"]])
def test_an_interface_that_is_not_there(tmp_path: Path, name: object) -> None:
    """SDK v3's local mode names one that does not exist: the libraries choose, and the run goes on."""
    config = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"], "network_interface_name": name}
    found = find_machines(resources(tmp_path, json.dumps(config)))
    assert (found.interface, found.fault) == (None, None)


def test_a_single_host_is_no_cluster(tmp_path: Path) -> None:
    """With one host nothing changes, and neither where the file is missing."""
    config = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"}
    assert find_machines(resources(tmp_path, json.dumps(config))) == Machines({})
    assert find_machines(Platform(name="sagemaker", resources=tmp_path / "nowhere.json")) == Machines({})


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "{}", '{"hosts": 3, "current_host": "a"}', '{"hosts": []}', "[" * 99999]
)
def test_a_broken_list_is_a_fault(tmp_path: Path, content: str) -> None:
    """A file that names no hosts is told of instead of training on each host alone."""
    assert find_machines(resources(tmp_path, content)).fault is not None
