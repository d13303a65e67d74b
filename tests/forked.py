"""Groups of processes of the job as torchrun starts them, forked; see `warm`."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.warm import ROOT, Member, Processes

__all__ = ["ROOT", "Forks", "Group", "free_port"]
_DRAW = random.SystemRandom()


@dataclass(frozen=True)
class Group:
    """Running processes: their process ids, in the order of their ranks, and the files of their logs."""

    processes: Processes
    logs: tuple[Path, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        """Their process ids."""
        return self.processes.pids

    def wait(self, timeout: float = 240) -> list[int]:
        """Their exit codes, negative for a signal.

        Raises:
            TimeoutError: They did not end in so many seconds; they are killed.
        """
        return self.processes.wait(timeout)

    def lines(self, rank: int) -> list[dict[str, Any]]:
        """The log of one of them, as far as it is written."""
        text = self.logs[rank].read_text(encoding="utf-8", errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


@dataclass(frozen=True)
class Forks:
    """Starts groups; their logs are in `folder`."""

    folder: Path

    def start(self, environment: Mapping[str, str], processes: int, name: str) -> Group:
        """Starts a group with torchrun's variables, without a launcher; process 0 hosts the store."""
        port = str(free_port())
        logs = [self.folder / f"{name}-{rank}.log" for rank in range(processes)]
        members = []
        for rank, log in enumerate(logs):
            log.write_bytes(b"")
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            members.append(Member(["run"], {**os.environ, **environment, **place}, log, log))
        return Group(Processes(members), tuple(logs))

    def run(self, environment: Mapping[str, str], processes: int, name: str) -> tuple[list[int], Group]:
        """Runs a group to its end; returns its exit codes too."""
        group = self.start(environment, processes, name)
        return group.wait(), group


def free_port() -> int:
    """A port of this machine that is free, and stays free until it is bound.

    It is below the kernel's range of ephemeral ports, and each caller draws another one: otherwise another test could
    get the same port before it is bound.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = _DRAW.randrange(first // 2, first)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
