"""The effect of adapter options: the same run with each option, compared with the first one, paired by question.

`python tests/bench/adapter_options.py --model FOLDER --data FILE --task arc_easy=FILE` starts the job from the command
line, once with each of `OPTIONS`, all with one seed, and prints one table. Every other setting is the environment's:
`JOB_TRAIN__EPOCHS=1` before the command is for all runs. `--minutes` bounds the time of all together; a run that would
take longer is stopped, and the table says so. How to add one: an entry in `OPTIONS`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.common import tables
from tests.bench.common import ROOT, arguments, conditions

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "LoRA, the settings as they are": {},
    "rsLoRA": {"JOB_LORA__USE_RSLORA": "true"},
    "PiSSA": {"JOB_LORA__INIT": "pissa"},
    "all-linear, rank 64, alpha 64": {
        "JOB_LORA__TARGET_MODULES": "all-linear",
        "JOB_LORA__RANK": "64",
        "JOB_LORA__ALPHA": "64",
    },
    "attention only": {"JOB_LORA__TARGET_MODULES": "attention"},
    "DoRA": {"JOB_LORA__USE_DORA": "true"},  # last, since PEFT's layers take longest
}
HEAD = (
    *("adapter", "trained", "base", "adapter", "difference to the first", "p", "verdict"),
    *("target tokens/s", "peak memory", "seconds"),
)
GRACE_SECONDS = 30
"""Between the signals that stop a run: it saves a checkpoint in between."""
LONG_ENOUGH = 5
"""If fewer seconds are left, no run is started."""


@dataclass(frozen=True)
class Finished:
    """A run of the job: its manifest, and its time including the start of Python; or why there is no manifest."""

    folder: Path
    seconds: float
    results: dict[str, Any] | None
    why: str = ""


def main() -> int:
    """Runs, compares and prints; returns 1 if the first run was not finished."""
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model, in the hub's layout")
    parser.add_argument("--data", type=Path, required=True, help="file of training rows")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE", help="questions of a task")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all runs together")
    parser.add_argument("--seed", default="0", help="of all runs")
    parser.add_argument("--only", nargs="+", choices=range(len(OPTIONS)), type=int, help="numbers of OPTIONS, from 0")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the runs there; must hold no others")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    where, names = conditions(), [list(OPTIONS)[number] for number in args.only or range(len(OPTIONS))]
    settings = {
        "JOB_MODEL__ID": str(args.model.resolve()),
        "JOB_DATA__SOURCE": str(args.data.resolve()),
        "JOB_EVAL__TASKS": ",".join(task.partition("=")[0] for task in args.task),
        "JOB_EVAL__DATA": ",".join(f"{n}={Path(p).resolve()}" for n, _, p in (t.partition("=") for t in args.task)),
        "JOB_RUN__SEED": args.seed,
        "JOB_LOG__FORMAT": "console",
    }
    with ExitStack() as stack:
        folder = args.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # One cache, so that only the first run quantizes the base; it also scores the base, for all.
        settings |= {"JOB_RUN__OUTPUT": str(folder / "runs"), "JOB_STORAGE__CACHE": str(folder / "cache")}
        jobs = {name: run(number, {**settings, **OPTIONS[name]}, deadline) for number, name in enumerate(names)}
        first = jobs[names[0]]
        compared = {
            name: compare(first.folder, job.folder)
            for name, job in jobs.items()
            if job is not first and first.results and job.results
        }
        shutil.rmtree(folder / "cache", ignore_errors=True)
    for task in (task.partition("=")[0] for task in args.task):
        rows = [row(name, job, compared.get(name), task) for name, job in jobs.items()]
        print("", f"{task}, seed {args.seed}", "", *tables.markdown(HEAD, rows), "", sep="\n", flush=True)
    if args.json is not None:
        runs = {name: {**asdict(job), "folder": None} for name, job in jobs.items()}
        content = {**where, "settings": dict(OPTIONS), "runs": runs, "compared": compared}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if compared else 1


def run(number: int, settings: Mapping[str, str], deadline: float) -> Finished:
    """Runs the job once; it is stopped, and if necessary killed, so that it ends by the deadline."""
    began, name = time.monotonic(), f"options-{number}"
    folder = Path(settings["JOB_RUN__OUTPUT"]) / name
    if deadline - began < GRACE_SECONDS + LONG_ENOUGH:
        return Finished(folder, 0.0, None, "not started: no time was left")
    process = subprocess.Popen(
        [sys.executable, "-m", "job"], cwd=ROOT, env={**os.environ, **settings, "JOB_RUN__ID": name}
    )
    try:
        code, why = process.wait(deadline - began - GRACE_SECONDS), ""
    except subprocess.TimeoutExpired:
        why = "stopped: no time was left"
        process.terminate()
        try:
            code = process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    seconds = time.monotonic() - began
    if code != 0:
        return Finished(folder, seconds, None, why or f"exit code {code}")
    return Finished(folder, seconds, json.loads((folder / "results.json").read_text(encoding="utf-8")))


def compare(first: Path, other: Path) -> dict[str, Any]:
    """What `qlora-job compare` says of two runs."""
    command = [sys.executable, "-m", "job", "compare", str(first), str(other), "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    comparison: dict[str, Any] = json.loads(done.stdout)
    return comparison


def row(name: str, job: Finished, compared: Mapping[str, Any] | None, task: str) -> list[str]:
    """A run's line in the table of a task; points are percentage points of accuracy."""
    if job.results is None:
        return [name, job.why, *[""] * (len(HEAD) - 3), f"{job.seconds:.0f}"]
    training, scores = job.results["training"], job.results["evaluation"]["tasks"][task]
    memory = training["peak_memory_bytes"]
    difference = ["-"] * 3
    if compared is not None:
        beside = compared["tasks"][task]
        low, high = beside["ci95"]
        points = f"{100 * beside['delta']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        difference = [points, f"{beside['mcnemar_p']:.2g}", beside["verdict"]]
    return [
        name,
        f"{job.results['model']['trainable_parameters']:,}",
        *(f"{100 * scores[side]['acc']:.2f} %" for side in ("base", "adapter")),
        *difference,
        f"{training['tokens_per_second']:,.0f}",
        "-" if memory is None else f"{memory / (1 << 30):.2f} GiB",
        f"{job.seconds:.0f}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
