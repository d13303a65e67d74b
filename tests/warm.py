"""The job started warm: forked from a server that has imported the heavy libraries, ten seconds' work in a cold start.

What is forked is still a whole process, with its own environment, signals and exit code, that runs the command line
from its first line on. That the job starts cold too is for the tests that start it so.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TextIO

from tests.forked import LATE, ROOT

PRELOADED = [
    *("torch", "transformers.models.mistral.modeling_mistral", "trl.trainer.sft_trainer", "peft", "bitsandbytes"),
    *("datasets", "lm_eval.tasks", "boto3", *LATE),
]


def start(
    words: list[str], environ: Mapping[str, str], output: Path, errors: Path, cwd: Path = ROOT
) -> ForkServerProcess:
    """Starts the job; the first time the server too.

    Args:
        words: The command line.
        environ: The whole environment. What libraries read when they are imported is as it is here.
        output: The file that standard output is added to.
        errors: The same for standard error; it may be the same file.
        cwd: Where it runs.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    process = server.Process(target=called, args=(words, dict(environ), str(output), str(errors), str(cwd)))
    process.start()
    return process


def run(words: list[str], environ: Mapping[str, str], *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the job to its end.

    Raises:
        TimeoutError: It did not end in so many seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = start(words, environ, output, errors)
        code = wait(process, timeout)
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (output, errors)]
    return subprocess.CompletedProcess(["qlora-job", *words], code, *texts)


@contextmanager
def followed(
    words: list[str], environ: Mapping[str, str], *, output: Path | None = None, cwd: Path = ROOT
) -> Iterator[tuple[ForkServerProcess, TextIO]]:
    """Starts the job, for its log to be read while it is written; what is left of it is killed in the end.

    Args:
        words: The command line.
        environ: The whole environment.
        output: The file for standard output; None to have it in the log.
        cwd: Where it runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / "log"
        os.mkfifo(pipe)
        process = start(words, environ, output or pipe, pipe, cwd)
        try:
            with pipe.open(encoding="utf-8") as log:
                yield process, log
        finally:
            process.kill()
            process.join()


def wait(process: ForkServerProcess, timeout: float) -> int:
    """How the process ended, minus a signal's number where one killed it.

    Raises:
        TimeoutError: It did not end in so many seconds; it is killed.
    """
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"it did not end in {timeout} s")
    return process.exitcode


def called(words: list[str], environ: dict[str, str], output: str, errors: str, cwd: str) -> None:
    """The body of the process: the command line in its own environment, with its output in files."""
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    tempfile.tempdir = None
    from job.cli.main import main

    raise SystemExit(main(words))
