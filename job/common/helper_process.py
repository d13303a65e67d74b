"""Python processes that work for the job and end with it: what may crash, hang, or take too much runs in one.

A module that runs as a helper has a function `main`, which reads stdin and writes its answers to stdout. It ends when
its stdin does: that is how it notices that the job was killed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO

from job.common.resources import main_memory

_START = (
    "import json, os, sys; from importlib import import_module; given = json.loads(sys.argv.pop()); "
    "sys.path[:] = given['path']; os.environ.update(given['environ']); import_module(sys.argv.pop(1)).main()"
)
"""With the `sys.path` of this process: `python -m` need not find the same modules."""
_LAST_BYTES = 1 << 16
_LAST_CHARACTERS = 500


@dataclass(frozen=True)
class HelperProcess:
    """A helper that runs, with its two pipes."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    errors: IO[bytes]
    """A file: its standard error."""
    kills: int | None = None
    """`MainMemory.oom_kills` when it started."""

    def last_error_line(self) -> str:
        """The last line of its standard error that is not blank, which says why it ended; empty if there is none."""
        self.errors.seek(max(0, self.errors.seek(0, 2) - _LAST_BYTES))
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [""]
        return lines[-1].strip()[:_LAST_CHARACTERS]

    def killed_for_memory(self) -> bool:
        """Whether it was killed while the kernel killed a process of this container because memory was full.

        False where the kernel does not count them.
        """
        if self.process.wait() != -signal.SIGKILL or self.kills is None:
            return False
        return (main_memory().oom_kills or 0) > self.kills


@contextmanager
def start_helper(module: str, *arguments: str, environ: Mapping[str, str] | None = None) -> Iterator[HelperProcess]:
    """Runs `main` of a module in a new Python process, which is killed when the context is left.

    Args:
        module: Its full name.
        arguments: `sys.argv[1:]` of the process.
        environ: Variables that the process has besides those of this one.
    """
    given = json.dumps({"path": sys.path, "environ": {**(environ or {})}})
    kills = main_memory().oom_kills
    with TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, with a module of ours
            [sys.executable, "-c", _START, module, *arguments, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for the job, which ends this process when it ends
        )
        try:
            assert process.stdin is not None  # noqa: S101 - it was opened as a pipe
            assert process.stdout is not None  # noqa: S101 - it was opened as a pipe
            yield HelperProcess(process, process.stdin, process.stdout, errors, kills)
        finally:
            process.kill()
            with suppress(OSError):  # its pipe is broken already
                process.communicate()
