"""Rank and world size of this process, from torchrun's variables; number of machines, from the platform.

If torchrun's variables are set, torchrun or another launcher has started the processes. If not, the job starts them
itself (`launcher`) and sets the variables.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from job.platforms.detect import Platform

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = "QLORA_JOB_LAUNCHER"
"""Variable with the process id of this job's launcher."""
PORT = 29400
"""Port on which machine 0 listens on SageMaker, torchrun's default. Elsewhere JOB_RUN__RENDEZVOUS names the port."""

_MOST_PROCESSES, _MOST_PORT = 1_000_000, 65_535
_NUMBER = re.compile(r"[0-9]{1,7}", re.ASCII)
_MAX_FILE_BYTES = 1 << 20
_MANY = "1000"


@dataclass(frozen=True)
class Place:
    """Rank and world size of a process. Ranks count from 0; process 0 writes and reports.

    Attributes:
        rank: Rank among all processes of the run.
        world_size: Number of processes of the run.
        local_rank: Rank among the processes of this machine, whose ranks are consecutive.
        local_world_size: Number of processes on this machine.
        host: Host of the common TCPStore.
        port: Port of the common TCPStore.
        hosted: Whether the launcher hosts the store; otherwise process 0 does.
        launcher: Process id of this job's launcher if it started this process; 0 if another launcher did.
        restart: Number of restarts by torchrun. Its store outlives a restart, so keys include this number.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = ""
    port: int = 0
    hosted: bool = False
    launcher: int = 0
    restart: int = 0

    @property
    def first_of_machine(self) -> int:
        """Rank of the first process on this machine."""
        return self.rank - self.local_rank


def find_place(environ: Mapping[str, str]) -> Place | None:
    """Rank and world size from torchrun's variables; None if they are not set. Call `find_faults` first."""
    if not _is_placed(environ):
        return None
    number = {name: int(environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return Place(
        rank=int(environ["RANK"]),
        world_size=number["WORLD_SIZE"],
        local_rank=int(environ["LOCAL_RANK"]),
        local_world_size=number["LOCAL_WORLD_SIZE"],
        host=environ.get("MASTER_ADDR", ""),
        port=int(environ.get("MASTER_PORT") or 0),
        hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        launcher=int(environ.get(LAUNCHER) or 0),
        restart=int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
    )


def partial_place(environ: Mapping[str, str]) -> Place | None:
    """Like `find_place` if variables other than the address are wrong: what is needed to inform the other processes.

    A wrong rank is replaced by the world size, which is no process's rank; a wrong world size by a large number, so
    that process 0 waits for other processes as long as it may. None without a launcher, or if the address is wrong.
    """
    wrong = dict(find_faults(environ))
    if wrong.keys() & {"MASTER_ADDR", "MASTER_PORT"}:
        return None
    size = _MANY if "WORLD_SIZE" in wrong else environ.get("WORLD_SIZE") or "1"
    values = {"RANK": size, "LOCAL_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": "1"}
    return find_place({**environ, **{name: values[name] for name in wrong}})


def find_faults(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Problems with torchrun's variables, as (name, problem); none if they are not set."""
    if not _is_placed(environ):
        return
    wrong = {name: what for name in VARIABLES if (what := _fault(name, environ))}
    yield from wrong.items()
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if not wrong and environ.get(size) and int(environ[rank]) >= int(environ[size]):
            yield rank, f"counts from 0, so it must be less than {size}; torchrun sets both"


def _fault(name: str, environ: Mapping[str, str]) -> str | None:
    """The problem of a single variable; None if it is valid."""
    text = environ.get(name, "")
    if not text:
        needed = not (name == "LOCAL_WORLD_SIZE" or (name.startswith("MASTER") and environ.get("WORLD_SIZE") == "1"))
        missing = "is missing, but torchrun's other variables are set; start with torchrun, or unset them all"
        return missing if needed else None
    least, most = 0 if name.endswith("RANK") else 1, _MOST_PORT if name == "MASTER_PORT" else _MOST_PROCESSES
    if name == "MASTER_ADDR" or (_NUMBER.fullmatch(text) and least <= int(text) <= most):
        return None
    return f"must be a number from {least} to {most}; torchrun sets it"


def _is_placed(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("RANK") or environ.get("LOCAL_RANK") or environ.get("WORLD_SIZE", "1") not in {"", "1"})


def visible_gpu(environ: Mapping[str, str], local_rank: int) -> str:
    """The value of CUDA_VISIBLE_DEVICES with which the process sees only its own GPU.

    If a process sees several GPUs, libraries may use all of them: Trainer would wrap the model in DataParallel.
    """
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return str(local_rank)
    names = [name.strip() for name in shown.split(",")]
    return names[local_rank] if local_rank < len(names) else ""


@dataclass(frozen=True)
class Machines:
    """The machines of a run, from the platform.

    Attributes:
        settings: Dotted name of a setting -> its value.
        interface: Network interface between the machines, for NCCL and gloo.
        fault: The problem of the platform's file; None if it is valid.
    """

    settings: Mapping[str, object]
    interface: str | None = None
    fault: str | None = None


def find_machines(platform: Platform) -> Machines:
    """Reads the machines from the platform: SageMaker's file of hosts, or the index of a pod in an Indexed Job."""
    if platform.completion_index is not None:
        return Machines({"run.node_rank": platform.completion_index})
    if platform.resources is None or not platform.resources.is_file():
        return Machines({})
    try:
        with platform.resources.open("rb") as file:
            config = json.loads(file.read(_MAX_FILE_BYTES))
        hosts = sorted(map(str, config["hosts"]))  # the order may differ from host to host
        rank = hosts.index(str(config["current_host"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Machines({}, fault="must list hosts, with current_host among them; SageMaker writes it")
    if len(hosts) == 1:
        return Machines({})
    settings = {"run.nodes": len(hosts), "run.node_rank": rank, "run.rendezvous": f"{hosts[0]}:{PORT}"}
    # SageMaker SDK v3's local mode names an interface that does not exist, with which NCCL would fail.
    interface = config.get("network_interface_name")
    exists = isinstance(interface, str) and interface in {name for _, name in socket.if_nameindex()}
    return Machines(settings, interface if exists else None)
