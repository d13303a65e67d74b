"""What surviving costs: `python tests/bench/recovery.py` prints seconds and shares, measured on this machine.

- from SIGTERM to the end of the process, with the state durable
- training time with a checkpoint every 10 steps, against none, and the share that publishing took
- from the start of the process to the first new step: a first start, and a restart

The demo's model and data on an S3-protocol server on this machine (moto): it measures the job, not a network.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import boto3

from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server

STEPS = 40


def start(url: str, run: str, **changes: str) -> subprocess.Popen[str]:
    """One attempt of the demo, its log on a pipe."""
    environment = {
        **os.environ,
        **CREDENTIALS,
        "JOB_PRESET": "demo",
        "JOB_RUN__ID": run,
        "JOB_RUN__OUTPUT": f"s3://{BUCKET}/out",
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_STORAGE__ENDPOINT_URL": url,
        "JOB_TRAIN__MAX_STEPS": str(STEPS),
        "JOB_EVAL__LIMIT": "20",
        "JOB_LOG__FORMAT": "json",
        **changes,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "job"], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def follow(stream: IO[str] | None, until: int) -> dict[str, Any]:
    """Reads the log up to the line of an optimizer step of at least that number."""
    assert stream is not None
    for line in stream:
        if line.startswith("{"):
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == "steps" and entry["done"] >= until:
                return entry
    raise RuntimeError("the log ended before the step")


def main() -> int:
    """Measures and prints."""
    with credentials(), moto_server() as url:
        began = time.monotonic()
        process = start(url, "stopped", JOB_CHECKPOINT__EVERY_STEPS="10")
        follow(process.stderr, 1)
        first = time.monotonic() - began
        follow(process.stderr, 15)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate()
        print(f"SIGTERM to durable and ended (exit code {process.returncode}): {time.monotonic() - asked:.2f} s")
        began = time.monotonic()
        process = start(url, "stopped", JOB_CHECKPOINT__EVERY_STEPS="10")
        step = follow(process.stderr, 1)["done"]
        again = time.monotonic() - began
        process.kill()
        process.communicate()
        print(f"start to the first step: {first:.2f} s; restart to the next new step ({step}): {again:.2f} s")
        seconds = {}
        for every in ("10", "100000"):
            process = start(url, f"every-{every}", JOB_CHECKPOINT__EVERY_STEPS=every)
            process.communicate()
            client = boto3.client("s3", endpoint_url=url)
            key = f"out/every-{every}/results.json"
            results = json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
            stage = results["run"]["attempts"][0]["stage_seconds"]["train"]
            seconds[every] = stage
            print(f"checkpoint every {every} steps: training stage {stage:.2f} s, {STEPS} steps")
        lost = seconds["10"] / seconds["100000"] - 1
        print(f"ratio: {1 + lost:.3f}, {100 * lost:.1f} % of training time lost to publishing")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
