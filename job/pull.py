"""The first stage: brings model, data and questions here and checks all of it, before anything is loaded.

Of several processes on a machine the first does it; the others read what it leaves for them on the disk.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from job import log, manifest
from job.attempts import Attempt
from job.baselines import Baseline, check_questions, read_baseline
from job.bases import Shelf, find, shelf_of
from job.dataset import load_examples
from job.hub import download_model, import_client
from job.limits import check_disk, required_bytes
from job.model import choose_device, choose_dtype, fingerprint, load_tokenizer
from job.objects import fetch, open_store, size
from job.records import Example, Pulled
from job.settings import Settings
from job.store import disk_errors
from job.tasks import Tasks, load_tasks


@dataclass(frozen=True)
class Sources:
    """What was pulled, in memory; `folder` holds the model's files, which may be those of a kept quantized base.

    `tasks` are where it was pulled, and `baseline`, which the gate looks back to, in process 0; `shelf`, where the
    quantized base is to be kept, in the process that pulled.
    """

    record: Pulled
    folder: Path
    quantized: bool
    tokenizer: Any
    examples: list[Example]
    tasks: Tasks | None
    baseline: Baseline | None
    shelf: Shelf | None


@dataclass(frozen=True)
class _Model:
    """The model's files, and what they are."""

    folder: Path
    revision: str | None
    sha256: str
    shelf: Shelf | None
    quantized: bool


@dataclass(frozen=True)
class _Left:
    """What the first process of a machine leaves for the others: paths, and what it found out."""

    record: Pulled
    folder: str
    quantized: bool
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
    left = _Left(sources.record, str(sources.folder.absolute()), sources.quantized, str(examples.absolute()))
    return TypeAdapter(_Left).dump_json(left).decode()


def _take_over(left: _Left) -> Sources:
    folder = Path(left.folder)
    examples = TypeAdapter(list[Example]).validate_json(Path(left.examples).read_bytes())
    return Sources(
        left.record, folder, left.quantized, load_tokenizer(folder), examples, tasks=None, baseline=None, shelf=None
    )


def _pull(attempt: Attempt, settings: Settings, storage: dict[str, Any]) -> Sources:
    def local(uri: str, kind: str) -> str:
        attempt.alive()
        return str(fetch(uri, attempt.work / kind, **storage)) if uri.startswith("s3://") else uri

    gate, data = settings.gate, settings.data
    baseline = None if gate.baseline is None else read_baseline(gate.baseline, storage)
    uris = {uri for uri in (settings.model.id, data.source, *settings.eval.data.values()) if uri.startswith("s3://")}
    check_disk(attempt.work, required_bytes(size(uri, **storage) for uri in uris))
    import_client()  # here: two threads had better not import the same at once
    # Downloads and hashes leave the interpreter alone, which meanwhile imports and reads.
    with ThreadPoolExecutor(1, thread_name_prefix="model") as pool:
        coming = pool.submit(copy_context().run, _find_model, attempt, settings, storage)
        _import_libraries()
        questions = {task: Path(local(uri, f"questions/{task}")) for task, uri in settings.eval.data.items()}
        tasks = load_tasks(settings.eval.tasks, questions, settings.eval.data)
        if baseline is not None:
            check_questions(baseline, tasks.questions(settings.eval.limit), gate.metric)
        source = local(data.source, "data")
        model = coming.result()
    attempt.alive()
    tokenizer = load_tokenizer(model.folder)
    examples, dataset = load_examples(
        source,
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
    log.get_logger().info("data is ready", rows=dataset.rows, skipped=dataset.skipped, tokens=dataset.tokens)
    record = Pulled(dataset, model.sha256, model.revision, tasks.fingerprints())
    return Sources(record, model.folder, model.quantized, tokenizer, examples, tasks, baseline, model.shelf)


def _import_libraries() -> None:
    """What the stages need, which takes seconds."""
    with log.hush():
        import_module("job.stages")


def _find_model(attempt: Attempt, settings: Settings, storage: dict[str, Any]) -> _Model:
    """The model's files: the kept quantized base, or what the settings name.

    A later attempt goes on with what the first one found, and does not ask again where that came from.
    """
    known = attempt.known("pull", Pulled)
    shelf = None if known is None else _shelf(attempt, settings, storage, known.model_sha256)
    if known is not None and shelf is not None and (folder := find(shelf, attempt.get_on)) is not None:
        return _Model(folder, known.model_revision, known.model_sha256, shelf, quantized=True)
    source = settings.model.id
    if source.startswith("s3://"):
        source = str(fetch(source, attempt.work / "model", **storage))
    folder, revision = download_model(source, settings.model.revision)
    sha256 = fingerprint(folder)
    shelf = _shelf(attempt, settings, storage, sha256)
    here = None if shelf is None else find(replace(shelf, store=None), attempt.get_on)
    return _Model(here or folder, revision, sha256, shelf, quantized=here is not None)


def _shelf(attempt: Attempt, settings: Settings, storage: dict[str, Any], sha256: str) -> Shelf | None:
    """Where the quantized base of this model is kept; None where it is not to be."""
    model, cache = settings.model, settings.storage.cache
    if model.quantization == "none" or model.keep_quantized == "off":
        return None
    if model.keep_quantized == "cache" and cache is None:
        return None
    device = choose_device(settings.run.device)
    facts = {
        "model": sha256,
        "quantization": model.quantization,
        "double_quantization": model.double_quantization,
        "dtype": str(choose_dtype(model.dtype, device)),
        "device": device.type,
        "software": manifest.software(),
    }
    store = open_store(settings.run.output, **storage) if model.keep_quantized == "store" else None
    return shelf_of(facts, attempt.work if cache is None else Path(cache), store)
