"""The job's overhead: the time of fast commands, and where whole runs spend their time.

These are the demo and, where the data is at hand, the reference recipe on a model of 25 million parameters: 1,500 rows
of real Alpaca in two epochs and all of ARC-Easy before and after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.common import ALPACA, ARC_EASY, ROOT, Row, arguments, conditions, finish, make_base

QUICK = {"--help": ["--help"], "config": ["config"], "a settings error": ["--train.epochs", "none", "--lora.rnk", "3"]}
LIMIT_SECONDS = 0.5
WORK = ("pull", "evaluate-base", "train", "evaluate-adapter")


def job(words: list[str], **changes: str) -> tuple[float, str]:
    """Runs a command of the job; its seconds and its log."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "job", *words],
        cwd=ROOT,
        env={**os.environ, **changes},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return time.monotonic() - began, done.stderr


def quick_commands(times: int) -> list[Row]:
    """The best of several times, so that other load of the machine counts least."""
    rows = []
    for name, words in QUICK.items():
        best = min(job(words)[0] for _ in range(times))
        goal = f"<= {LIMIT_SECONDS} s"
        rows.append(Row(name, f"{best:.2f} s", f"best of {times}", best / LIMIT_SECONDS, goal, best <= LIMIT_SECONDS))
    return rows


def moment(log: list[dict[str, Any]], event: str) -> float:
    """When a line was logged, in seconds."""
    return next(datetime.fromisoformat(line["timestamp"]).timestamp() for line in log if line["event"] == event)


def real(base: Path) -> dict[str, str]:
    """Settings of the run on real data."""
    make_base(base)
    return {
        "JOB_MODEL__ID": str(base),
        "JOB_DATA__SOURCE": str(ALPACA),
        "JOB_DATA__LIMIT": "1500",
        "JOB_DATA__ON_BAD_ROW": "skip",
        "JOB_EVAL__DATA": f"arc_easy={ARC_EASY}",
        "JOB_RUN__DEVICE": "cpu",
    }


def whole(name: str, **changes: str) -> tuple[Row, dict[str, float]]:
    """The parts of a whole run in seconds, by its own manifest, its log and the clock."""
    with tempfile.TemporaryDirectory() as folder:
        before = time.time()
        wall, text = job([], JOB_RUN__ID="profile", JOB_RUN__OUTPUT=folder, JOB_LOG__FORMAT="json", **changes)
        attempt = json.loads((Path(folder) / "profile/results.json").read_text())["run"]["attempts"][0]
    log = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    stages: dict[str, float] = attempt["stage_seconds"]
    parts = {stage: stages.get(stage, 0.0) for stage in WORK}
    parts["load"] = moment(log, "model is loaded") - moment(log, "data is ready")
    opened = datetime.fromisoformat(attempt["started"]).timestamp()
    outside = 1 - sum(parts.values()) / wall
    parts["before the attempt"] = opened - before
    parts["imports, before the first stage"] = moment(log, "data is ready") - opened - parts["pull"]
    parts["publishing, the end, between stages"] = wall - sum(parts.values())
    parts["all"] = wall
    for part, seconds in parts.items():
        print(f"{name:<12} {part:<40} {seconds:7.2f} s")
    what, shown = f"{name}, outside pull, load, train, evaluate", f"{outside * wall:.2f} s"
    return Row(what, shown, f"{wall:.2f} s in all", outside, "<= 0.05", outside <= 0.05), parts


def main() -> int:
    """Measures and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--times", type=int, default=10, help="runs of each quick command")
    args = parser.parse_args()
    where = conditions()
    rows = quick_commands(args.times)
    measurements = {"demo": whole("demo", JOB_PRESET="demo")}
    if ALPACA.exists() and ARC_EASY.exists():
        with tempfile.TemporaryDirectory() as folder:
            measurements["real data"] = whole("real data", **real(Path(folder)))
    rows += [row for row, _ in measurements.values()]
    finish(rows, {name: parts for name, (_, parts) in measurements.items()}, where, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
