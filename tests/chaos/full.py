"""`make chaos`: a hundred runs, each killed at random points, compared with undisturbed ones. Prints a table.

The runs take the configurations of `small.CONFIGURATIONS` in turn.
"""

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
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import clouds
from tests.chaos.harness import Outcome, preload, read_results, run_until_done
from tests.chaos.small import CONFIGURATIONS, settings

KEPT = "undisturbed.json"


@dataclass(frozen=True)
class Undisturbed:
    """A configuration and its undisturbed run: what it published, and the seconds that it took."""

    environment: Mapping[str, str]
    facts: Mapping[str, str]
    span: float
    told: str


def main() -> int:
    """Runs and kills, and prints the table; exit code 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to go on where others ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CONFIGURATIONS, help="runs of one configuration")
    parser.add_argument("--folder", type=Path, help="keeps what undisturbed runs published, for further calls")
    parser.add_argument("--store", choices=clouds.SCHEMES, help="the runs lie in an imitation of this store")
    parser.add_argument("--validate", action="store_const", dest="only", const="early-stopping", help="early stopping")
    chosen = parser.parse_args()
    preload()  # before anything else: it keeps torch from starting threads
    names = [chosen.only] if chosen.only else list(CONFIGURATIONS)
    known: dict[str, Undisturbed] = {}
    outcomes: list[tuple[str, Outcome]] = []
    with tempfile.TemporaryDirectory(prefix="qlora-job-chaos-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        server = stack.enter_context(clouds.process(chosen.store)) if chosen.store else {}
        outputs = clouds.place(chosen.store) if chosen.store else None
        kept = folder if chosen.folder is None else chosen.folder.absolute()
        for number in range(chosen.first, chosen.first + chosen.runs):
            name, run = names[number % len(names)], f"run-{number:03d}"
            if name not in known:
                known[name] = _undisturbed(name, kept, server, outputs)
                print(f"{name}, undisturbed: {known[name].span:.1f} s, {known[name].told}", flush=True)
            whole, output = known[name], f"{outputs or folder}/out/{run}"
            outcome = run_until_done(
                # runs with the same output would share the base's evaluation; here each has to do its own
                {**whole.environment, **server, "JOB_RUN__OUTPUT": output},
                run,
                folder,
                random.Random(f"{chosen.seed} {number}"),
                whole.span,
            )
            outcomes.append((name, outcome))
            shutil.rmtree(output, ignore_errors=True)
            same = "same" if outcome.facts == whole.facts else "DIFFERENT"
            print(f"{run}, {name}: {len(outcome.kills)} kills, {same}", flush=True)
    return report(known, outcomes)


def _undisturbed(name: str, folder: Path, server: Mapping[str, str], outputs: str | None) -> Undisturbed:
    """Runs a configuration twice without a kill: the first run warms caches, so the time of the second one counts.

    `server` has the variables of the store with the runs, at the URI `outputs`; None for `folder`.

    Raises:
        AssertionError: The two differ, or a run that should stop early does not.
    """
    own = folder / name.replace(",", "-")
    own.mkdir(parents=True, exist_ok=True)
    environment = settings(own, rows=20, questions=8) if name == "early-stopping" else settings(own)
    environment |= CONFIGURATIONS[name](own)
    if (own / KEPT).exists():
        return Undisturbed(environment, **json.loads((own / KEPT).read_bytes()))
    found: list[tuple[float, Outcome]] = []
    for turn in ("one", "two"):
        environment["JOB_RUN__OUTPUT"] = f"{outputs}/{own.name}/{turn}" if outputs else str(own / turn)
        began = time.monotonic()
        outcome = run_until_done({**environment, **server}, "whole", own, _Never(), 0)
        found.append((time.monotonic() - began, outcome))
    (_, one), (span, two) = found
    assert one.facts == two.facts, f"two undisturbed runs of {name} differ"
    results = read_results({**environment, **server}, "whole")
    told = f"{len(two.facts)} artifacts, {results['training']['steps']} steps"
    if name == "early-stopping":
        validated = results["training"]["validation"]
        assert validated["stopped_early"]
        assert validated["kept_step"] > 0
        told += f" of {validated['planned_steps']}, the adapter of step {validated['kept_step']} kept"
    (own / KEPT).write_text(json.dumps({"facts": two.facts, "span": span, "told": told}), encoding="utf-8")
    return Undisturbed(environment, two.facts, span, told)


class _Never(random.Random):
    """Draws a time that is never reached."""

    def uniform(self, a: float, b: float) -> float:
        del a, b
        return 1e9


def report(known: Mapping[str, Undisturbed], outcomes: list[tuple[str, Outcome]]) -> int:
    """Prints in which stages runs were killed, and what that cost."""
    kills = [kill for _, outcome in outcomes for kill in outcome.kills]
    repeated = [attempt.repeated_steps for _, outcome in outcomes for attempt in outcome.attempts]
    table = Counter((kill.stage, signal.Signals(kill.number).name) for kill in kills)
    print(f"\n{'stage':<18}{'SIGKILL':>9}{'SIGTERM':>9}")
    for stage in sorted({stage for stage, _ in table}):
        print(f"{stage:<18}{table[stage, 'SIGKILL']:>9}{table[stage, 'SIGTERM']:>9}")
    print(f"{'all':<18}{len(kills):>18}")
    durable = sum(kill.status == os.EX_TEMPFAIL for kill in kills)
    same = Counter(name for name, outcome in outcomes if outcome.facts == known[name].facts)
    print(f"ended by SIGTERM with exit code 75: {durable}")
    print(f"runs that were killed at least once: {sum(bool(outcome.kills) for _, outcome in outcomes)}")
    print(f"steps repeated: {sum(repeated)} in all, {max(repeated, default=0)} at worst in one attempt")
    print("same adapter, metrics and evaluation records as the undisturbed run:")
    for name, total in Counter(name for name, _ in outcomes).items():
        print(f"  {name:<16}{same[name]} of {total}")
    return 0 if same.total() == len(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
