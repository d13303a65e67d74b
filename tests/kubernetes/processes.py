"""Two ways to start the job as a container would: the image's command, or a fork that saves the imports.

The fork runs the command line with the environment and the signals of a pod; see `warm`.
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
        """Its exit code, or minus the number of the signal that killed it; None while it runs."""


class Start(Protocol):
    """Starts the job with an environment, and its output in a file."""

    def __call__(self, environ: Mapping[str, str], log: Path) -> Process:
        """Start it."""


def cold(environ: Mapping[str, str], log: Path) -> Process:
    """Starts the image's command, with the pod's environment only."""
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
    """The image's entrypoint, with the file of the image's CUDA version: none, as for a machine without a GPU."""
    image = folder / "image"
    image.mkdir()
    (image / "cuda").write_text("none 0.0\n", encoding="utf-8")
    return [shutil.copy(ROOT / "entrypoint.sh", image)]


def warm(environ: Mapping[str, str], log: Path) -> Process:
    """A fork of the server that has imported the libraries."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    return start([], kept | dict(environ), log, log)
