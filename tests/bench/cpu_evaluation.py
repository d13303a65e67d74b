"""Evaluation on this CPU: the job's scorer against lm-eval's own HFLM, at the best of its batch sizes.

Both answer the same real ARC-Easy questions by lm-eval's task, with the same random model of 25 M parameters in
the same precision. All predictions are compared; those that differ are listed with their margins on both sides.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.common import (
    ARC_EASY,
    FAMILIES,
    Row,
    arguments,
    at_least,
    conditions,
    finish,
    load_ours,
    load_plain,
    make_base,
)

TASK, OURS = "arc_easy", "ours"
Answers = list[list[float]]
"""By question: the log-likelihood of each choice."""


def by_ours(
    tasks: Any, model: Any, tokenizer: Any, limit: int | None, batch_tokens: int | None
) -> tuple[Answers, float]:
    """The job's scorer: many questions in a packed sequence."""
    from job.evaluation.harness import evaluate
    from job.evaluation.scorer import score_questions
    from job.settings.schema import Eval

    def score(questions: list[Any]) -> list[Any]:
        return score_questions(model, questions, batch_tokens or Eval().batch_tokens)

    with model.disable_adapter():
        began = time.monotonic()
        records = evaluate(tasks, tokenizer, score, limit=limit)[TASK][1]
        seconds = time.monotonic() - began
    return [record.log_likelihoods for record in records], seconds


def by_hflm(
    tasks: Any, model: Any, tokenizer: Any, limit: int | None, batch_size: str, *, device: str = "cpu"
) -> tuple[Answers, float]:
    """lm-eval's own model; the time to find the batch size `auto` is included."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=64, device=device)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = lm_eval.evaluate(lm=lm, task_dict=tasks.loaded, limit=limit, bootstrap_iters=0)
    seconds = time.monotonic() - began
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [[answer[0] for answer in sample["filtered_resps"]] for sample in samples], seconds


def margin(answers: Sequence[float]) -> float:
    """The margin between the best and the second-best answer."""
    first, second = sorted(answers, reverse=True)[:2]
    return first - second


def differing(ours: Answers, theirs: Answers) -> list[dict[str, float]]:
    """The questions that the two answer differently, with their margins; tiny margins mean rounding noise."""
    return [
        {"question": number, "our_margin": margin(a), "their_margin": margin(b)}
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if a.index(max(a)) != b.index(max(b))
    ]


def compare(ours: Answers, theirs: dict[str, Answers]) -> tuple[Row, dict[str, Any]]:
    """How many of HFLM's predictions, over all its batch sizes, differ from the job's, and the margins."""
    differences = {size: differing(ours, answers) for size, answers in theirs.items()}
    furthest = max(
        abs(a - b)
        for all_b in theirs.values()
        for x, y in zip(ours, all_b, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    for size, questions in differences.items():
        for q in questions:
            print(f"question {q['question']}, batch {size}: margins {q['our_margin']:.2e}, {q['their_margin']:.2e}")
    margins = [max(q["our_margin"], q["their_margin"]) for questions in differences.values() for q in questions]
    most = max(map(len, differences.values()))
    met = max(margins, default=0.0) <= 2 * furthest <= 1e-2
    other = f"ties only (log-likelihoods are at most {furthest:.1e} apart)"
    return Row("evaluation, predictions that differ", str(most), other, most / len(ours), "ties", met), differences


def main() -> int:
    """Measures and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--full", action="store_true", help="all 2,376 questions")
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8", "32", "64", "auto"], help="of HFLM")
    parser.add_argument("--rounds", type=int, default=2, help="times everything is measured; the best counts")
    parser.add_argument("--batch-tokens", type=int, help="ours; default: the job's")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both sides")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4", help="of both sides")
    parser.add_argument("--family", choices=FAMILIES, default="mistral")
    args = parser.parse_args()
    args.questions = None if args.full else args.questions
    where = conditions()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from job.evaluation.tasks import load_tasks
    from job.model.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        make_base(folder, args.family)
        tokenizer = load_tokenizer(folder)
        tasks = load_tasks([TASK], {TASK: ARC_EASY}, {TASK: ARC_EASY.name})
        mine = load_ours(folder, args.quantization, args.dtype).eval()
        plain = load_plain(folder, args.quantization, args.dtype).eval()
        # The first call is slow on both sides. The job's comes first, because it sets the tasks to zero-shot, for both.
        by_ours(tasks, mine, tokenizer, 4, args.batch_tokens)
        by_hflm(tasks, plain, tokenizer, 4, "4")
        gc.freeze()  # the garbage collector skips what was imported, as in the job; this helps both sides
        best: dict[str, float] = {}
        answers: dict[str, Answers] = {}
        for _ in range(args.rounds):
            for side in (OURS, *args.batch_sizes):
                if side == OURS:
                    answers[side], seconds = by_ours(tasks, mine, tokenizer, args.questions, args.batch_tokens)
                else:
                    answers[side], seconds = by_hflm(tasks, plain, tokenizer, args.questions, side)
                speed = len(answers[side]) / seconds
                best[side] = max(best.get(side, 0.0), speed)
                print(f"{side if side == OURS else f'HFLM, batch {side}'}: {speed:.1f} questions/s", flush=True)
    ours, speed = answers.pop(OURS), best.pop(OURS)
    fastest = max(best, key=lambda size: best[size])
    row, differences = compare(ours, answers)
    rows = [
        at_least("evaluation", speed, best[fastest], unit="questions/s", against=f"HFLM, batch {fastest}", goal=3),
        row,
    ]
    finish(rows, {"questions": len(ours), "ours": speed, "hflm": best, "differing": differences}, where, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
