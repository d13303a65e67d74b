"""Whole jobs of several checkouts on the same random bases: how fast each trains and scores, and how results differ.

    git worktree add /tmp/before 70b09f3
    python tests/bench/checkouts.py training --checkouts . /tmp/before --families llama qwen2 --json training.json
    python tests/bench/checkouts.py evaluation --checkouts . /tmp/before --families llama qwen2 --json evaluation.json

The checkouts are run by this interpreter, through the command line alone, so that only settings have to be common to
them. It needs no data and no network: models and texts are random, the texts as long as Alpaca's rows and ARC-Easy's
questions are in Mistral's tokenizer. The number of threads is torch's, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.common import FAMILIES, SHAPE, Row, arguments, at_least, conditions, finish, make_model

LENGTHS = json.loads(Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))
SMALL = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
"""What `--small` changes of `SHAPE`, to see whether the script runs."""
PARTS = ("training", "evaluation")
_AROUND = len("Question: \nAnswer:")
"""Characters that the task adds to a question."""


def write_inputs(folder: Path, rows: int, questions: int) -> None:
    """Writes rows and questions of random letters, each of which is a token of `make_tokenizer`'s."""
    chance = random.Random(0)

    def letters(count: int) -> str:
        return "".join(chance.choices(ascii_lowercase, k=max(1, count)))

    texts = [{"text": letters(length - 1)} for length in LENGTHS["alpaca"][:rows]]
    asked = [
        {
            "id": str(number),
            "question": letters(context - _AROUND),
            "choices": {"text": [letters(choice - 1) for choice in choices], "label": list("ABCDE"[: len(choices)])},
            "answerKey": "A",
        }
        for number, (context, choices) in enumerate(LENGTHS["arc_easy"][:questions])
    ]
    for name, lines in (("rows", texts), ("questions", asked)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")


def make_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each byte, however a family's own tokenizer splits words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def run_job(checkout: Path, model: Path, output: Path, part: str, steps: int) -> dict[str, Any]:
    """One whole job on the model and the texts next to it: its speed, and its losses or log-likelihoods.

    Raises:
        SystemExit: The job failed; the end of its log is shown.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JOB_", "PYTHON"))}
    settings = {
        "JOB_RUN__ID": "bench",
        "JOB_RUN__OUTPUT": str(output),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_MODEL__ID": str(model),
        "JOB_DATA__SOURCE": str(model.with_name("rows.jsonl")),
        "JOB_EVAL__DATA": f"arc_easy={model.with_name('questions.jsonl')}",
        "JOB_TRAIN__MAX_STEPS": str(steps if part == "training" else 1),
        **({"JOB_EVAL__LIMIT": "8"} if part == "training" else {}),
        "JOB_LOG__FORMAT": "json",
        "HF_HUB_OFFLINE": "1",
    }
    # An older checkout lacks these settings: so the newer one turns the corresponding features off.
    schema = _job(checkout, ["config", "--schema"], clean)
    settings |= {"JOB_EVAL__FULL_PRECISION": "off"} if "full_precision" in schema else {}
    _job(checkout, [], {**clean, **settings})
    run = output / "bench"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    if part == "training":
        steps_done = _lines(run / "artifacts/metrics.jsonl")
        later = [line for line in steps_done if "loss" in line][1:]  # the first step is slow everywhere
        seconds = sum(line["measured"]["seconds"] for line in later)
        tokens = sum(line["target_tokens"] for line in later)
        return {"speed": tokens / seconds, "numbers": [line["loss"] for line in steps_done if "loss" in line]}
    records = _lines(run / "artifacts/evaluation/arc_easy.adapter.jsonl")
    seconds = results["run"]["attempts"][-1]["stage_seconds"]["evaluate-adapter"]
    return {"speed": len(records) / seconds, "numbers": [x for one in records for x in one["log_likelihoods"]]}


def _job(checkout: Path, words: list[str], environment: Mapping[str, str]) -> str:
    command = [sys.executable, "-m", "job", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    """Measures in turn, so that other load of the machine affects all alike; the best round of each counts."""
    parser = arguments(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--checkouts", nargs="+", type=Path, required=True, help="the first beside each other one")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["llama", "qwen2"])
    parser.add_argument("--steps", type=int, default=8, help="of training, 32 rows each")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny model and little data, to try the script")
    args = parser.parse_args()
    shape = {**SHAPE, **(SMALL if args.small else {})}
    steps, questions = (2, 16) if args.small else (args.steps, args.questions)
    where = conditions()
    best: dict[tuple[str, Path], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, 32 * steps, questions)
        for family in args.families:
            make_tokenizer(folder / family)
            make_model(folder / family, family, shape)
        for turn in range(args.rounds):
            for family in args.families:
                for number, checkout in enumerate(args.checkouts):
                    output = folder / f"{turn}-{family}-{number}"
                    result = run_job(checkout.resolve(), folder / family, output, args.part, steps)
                    print(f"{family}, {checkout}: {result['speed']:,.1f} {_unit(args.part)}", flush=True)
                    if result["speed"] > best.get((family, checkout), {"speed": 0})["speed"]:
                        best[family, checkout] = result
    first, *others = args.checkouts
    rows = []
    for family in args.families:
        ours = best[family, first]
        for other in others:
            theirs = best[family, other]
            rows.append(
                at_least(
                    f"{args.part}, {family}", ours["speed"], theirs["speed"], unit=_unit(args.part), against=str(other)
                )
            )
            rows.append(_apart(args.part, family, ours["numbers"], theirs["numbers"]))
    details = {f"{family}, {checkout}": result for (family, checkout), result in best.items()}
    finish(rows, {**details, "shape": shape, "threads": os.environ.get("OMP_NUM_THREADS", "")}, where, args.json)
    return 0


def _unit(part: str) -> str:
    return "target tokens/s" if part == "training" else "questions/s"


def _apart(part: str, family: str, ours: list[float], theirs: list[float]) -> Row:
    """The largest relative difference of two checkouts' losses or log-likelihoods."""
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    what = "losses" if part == "training" else "log-likelihoods"
    return Row(f"{part}, {family}: largest difference of the {what}", f"{apart:.1e}", "", apart)


if __name__ == "__main__":
    raise SystemExit(main())
