"""The first stage: brings model, data and questions here and checks all of it, before anything is loaded.

Of several processes on a machine the first does it; the others read what it leaves for them on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.attempts import Attempt
from job.baselines import Baseline, check_questions, read_baseline
from job.dataset import load_examples
from job.hub import download_model
from job.limits import check_disk, required_bytes
from job.model import fingerprint, load_tokenizer
from job.objects import fetch, size
from job.records import Example, Pulled
from job.settings import Settings
from job.store import disk_errors
from job.tasks import Tasks, load_tasks


@dataclass(frozen=True)
class Sources:
    """What was pulled, in memory; `folder` holds the model's files.

    `tasks` are where it was pulled, and `baseline`, which the gate looks back to, in process 0.
    """

    record: Pulled
    folder: Path
    tokenizer: Any
    examples: list[Example]
    tasks: Tasks | None
    baseline: Baseline | None


@dataclass(frozen=True)
class _Left:
    """What the first process of a machine leaves for the others: paths, and what it found out."""

    record: Pulled
    folder: str
    examples: str


def pull(attempt: Attempt, settings: Settings, storage: dict[str, Any]) -> Sources:
    """Pulls everything, once a machine; `storage` are the options of `objects.fetch`."""
    processes = attempt.processes
    if processes.place.local_world_size == 1:
        return _pull(attempt, settings, storage)
    sources = _pull(attempt, settings, storage) if processes.place.local_rank == 0 else None
    left = processes.share_on_machine("sources", lambda: _leave(sources, attempt.work) if sources else None)
    return sources or _take_over(TypeAdapter(_Left).validate_json(left or ""))


def _leave(sources: Sources, work: Path) -> str:
    examples = work / "examples.json"
    with disk_errors(f"cannot write {examples}"):
        examples.write_bytes(TypeAdapter(list[Example]).dump_json(sources.examples))
    left = _Left(sources.record, str(sources.folder.absolute()), str(examples.absolute()))
    return TypeAdapter(_Left).dump_json(left).decode()


def _take_over(left: _Left) -> Sources:
    folder = Path(left.folder)
    examples = TypeAdapter(list[Example]).validate_json(Path(left.examples).read_bytes())
    return Sources(left.record, folder, load_tokenizer(folder), examples, tasks=None, baseline=None)


def _pull(attempt: Attempt, settings: Settings, storage: dict[str, Any]) -> Sources:
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
