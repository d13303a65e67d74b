"""Docker Engine for tests: containers, volumes and networks with names of their own, removed by these names."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

DOCKER = os.environ.get("DOCKER") or "docker"
IMAGE = os.environ["IMAGE"]
LIMITS = ("--memory", "8g", "--pids-limit", "512", "--env", "OMP_NUM_THREADS=1")  # one thread: a machine may be shared
RUNS = "/work/runs"


def docker(*arguments: str, timeout: float = 120, stdin: str | None = None) -> str:
    """The output of a docker command; if it fails, the test fails."""
    done = subprocess.run(
        [DOCKER, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"docker {arguments[0]}: {done.stderr[-3000:]}"
    return done.stdout


def variables(environ: Mapping[str, str]) -> list[str]:
    """Options that set environment variables."""
    return [option for name, value in environ.items() for option in ("--env", f"{name}={value}")]


@dataclass
class Container:
    """A container that runs in the foreground of a `docker run`."""

    name: str
    process: subprocess.Popen[str]
    began: float
    out: IO[str]
    log: list[str] = field(default_factory=list)
    first_line: float = 0
    first_step: float = 0

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields the JSON lines of its log as they are written; other lines are only added to `log`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self.first_line = self.first_line or time.monotonic() - self.began
            if line.startswith("{"):
                event = json.loads(line)
                if event["event"] == "steps":
                    self.first_step = self.first_step or time.monotonic() - self.began
                yield event

    def end(self) -> int:
        """Reads on to the end and returns the exit code."""
        for _ in self.events():
            pass
        return self.process.wait(timeout=30)

    @property
    def text(self) -> str:
        """All that it wrote."""
        self.out.seek(0)
        return "".join(self.log) + self.out.read()


class Engine:
    """Starts containers, volumes and networks, and removes them."""

    def __init__(self) -> None:
        self._made: list[tuple[str, ...]] = []
        self._running = ExitStack()

    def name(self) -> str:
        """A unique name for this test run."""
        return f"qlora-job-test-{uuid.uuid4().hex[:12]}"

    def volume(self) -> str:
        """A new empty volume."""
        name = docker("volume", "create", self.name()).strip()
        self._made.append(("volume", "rm", "--force", name))
        return name

    def network(self) -> str:
        """A network without internet access."""
        name = self.name()
        docker("network", "create", "--internal", name)
        self._made.append(("network", "rm", name))
        return name

    def start(
        self, *options: str, words: Sequence[str] = (), image: str = IMAGE, seconds: float = 400, **environ: str
    ) -> Container:
        """Runs a container, which is killed if it takes too long."""
        name, out = self.name(), tempfile.TemporaryFile("w+")  # noqa: SIM115 - the next line sees to it
        self._running.enter_context(out)
        self._made.append(("rm", "--force", "--volumes", name))
        command = [DOCKER, "run", "--name", name, *LIMITS, *options, *variables(environ), image, *words]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        self._running.enter_context(process)
        limit = threading.Timer(
            seconds, lambda: subprocess.run([DOCKER, "kill", name], capture_output=True, check=False)
        )
        limit.start()
        self._running.callback(limit.cancel)
        return Container(name, process, began, out)

    def shell(self, script: str, *options: str) -> str:
        """The stdout of a shell script in the image."""
        return docker("run", "--rm", "--name", self.name(), "--entrypoint", "bash", *options, IMAGE, "-c", script)

    def results(self, container: Container, run: str, folder: Path) -> dict[str, Any]:
        """The manifest of a run that a container left in its volume."""
        docker("cp", f"{container.name}:{RUNS}/{run}/results.json", str(folder / "results.json"))
        results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results

    def remove_all(self) -> None:
        """Removes what was created, in reverse order."""
        for command in reversed(self._made):
            subprocess.run([DOCKER, *command], capture_output=True, timeout=120, check=False)
        self._running.close()
