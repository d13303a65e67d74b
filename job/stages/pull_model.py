"""Finds the base's files: a quantized base in the cache, or the files that the settings name, downloaded and hashed.

An attempt that began with a quantized base and needs the unquantized one later fetches it by `fetch_original`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.common import host
from job.common.hashing import code_hashes
from job.errors import DataError, Problem, named_by
from job.model.device import choose_device, choose_dtype
from job.model.files import fingerprint
from job.model.quantized_cache.cache import find
from job.model.quantized_cache.layout import CachedBase, CacheEntry, entry_at, entry_for
from job.model.tokenizer_files import tokenizer_files
from job.model.weight_file_check import check_weight_files
from job.records import FirstValues, Pulled
from job.runs.attempt import Attempt
from job.runs.layout import BASE, FIRST_VALUES, Stage
from job.settings.schema import Model
from job.storage.hub import MAX_SMALL_BYTES, download_model
from job.storage.location import is_remote
from job.storage.open import ObjectStore, StorageOptions, download_listed, fetch, listed_files, open_store

CODE = (
    "job.model.experts",
    "job.model.files",
    "job.model.load_base",
    "job.model.placed_loading",
    "job.model.placed_weights",
    "job.model.quantized_cache.cache",
    "job.model.quantized_cache.layout",
)
"""Modules whose code decides the bits of a quantized base."""


@dataclass(frozen=True)
class BaseSettings:
    """The settings that decide which files of the base a run uses.

    Attributes:
        model: Where the base is, and how it is quantized and kept.
        init: `JOB_LORA__INIT`: some initial values of the adapter need the unquantized base.
        device: `JOB_RUN__DEVICE`.
        output: `JOB_RUN__OUTPUT`, whose store may keep the quantized base.
        cache: `JOB_STORAGE__CACHE`, a folder of this machine that may keep it.
    """

    model: Model
    init: str
    device: str
    output: str
    cache: str | None


@dataclass(frozen=True)
class BaseFiles:
    """The base's files on this machine.

    Attributes:
        folder: The files to load: the base's own, or a quantized base of the cache.
        revision: The commit on the hub; None for a path or URI.
        sha256: Hash of the base's own files.
        cache_entry: Where a quantized base is or will be kept; None if it is not kept.
        quantized: Whether `folder` is a quantized base of the cache.
        original: Folder of the base's own files; None if they are not on this machine.
    """

    folder: Path
    revision: str | None
    sha256: str
    cache_entry: CacheEntry | None
    quantized: bool
    original: Path | None = None


def find_base(
    attempt: Attempt, base: BaseSettings, storage: StorageOptions, before_weights: Callable[[Path, bool], None]
) -> BaseFiles:
    """Finds the quantized base in the cache, or downloads the files that the settings name.

    A later attempt uses the quantized base that the first one recorded, and does not contact the model's source.

    Args:
        attempt: Its work folder gets copies from a store.
        base: The settings.
        storage: How to reach stores.
        before_weights: Called before weights are downloaded, with the folder of configuration and tokenizer, and
            whether weights have to be downloaded; returns when these files are checked.

    Raises:
        DataError, SettingsError: There is no usable model at JOB_MODEL__ID.
        Unreachable, AccessDenied: The hub or a store cannot be used.
    """
    earlier, kept_base = attempt.recorded(Stage.PULL, Pulled), attempt.recorded(BASE, CachedBase)
    if (
        earlier is not None
        and kept_base is not None
        and kept_base.key is not None
        # else the unquantized base is needed
        and (base.init != "loftq" or attempt.recorded(FIRST_VALUES, FirstValues) is not None)
        and (locations := _cache_locations(attempt, base, storage))
    ):
        recorded_entry = entry_at(kept_base.key, *locations, kept_base.index_sha256)
        if (folder := find(recorded_entry, attempt.check_stop_in_thread)) is not None:
            return BaseFiles(
                folder, earlier.model_revision, earlier.model_sha256, recorded_entry, quantized=True, original=None
            )
    source = base.model.id
    if is_remote(source):
        if (small := _fetch_small_files(source, attempt.work / "model-small", storage)) is not None:
            before_weights(small, True)  # noqa: FBT003 - as hub.download_model calls it
        with named_by("JOB_MODEL__ID", ": "):
            source = fetch(source, attempt.work / "model", storage)
        folder, revision = download_model(source, None)
    else:
        # the commit of the first attempt: a branch or tag may have moved since
        requested_revision = (None if earlier is None else earlier.model_revision) or base.model.revision
        folder, revision = download_model(source, requested_revision, before_weights)
    check_weight_files(folder)  # before gigabytes are hashed and rows are tokenized
    tokenizer_files(folder)  # fails now rather than when the adapter is published
    sha256 = fingerprint(folder)
    locations = _cache_locations(attempt, base, storage)
    entry = None if locations is None else entry_for(_facts(base, sha256), *locations)
    # Only in the first attempt: later ones must use the entry that the run began with, which was looked up above.
    cached = None if entry is None or earlier else find(replace(entry, store=None), attempt.check_stop_in_thread)
    return BaseFiles(cached or folder, revision, sha256, entry, quantized=cached is not None, original=folder)


def fetch_original(attempt: Attempt, source: str, storage: StorageOptions, record: Pulled) -> Path:
    """The folder of the base's own files, fetched again by an attempt that began with the quantized base.

    Args:
        attempt: Its work folder gets a copy from a store.
        source: `JOB_MODEL__ID`.
        storage: How to reach stores.
        record: What the run's first attempt pulled.

    Raises:
        DataError: They are gone, or no longer those that the run began with.
        Unreachable, AccessDenied: The hub or the store cannot be used.
    """
    if is_remote(source):
        attempt.check_stop()
        with named_by("JOB_MODEL__ID", ": "):
            location = fetch(source, attempt.work / "model", storage)
        folder, _ = download_model(location, None)
    else:
        folder, _ = download_model(source, record.model_revision)
    if fingerprint(folder) != record.model_sha256:
        raise DataError(
            [
                Problem(
                    "JOB_MODEL__ID",
                    f"{source} has changed since this run began; restore its files, or start a new "
                    "run with another JOB_RUN__ID",
                )
            ]
        )
    return folder


def _fetch_small_files(location: str, folder: Path, storage: StorageOptions) -> Path | None:
    """The folder with configuration and tokenizer of a model in a store; None if nothing is there."""
    store = open_store(location, storage)
    with named_by("JOB_MODEL__ID", ": "):
        files = listed_files(store, location)
    for name, info in files.items():
        if "/" not in name and not name.endswith(".safetensors") and info.bytes <= MAX_SMALL_BYTES:
            download_listed(store, info, folder / name)
    return folder if files else None


def _cache_locations(
    attempt: Attempt, base: BaseSettings, storage: StorageOptions
) -> tuple[Path, ObjectStore | None] | None:
    """The folder and the store of the quantized cache; None if nothing is cached."""
    model, cache = base.model, base.cache
    if model.quantization == "none" or model.keep_quantized == "off":
        return None
    if model.keep_quantized == "cache" and cache is None:
        return None
    store = open_store(base.output, storage) if model.keep_quantized == "store" else None
    return attempt.work if cache is None else Path(cache), store


def _facts(base: BaseSettings, sha256: str) -> dict[str, Any]:
    """Everything that affects the bits of a quantized base; the key of its cache entry is made of it."""
    model, device, machine = base.model, choose_device(base.device), host.hardware()
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


def vocabulary_of(folder: Path) -> int | None:
    """`vocab_size` of the model's config.json, the rows of its embedding; None if it is not there."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        return int(text["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
