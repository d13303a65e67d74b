"""The first stage: brings model, data and questions here and checks all of it, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import log
from job.attempts import Attempt
from job.baselines import Baseline, check_questions, read_baseline
from job.dataset import load_examples
from job.evaluate import Tasks, load_tasks
from job.hub import download_model
from job.limits import check_disk, required_bytes
from job.model import fingerprint, load_tokenizer
from job.objects import fetch, size
from job.records import Example, Pulled
from job.settings import Settings


@dataclass(frozen=True)
class Sources:
    """What was pulled, in memory; `folder` holds the model's files, `baseline` is what the gate looks back to."""

    record: Pulled
    folder: Path
    tokenizer: Any
    examples: list[Example]
    tasks: Tasks
    baseline: Baseline | None


def pull(attempt: Attempt, settings: Settings, storage: dict[str, Any]) -> Sources:
    """Pulls everything; `storage` are the options of `objects.fetch`."""

    def local(uri: str, kind: str) -> str:
        attempt.alive()
        return str(fetch(uri, attempt.work / kind, **storage)) if uri.startswith("s3://") else uri

    gate = settings.gate
    baseline = None if gate.baseline is None else read_baseline(gate.baseline, storage)
    model, data = settings.model, settings.data
    uris = {uri for uri in (model.id, data.source, *settings.eval.data.values()) if uri.startswith("s3://")}
    check_disk(attempt.work, required_bytes(size(uri, **storage) for uri in uris))
    folder, revision = download_model(local(model.id, "model"), model.revision)
    attempt.alive()
    tokenizer = load_tokenizer(folder)
    examples, dataset = load_examples(
        local(data.source, "data"),
        name=data.source,
        revision=data.revision,
        split=data.split,
        limit=data.limit,
        schema=None if data.format == "auto" else data.format,
        on_bad_row=data.on_bad_row,
        loss_on=settings.train.loss_on,
        max_length=settings.train.max_length,
        tokenizer=tokenizer,
    )
    attempt.alive()
    questions = {task: Path(local(uri, f"questions/{task}")) for task, uri in settings.eval.data.items()}
    tasks = load_tasks(settings.eval.tasks, questions, settings.eval.data)
    if baseline is not None:
        check_questions(baseline, tasks.questions(settings.eval.limit), gate.metric)
    attempt.alive()
    log.get_logger().info("data is ready", rows=dataset.rows, skipped=dataset.skipped, tokens=dataset.tokens)
    record = Pulled(dataset, fingerprint(folder), revision, tasks.fingerprints())
    return Sources(record, folder, tokenizer, examples, tasks, baseline)
