"""Machines agree on one exit code, in whatever order and with whatever codes they end."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest

from job.distributed.common_exit_code import End, agree_on_end, announce_end
from job.errors import exit_codes, most_serious


@pytest.fixture
def store() -> Any:
    """A store in this process."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    return HashStore()


def agree(store: Any, own: int, machine: int, seconds: float = 60, machines: int = 2) -> End:
    """What a machine with one process ends with."""
    return agree_on_end(store, own, machine=machine, machines=machines, processes=machines, seconds=seconds)


def test_all_pairs_of_codes(store: Any) -> None:
    """Both machines end with the more serious code, but with 0 where machine 0 did, since the run is complete then."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    def both(codes: tuple[int, int]) -> list[int]:
        own = PrefixStore(str(codes), store)
        with ThreadPoolExecutor(2) as pool:
            return [end.code for end in pool.map(lambda rank: agree(own, codes[rank], rank), (0, 1))]

    pairs = list(product([0, *exit_codes()], repeat=2))
    with ThreadPoolExecutor(len(pairs)) as pool:
        found = dict(zip(pairs, pool.map(both, pairs), strict=True))
    for (first, second), codes in found.items():
        assert codes == [0 if first == 0 else most_serious(code for code in (first, second) if code)] * 2


def test_the_reason_comes_from_the_process(store: Any) -> None:
    """What a process said of its end is kept, whatever its launcher adds; else the machine is named."""
    announce_end(store, 1, 65, "rows.jsonl:3: is empty")
    announce_end(store, 1, 65, "ended with exit code 65")
    store.set("machine#1", "65")
    assert agree(store, 75, 0, seconds=0) == End(65, "process 1", "rows.jsonl:3: is empty")
    store.set("machine#1", "2")
    assert agree(store, 75, 0, seconds=0) == End(2, "machine 1", "ended with exit code 2")


def test_a_machine_that_still_ends_counts_with_what_its_processes_said(store: Any) -> None:
    """The wait is bounded; a failure that was published by then is known, and a machine without one is nothing."""
    announce_end(store, 1, 1, "was killed by SIGKILL")
    began = time.monotonic()
    assert agree(store, 75, 0, seconds=0.2, machines=3) == End(1, "process 1", "was killed by SIGKILL")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("code", [99, 137])
def test_a_code_that_is_not_in_the_table_counts_as_killed(store: Any, code: int) -> None:
    """Another machine may run another version of the job: its code is named, and is no reason to end as a bug here."""
    store.set("machine#1", str(code))
    assert agree(store, 75, 0, seconds=0) == End(1, "machine 1", f"ended with exit code {code}")
    announce_end(store, 1, code, "is new")
    assert agree(store, 75, 0, seconds=0) == End(1, "process 1", "is new")
