"""Groups of processes of the job, forked from one that has imported the heavy libraries once: quick, and still whole.

As a script it is that one process: it reads a group a line, forks it, and says how its members ended.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
"""What the job tells its libraries before it imports them, which here is before there is a job."""

LATE = ("scipy.stats", "jsonschema", "lm_eval.evaluator", "tensorboardX")
"""What a run imports when it needs it."""


@dataclass(frozen=True)
class Group:
    """Processes that are running: their process ids, in the order of their ranks, and the files of their logs."""

    pids: tuple[int, ...]
    logs: tuple[Path, ...]
    _server: subprocess.Popen[str]

    def wait(self) -> list[int]:
        """Their exit codes, negative for a signal."""
        assert self._server.stdout
        codes: list[int] = json.loads(self._server.stdout.readline())
        return codes

    def lines(self, rank: int) -> list[dict[str, Any]]:
        """The log of one of them, as far as it is written."""
        text = self.logs[rank].read_text(encoding="utf-8", errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


@dataclass(frozen=True)
class Forks:
    """The process that forks."""

    server: subprocess.Popen[str]
    folder: Path

    def start(self, environment: Mapping[str, str], processes: int, name: str) -> Group:
        """Starts a group with torchrun's variables, as one would without a launcher; process 0 hosts the store."""
        port = str(free_port())
        logs = [self.folder / f"{name}-{rank}.log" for rank in range(processes)]
        members = [
            {
                **environment,
                "RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for rank in range(processes)
        ]
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps([members, [str(log) for log in logs]]) + "\n")
        self.server.stdin.flush()
        return Group(tuple(json.loads(self.server.stdout.readline())), tuple(logs), self.server)

    def run(self, environment: Mapping[str, str], processes: int, name: str) -> tuple[list[int], Group]:
        """Runs a group to its end; returns its exit codes too."""
        group = self.start(environment, processes, name)
        return group.wait(), group


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """Within it groups can be started; `folder` takes their logs."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        cwd=ROOT,
        env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Forks(server, folder)
    finally:
        assert server.stdin
        server.stdin.close()
        server.wait(timeout=60)
        assert server.stdout
        server.stdout.close()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve() -> None:
    from tests.chaos.harness import preload

    preload()
    for name in LATE:
        import_module(name)
    for line in sys.stdin:
        pids = [_fork(environment, log) for environment, log in zip(*json.loads(line), strict=True)]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def _fork(environment: Mapping[str, str], log: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        from job.cli.main import main

        status = main(["run"])
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
