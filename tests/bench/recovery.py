"""The cost of checkpoints and restarts: seconds and shares of the demo, measured on this machine.

- from SIGTERM to the end of the process, with a saved checkpoint
- training time with a checkpoint every 10 steps, compared with none
- from the start of the process to the first new step: a first start, which scores the base, and a restart

The last also for 25 million parameters, 1,500 rows of real Alpaca and all of ARC-Easy, where the data is at hand.

On an S3-protocol server on this machine (moto): it measures the job, not a network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import boto3

from tests.bench.common import ALPACA, ARC_EASY, ROOT, Row, arguments, at_most, conditions, finish, make_base
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server

STEPS = 40
GRACE_SECONDS = 30.0


def start(url: str, run: str, **changes: str) -> subprocess.Popen[str]:
    """One attempt of the demo with changed settings, its log on a pipe."""
    environment = {
        **os.environ,
        **CREDENTIALS,
        "JOB_PRESET": "demo",
        "JOB_RUN__ID": run,
        "JOB_RUN__OUTPUT": f"s3://{BUCKET}/{run}",  # else runs with the same base share its evaluation
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_STORAGE__ENDPOINT_URL": url,
        "JOB_TRAIN__MAX_STEPS": str(STEPS),
        "JOB_LOG__FORMAT": "json",
        **changes,
    }
    command = [sys.executable, "-m", "job"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def follow(stream: IO[str] | None, until: int) -> int:
    """Reads the log up to the line of an optimizer step with at least this number, and returns it."""
    assert stream is not None
    for line in stream:
        if line.startswith("{"):
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == "steps" and entry["done"] >= until:
                return int(entry["done"])
    raise RuntimeError("the log ended before the step")


def interrupted(url: str) -> tuple[list[Row], dict[str, float]]:
    """A run that is stopped in the middle and started again."""
    began = time.monotonic()
    process = start(url, "stopped", JOB_CHECKPOINT__EVERY_STEPS="10")
    follow(process.stderr, 1)
    first = time.monotonic() - began
    follow(process.stderr, 15)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    durable, code = time.monotonic() - asked, process.returncode
    began = time.monotonic()
    process = start(url, "stopped", JOB_CHECKPOINT__EVERY_STEPS="10")
    step = follow(process.stderr, 1)
    again = time.monotonic() - began
    process.kill()
    process.communicate()
    print(f"SIGTERM to durable and ended (exit code {code}): {durable:.2f} s; the next new step was {step}")
    rows = [
        at_most("restart to the next new step, demo", again, first, unit="s", against="first start to its first"),
        at_most("SIGTERM to durable and ended", durable, GRACE_SECONDS, unit="s", against="the grace period", goal=1),
    ]
    return rows, {"first": first, "again": again, "durable": durable, "exit_code": code, "step": step}


def restarted(url: str, base: Path) -> tuple[Row, dict[str, float]]:
    """A run on real data that is killed after its second step and started again, its quantized base in the store."""
    make_base(base)
    changes = {
        "JOB_PRESET": "mistral-7b-alpaca",
        "JOB_MODEL__ID": str(base),
        "JOB_MODEL__KEEP_QUANTIZED": "store",
        "JOB_DATA__SOURCE": str(ALPACA),
        "JOB_DATA__LIMIT": "1500",
        "JOB_DATA__ON_BAD_ROW": "skip",
        "JOB_EVAL__DATA": f"arc_easy={ARC_EASY}",
        "JOB_CHECKPOINT__EVERY_STEPS": "1",
    }
    seconds = []
    for until in (2, 1):
        began = time.monotonic()
        process = start(url, "real", **changes)
        step = follow(process.stderr, 1)
        seconds.append(time.monotonic() - began)
        if until > step:
            follow(process.stderr, until)
        process.kill()
        process.communicate()
    what = "restart to the next new step, real data"
    row = at_most(what, seconds[1], seconds[0], unit="s", against="first start to its first", goal=0.5)
    return row, {"real_first": seconds[0], "real_again": seconds[1], "real_step": step}


def train_seconds(url: str, run: str, every: str) -> float:
    """Seconds from a run's first step to its last, with uploads meanwhile."""
    start(url, run, JOB_CHECKPOINT__EVERY_STEPS=every, JOB_EVAL__LIMIT="20").communicate()
    client = boto3.client("s3", endpoint_url=url)
    results = json.loads(client.get_object(Bucket=BUCKET, Key=f"{run}/{run}/results.json")["Body"].read())
    return float(results["run"]["attempts"][0]["stage_seconds"]["train"])


def published(url: str, times: int) -> tuple[Row, dict[str, list[float]]]:
    """The best of several runs with checkpoints, and of the same number without, in turn."""
    seconds: dict[str, list[float]] = {"10": [], "100000": []}
    for number in range(times):
        for every, trials in seconds.items():
            trials.append(train_seconds(url, f"every-{every}-{number}", every))
    print(f"seconds of the training stage by steps between checkpoints: {seconds}")
    best = [min(trials) for trials in seconds.values()]
    row = at_most(f"checkpoint every 10 of {STEPS} steps", *best, unit="s", against="no checkpoints", goal=1.02)
    return row, seconds


def main() -> int:
    """Measures and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--times", type=int, default=3, help="runs with checkpoints, and without")
    args = parser.parse_args()
    where = conditions()
    with credentials(), moto_server() as url:
        rows, details = interrupted(url)
        if ALPACA.exists():
            with tempfile.TemporaryDirectory() as folder:
                row, more = restarted(url, Path(folder))
            rows, details = [*rows, row], details | more
        row, seconds = published(url, args.times)
    finish([*rows, row], {**details, "train_stage": seconds}, where, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
