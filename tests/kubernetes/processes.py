"""Two ways to start the job as a container would: what the image starts, or a fork that spares the imports.

What is forked runs the command line with the environment and the signals of a pod; see `warm`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tests.warm import ROOT, start


class Process(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int:
        """Its process id."""

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
    """A fork of the server that has imported the libraries."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    return start([], kept | dict(environ), log, log)
