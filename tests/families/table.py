"""Goes over every causal family of the installed transformers, prints what came of each, and keeps the table.

Run by `make families`; ends with 1 where one is wrong or fails. Names of families as arguments: only their lines of the
table are made anew.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

TABLE = Path(__file__).with_name("table.md")
BAD = ("WRONG", "FAILED")


def main(names: Sequence[str]) -> int:
    """Checks the families, all of them where none is named."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    from job.model.base import load_tokenizer
    from tests.families.check import Verdict, check
    from tests.families.models import families
    from tests.helpers import make_base

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        tokenizer = load_tokenizer(Path(base))
    verdicts: list[Verdict] = []
    for family in names or families():
        verdicts.append(check(family, tokenizer))
        print(" | ".join(_cells(verdicts[-1])), flush=True)
    rows = _kept() if names else {}
    rows |= {verdict.family: " | ".join(_cells(verdict)) for verdict in verdicts}
    counts = Counter(row.split(" | ")[1] for row in rows.values())
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    print(f"{len(rows)} families: {summary}")
    TABLE.write_text(_table(rows, f"transformers {transformers.__version__}: {summary}"), encoding="utf-8")
    return int(any(verdict.outcome in BAD for verdict in verdicts))


def _kept() -> dict[str, str]:
    """The lines of the table as it lies there, by family."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    rows = [line.removeprefix("| ").removesuffix(" |") for line in lines if line.startswith("| ")][1:]
    return {row.split(" | ")[0]: row for row in rows}


def _cells(verdict: object) -> list[str]:
    def number(name: str) -> str:
        value = getattr(verdict, name)
        return "" if value is None else f"{value:.0e}"

    family, outcome, why = (getattr(verdict, name) for name in ("family", "outcome", "why"))
    return [family, outcome, number("loss"), number("likelihood"), why.replace("|", "/").replace("\n", " ")]


def _table(rows: Mapping[str, str], summary: str) -> str:
    head = "| family | outcome | loss | log-likelihood | why |\n|---|---|---|---|---|\n"
    lines = "".join(f"| {rows[family]} |\n" for family in sorted(rows))
    return (
        f"# Every causal family of transformers\n\nWritten by `make families` ({summary}). Tiny random models in fp32: "
        "4 steps and some questions by this job, beside plain PEFT with eager attention, one example at a time. "
        f"Numbers are the largest differences.\n\n{head}{lines}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
