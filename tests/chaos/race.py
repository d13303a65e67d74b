"""Two whole attempts of one run, started within a moment of each other, fifty times: one lineage each time."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.errors import Replaced
from job.runs.layout import facts_of
from tests.chaos.harness import preload, start_attempt
from tests.chaos.small import settings


def main() -> int:
    """Runs the races and prints how they went; exit code 1 if one of them had two lineages or another result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="qlora-job-race-") as name:
        folder = Path(name)
        environment = {**settings(folder), "JOB_TRAIN__MAX_STEPS": "6"}
        race(environment, "warm-up", folder, 0.0)  # leaves the base's scores, which all races share
        began = time.monotonic()
        _, facts, _ = race(environment, "measured", folder, 0.0)
        span = time.monotonic() - began
        table: Counter[str] = Counter()
        for number in range(chosen.races):
            draw = random.Random(f"{chosen.seed} {number}")
            # Half of them in the same moment, half anywhere within the run of the first.
            delay = draw.choice([0.0, draw.uniform(0, span / 2)])
            codes, found, whole = race(environment, f"race-{number:03d}", folder, delay)
            same = found == facts and sorted(codes) in ([0, 0], [0, Replaced.exit_code])
            lineage = "one lineage" if whole else "SEVERAL lineages"
            table[f"exit codes {codes}, {lineage}, {'same' if same else 'DIFFERENT'} result"] += 1
    for outcome, count in sorted(table.items()):
        print(f"{count:>4}  {outcome}")
    return 1 if any("SEVERAL" in outcome or "DIFFERENT" in outcome for outcome in table) else 0


def race(environment: dict[str, str], run: str, folder: Path, delay: float) -> tuple[list[int], dict[str, str], bool]:
    """Two attempts, the second `delay` seconds later.

    Returns:
        Their exit codes; the published facts; and whether all that was published is of one lineage: the attempt that
        wrote the manifest holds the lease, and no checkpoint is of anybody who is not in the ledger. An attempt that
        was replaced before it did anything is in no book.
    """
    children, logs = [], [folder / f"{run}-{number}.log" for number in range(2)]
    for number, log in enumerate(logs):
        time.sleep(delay * number)
        children.append(start_attempt({**environment, "JOB_RUN__ID": run}, log))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if 0 not in codes:
        raise AssertionError(
            "\n".join([f"{run}, {delay:.3f} s apart: {codes}", *(log.read_text()[-4000:] for log in logs)])
        )
    output = Path(environment["JOB_RUN__OUTPUT"]) / run
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    numbers = [attempt["number"] for attempt in results["run"]["attempts"]]
    epoch = json.loads((output / "lease.json").read_text(encoding="utf-8"))["epoch"]
    markers = [json.loads(path.read_text(encoding="utf-8")) for path in output.glob("checkpoints/*/COMMITTED.json")]
    whole = numbers[-1] == epoch and {marker["epoch"] for marker in markers} <= set(numbers)
    return codes, facts_of(results), whole


if __name__ == "__main__":
    raise SystemExit(main())
