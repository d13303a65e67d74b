"""What a run is made of, looked at beforehand: the model but for its weights, the tokenizer, rows and questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.common import formatting
from job.data.dataset import is_hub_id, load_examples, require_revision
from job.errors import DataError, Problem, SettingsError
from job.evaluation.tasks import check_tasks, count_questions, load_tasks
from job.model.architecture import Architecture, read_config
from job.model.base import load_tokenizer
from job.planning.character_tokenizer import CharacterTokenizer
from job.planning.preflight import Found, NotChecked
from job.planning.reference import CHARACTERS_PER_TOKEN, TaskTokens
from job.records import Example
from job.storage.hub import cached_model, local_model, peek_dataset, peek_model
from job.storage.open import StorageOptions, fetch, is_remote, open_store, size

MOST_BYTES = 256 << 20
"""Data that is larger is not fetched for a plan."""
MOST_SMALL_BYTES = 64 << 20
SILENT = "the hub cannot be reached from here"
Online = Callable[[], bool]
"""Whether the hub can be reached; asked only where something has to come from there."""
NO_LIMIT = 1 << 31
"""Of an example's tokens, where tokens are only estimated."""


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights: where its small files lie, what they say, and what the job will have to fetch.

    `download_bytes` is None where the files could not be asked for their sizes.
    """

    folder: Path
    architecture: Architecture | None
    download_bytes: int | None


def preview_model(
    source: str,
    revision: str | None,
    max_length: int,
    *,
    online: Online,
    folder: Path,
    storage: StorageOptions,
) -> Found[ModelFacts]:
    """Fetches a model's configuration and tokenizer, and sees that its weights are there.

    Args:
        source: Hub id, `s3://` URI or path.
        revision: Of a hub id.
        max_length: Longest example, which has to fit the model's window.
        online: Whether the hub can be reached.
        folder: Where to put what is fetched from S3.
        storage: How to reach stores.
    """
    download: int | None
    if is_remote(source):
        place, weights = _fetch_small_files(source, folder, storage)
        where, download = f"{source} can be read", size(source, storage)
    elif (local := local_model(source)) is not None:
        place, weights, download = local, sum(1 for _ in local.glob("*.safetensors")), 0
        where = f"{source} is here"
    else:
        place, weights, download, where = _of_the_hub(source, revision, online=online)
    if not weights:
        raise DataError([Problem("model.id", f"{source} has no weights in safetensors")])
    try:
        architecture = read_config(_config(place, source))
    except ValueError as error:
        return "note", f"{where}; no figures: {error}", ModelFacts(place, None, download)
    if architecture.window is not None and architecture.window < max_length:
        what = f"{max_length} is more than the model's window of {architecture.window} tokens; lower it"
        raise SettingsError([Problem("train.max_length", what)])
    return "ok", where, ModelFacts(place, architecture, download)


def _config(place: Path, source: str) -> dict[str, Any]:
    """The model's config.json."""
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError([Problem("model.id", f"{source} has no config.json that can be read: {error}")]) from error
    if not isinstance(config, dict):
        raise DataError([Problem("model.id", f"{source} has a config.json that holds no object")])
    return config


def _of_the_hub(source: str, revision: str | None, *, online: Online) -> tuple[Path, int, int | None, str]:
    """Folder, number of files of weights, bytes to fetch, and words for where it was found."""
    if online():
        place, files = peek_model(source, revision)
        weights = sum(name.endswith(".safetensors") for name in files)
        return place, weights, sum(files.values()), f"{source} can be fetched from the hub"
    cached = cached_model(source, revision)
    if cached is None or not (cached / "config.json").exists():
        raise NotChecked(f"{source} is not in the cache, and {SILENT}")
    return cached, 1, None, f"{source} is in the cache; for its weights {SILENT}"


def _fetch_small_files(source: str, folder: Path, storage: StorageOptions) -> tuple[Path, int]:
    """Copies everything but the weights; returns the folder, and how many files of weights there are."""
    store = open_store(source, storage)
    found = list(store.list())
    if not found:
        raise SettingsError([Problem("model.id", f"there is nothing at {source}; correct the URI")])
    target = folder / "model"
    target.mkdir()
    for info in found:
        if "/" not in info.key and not info.key.endswith(".safetensors") and info.bytes <= MOST_SMALL_BYTES:
            store.download(info.key, target / info.key)
    return target, sum(info.key.endswith(".safetensors") for info in found)


@dataclass(frozen=True)
class DataFacts:
    """The rows as they would be trained on. `estimated` says that the tokens are counted in characters."""

    examples: Sequence[Example]
    estimated: bool
    download_bytes: int
    licence: str | None


def preview_data(
    source: str,
    *,
    tokenizer: Any | None,
    max_length: int,
    online: Online,
    folder: Path,
    storage: StorageOptions,
    revision: str | None,
    **reading: Any,
) -> Found[DataFacts]:
    """Reads and checks the rows as the job will; without a tokenizer their tokens are estimated.

    Args:
        source: Hub id, `s3://` URI or path.
        tokenizer: The model's; None where it cannot be had.
        max_length: The most tokens of an example.
        online: Whether the hub can be reached.
        folder: Where to put what is fetched from S3.
        storage: How to reach stores.
        revision: Of a hub id.
        reading: What else `load_examples` is told.
    """
    download, licence = _of_the_data(source, revision, storage, online=online)
    if download > MOST_BYTES:
        raise NotChecked(f"{source} has {formatting.size(download, ' ')}, too much to fetch for a plan")
    place = fetch(source, folder / "data", storage)
    examples, record = load_examples(
        place,
        revision=revision,
        max_length=NO_LIMIT if tokenizer is None else max_length,
        tokenizer=tokenizer or CharacterTokenizer(CHARACTERS_PER_TOKEN),
        name=source,
        **reading,
    )
    what = f"{record.rows:,} rows in the schema {record.format}"
    if record.skipped:
        what += f"; skipped {', '.join(f'{count} {kind}' for kind, count in record.skipped.items())}"
    facts = DataFacts(examples, tokenizer is None, download, licence)
    if tokenizer is not None:
        return "ok", what, facts
    long = sum(len(example.input_ids) > max_length for example in examples)
    return "note", f"{what}; tokens are estimated{f', so {long} rows may be too long' if long else ''}", facts


def _of_the_data(
    source: str, revision: str | None, storage: StorageOptions, *, online: Online
) -> tuple[int, str | None]:
    """What has to be downloaded, which is nothing of a file that lies here; and the licence on the hub's card."""
    if is_remote(source):
        return size(source, storage), None
    if not is_hub_id(source):
        return 0, None
    pinned = require_revision(revision)
    if not online():
        raise NotChecked(f"{source}: {SILENT}")
    return peek_dataset(source, pinned)


def preview_questions(
    names: Sequence[str],
    data: Mapping[str, str],
    *,
    tokenizer: Any | None,
    limit: int | None,
    online: Online,
    folder: Path,
    storage: StorageOptions,
) -> Found[TaskTokens]:
    """Loads the tasks as the job will, if all their questions can be had.

    Args:
        names: Tasks.
        data: The user's own files of questions, by task.
        tokenizer: The model's; None where it cannot be had.
        limit: Questions of each task.
        online: Whether the hub can be reached.
        folder: Where to put what is fetched from S3.
        storage: How to reach stores.
    """
    check_tasks(names, data)
    if (missing := [name for name in names if name not in data]) and not online():
        raise NotChecked(f"{', '.join(missing)}: {SILENT}")
    files = {task: Path(fetch(uri, folder / "questions" / task, storage)) for task, uri in data.items()}
    tasks = load_tasks(names, files, data)
    facts = TaskTokens(*count_questions(tasks, tokenizer or CharacterTokenizer(CHARACTERS_PER_TOKEN), limit))
    return "ok", f"{facts.count:,} questions in {', '.join(names)}", facts


def find_tokenizer(model: ModelFacts | None) -> Found[Any]:
    """The tokenizer beside the model."""
    if model is None:
        raise NotChecked("the model's files cannot be had; tokens are estimated from characters where there is text")
    tokenizer = load_tokenizer(model.folder)
    return "ok", f"{len(tokenizer):,} tokens", tokenizer
