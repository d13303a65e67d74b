"""lm-eval's index of the tasks that these tests need, and its tasks with rows from files."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from job.evaluation.tasks import load_tasks
from tests.helpers import write_jsonl

FOLDERS = ("arc", "glue", "gsm8k", "truthfulqa", "wikitext", "winogrande")
"""Of lm-eval's tasks."""


@cache
def whole_index() -> Any:
    """lm-eval's index of the tasks named here, read once: the index of all tasks takes ten seconds."""
    from lm_eval import tasks
    from lm_eval.tasks.manager import TaskManager

    folder = Path(tasks.__file__).parent
    return TaskManager(include_path=[str(folder / name) for name in FOLDERS], include_defaults=False)


def local_tasks(**files: Path) -> Any:
    """lm-eval's tasks by name, each with its questions from a file."""
    return load_tasks(list(files), files, {name: f"file://{name}" for name in files})


TASK: dict[str, Any] = {
    "task": "sums",
    "output_type": "generate_until",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "test.jsonl", "train": "train.jsonl"}},
    "test_split": "test",
    "fewshot_split": "train",
    "num_fewshot": 2,
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": " {{answer}}",
    "generation_kwargs": {"until": ["\n", "Question:"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, *, questions: int = 12, **changes: Any) -> Path:
    """The file of an arithmetic task, with its questions and examples beside it; a change to None removes a field."""
    rows = [{"question": f"what is {n} and {n + 2}?", "answer": str(2 * n + 2)} for n in range(questions + 5)]
    write_jsonl(folder / "test.jsonl", rows[5:])
    write_jsonl(folder / "train.jsonl", rows[:5])
    config = {name: value for name, value in (TASK | changes).items() if value is not None}
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def write_prose(folder: Path) -> Path:
    """The file of a perplexity task with texts of one window and of several."""
    chance = random.Random(5)
    words = ["it", "is", "the", "one", "which", "they", "say", "of", "them", "and", "so", "on"]
    texts = [" ".join(chance.choices(words, k=length)) for length in (3, 9, 30, 60)]
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    path = write_task(
        folder,
        task="prose",
        output_type="loglikelihood_rolling",
        dataset_kwargs={"data_files": {"test": "texts.jsonl"}},
        fewshot_split=None,
        num_fewshot=None,
        doc_to_text="",
        doc_to_target="{{text}}",
        generation_kwargs=None,
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    return path.rename(folder / "prose.yaml")


SIZES = {"few": 4, "many": 9, "said": 6}


def write_choices(folder: Path, name: str, questions: int) -> None:
    """A multiple-choice task of the group, in a file beside it."""
    rows = [{"q": f"{name} {n}?", "choices": ["one", "two", "three"], "gold": n % 3} for n in range(questions)]
    write_jsonl(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, *([{"metric": "acc_norm"}] if name == "many" else [])],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def write_group(folder: Path, **changes: Any) -> Path:
    """A group of three tasks: two of choices, one of generated answers."""
    for name in ("few", "many"):
        write_choices(folder, name, SIZES[name])
    write_task(folder, task="said", num_fewshot=0, questions=SIZES["said"]).rename(folder / "said.yaml")
    group = {
        "group": "own",
        "task": ["few.yaml", "many.yaml", "said.yaml"],
        "aggregate_metric_list": [
            {"metric": "acc", "weight_by_size": True},
            {"metric": "acc_norm", "weight_by_size": False},
            {"metric": "exact_match", "filter_list": "none"},
        ],
        "metadata": {"version": 3},
    } | changes
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in group.items() if v is not None}), encoding="utf-8")
    return path
