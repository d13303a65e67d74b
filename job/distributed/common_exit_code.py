"""How processes and machines end: the keys that they write to the rendezvous store, and the common exit code.

    end             the first failure, which makes the other processes end: rank, exit code, reason
    end#RANK        the failure of a process: rank, exit code, reason
    machine#NUMBER  the exit code of a machine, written by its launcher
    read#NUMBER     exists once the launcher of a machine has read how the others ended
    gone#RANK       exists once a process has ended or is about to; if it failed, its failure is in the store before

Most platforms take the exit code of one machine, often the first that ends, as that of the whole run. Therefore the
launchers agree: each ends with the most serious exit code that any machine announced (`errors.most_serious`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import Killed, exit_codes, most_serious

END = "end"
"""Key of the first failure."""
SETTLE_SECONDS = 10.0
"""How long a launcher waits for the exit codes of the other machines; a machine that was lost publishes none."""
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class End:
    """How a run of several machines ended: its exit code, the process or machine that it comes from, and the reason."""

    code: int
    where: str = ""
    why: str = ""


def failure_key(rank: int) -> str:
    """Key of a process's failure."""
    return f"{END}#{rank}"


def ended_key(machine: int) -> str:
    """Key of the exit code of a machine."""
    return f"machine#{machine}"


def gone_key(rank: int) -> str:
    """Key that says that a process has ended regularly, or has written its failure."""
    return f"gone#{rank}"


def read_key(machine: int) -> str:
    """Key that says that the launcher of a machine has read how the others ended."""
    return f"read#{machine}"


def announce_end(store: Any, process: int, exit_code: int, why: str) -> None:
    """Writes a process's failure to the store, and also as the first failure unless there already is one.

    A failure that the process itself has written is not replaced: its launcher, which calls this too, knows less.
    """
    end = json.dumps({"process": process, "code": exit_code, "why": why[:2000]})
    store.compare_set(failure_key(process), "", end)
    store.compare_set(END, "", end)


def read_first_failure(store: Any) -> End | None:
    """The first failure that a process announced; None if there is none."""
    if not store.check([END]):
        return None
    end = json.loads(store.get(END))
    return End(_known(end["code"]), f"process {end['process']}", end["why"])


def agree_on_end(store: Any, own_code: int, *, machine: int, machines: int, processes: int, seconds: float) -> End:
    """The exit code of all machines, once each of them has announced its own, or after `seconds`.

    Args:
        store: The rendezvous store of this run. Machine 0 hosts it, and therefore waits until the others have read it.
        own_code: The exit code of this machine.
        machine: Number of this machine.
        machines: Number of machines.
        processes: World size.
        seconds: Longest time to wait. For machines that have not ended by then, the failures that their processes
            announced are used.

    Returns:
        0 if machine 0 ended with 0, since the run is complete then; otherwise the most serious exit code.

    Raises:
        RuntimeError: The store cannot be reached.
    """
    deadline = time.monotonic() + seconds
    ended, acknowledged = ([key(number) for number in range(machines)] for key in (ended_key, read_key))
    store.set(ended[machine], str(own_code))
    _wait(lambda: store.check(ended), deadline)
    codes = {key: int(store.get(key)) for key in ended if store.check([key])}
    failed = [json.loads(store.get(key)) for key in map(failure_key, range(processes)) if store.check([key])]
    store.set(acknowledged[machine], "")
    if machine == 0:
        _wait(lambda: store.check(acknowledged), deadline)
    return _of_all(codes, failed, ended)


def _of_all(codes: dict[str, int], failed: Sequence[dict[str, Any]], machines: Sequence[str]) -> End:
    if codes.get(machines[0]) == 0:
        return End(0)
    ends = [End(_known(failure["code"]), f"process {failure['process']}", failure["why"]) for failure in failed]
    for key, code in codes.items():
        if code:
            ends.append(End(_known(code), key.replace("#", " "), f"ended with exit code {code}"))
    if not ends:
        return End(0)
    code = most_serious(end.code for end in ends)
    return next(end for end in ends if end.code == code)


def _known(code: int) -> int:
    """The exit code; that of a killed process if this version does not know it, as another machine's version may."""
    return code if code in exit_codes() else Killed.exit_code


def _wait(ready: Callable[[], bool], deadline: float) -> None:
    while not ready() and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
