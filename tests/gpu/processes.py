"""Checks that need several GPUs: `python tests/gpu/processes.py [--speed]` prints one JSON line per finding.

The demo by one process and by one per GPU: the same losses, the same answers of the base; killed and resumed on all
GPUs: the same bits. `--speed`: tokens a second by one and by all, on a random model of Mistral-7B's shape. `--processes
N` sets the number of processes, to try the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.runs.layout import facts_of

ROOT = Path(__file__).parents[2]
DEMO = {"JOB_PRESET": "demo", "JOB_RUN__SPOT_NOTICES": "off", "JOB_LOG__FORMAT": "json", "JOB_LOG__LEVEL": "warning"}


def say(what: str, **figures: Any) -> None:
    """One finding."""
    print(json.dumps({"what": what, **figures}), flush=True)


def run(folder: Path, name: str, **changes: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs the job until it is done, with injected faults; returns its manifest and its steps."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("JOB_")}
    settings = {**clean, **DEMO, "JOB_RUN__ID": name, "JOB_RUN__OUTPUT": str(folder / name), **changes}
    began, codes = time.monotonic(), []
    while not codes or codes[-1] != 0:
        command = [sys.executable, "-m", "job"]
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        if len(codes) > 5 or done.returncode not in {0, 1, 75, -9}:
            raise SystemExit(f"{name} ended with {codes}:\n{done.stderr[-3000:]}")
    say("run", name=name, codes=codes, seconds=round(time.monotonic() - began, 1))
    place = folder / name / name
    steps = [json.loads(line) for line in (place / "artifacts/metrics.jsonl").read_text().splitlines()]
    return json.loads((place / "results.json").read_text()), steps


def exactness(folder: Path, number: int) -> None:
    """One process and several agree; several processes repeat bit by bit, killed or not."""
    changes = {"JOB_TRAIN__MAX_STEPS": "20", "JOB_CHECKPOINT__EVERY_STEPS": "4"}
    one, one_steps = run(folder, "one", JOB_RUN__PROCESSES="1", **changes)
    several, steps = run(folder, "several", JOB_RUN__PROCESSES=str(number), **changes)
    killed, _ = run(folder, "killed", JOB_RUN__PROCESSES=str(number), JOB_FAULT="kill@step=10", **changes)
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(steps, one_steps, strict=True))
    same = [
        (folder / name / name / "artifacts/evaluation/arc_easy.base.jsonl").read_bytes() for name in ("one", "several")
    ]
    say(
        "exactness",
        processes=several["training"]["world_size"],
        gpus=[gpu["name"] for gpu in several["hardware"]["gpus"]],
        worst_relative_difference_of_a_loss=worst,
        base_scored_alike=same[0] == same[1],
        killed_is_identical=facts_of(killed) == facts_of(several),
        accuracy=[result["evaluation"]["tasks"]["arc_easy"]["adapter"]["acc"] for result in (one, several)],
    )


def speed(folder: Path, number: int, sizes: Mapping[str, int]) -> None:
    """Tokens a second in steps of all the demo's examples, the first two left out."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shutil.copytree(ROOT / "job/demo/base", folder / "big", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        MistralForCausalLM(MistralConfig(**sizes, sliding_window=4096)).save_pretrained(folder / "big")
    torch.cuda.empty_cache()
    for processes in (1, number):
        _, steps = run(
            folder,
            f"speed-{processes}",
            JOB_RUN__PROCESSES=str(processes),
            JOB_MODEL__ID=str(folder / "big"),
            JOB_MODEL__DTYPE="auto",
            JOB_TRAIN__GLOBAL_BATCH_SIZE="512",
            JOB_TRAIN__EPOCHS="6",  # of one step each
            JOB_TRAIN__LEARNING_RATE="1e-5",
            JOB_EVAL__LIMIT="8",
        )
        steady = steps[2:]
        seconds = sum(step["measured"]["seconds"] for step in steady)
        say(
            "speed",
            processes=processes,
            target_tokens_per_second=sum(step["target_tokens"] for step in steady) / seconds,
            memory_bytes=max(step["measured"]["memory_bytes"] for step in steps),
            losses=[round(step["loss"], 4) for step in steps],
        )


def main() -> int:
    """Runs the requested checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--small", action="store_true", help="a model of a thousandth of the size")
    chosen = parser.parse_args()
    if not chosen.processes:
        import torch

        chosen.processes = torch.cuda.device_count()
    big = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    big |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    small = {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        exactness(Path(folder), chosen.processes)
        if chosen.speed:
            speed(Path(folder), chosen.processes, small if chosen.small else big)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
