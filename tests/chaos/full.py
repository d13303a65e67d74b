"""`make chaos`: a hundred runs, each killed at random points, against an undisturbed one. Prints what happened."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.chaos.harness import Outcome, preload, run_until_done
from tests.chaos.small import settings, validation


def main() -> int:
    """Runs the chaos and prints the table; exit code 1 if a single run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true", help="runs that stop early and keep the best adapter")
    chosen = parser.parse_args()
    preload()  # first of all: it keeps torch from starting threads
    with tempfile.TemporaryDirectory(prefix="qlora-job-chaos-") as name:
        folder = Path(name)
        environment = settings(folder)
        if chosen.validate:
            environment = {**settings(folder, rows=20, questions=8), **validation(folder)}
        began = time.monotonic()
        whole = run_until_done(environment, "whole", folder, _Never(), 0)
        span = time.monotonic() - began
        print(f"undisturbed: {span:.1f} s, {len(whole.facts)} artifacts{_stopped(folder) if chosen.validate else ''}")
        outcomes = []
        for number in range(chosen.runs):
            run = f"run-{number:03d}"
            # a base evaluation is shared between runs of one output: every run shall do its own
            output = folder / "out" / run
            outcome = run_until_done(
                {**environment, "JOB_RUN__OUTPUT": str(output)},
                run,
                folder,
                random.Random(f"{chosen.seed} {number}"),
                span,
            )
            outcomes.append(outcome)
            shutil.rmtree(output, ignore_errors=True)
            same = outcome.facts == whole.facts
            print(f"{run}: {len(outcome.kills)} kills, {'same' if same else 'DIFFERENT'}", flush=True)
    return report(whole, outcomes)


def _stopped(folder: Path) -> str:
    """Where the undisturbed run stopped, which all others have to do as well."""
    found = json.loads((folder / "out/whole/results.json").read_bytes())["training"]["validation"]
    assert found["stopped_early"]
    assert found["kept_step"] > 0
    last = found["best_step"] + found["stale"] * found["every_steps"]
    return f", stopped after step {last} of {found['planned_steps']}, the adapter of step {found['kept_step']} kept"


class _Never(random.Random):
    """Draws a time that never comes."""

    def uniform(self, a: float, b: float) -> float:
        del a, b
        return 1e9


def report(whole: Outcome, outcomes: list[Outcome]) -> int:
    """Prints where the kills fell and what they cost."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    repeated = [attempt.repeated_steps for outcome in outcomes for attempt in outcome.attempts]
    table = Counter((kill.stage, signal.Signals(kill.number).name) for kill in kills)
    print(f"\n{'stage':<18}{'SIGKILL':>9}{'SIGTERM':>9}")
    for stage in sorted({stage for stage, _ in table}):
        print(f"{stage:<18}{table[stage, 'SIGKILL']:>9}{table[stage, 'SIGTERM']:>9}")
    print(f"{'all':<18}{len(kills):>18}")
    durable = sum(kill.status == os.EX_TEMPFAIL for kill in kills)
    same = sum(outcome.facts == whole.facts for outcome in outcomes)
    print(f"ended by SIGTERM with exit code 75: {durable}")
    print(f"steps repeated: {sum(repeated)} in all, {max(repeated, default=0)} at worst in one attempt")
    print(f"same adapter, metrics and evaluation records as the undisturbed run: {same} of {len(outcomes)}")
    return 0 if same == len(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
