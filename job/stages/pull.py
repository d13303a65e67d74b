"""The first stage: brings model, data and questions here and checks all of it, before anything is loaded.

Of several processes on a machine the first does it; the others read what it leaves for them on the disk.
"""

from __future__ import annotations

import json
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.common import host
from job.common.hashing import code_hashes
from job.common.resources import check_disk, required_bytes
from job.common.threads import in_thread
from job.data.dataset import check_source, load_examples
from job.errors import JobError
from job.evaluation.tasks import load_tasks
from job.model.base import choose_device, choose_dtype, load_tokenizer
from job.model.files import fingerprint
from job.model.lora import tokenizer_files
from job.model.quantized_cache.cache import find
from job.model.quantized_cache.layout import CachedBase, CacheEntry, entry_at, entry_for
from job.records import Example, Pulled
from job.results.baseline import check_questions, read_baseline
from job.runs.attempt import Attempt
from job.runs.layout import BASE, Stage
from job.settings.load import Settings
from job.stages.handoff import Sources
from job.stages.preload import import_libraries
from job.storage.base import disk_errors
from job.storage.hub import download_model, import_client
from job.storage.location import is_remote
from job.storage.open import ObjectStore, StorageOptions, fetch, open_store, size

CODE = ("job.model.base", "job.model.files", "job.model.quantized_cache.cache", "job.model.quantized_cache.layout")
"""Modules whose code decides the bits of a quantized base."""
_LOOK_SECONDS = 0.5
_FAREWELL_SECONDS = 3.0


@dataclass(frozen=True)
class _Model:
    """The model's files, and what they are."""

    folder: Path
    revision: str | None
    sha256: str
    shelf: CacheEntry | None
    quantized: bool


@dataclass(frozen=True)
class _Left:
    """What the first process of a machine leaves for the others: paths, and what it found out."""

    record: Pulled
    folder: str
    quantized: bool
    examples: str


def pull(attempt: Attempt, settings: Settings, storage: StorageOptions) -> Sources:
    """Pulls everything, once a machine; `storage` says how to reach stores."""
    processes = attempt.processes
    date = processes.share("date of the run", lambda: _date(attempt))
    if processes.place.local_world_size == 1:
        return _pull(attempt, settings, storage, date)
    if processes.place.local_rank:
        import_libraries()  # meanwhile
    sources = _pull(attempt, settings, storage, date) if processes.place.local_rank == 0 else None
    left = processes.share_on_machine("sources", lambda: _leave(sources, attempt.work) if sources else None)
    return sources or _take_over(TypeAdapter(_Left).validate_json(left or ""))


def _date(attempt: Attempt) -> str:
    """The day on which the run began: chat templates that write the date write this one, in every attempt.

    The ledger has it from the first second of the first attempt.
    """
    return min([attempt.started, *(record.started for record in attempt.earlier)])[: len("2026-01-31")]


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


def _pull(attempt: Attempt, settings: Settings, storage: StorageOptions, date: str) -> Sources:
    def local(uri: str, kind: str) -> str:
        attempt.alive()
        return fetch(uri, attempt.work / kind, storage)

    gate, data = settings.gate, settings.data
    if not is_remote(data.source):
        check_source(data.source, data.revision, data.split)  # before gigabytes of weights are fetched
    baseline = None if gate.baseline is None else read_baseline(gate.baseline, storage)
    places = {settings.model.id, data.source, *settings.eval.data.values()}
    check_disk(attempt.work, required_bytes(size(place, storage) for place in places))
    import_client()  # here: two threads had better not import the same at once
    # Downloads and hashes leave the interpreter alone, which meanwhile imports and reads.
    coming = in_thread(lambda: _find_model(attempt, settings, storage), "model")
    import_libraries()
    questions = {task: Path(local(uri, f"questions/{task}")) for task, uri in settings.eval.data.items()}
    tasks = load_tasks(settings.eval.tasks, questions, settings.eval.data)
    if baseline is not None:
        check_questions(baseline, tasks.questions(settings.eval.limit), gate.metric)
    source = local(data.source, "data")
    try:
        while not wait([coming], _LOOK_SECONDS).done:
            attempt.alive(progress=False)  # to be asked to end is no reason to wait for gigabytes
    except JobError:
        wait([coming], _FAREWELL_SECONDS)  # what brings a kept base here removes the half of it that there is
        raise
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
        date=date,
        vocabulary=_vocabulary(model.folder),
        alive=attempt.alive,
    )
    attempt.alive()
    log.get_logger().info("data is ready", rows=dataset.rows, skipped=dataset.skipped, tokens=dataset.tokens)
    record = Pulled(dataset, model.sha256, model.revision, tasks.fingerprints())
    return Sources(record, model.folder, model.quantized, tokenizer, examples, tasks, baseline, model.shelf)


def _vocabulary(folder: Path) -> int | None:
    """Rows of the model's embedding, by its configuration; None where that does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        return int(text["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _find_model(attempt: Attempt, settings: Settings, storage: StorageOptions) -> _Model:
    """The model's files: the kept quantized base, or what the settings name.

    A later attempt goes on with what the first one found, and does not ask again where that came from.
    """
    known, base = attempt.known(Stage.PULL, Pulled), attempt.known(BASE, CachedBase)
    if known is not None and base is not None and base.key is not None and (room := _room(attempt, settings, storage)):
        noted = entry_at(base.key, *room, base.index_sha256)
        if (folder := find(noted, attempt.get_on)) is not None:
            return _Model(folder, known.model_revision, known.model_sha256, noted, quantized=True)
    source = fetch(settings.model.id, attempt.work / "model", storage)
    folder, revision = download_model(source, settings.model.revision)
    tokenizer_files(folder)  # refuses now what cannot be published in the end
    sha256 = fingerprint(folder)
    room = _room(attempt, settings, storage)
    shelf = None if room is None else entry_for(_facts(settings, sha256), *room)
    # Not in a later attempt: it is not known to be the one that the run began with.
    here = None if shelf is None or known else find(replace(shelf, store=None), attempt.get_on)
    return _Model(here or folder, revision, sha256, shelf, quantized=here is not None)


def _room(attempt: Attempt, settings: Settings, storage: StorageOptions) -> tuple[Path, ObjectStore | None] | None:
    """The folder and the store in which quantized bases are kept; None where they are not to be."""
    model, cache = settings.model, settings.storage.cache
    if model.quantization == "none" or model.keep_quantized == "off":
        return None
    if model.keep_quantized == "cache" and cache is None:
        return None
    store = open_store(settings.run.output, storage) if model.keep_quantized == "store" else None
    return attempt.work if cache is None else Path(cache), store


def _facts(settings: Settings, sha256: str) -> dict[str, Any]:
    """What the bits of a quantized base come from."""
    model, device, machine = settings.model, choose_device(settings.run.device), host.hardware()
    return {
        "model": sha256,
        "quantization": model.quantization,
        "double_quantization": model.double_quantization,
        "dtype": str(choose_dtype(model.dtype, device)),
        "device": device.type,
        "cpu": machine["cpu"],
        "gpus": machine["gpus"],
        "software": host.software(),
        "code": code_hashes(*CODE),
    }
