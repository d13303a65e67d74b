"""Commands of the job, forked from a process that has run similar commands: a tenth of the time of a cold start.

What commands import, compile and parse on first use is already loaded. A fork is still a process, with its own
environment, signals and exit code, that runs the command line from its first line on. Other tests start the job in new
processes.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests import fork_server, warm

_PAUSE = 0.01


def heat(commands: Sequence[tuple[list[str], Mapping[str, str]]]) -> None:
    """Imports the heavy libraries and runs the commands in this process.

    No command may train: autograd's threads do not survive a fork, and autograd then refuses to run in the fork.
    """
    fork_server.preload()
    from job.cli.main import main

    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        for words, environ in commands:
            with _environment(environ), _output_in(Path(log.name)):
                code = main(list(words))
            if code != 0:
                raise AssertionError(f"{words} ended with {code}:\n{log.read()[-3000:]}")
    gc.collect()
    gc.freeze()  # collecting in a fork would write to shared pages


def run(words: list[str], environ: Mapping[str, str], *, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs the job in a fork to its end.

    Raises:
        TimeoutError: It did not end in so many seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        code = wait(start(words, environ, output, errors), timeout)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (output, errors)]
    return subprocess.CompletedProcess(["qlora-job", *words], code, *texts)


def start(
    words: list[str],
    environ: Mapping[str, str],
    output: Path,
    errors: Path,
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """Starts the job in a fork, which calls `prepare` first; returns its process id."""
    output.touch()
    errors.touch()
    child = os.fork()
    if child == 0:
        _be(words, dict(environ), output, errors, prepare)
    return child


def _be(words: list[str], environ: dict[str, str], output: Path, errors: Path, prepare: Callable[[], object]) -> None:
    """The body of the fork: runs the command line, and never returns to the parent's code."""
    code = 1
    try:
        prepare()
        for descriptor, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
        fork_server.called(words, environ, str(warm.ROOT))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, it has to be seen
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int, timeout: float) -> int:
    """The exit code of a fork; minus a signal's number where one killed it.

    Raises:
        TimeoutError: It did not end in so many seconds; it is killed.
    """
    ends = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"it did not end in {timeout} s")
        time.sleep(_PAUSE)


@contextmanager
def _environment(environ: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _output_in(path: Path) -> Iterator[None]:
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    for stream, _ in kept:
        os.dup2(file, stream)
    try:
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(file)
