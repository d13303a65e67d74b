"""A whole run with generated answers and a perplexity: killed while it generates, verified, and compared."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from job.common.hashing import sealed
from job.demo.make import HERE as DEMO
from tests import warm
from tests.helpers import read_jsonl, write_jsonl
from tests.unit.evaluation.example_tasks import write_prose, write_task

pytestmark = pytest.mark.long
GSM8K: dict[str, Any] = {
    "doc_to_target": " {{answer}}\n#### {{answer}}",
    "generation_kwargs": {"until": ["Question:", "</s>"], "do_sample": False, "max_gen_toks": 24},
    "filter_list": [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern, **how}, {"function": "take_first"}]}
        for name, pattern, how in (
            ("strict-match", r"#### (\w+)", {}),
            ("flexible-extract", r"(\w+)", {"group_select": -1}),
        )
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"],
        }
    ],
}
"""As lm-eval's gsm8k.yaml, but for words instead of numbers: the answer behind `####`, or the last word."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo's base, rows, and two tasks of the user's own, one as GSM8K is, answered in batches of two or three.

    It asks for facts that the demo's base has read, so that the answers differ.
    """
    folder = tmp_path_factory.mktemp("generated")
    prose = folder / "prose"
    prose.mkdir()
    tasks = [write_task(folder, **GSM8K), write_prose(prose)]
    asked = [
        {"question": row["question"], "answer": row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]}
        for row in read_jsonl(DEMO / "questions.jsonl")[:17]
    ]
    write_jsonl(folder / "test.jsonl", asked[5:])
    write_jsonl(folder / "train.jsonl", asked[:5])
    given = {
        "RUN__OUTPUT": str(folder / "runs"),
        "MODEL__ID": str(DEMO / "base"),
        "MODEL__DTYPE": "fp32",
        "DATA__SOURCE": str(DEMO / "instructions.jsonl"),
        "DATA__LIMIT": "16",
        "EVAL__TASKS": ",".join(map(str, tasks)),
        "EVAL__BATCH_TOKENS": "150",
        "TRAIN__MAX_LENGTH": "512",
        "TRAIN__MAX_STEPS": "2",
        "TRAIN__GLOBAL_BATCH_SIZE": "4",
        "TRAIN__LEARNING_RATE": "0.004",
        "LORA__RANK": "4",
        "RUN__DEVICE": "cpu",
    }
    return {**os.environ, **{f"JOB_{name}": value for name, value in given.items()}}


def stopped_while_it_answers(environment: dict[str, str], run: str, number: signal.Signals) -> int:
    """Starts the job and sends it a signal when its log says that an answer was given; its exit code."""
    with (
        tempfile.NamedTemporaryFile("r", encoding="utf-8") as output,
        warm.followed([], {**environment, "JOB_RUN__ID": run}, output=Path(output.name)) as (process, log),
    ):
        sent = False
        for line in log:
            seen = json.loads(line)
            if not sent and seen.get("event") == "answers" and seen["done"]:
                os.kill(process.pid, number)
                sent = True
        return int(process.wait(100)[0])


def files_of(run: Path) -> dict[str, bytes]:
    """The adapter and all answers."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in (*run.glob("artifacts/evaluation/*"), run / "artifacts/adapter/adapter_model.safetensors")
    }


def test_generated_answers_survive_a_kill(environment: dict[str, str]) -> None:
    """Killed and stopped while answers are generated: the same bytes as undisturbed; verify and compare agree."""
    done = warm.run([], {**environment, "JOB_RUN__ID": "whole"})
    assert done.returncode == 0, done.stderr
    runs = Path(environment["JOB_RUN__OUTPUT"])
    assert stopped_while_it_answers(environment, "hit", signal.SIGKILL) == -signal.SIGKILL
    assert stopped_while_it_answers(environment, "hit", signal.SIGTERM) == 75
    kept = [*(runs / "hit").rglob("scores/*/*.jsonl"), *runs.glob("scores/*/*.jsonl")]
    assert any('"answers"' in path.read_text(encoding="utf-8") for path in kept)
    assert warm.run([], {**environment, "JOB_RUN__ID": "hit"}).returncode == 0
    assert files_of(runs / "hit") == files_of(runs / "whole")
    assert len({line["responses"][0] for line in read_jsonl(runs / "whole/artifacts/evaluation/sums.base.jsonl")}) > 3

    found: dict[str, Any] = json.loads((runs / "whole/results.json").read_bytes())["evaluation"]["measured"]
    assert {name: task["num_fewshot"] for name, task in found.items()} == {"sums": 2, "prose": 0}
    assert set(found["prose"]["metrics"]) == {
        f"{name},none" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    }
    assert "exact_match,strict-match -> " not in done.stdout
    assert "sums, 12 questions: exact_match,strict-match" in done.stdout
    assert "word_perplexity" in (runs / "whole/artifacts/report.html").read_text(encoding="utf-8")
    assert "word_perplexity" in (runs / "whole/artifacts/adapter/README.md").read_text(encoding="utf-8")

    verified = warm.run(["verify", str(runs / "hit")], environment)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    compared = warm.run(["compare", str(runs / "whole"), str(runs / "hit")], environment)
    assert compared.returncode == 0, compared.stderr
    assert "Metrics of other tasks" in compared.stdout

    answers = runs / "whole/artifacts/evaluation/sums.adapter.jsonl"
    text, figure = answers.read_text(encoding="utf-8"), '"exact_match,strict-match": [0.0'
    assert figure in text
    answers.write_text(text.replace(figure, figure.replace("0.0", "1.0"), 1), encoding="utf-8")
    assert warm.run(["verify", str(runs / "whole")], environment).returncode != 0


def test_a_gate_without_choices_is_refused(environment: dict[str, str]) -> None:
    """With exit code 2, before anything is computed."""
    done = warm.run([], {**environment, "JOB_RUN__ID": "gated", "JOB_GATE__MIN_DELTA": "0.01"})
    assert done.returncode == 2
    assert "JOB_GATE: is about accuracy" in done.stderr


def test_answers_of_a_version_with_another_rule_are_made_again(environment: dict[str, str]) -> None:
    """If an earlier version answered with the base, both are answered again, with the bytes of an undisturbed run."""
    prompts = Path(environment["JOB_RUN__OUTPUT"]).parent / "prompts.jsonl"
    write_jsonl(prompts, [{"prompt": "How much is 1 plus 2?"}])
    given = {**environment, "JOB_RUN__ID": "older", "JOB_EVAL__PROMPTS": str(prompts)}
    assert warm.run([], {**given, "JOB_FAULT": "kill@stage=train"}).returncode == -signal.SIGKILL
    path = Path(environment["JOB_RUN__OUTPUT"]) / "older/stages/evaluate-base.json"
    facts = json.loads(path.read_bytes())
    assert set(facts["generation"]) == {"sums", "JOB_EVAL__PROMPTS"}
    del facts["generation"]  # as an earlier version has it
    path.write_bytes(sealed({name: value for name, value in facts.items() if name != "seal"}))
    done = warm.run([], given)
    assert done.returncode == 0, done.stderr
    assert "the answers of JOB_EVAL__PROMPTS, sums were generated by the rules of another version" in done.stderr
    assert warm.run(["verify", str(path.parents[1])], environment).returncode == 0
    again = warm.run([], {**environment, "JOB_RUN__ID": "undisturbed", "JOB_EVAL__PROMPTS": str(prompts)})
    assert again.returncode == 0
    assert files_of(path.parents[1]) == files_of(path.parents[2] / "undisturbed")
