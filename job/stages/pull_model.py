"""The model of the pull: its files or the quantized base in the cache, found while rows are read, and what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.common import host
from job.common.hashing import code_hashes
from job.errors import DataError, Problem, named_by
from job.model.adapter_options import MANY_STEPS, make_options
from job.model.base import choose_device, choose_dtype, inspect
from job.model.files import fingerprint
from job.model.quantized_cache.cache import find
from job.model.quantized_cache.layout import CachedBase, CacheEntry, entry_at, entry_for
from job.model.tokenizer_files import tokenizer_files
from job.records import FirstValues, Pulled
from job.runs.attempt import Attempt
from job.runs.layout import BASE, FIRST_VALUES, Stage
from job.settings.load import Settings
from job.storage.hub import MAX_SMALL_BYTES, download_model
from job.storage.location import is_remote
from job.storage.open import ObjectStore, StorageOptions, fetch, open_store

CODE = ("job.model.base", "job.model.files", "job.model.quantized_cache.cache", "job.model.quantized_cache.layout")
"""Modules whose code decides the bits of a quantized base."""


@dataclass(frozen=True)
class FoundModel:
    """The model's files, and what they are."""

    folder: Path
    revision: str | None
    sha256: str
    cache_entry: CacheEntry | None
    quantized: bool
    original: Path | None = None


def check_model(folder: Path, settings: Settings) -> None:
    """Refuses what is wrong without the weights: an unusable configuration, lengths, and an impossible adapter.

    Raises:
        DataError, SettingsError: The same errors that loading the model would raise.
    """
    lora = settings.lora
    inspect(
        folder,
        max_length=settings.train.max_length,
        targets=lora.target_modules,
        rank=lora.rank,
        options=make_options(dict(lora), settings.train.max_steps or MANY_STEPS, settings.model.add_tokens),
    )


def embedding_rows(folder: Path) -> int | None:
    """Rows of the model's embedding according to its configuration; None if it does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        return int(text["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_model(
    attempt: Attempt, settings: Settings, storage: StorageOptions, before_weights: Callable[[Path, bool], None]
) -> FoundModel:
    """The model's files: the quantized base in the cache, or what the settings name.

    A later attempt uses the quantized base that the first one recorded, and does not contact the model's source.
    Before weights are downloaded, `before_weights` is called with the folder of the small files (configuration and
    tokenizer), and returns when they are checked.
    """
    earlier, base = attempt.recorded(Stage.PULL, Pulled), attempt.recorded(BASE, CachedBase)
    if (
        earlier is not None
        and base is not None
        and base.key is not None
        and (
            settings.lora.init != "loftq" or attempt.recorded(FIRST_VALUES, FirstValues) is not None
        )  # else the unquantized base is needed
        and (locations := _cache_locations(attempt, settings, storage))
    ):
        noted = entry_at(base.key, *locations, base.index_sha256)
        if (folder := find(noted, attempt.alive_in_thread)) is not None:
            return FoundModel(
                folder, earlier.model_revision, earlier.model_sha256, noted, quantized=True, original=None
            )
    source = settings.model.id
    if is_remote(source):
        if (small := _fetch_small_files(source, attempt.work / "model-small", storage)) is not None:
            before_weights(small, True)  # noqa: FBT003 - as hub.download_model calls it
        with named_by("JOB_MODEL__ID", ": "):
            source = fetch(source, attempt.work / "model", storage)
        folder, revision = download_model(source, None)
    else:
        folder, revision = download_model(source, settings.model.revision, before_weights)
    tokenizer_files(folder)  # fails now rather than when the adapter is published
    sha256 = fingerprint(folder)
    locations = _cache_locations(attempt, settings, storage)
    entry = None if locations is None else entry_for(_facts(settings, sha256), *locations)
    # Not in a later attempt: this entry may not be the one that the run began with.
    here = None if entry is None or earlier else find(replace(entry, store=None), attempt.alive_in_thread)
    return FoundModel(here or folder, revision, sha256, entry, quantized=here is not None, original=folder)


def fetch_original(attempt: Attempt, settings: Settings, storage: StorageOptions, record: Pulled) -> Path:
    """The folder of the base's own files, fetched again by an attempt that began with the quantized base.

    Raises:
        DataError: They are gone, or no longer those that the run began with.
        Unreachable, AccessDenied: The hub or the store cannot be used.
    """
    source = settings.model.id
    if is_remote(source):
        attempt.alive()
        with named_by("JOB_MODEL__ID", ": "):
            place = fetch(source, attempt.work / "model", storage)
        folder, _ = download_model(place, None)
    else:
        folder, _ = download_model(source, record.model_revision)
    if fingerprint(folder) != record.model_sha256:
        raise DataError([Problem("JOB_MODEL__ID", f"{source} is not what this run began with: its files have changed")])
    return folder


def _fetch_small_files(place: str, folder: Path, storage: StorageOptions) -> Path | None:
    """The folder with configuration and tokenizer of a model in a store; None if nothing is there."""
    store = open_store(place, storage)
    found = list(store.list())
    for info in found:
        if "/" not in info.key and not info.key.endswith(".safetensors") and info.bytes <= MAX_SMALL_BYTES:
            store.download(info.key, folder / info.key, max_bytes=info.bytes)
    return folder if found else None


def _cache_locations(
    attempt: Attempt, settings: Settings, storage: StorageOptions
) -> tuple[Path, ObjectStore | None] | None:
    """The folder and the store of the quantized cache; None if nothing is cached."""
    model, cache = settings.model, settings.storage.cache
    if model.quantization == "none" or model.keep_quantized == "off":
        return None
    if model.keep_quantized == "cache" and cache is None:
        return None
    store = open_store(settings.run.output, storage) if model.keep_quantized == "store" else None
    return attempt.work if cache is None else Path(cache), store


def _facts(settings: Settings, sha256: str) -> dict[str, Any]:
    """Everything that affects the bits of a quantized base: the key of its cache entry."""
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
