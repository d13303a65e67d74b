"""Two ways to start the job as a container would: what the image starts, or a fork that spares the imports.

The heavy libraries take ten seconds to import. A server that has them forks in no time, and what is forked is still a
whole process that runs the command line from its first line on, with the environment and the signals of a pod.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]

PRELOADED = [
    *("torch", "transformers.models.mistral.modeling_mistral", "trl.trainer.sft_trainer", "peft", "bitsandbytes"),
    *("datasets", "lm_eval.tasks", "lm_eval.evaluator", "jsonschema", "boto3", "tensorboard.compat.proto.event_pb2"),
]


class Process(Protocol):
    """A process that was started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, minus a signal's number where one killed it; None while it lives."""


class Start(Protocol):
    """Starts the job with an environment; what it says goes into a file."""

    def __call__(self, environ: Mapping[str, str], log: Path) -> Process:
        """Start it."""


def cold(environ: Mapping[str, str], log: Path) -> Process:
    """What the image starts, with nothing in the environment but the pod's."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("ab") as output:
        return subprocess.Popen(
            _command(log.parent),
            cwd=log.parent,
            env={"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def _command(folder: Path) -> list[str]:
    """The image's entrypoint, beside it what the image knows of its CUDA: none, as for a machine without a GPU."""
    image = folder / "image"
    image.mkdir()
    (image / "cuda").write_text("none 0.0\n", encoding="utf-8")
    return [shutil.copy(ROOT / "entrypoint.sh", image)]


def warm(environ: Mapping[str, str], log: Path) -> Process:
    """A fork of a server that has imported the libraries; the first one starts it."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return _Forked(server, environ, log)


class _Forked:
    """See `Process`."""

    def __init__(self, server: ForkServerContext, environ: Mapping[str, str], log: Path) -> None:
        self._process = server.Process(target=_run, args=(dict(environ), str(log)))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """See `Process.poll`."""
        return self._process.exitcode


def _run(environ: dict[str, str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    os.environ.clear()
    os.environ.update(kept | environ)
    os.chdir(ROOT)
    tempfile.tempdir = None
    from job.cli import main

    raise SystemExit(main([]))
