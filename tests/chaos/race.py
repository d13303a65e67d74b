"""Two whole attempts of one run, started at nearly the same time, fifty times: only one may win each time."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.errors import Replaced
from job.runs.layout import CHECKPOINTS, LEASE, facts_of
from job.storage.open import ObjectStore, StorageOptions, open_store
from tests import clouds
from tests.chaos.harness import preload, read_results, start_attempt
from tests.chaos.small import settings


def main() -> int:
    """Runs the races and prints the outcomes; exit code 1 if both attempts wrote, or a result differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=clouds.SCHEMES, help="the runs lie in an imitation of this store")
    chosen = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="qlora-job-race-") as name, ExitStack() as stack:
        folder = Path(name)
        environment = {**settings(folder), "JOB_TRAIN__MAX_STEPS": "6"}
        if chosen.store:
            environment |= stack.enter_context(clouds.process(chosen.store))
            environment["JOB_RUN__OUTPUT"] = f"{clouds.place(chosen.store)}/out"
        race(environment, "warm-up", folder, 0.0)  # leaves the base's scores in place, which all races share
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
        Their exit codes; the published facts; and whether only one attempt's files were published: the lease is held by
        the attempt that wrote the manifest, or by its successor, which found the run complete; and every checkpoint is
        of an attempt in the run log. An attempt that was replaced before it did anything is not in the log.
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
    results = read_results(environment, run)
    numbers = [attempt["number"] for attempt in results["run"]["attempts"]]
    epoch, markers = clouds.in_fork(lambda: _epochs(environment, run))
    last = {numbers[-1], numbers[-1] + 1} if codes == [0, 0] else {numbers[-1]}
    whole = epoch in last and markers <= set(numbers)
    if not whole:
        print(f"{run}: {codes}, lease {epoch}, checkpoints of {markers}, attempts {numbers}", flush=True)
    return codes, facts_of(results), whole


def _epochs(environment: dict[str, str], run: str) -> tuple[int, set[int]]:
    """The epoch of the lease, and those of the checkpoints."""
    options = StorageOptions(endpoint_url=environment.get("JOB_STORAGE__ENDPOINT_URL"))
    store = open_store(f"{environment['JOB_RUN__OUTPUT']}/{run}", options)
    keys = [info.key for info in store.list(CHECKPOINTS) if info.key.endswith("/COMMITTED.json")]
    return _read(store, LEASE)["epoch"], {_read(store, key)["epoch"] for key in keys}


def _read(store: ObjectStore, key: str) -> Any:
    stored = store.read(key)
    assert stored is not None, key
    return json.loads(stored.data)


if __name__ == "__main__":
    raise SystemExit(main())
