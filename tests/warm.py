"""Starts the job by a fork of a process that has imported the heavy libraries, which takes ten seconds otherwise.

The fork is still a whole process, with its own environment, signals and exit code, that runs the command line from its
first line on. Other tests start the job as a new process. All workers of a test session
share one such process, `fork_server`: conftest has it started, and the workers inherit its address.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, TextIO

ROOT = Path(__file__).parents[1]
ADDRESS = "QLORA_JOB_TESTS_FORK_SERVER"
"""The variable with the address, which starts with a zero byte that no variable may hold."""


@dataclass(frozen=True)
class Member:
    """A process to start.

    Attributes:
        words: The command line.
        environ: The whole environment; only the hub's libraries see variables that libraries read when imported.
        output: The file that standard output is added to, or an open descriptor.
        errors: The same for standard error; it may be the same file.
        folder: Where it runs.
        memory: Bytes of memory that it may use in addition to the libraries; None for no limit.
        source: A Python program that it runs instead of the job, with the arguments `words`.
        input: What it reads from stdin.
    """

    words: Sequence[str]
    environ: Mapping[str, str]
    output: Path | int
    errors: Path | int
    folder: Path = ROOT
    memory: int | None = None
    source: str = ""
    input: Path | int = Path(os.devnull)


class Processes:
    """Processes that were started together: their process ids in order."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._codes: list[int] | None = None
        asked = [
            {
                "source": m.source,
                "words": list(m.words),
                "environ": dict(m.environ),
                "folder": str(m.folder),
                "memory": m.memory,
            }
            for m in members
        ]
        with ExitStack() as stack:
            descriptors = []
            for member in members:
                for place, how in ((member.input, "rb"), (member.output, "ab"), (member.errors, "ab")):
                    opened = place if isinstance(place, int) else stack.enter_context(place.open(how)).fileno()
                    descriptors.append(opened)
            self._connection.connect("\0" + address())
            socket.send_fds(self._connection, [json.dumps(asked).encode() + b"\n"], descriptors)
        self._lines = self._connection.makefile("rb")
        self.pids: tuple[int, ...] = tuple(json.loads(self._lines.readline()))

    @property
    def pid(self) -> int:
        """The process id of the first, which may be the only one."""
        return self.pids[0]

    def wait(self, timeout: float | None = None) -> list[int]:
        """Their exit codes, or minus the number of the signal that killed a process.

        Raises:
            TimeoutError: They did not end in so many seconds; they are killed.
        """
        if self._codes is None and not select.select([self._connection], [], [], timeout)[0]:
            self.kill()
            self._read()
            raise TimeoutError(f"it did not end in {timeout} s")
        return self._read()

    def poll(self) -> int | None:
        """The exit code of the first if all have ended, else None."""
        if self._codes is None and not select.select([self._connection], [], [], 0)[0]:
            return None
        return self._read()[0]

    def kill(self) -> None:
        """Kills those that are left, and waits for their end."""
        if self.poll() is None:
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._read()

    def __del__(self) -> None:
        """Closes the connection if nobody waits for the processes, such as pods of a lost machine."""
        self._connection.close()

    def _read(self) -> list[int]:
        if self._codes is None:
            self._codes = json.loads(self._lines.readline())
            self._lines.close()
            self._connection.close()
        return self._codes


def address() -> str:
    """The server's address; it is started if it does not run."""
    if ADDRESS not in os.environ:
        serve()
    return os.environ[ADDRESS]


def serve() -> None:
    """Starts the server for this process and those that it starts; it ends with this process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        name = f"qlora-job-tests-{os.getpid()}"
        listener.bind("\0" + name)
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(listener.fileno())],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
    os.environ[ADDRESS] = name
    atexit.register(_end, server)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.communicate()
    del os.environ[ADDRESS]


def start(
    words: Sequence[str], environ: Mapping[str, str], output: Path, errors: Path, folder: Path = ROOT
) -> Processes:
    """Starts the job; see `Member`."""
    return Processes([Member(words, environ, output, errors, folder)])


def run(
    words: Sequence[str], environ: Mapping[str, str], *, timeout: float = 240, folder: Path = ROOT, source: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the job, or another program, to its end; see `Member`.

    Raises:
        TimeoutError: It did not end in so many seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place) / "output", Path(place) / "errors"
        (code,) = Processes([Member(words, environ, output, errors, folder, source=source)]).wait(timeout)
        texts = [path.read_text(encoding="utf-8") for path in (output, errors)]
    return subprocess.CompletedProcess(["qlora-job", *words], code, *texts)


FORKED = ("job.data.template_process", "job.export.llama_cpp_process")
"""Modules whose helper processes take long to start; the server has imported what they need."""


def start_helper_process(command: Sequence[str], **how: Any) -> HelperProcess | subprocess.Popen[bytes]:
    """Replaces `subprocess.Popen` in `job.common.helper_process`: forks where that is faster."""
    return HelperProcess(command, **how) if command[3] in FORKED else subprocess.Popen(command, **how)


class HelperProcess:
    """What `job.common.helper_process` starts, forked: the part of `subprocess.Popen` that is used."""

    last: ClassVar[HelperProcess]

    def __init__(self, command: Sequence[str], *, stderr: IO[bytes], **_: object) -> None:
        HelperProcess.last = self
        question, ask = os.pipe()
        answer, say = os.pipe()
        _, _, source, *words = command
        member = Member(words, {}, source=source, input=question, output=say, errors=stderr.fileno())
        self._processes = Processes([member])
        os.close(question)
        os.close(say)
        self.stdin, self.stdout = os.fdopen(ask, "wb"), os.fdopen(answer, "rb")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._processes.pid

    def kill(self) -> None:
        """Kills it."""
        self._processes.kill()

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return self._processes.wait()[0]

    def communicate(self) -> None:
        """Waits for its end.

        Raises:
            OSError: What was written to it can no longer be sent.
        """
        self.wait()
        self.stdout.close()
        self.stdin.close()


@contextmanager
def followed(
    words: Sequence[str], environ: Mapping[str, str], *, output: Path | None = None, folder: Path = ROOT
) -> Iterator[tuple[Processes, TextIO]]:
    """Starts the job so that its log can be read while it is written; kills remaining processes in the end.

    Args:
        words: The command line.
        environ: The whole environment.
        output: The file for standard output; None for the log.
        folder: Where it runs.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="utf-8") as log:
        process = Processes([Member(words, environ, output or writer, writer, folder)])
        os.close(writer)
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()
