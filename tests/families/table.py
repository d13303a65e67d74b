"""Checks every causal family of the installed transformers, prints each verdict, and writes the table.

Run by `make families`; ends with 1 if a family is wrong or fails. Each verdict is written at once to a journal, whose
name has a hash of the code: a run that was stopped (`--minutes 8`) continues, other code begins a new journal, and the
table is written when a journal has all families. With names of families as arguments only those are checked, and
nothing is written. `--jobs 8` uses 8 processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.spread import spread

if TYPE_CHECKING:
    from tests.families.check import Verdict

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("table.md")
BAD = ("WRONG", "FAILED")


def main() -> int:
    """Checks the named families, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no family after so long")
    parser.add_argument("--jobs", type=int, default=1, help="check in so many processes")
    given = parser.parse_args()
    _quiet()
    import transformers

    from tests.families.check import Verdict
    from tests.families.models import families

    journal = Path(tempfile.gettempdir()) / f"families-{_code(transformers.__version__)}.jsonl"
    verdicts: dict[str, Verdict] = {}
    if journal.exists() and not given.names:
        lines = journal.read_text(encoding="utf-8").splitlines()
        verdicts = {verdict.family: verdict for verdict in (Verdict(**json.loads(line)) for line in lines)}
    names = given.names or [family for family in families() if family not in verdicts]
    for verdict in spread(_verdict, names, jobs=given.jobs, minutes=given.minutes, method="spawn", prepare=_quiet):
        verdicts[verdict.family] = verdict
        print(" | ".join(_cells(verdict)), flush=True)
        if not given.names:
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")
    counts = Counter(verdict.outcome for verdict in verdicts.values())
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    print(f"{len(verdicts)} families: {summary}")
    if not given.names and verdicts.keys() == set(families()):
        TABLE.write_text(_table(verdicts, f"transformers {transformers.__version__}: {summary}"), encoding="utf-8")
    return int(any(verdict.outcome in BAD for verdict in verdicts.values()))


def _quiet() -> None:
    """Sets this process up: offline, one thread, no warnings."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def _verdict(family: str) -> Verdict:
    from tests.families.check import check

    return check(family, _tokenizer())


@cache
def _tokenizer() -> Any:
    from job.model.tokenizer import load_tokenizer
    from tests.helpers import make_base

    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        return load_tokenizer(Path(base))


def _code(version: str) -> str:
    """A hash of all code that verdicts depend on."""
    total = hashlib.sha256(version.encode())
    for path in sorted([*(ROOT / "job").rglob("*.py"), *Path(__file__).parent.glob("*.py"), ROOT / "tests/helpers.py"]):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _cells(verdict: Verdict) -> list[str]:
    def number(value: float | None, most: float | None) -> str:
        return "" if value is None or most is None else f"{value:.0e} of {most:.0e}"

    return [
        verdict.family,
        verdict.outcome,
        number(verdict.loss, verdict.loss_tolerance),
        number(verdict.likelihood, verdict.likelihood_tolerance),
        verdict.why.replace("|", "/").replace("\n", " "),
    ]


def _table(verdicts: Mapping[str, Verdict], summary: str) -> str:
    head = "| family | outcome | loss | log-likelihood | why |\n|---|---|---|---|---|\n"
    lines = "".join(f"| {' | '.join(_cells(verdicts[family]))} |\n" for family in sorted(verdicts))
    return (
        f"# Every causal family of transformers\n\nWritten by `make families` ({summary}). Tiny random models in fp32: "
        "4 steps and some questions by this job, beside plain PEFT with eager attention, one example at a time; and "
        "the published adapter, loaded by plain PEFT. Numbers are the largest difference, of the largest that rounding "
        f"explains (tests/families/check.py says how it is found).\n\n{head}{lines}"
    )


if __name__ == "__main__":
    sys.exit(main())
