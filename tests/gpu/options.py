"""Settings of training on a GPU, each uninterrupted and killed: `python tests/gpu/options.py [NAME ...]`, JSON lines.

The demo is run with the settings of each name below, once to its end and once killed in training and restarted: both
must have the same artifacts, bit by bit. Ends with 1 if they differ or a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.runs.layout import facts_of
from tests.bench.common import ROOT

DEMO, PAIRS = ({"JOB_PRESET": preset, "JOB_MODEL__DTYPE": "auto"} for preset in ("demo", "demo-dpo"))
VALIDATION = {"JOB_DATA__VALIDATION": "0.1", "JOB_TRAIN__VALIDATE_EVERY_STEPS": "5"}
OPTIONS: dict[str, Mapping[str, str]] = {
    "default": DEMO,
    "validation": DEMO | VALIDATION,
    "early stopping": DEMO
    | VALIDATION
    | {"JOB_TRAIN__STOP_AFTER": "2", "JOB_TRAIN__KEEP": "best", "JOB_TRAIN__LEARNING_RATE": "0.05"},
    "rsLoRA": DEMO | {"JOB_LORA__USE_RSLORA": "true"},
    "DoRA": DEMO | {"JOB_LORA__USE_DORA": "true"},
    "PiSSA": DEMO | {"JOB_LORA__INIT": "pissa"},
    "PiSSA, fast": DEMO | {"JOB_LORA__INIT": "pissa_niter_16"},
    "OLoRA": DEMO | {"JOB_LORA__INIT": "olora"},
    "orthogonal": DEMO | {"JOB_LORA__INIT": "orthogonal", "JOB_MODEL__QUANTIZATION": "none"},
    "AdaLoRA": DEMO | {"JOB_LORA__KIND": "adalora", "JOB_LORA__TINIT": "3", "JOB_LORA__TFINAL": "3"},
    "NEFTune, cosine": DEMO
    | {"JOB_TRAIN__NEFTUNE_NOISE_ALPHA": "5", "JOB_TRAIN__SCHEDULER": "cosine", "JOB_TRAIN__MIN_LR_RATIO": "0.1"},
    "lion_8bit": DEMO | {"JOB_TRAIN__OPTIMIZER": "lion_8bit"},
    "ademamix_8bit": DEMO | {"JOB_TRAIN__OPTIMIZER": "ademamix_8bit"},
    "dropout": DEMO | {"JOB_LORA__DROPOUT": "0.05"},
    "dpo": PAIRS,
    "dpo, validation": PAIRS | VALIDATION,
    "muon, label smoothing": DEMO | {"JOB_TRAIN__OPTIMIZER": "muon", "JOB_TRAIN__LABEL_SMOOTHING": "0.1"},
    "EVA": DEMO | {"JOB_LORA__INIT": "eva"},
    "LoftQ": DEMO | {"JOB_LORA__INIT": "loftq"},
    "new tokens": DEMO | {"JOB_MODEL__ADD_TOKENS": "<ask>,<tell>"},
    "merged": DEMO | {"JOB_EXPORT__FORMATS": "merged"},
    "fp8": DEMO | {"JOB_EXPORT__FORMATS": "merged,fp8"},
    "w4a16": DEMO | {"JOB_EXPORT__FORMATS": "w4a16", "JOB_EXPORT__QUANTIZATION_STEPS": "20"},
}
RETRIED = (0, -9, 75)


def run(folder: Path, name: str, settings: Mapping[str, str]) -> tuple[dict[str, str], list[int]]:
    """Starts the job until it is done; returns its artifacts' hashes and the exit codes."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("JOB_")}
    environ = {
        **clean,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "HF_HUB_OFFLINE": "1",
        "JOB_LOG__FORMAT": "json",
        "JOB_CHECKPOINT__EVERY_STEPS": "4",
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_RUN__ID": name,
        "JOB_RUN__OUTPUT": str(folder),
        **settings,
    }
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        command = [sys.executable, "-m", "job", "run"]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        if done.returncode not in RETRIED or len(codes) > 3:
            raise ChildProcessError(f"ended with {codes}: {done.stderr[-3000:]}")
    return facts_of(json.loads((folder / name / "results.json").read_text(encoding="utf-8"))), codes


def check(name: str, folder: Path) -> dict[str, object]:
    """Runs the demo with the settings of this name, uninterrupted and killed, and compares."""
    began = time.monotonic()
    try:
        whole, _ = run(folder, "whole", OPTIONS[name])
        middle = time.monotonic()
        killed, codes = run(folder, "killed", {**OPTIONS[name], "JOB_FAULT": "kill@step=7"})
    except ChildProcessError as error:
        return {"name": name, "right": False, "failed": str(error)}
    differ = sorted({path for path, _ in whole.items() ^ killed.items()})
    return {
        "name": name,
        "right": not differ and len(codes) > 1,
        "artifacts": len(whole),
        "differ": differ,
        "exit codes": codes,
        "seconds": [round(middle - began, 1), round(time.monotonic() - middle, 1)],
    }


def main() -> int:
    """Runs the named settings, several at a time, since a run mostly imports and loads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(OPTIONS))
    parser.add_argument("--together", type=int, default=4, help="runs at a time")
    given = parser.parse_args()
    names = given.names or list(OPTIONS)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(given.together) as pool:
        folders = [Path(place) / str(number) for number in range(len(names))]
        right = True
        for result in pool.map(check, names, folders):
            print(json.dumps(result), flush=True)
            right = right and bool(result["right"])
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
