"""The job itself on a GPU, at Mistral-7B's shape: `python tests/gpu/job.py --alpaca FILE --arc FILE` prints JSON lines.

A random base and a tokenizer made from the data; then a whole run, the same killed and resumed, the same next to a
process that takes most of the memory when training begins, and one limited to a small part of the GPU: artifacts bit by
bit, execution plan, target tokens a second, energy. `--tiny` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
from tests.bench.shapes import MISTRAL_7B, TINY

ROOT = Path(__file__).parents[2]
RUNS = ("killed", "crowded", "small")
PLAIN = {
    "JOB_LOG__FORMAT": "json",
    "JOB_RUN__SPOT_NOTICES": "off",
    "JOB_CHECKPOINT__EVERY_STEPS": "10",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def say(what: str, **figures: Any) -> None:
    """One finding."""
    print(json.dumps({"what": what, **figures}), flush=True)


def make_tokenizer(folder: Path, texts: list[str], size: int) -> Any:
    """A byte-level tokenizer trained on the data, with Mistral's vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return made


def make_base(folder: Path, texts: list[str], sizes: Mapping[str, int]) -> None:
    """A random Mistral in bf16, with such a tokenizer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    make_tokenizer(folder, texts, sizes["vocab_size"])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=4096, bos_token_id=0, eos_token_id=1))
    model.save_pretrained(folder, max_shard_size="4GB")


def run(folder: Path, name: str, **changes: str) -> dict[str, Any]:
    """Runs the job until it is done, with injected faults, and prints how; returns its manifest."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("JOB_")}
    settings = {**clean, **PLAIN, "JOB_RUN__ID": name, "JOB_RUN__OUTPUT": str(folder / name), **changes}
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        began = time.monotonic()
        command = [sys.executable, "-m", "job"]
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        seen = [line for line in lines if line["event"] not in {"steps", "questions", "checkpoint", "evaluated"}]
        say("attempt", name=name, code=codes[-1], seconds=round(time.monotonic() - began, 1), log=seen)
        if len(codes) > 3 or done.returncode not in {0, -9}:
            say("failed", name=name, code=done.returncode, end=done.stderr[-6000:])
            return {}
    place = folder / name / name
    steps = [json.loads(line) for line in (place / "artifacts/metrics.jsonl").read_text().splitlines()]
    results: dict[str, Any] = json.loads((place / "results.json").read_text())
    seconds, targets = (
        [step[key] if key in step else step["measured"][key] for step in steps] for key in ("seconds", "target_tokens")
    )
    half = len(steps) // 2
    say(
        "run",
        name=name,
        hardware=results["hardware"],
        software=results["software"],
        training=results["training"],
        cost=results["cost"],
        tokens_per_second=sum(targets) / sum(seconds),
        tokens_per_second_of_the_second_half=sum(targets[half:]) / sum(seconds[half:]),
        memory_bytes=max(step["measured"]["memory_bytes"] for step in steps),
        losses=[round(step["loss"], 4) for step in steps[:3] + steps[-3:]],
        tasks={
            name: {key: task[key]["acc"] for key in ("base", "adapter")}
            for name, task in results["evaluation"]["tasks"].items()
        },
    )
    return results


def crowd(mark: Path, leave_gib: float) -> None:
    """Takes the free memory of the GPU except for so much, once the file exists, and keeps it."""
    while not mark.exists():
        time.sleep(0.05)
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        taken = torch.empty(max(0, free - int(leave_gib * (1 << 30))), dtype=torch.uint8, device="cuda")
        say("neighbour", took=taken.numel(), of=total)
    time.sleep(3600)


def main() -> None:
    """Makes the inputs and runs the job on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alpaca", type=Path, required=True, help="rows in Alpaca's schema, one JSON object a line")
    parser.add_argument("--arc", type=Path, required=True, help="questions in ARC's schema")
    parser.add_argument("--rows", default="1500")
    parser.add_argument("--out", type=Path, help="a folder for the manifests")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS, help="beside the whole run")
    parser.add_argument("--leave", type=float, default=9, help="GiB that the neighbour leaves free")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    rows = asked.alpaca.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        folder = Path(place)
        began = time.monotonic()
        texts = [" ".join(json.loads(row).values()) for row in rows]
        maker = multiprocessing.get_context("spawn").Process  # its GPU memory is freed with it
        made = maker(target=make_base, args=(folder / "base", texts, TINY if asked.tiny else MISTRAL_7B))
        made.start()
        made.join()
        say("base", seconds=round(time.monotonic() - began, 1))
        given = {
            "JOB_MODEL__ID": str(folder / "base"),
            "JOB_DATA__SOURCE": str(asked.alpaca),
            "JOB_DATA__LIMIT": asked.rows,
            "JOB_DATA__ON_BAD_ROW": "skip",  # rows of Alpaca without an output
            "JOB_EVAL__DATA": f"arc_easy={asked.arc}",
            "JOB_STORAGE__CACHE": str(folder / "cache"),
        }
        found = {"whole": run(folder, "whole", **given)}
        spawn = multiprocessing.get_context("spawn").Process
        if "killed" in asked.only:
            found["killed"] = run(folder, "killed", JOB_FAULT="kill@step=3" if asked.tiny else "kill@step=25", **given)
        if "crowded" in asked.only:
            mark = folder / "crowded/crowded/stages/evaluate-base.json"
            neighbour = spawn(target=crowd, args=(mark, asked.leave), daemon=True)
            neighbour.start()
            found["crowded"] = run(folder, "crowded", **given)
            neighbour.kill()
        for name in ("killed", "crowded"):
            if found["whole"] and found.get(name):
                ours, theirs = facts_of(found["whole"]), facts_of(found[name])
                differ = [path for path in ours if ours[path] != theirs.get(path)]
                say("exactness", name=name, artifacts=len(ours), differ=differ)
        if "small" in asked.only:
            found["small"] = run(folder, "small", JOB_TRAIN__GPU_MEMORY_GB="16", JOB_TRAIN__MAX_STEPS="15", **given)
        for name, results in found.items():
            if asked.out and results:
                shutil.copy(folder / name / name / "results.json", asked.out / f"{name}.json")


if __name__ == "__main__":
    main()
