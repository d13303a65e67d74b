"""Generated answers: the job's batches with a cache against lm-eval's own HFLM, at the best of its batch sizes.

Both answer the same arithmetic questions in words, a task like GSM8K written for this script, with the same model in
the same precision: the demo's base, which ends its answers, or a random one of 25 million parameters, which does not.
If there is a GPU it is used, with fewer questions and without batches of one question, which takes less than a minute.
In fp32 all answers must be equal.
"""

from __future__ import annotations

import gc
import json
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.common import ROOT, Row, arguments, at_least, conditions, finish, make_base

OURS = "ours"
NAMES = ("Ada", "Bruno", "Chen", "Dilek", "Emil", "Farah", "Goran", "Hana")
THINGS = ("apples", "books", "coins", "pencils", "stones", "tickets")
MAX_LENGTH = 1024


def word_problem(chance: random.Random) -> dict[str, str]:
    """A question of one to four steps, and its answer with one sentence per step."""
    name, thing = chance.choice(NAMES), chance.choice(THINGS)
    held = chance.randint(5, 60)
    question, answer = [f"{name} has {held} {thing}."], [f"{name} begins with {held} {thing}."]
    for _ in range(chance.randint(1, 4)):
        other, number = chance.choice(NAMES), chance.randint(2, 30)
        if chance.random() < 0.5 and number < held:
            question.append(f"{name} gives {number} of them to {other}.")
            answer.append(f"Then {held} - {number} = {held - number} are left.")
            held -= number
        else:
            question.append(f"Then {other} brings {number} more {thing}.")
            answer.append(f"Now there are {held} + {number} = {held + number}.")
            held += number
    question.append(f"How many {thing} does {name} have in the end?")
    return {"question": " ".join(question), "answer": f"{' '.join(answer)} #### {held}"}


def write_task(folder: Path, questions: int, shots: int, most: int) -> Path:
    """Writes the task's file, with questions and examples next to it."""
    chance = random.Random(0)
    for split, number in (("test", questions), ("train", 20)):
        rows = [json.dumps(word_problem(chance)) + "\n" for _ in range(number)]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    task = {
        "task": "word_problems",
        "output_type": "generate_until",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl", "train": "train.jsonl"}},
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": shots,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": " {{answer}}",
        "generation_kwargs": {"until": ["Question:", "</s>"], "max_gen_toks": most},
        "metric_list": [{"metric": "exact_match"}],
    }
    path = folder / "word_problems.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")  # JSON is valid YAML
    return path


def by_ours(tasks: Any, model: Any, tokenizer: Any, batch_tokens: int) -> tuple[list[str], float, int]:
    """The job: answers, seconds, and generated tokens."""
    from job.evaluation.generation import generate
    from job.evaluation.harness import measure

    tokens = []

    def answer(prompts: list[Any], how: Any) -> list[Any]:
        answers = generate(
            model, tokenizer, prompts, max_new_tokens=how.max_new_tokens, stop=how.stop, batch_tokens=batch_tokens
        )
        tokens.extend(one.tokens for one in answers)
        return answers

    began = time.monotonic()
    ((_, samples),) = measure(tasks, tokenizer, lambda _: [], answer, limit=None, max_length=MAX_LENGTH).values()
    return [sample.responses[0] for sample in samples], time.monotonic() - began, sum(tokens)


def by_hflm(tasks: Any, model: Any, tokenizer: Any, batch_size: str) -> tuple[list[str], float]:
    """lm-eval's HFLM: answers and seconds."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from job.evaluation.tasks import restart_examples

    device = str(model.device)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=MAX_LENGTH, device=device)
    for task in tasks.loaded["tasks"].values():
        restart_examples(task)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = lm_eval.evaluate(lm=lm, task_dict=tasks.loaded, bootstrap_iters=0)
    seconds = time.monotonic() - began
    ((samples),) = results["samples"].values()
    return [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])], seconds


def breakdown(model: Any, answer: Callable[[], Any]) -> dict[str, float]:
    """Where the time of one more call goes: on a GPU, its busy time, and the numbers of kernels and copies."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    passes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    gpu = model.device.type == "cuda"
    if gpu:
        with profile(activities=[ProfilerActivity.CUDA]):  # the first profile initializes the profiler
            torch.zeros(1, device=model.device)
            torch.cuda.synchronize()
    began = time.monotonic()
    with profile(activities=[ProfilerActivity.CUDA]) if gpu else nullcontext() as profiled:
        answer()
        seconds = time.monotonic() - began
    hook.remove()
    figures: dict[str, float] = {"seconds": seconds, "passes": len(passes), "rows_at_most": max(passes)}
    if profiled is not None:
        events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
        figures |= {"gpu_seconds": sum(event.self_device_time_total for event in events) / 1e6, "kernels": len(events)}
    return figures


def load(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The same weights twice: loaded as by the job, and as by a plain script."""
    import torch
    from transformers import AutoModelForCausalLM

    from job.common.malloc import keep_freed_memory
    from job.model.device import choose_dtype
    from job.model.load_base import load_base

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    computed = choose_dtype(dtype, device)
    how: dict[str, Any] = {"quantization": "none", "double_quantization": False, "dtype": computed}
    ours = load_base(folder, **how, device=device, max_length=MAX_LENGTH)
    keep_freed_memory()
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=computed, attn_implementation="sdpa", device_map={"": device}
    )
    return ours.eval(), plain.eval()


def chosen(questions: int | None, batch_sizes: list[str] | None) -> tuple[int, list[str]]:
    """The given number of questions, or what takes a minute; a GPU needs as long for one question as for dozens."""
    import torch

    usual = (48, ["16", "48"]) if torch.cuda.is_available() else (128, ["1", "8", "32", "64"])
    return questions or usual[0], batch_sizes or usual[1]


def main() -> int:
    """Measures and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo", help="demo, random, or a folder")
    parser.add_argument("--questions", type=int, help="default: 128, on a GPU 48")
    parser.add_argument("--shots", type=int, default=3, help="examples in a prompt")
    parser.add_argument("--most", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--batch-sizes", nargs="+", help="of HFLM; default: 1 8 32 64, on a GPU 16 48")
    parser.add_argument("--batch-tokens", type=int, help="ours; default: the job's")
    parser.add_argument("--rounds", type=int, default=2, help="times everything is measured; the best counts")
    parser.add_argument("--breakdown", action="store_true", help="one more call of both sides with torch's profiler")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both sides")
    args = parser.parse_args()
    where = conditions()
    questions, sizes = chosen(args.questions, args.batch_sizes)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from job.evaluation.tasks import load_tasks
    from job.model.tokenizer import load_tokenizer
    from job.settings.schema import Eval

    budget = args.batch_tokens or Eval().batch_tokens
    with tempfile.TemporaryDirectory() as name:
        folder = ROOT / "job/demo/base" if args.model == "demo" else Path(args.model)
        if args.model == "random":
            folder = Path(name) / "base"
            make_base(folder)
        tokenizer = load_tokenizer(folder)
        tasks, few = (
            load_tasks([str(write_task(Path(name), number, args.shots, args.most))], {}, {})
            for number in (questions, 4)
        )
        mine, plain = load(folder, args.dtype)
        by_ours(few, mine, tokenizer, budget)  # the first call is slow on both sides
        by_hflm(few, plain, tokenizer, "4")
        gc.freeze()
        best: dict[str, float] = {}
        answers: dict[str, list[str]] = {}
        tokens = 0
        for _ in range(args.rounds):
            answers[OURS], seconds, tokens = by_ours(tasks, mine, tokenizer, budget)
            best[OURS] = max(best.get(OURS, 0.0), tokens / seconds)
            print(f"{OURS}: {tokens / seconds:,.0f} tokens/s", flush=True)
            for size in sizes:
                answers[size], seconds = by_hflm(tasks, plain, tokenizer, size)
                best[size] = max(best.get(size, 0.0), tokens / seconds)
                print(f"HFLM, batch {size}: {tokens / seconds:,.0f} tokens/s", flush=True)
        ours, speed = answers.pop(OURS), best.pop(OURS)
        fastest = max(best, key=lambda size: best[size])
        parts: dict[str, Any] = {}
        if args.breakdown:
            parts = {
                OURS: breakdown(mine, lambda: by_ours(tasks, mine, tokenizer, budget)),
                f"HFLM, batch {fastest}": breakdown(plain, lambda: by_hflm(tasks, plain, tokenizer, fastest)),
            }
            print(json.dumps(parts), flush=True)
    differing = {size: sum(a != b for a, b in zip(ours, found, strict=True)) for size, found in answers.items()}
    most = max(differing.values())
    rows = [
        at_least("generation", speed, best[fastest], unit="tokens/s", against=f"HFLM, batch {fastest}", goal=1),
        Row("generation, answers that differ", str(most), "0 in fp32", most / len(ours), "equal", most == 0),
    ]
    details = {
        "questions": len(ours),
        "tokens": tokens,
        "ours": speed,
        "hflm": best,
        "differing": differing,
        "breakdown": parts,
    }
    finish(rows, {**details, "device": str(mine.device), "dtype": args.dtype, "model": args.model}, where, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
