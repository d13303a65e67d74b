"""Whole runs of the job for tests: rows of preferences, starts, signals at a chosen call, and what was published."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.results.reader import open_run
from job.runs.layout import facts_of
from job.verification.verify import require_verified, verify
from tests import warm
from tests.helpers import read_jsonl


def attempt(environment: Mapping[str, str], source: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
    """One start of the job, to its end; or of a program that starts it, such as that of `signalled`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    return warm.run([], {**clean, **environment, **changes}, source=source)


def signalled(number: signal.Signals, owner: str, name: str, call: int = 1, first: str = "") -> str:
    """A program: the job, which gets a signal when it calls a function for the `call`-th time.

    Args:
        number: The signal.
        owner: The function's module, or its class as `module:Class`.
        name: The function's.
        call: Which call.
        first: Statements before the job starts.
    """
    return f"""
import os, pkgutil, job.cli.main
{first}
owner, calls = pkgutil.resolve_name({owner!r}), []
plain = getattr(owner, {name!r})
def counted(*given, **named):
    calls.append(given)
    if len(calls) == {call}:
        os.kill(os.getpid(), {int(number)})
    return plain(*given, **named)
setattr(owner, {name!r}, counted)
raise SystemExit(job.cli.main.main([]))
"""


def kept_chances(scores: Path) -> list[int]:
    """Numbers of the chunks whose probabilities, or judgements, were kept below a folder of scores, in order."""
    lines = [line for path in scores.glob("*/*.jsonl") for line in read_jsonl(path)]
    return sorted(line["row"] for line in lines if "chances" in line)


def published(output: Path, run: str) -> dict[str, str]:
    """The facts of a finished run, which verifies."""
    with tempfile.TemporaryDirectory() as work:
        require_verified(verify(open_run(str(output / run)), Path(work)))
    return facts_of(json.loads((output / run / "results.json").read_text(encoding="utf-8")))


def pairs(count: int) -> list[dict[str, str]]:
    """Sums with a right and a wrong answer."""
    return [
        {"prompt": f"What is {n} and {n + 1}?", "chosen": f" It is {2 * n + 1}.", "rejected": f" It is {3 * n} or so."}
        for n in range(count)
    ]


def labelled(count: int) -> list[dict[str, Any]]:
    """The same answers, each with a label."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": n % 2 == 1}
        for n, row in enumerate(pairs(count))
    ]
