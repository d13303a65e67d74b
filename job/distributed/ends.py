"""How processes and machines end: what each writes into the rendezvous store, and the exit code of all together.

    end             the first failure, with which the other processes end: rank, exit code, reason
    end#RANK        how a process failed: exit code, reason
    machine#NUMBER  the exit code of a machine, from its launcher
    read#NUMBER     the launcher of a machine has read how the others ended

A platform judges a run of several machines by one of them, mostly by the first that ends. Therefore the launchers
agree: each of them ends with the most serious exit code that any machine published (`errors.gravest`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import Killed, exit_codes, gravest

END = "end"
"""Key of the first failure."""
SETTLE_SECONDS = 10.0
"""How long a launcher waits for those of the other machines; a machine that is gone says nothing."""
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class End:
    """How a run of several machines ended: its exit code, which process or machine that came from, and why."""

    code: int
    where: str = ""
    why: str = ""


def end_of(rank: int) -> str:
    """Key of how a process failed."""
    return f"{END}#{rank}"


def ended_key(machine: int) -> str:
    """Key of the exit code of a machine."""
    return f"machine#{machine}"


def read_key(machine: int) -> str:
    """Key that says that the launcher of a machine has read how the others ended."""
    return f"read#{machine}"


def publish_end(store: Any, process: int, exit_code: int, why: str) -> None:
    """Writes into the store that a process has failed, and, unless another one is there already, as the first failure.

    If the process has already recorded its own failure, that record is kept: its launcher knows less.
    """
    end = json.dumps({"process": process, "code": exit_code, "why": why[:2000]})
    store.compare_set(end_of(process), "", end)
    store.compare_set(END, "", end)


def agree_on_end(store: Any, own: int, *, machine: int, machines: int, processes: int, seconds: float) -> End:
    """The exit code of all machines, once each of them has published its own, or after `seconds`.

    Args:
        store: The rendezvous store of this run. Machine 0 hosts it, so it waits until the others have read from it.
        own: The exit code of this machine.
        machine: Number of this machine.
        machines: Number of machines.
        processes: World size.
        seconds: Longest time to wait. Machines that have not ended by then count with what their processes published.

    Returns:
        0 if machine 0 ended with 0, since the run is complete then; otherwise the most serious exit code.

    Raises:
        RuntimeError: The store cannot be reached.
    """
    deadline = time.monotonic() + seconds
    ended, read = ([key(number) for number in range(machines)] for key in (ended_key, read_key))
    store.set(ended[machine], str(own))
    _wait(lambda: store.check(ended), deadline)
    codes = {key: int(store.get(key)) for key in ended if store.check([key])}
    failed = [json.loads(store.get(key)) for key in map(end_of, range(processes)) if store.check([key])]
    store.set(read[machine], "")
    if machine == 0:
        _wait(lambda: store.check(read), deadline)
    return _of_all(codes, failed, ended)


def _of_all(codes: dict[str, int], failed: Sequence[dict[str, Any]], machines: Sequence[str]) -> End:
    if codes.get(machines[0]) == 0:
        return End(0)
    found = [End(_known(one["code"]), f"process {one['process']}", one["why"]) for one in failed]
    for key, code in codes.items():
        if code:
            found.append(End(_known(code), key.replace("#", " "), f"ended with exit code {code}"))
    if not found:
        return End(0)
    code = gravest(end.code for end in found)
    return next(end for end in found if end.code == code)


def _known(code: int) -> int:
    """The exit code; that of a killed process if the table lacks it, as where another machine has another version."""
    return code if code in exit_codes() else Killed.exit_code


def _wait(ready: Callable[[], bool], deadline: float) -> None:
    while not ready() and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
