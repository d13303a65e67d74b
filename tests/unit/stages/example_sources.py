"""The result of pulling in tests: a base in `base/` and the questions of `questions.jsonl`."""

from __future__ import annotations

from pathlib import Path

from job.evaluation.tasks import load_tasks
from job.model.files import fingerprint
from job.model.tokenizer import load_tokenizer
from job.records import Pulled
from job.stages.handoff import Sources
from tests.example_run import DATASET


def example_sources(folder: Path) -> Sources:
    """Contains the questions only; tests add other inputs with `dataclasses.replace`."""
    base, questions = folder / "base", folder / "questions.jsonl"
    tasks = load_tasks(["arc_easy"], {"arc_easy": questions}, {"arc_easy": str(questions)})
    return Sources(
        record=Pulled(DATASET, fingerprint(base), None, tasks.fingerprints()),
        folder=base,
        quantized=False,
        tokenizer=load_tokenizer(base),
        examples=[],
        validation=[],
        original=base,
        tasks=tasks,
    )
