"""`selftest`: kills a run on this machine, resumes it, and compares it bit by bit with an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.cli.output import print_lines
from job.errors import JobError, Problem, SettingsError
from job.runs.layout import COMMITTED, RESULTS, facts_of
from job.settings.load import environment

FAULTS = "kill@stage=evaluate-base,kill@step=7,sigterm@step=12,kill@upload=4,kill@stage=evaluate-adapter"
MAX_ATTEMPTS = 12

# The demo, shortened, in the precision and with the kernels that this machine would use for any other model.
SETTINGS = {
    "JOB_PRESET": "demo",
    "JOB_MODEL__DTYPE": "auto",
    "JOB_LORA__DROPOUT": "0.1",
    "JOB_RUN__PROCESSES": "1",
    "JOB_TRAIN__MAX_STEPS": "20",
    "JOB_CHECKPOINT__EVERY_STEPS": "5",
    "JOB_EVAL__LIMIT": "100",
    "JOB_LOG__FORMAT": "json",
    "JOB_LOG__LEVEL": "error",
}


@dataclass(frozen=True)
class ProcessEnd:
    """One process of a run: its exit code (negative: the signal that killed it) and the last step that it had saved."""

    code: int
    saved: int
    """0: none."""


def selftest_command(argv: Sequence[str]) -> int:
    """`selftest`: prints the progress of the test.

    Raises:
        SettingsError: There are arguments.
        JobError: As `selftest` says.
    """
    if argv:
        raise SettingsError([Problem("selftest", "takes no arguments and no settings; remove them")])
    return max((print_lines([line]) for line in selftest(environment())), default=0)


def selftest(environ: Mapping[str, str]) -> Iterator[str]:
    """Runs the test and yields its progress, line by line.

    Args:
        environ: The environment of the runs; settings in it are left out, a SageMaker job's too.

    Raises:
        JobError: The runs differ, or one of them does not end.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith(("JOB_", "TRAINING_JOB_"))}
    clean = kept | SETTINGS
    with tempfile.TemporaryDirectory(prefix="qlora-job-selftest-") as folder:
        yield "an uninterrupted run ..."
        uninterrupted, _ = _run_until_done(clean, Path(folder) / "whole")
        yield f"the same run with {FAULTS} ..."
        resumed, ends = _run_until_done(clean | {"JOB_FAULT": FAULTS}, Path(folder) / "killed")
        for number, end in enumerate(ends, start=1):
            how = f"killed by signal {-end.code}" if end.code < 0 else f"exit code {end.code}"
            newest = f"newest checkpoint at step {end.saved}" if end.saved else "no checkpoint yet"
            yield f"  attempt {number}: {how}, {newest}"
    expected, found = facts_of(uninterrupted), facts_of(resumed)
    wrong = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    for path in sorted(expected):
        yield f"  {'differs' if path in wrong else 'same   '}  {expected[path][:12]}  {path}"
    if wrong:
        raise JobError(f"the killed run differs from the uninterrupted one in {', '.join(wrong)}")
    yield f"identical: {len(expected)} artifacts after {len(ends)} attempts"


def _run_until_done(environ: Mapping[str, str], output: Path) -> tuple[dict[str, Any], list[ProcessEnd]]:
    """Starts the job until it is done; returns its manifest and how each attempt ended."""
    settings = {"JOB_RUN__ID": "selftest", "JOB_RUN__OUTPUT": str(output)}
    ends: list[ProcessEnd] = []
    while not ends or ends[-1].code != 0:
        if len(ends) == MAX_ATTEMPTS:
            raise JobError(f"the run was not complete after {MAX_ATTEMPTS} attempts")
        process = subprocess.run(
            [sys.executable, "-m", "job", "run"],
            env={**environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        saved = [int(path.parent.name.removeprefix("step-")) for path in output.rglob(COMMITTED)]
        ends.append(ProcessEnd(process.returncode, max(saved, default=0)))
        if process.returncode > 0 and process.returncode != os.EX_TEMPFAIL:
            raise JobError(f"a run ended with exit code {process.returncode}:\n{process.stderr[-2000:]}")
    results: dict[str, Any] = json.loads((output / "selftest" / RESULTS).read_text(encoding="utf-8"))
    return results, ends
