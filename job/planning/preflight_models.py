"""Checks of `plan`, made without weights: the base, its tokenizer and adapter, the safety classifier and the judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from shutil import copyfile
from typing import Any

from job.audit.safety import SETTING as SAFETY_SETTING
from job.audit.safety import unsafe_labels
from job.common.formatting import first_line, size
from job.errors import DataError, JobError, Problem, SettingsError, named_by, naming
from job.evaluation.principles import question, read_principles
from job.model.adapter_options import PLAIN, AdapterOptions, described
from job.model.architecture import Architecture
from job.model.architecture import read_config as read_architecture
from job.model.families import fused_family, why_not_recorded
from job.model.files import check_weights, read_config, weight_files
from job.model.load_base import inspect
from job.model.lora import count_parameters
from job.model.start_adapter import CONFIG as START_CONFIG
from job.model.start_adapter import TOKENIZER as START_TOKENIZER
from job.model.start_adapter import WEIGHTS as START_WEIGHTS
from job.model.target_modules import linear_weights, resolve_targets
from job.model.text_classifier import Labels
from job.model.tokenizer import load_tokenizer
from job.model.weight_file_check import check_weight_files
from job.planning.auxiliary_models import count_weights
from job.planning.known_models_and_data import CHARACTERS_PER_TOKEN
from job.planning.preflight import HUB_UNREACHABLE, Found, NotChecked, Online
from job.settings.field_types import is_server
from job.storage.hub import SMALL_FILES, cached_model, local_model, peek_model
from job.storage.open import StorageOptions, bytes_to_fetch, download_listed, is_remote, listed_files, open_store

MOSTLY = 0.5
"""The plan notes if less than this share of the weights would be quantized; in most models it is more."""
MAX_SMALL_BYTES = 64 << 20
MAX_START_BYTES = 256 << 20
"""Most bytes of an adapter to start from that are fetched for a plan."""


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights.

    Attributes:
        folder: Has its configuration and tokenizer.
        architecture: None if the memory formulas do not cover it.
        download_bytes: Bytes that the job has to fetch; None if the files' sizes are unknown.
        is_here: Whether the folder is the user's, with the weights.
    """

    folder: Path
    architecture: Architecture | None
    download_bytes: int | None
    is_here: bool = False


def preview_model(
    source: str,
    revision: str | None,
    *,
    online: Online,
    folder: Path,
    storage: StorageOptions,
) -> Found[ModelFacts]:
    """Fetches a model's configuration and tokenizer, and checks that it has weights in safetensors.

    Args:
        source: Hub id, URI or path.
        revision: For a hub id.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
    """
    download: int | None
    is_here = False
    if is_remote(source):
        model_folder, weights = _fetch_small_files(source, folder, storage)
        sentence, download = f"{source} can be read", bytes_to_fetch(source, storage)
    elif (local := local_model(source)) is not None:
        model_folder, weights, download = local, len(check_weight_files(local)), 0
        sentence, is_here = f"{source} is here", True
    else:
        model_folder, weights, download, sentence = _look_up_on_hub(source, revision, online=online)
    if not weights:
        raise DataError([Problem("JOB_MODEL__ID", f"{source} has no weights in safetensors")])
    _check_config(model_folder, source)
    facts = ModelFacts(model_folder, None, download, is_here)
    try:
        # As a run reads it: with transformers' defaults for what config.json does not say.
        architecture = read_architecture(read_config(model_folder).to_dict())
    except (JobError, ValueError) as error:  # a JobError is raised by the check of the adapter
        return "note", f"{sentence}; no figures: {first_line(error, 200)}", facts
    return "ok", sentence, replace(facts, architecture=architecture)


def files_without_weights(model: Path, folder: Path) -> Path:
    """Copies a model's configuration and tokenizer to a new folder, which is returned.

    For llama.cpp's converter. Of a model without weights it would look for those that an index of its files names, such
    as that of pickles, which the hub's models often have as well.
    """
    folder.mkdir()
    for file in model.iterdir():
        if any(map(file.match, (*SMALL_FILES, "*.txt"))) and not file.match("*.index.json") and file.is_file():
            copyfile(file, folder / file.name)
    return folder


@dataclass(frozen=True)
class AdapterFacts:
    """The adapter on a model: names of the layers that get one, and its number of parameters."""

    targets: tuple[str, ...]
    parameters: int


def preview_adapter(
    model: ModelFacts | None,
    targets: Sequence[str] | str | None,
    *,
    quantization: str,
    max_length: int,
    rank: int = 1,
    options: AdapterOptions = PLAIN,
    problems: Callable[[Any, Any], Iterable[Problem]] = lambda _config, _empty: (),
) -> Found[AdapterFacts]:
    """Builds the model without weights, as a run does first, to find what LoRA adapts and what would be quantized.

    Args:
        model: As `preview_model` returned it; None if its files cannot be fetched.
        targets: `JOB_LORA__TARGET_MODULES`; None for the default of the architecture.
        quantization: `nf4` or `none`.
        max_length: Longest example in tokens.
        rank: `JOB_LORA__RANK`.
        options: The adapter's other options.
        problems: As for `inspect`: what else of the settings this model excludes.
    """
    if model is None:
        raise NotChecked("the model's files cannot be fetched")
    config, empty = inspect(
        model.folder, max_length=max_length, targets=targets, rank=rank, options=options, problems=problems
    )
    if model.is_here:
        check_weights(model.folder, config, empty)
    modules = tuple(sorted(resolve_targets(empty, targets)))
    names = ", ".join(modules)
    linear, total = (sum(p.numel() for p in part) for part in (linear_weights(empty), empty.parameters()))
    facts = AdapterFacts(modules, count_parameters(empty, rank=rank, target_modules=modules, options=options))
    text = f"LoRA on {names}"
    if options != PLAIN:
        options_in_words = ", ".join(
            f"{name}={value}" for name, value in described(options).items() if name != "adalora"
        )
        text = f"{text}; {options_in_words}; {facts.parameters:,} parameters"
    if options.not_fused:
        text = f"{text}; on a GPU at less than half the speed, by PEFT's own layers: {options.not_fused}"
    elif fused_family(config_values := config.to_dict()) is None:
        text = f"{text}; on a GPU only these layers are fused, not the whole decoder of {config.model_type}"
    elif why := why_not_recorded(config_values):
        text = f"{text}; on a GPU all of {config.model_type}'s decoder is fused, without CUDA graphs: {why}"
    if quantization == "none" or linear >= MOSTLY * total:
        return "ok", text, facts
    stays = "the rest, such as embeddings, stays in 16 bit"
    return "note", f"{text}; {linear:,} of {total:,} weights can be held as {quantization}, {stays}", facts


def find_tokenizer(model: ModelFacts | None, added_tokens: Sequence[str] | None = None) -> Found[Any]:
    """The tokenizer next to the model, with new tokens."""
    if model is None:
        raise NotChecked(
            "the model's files cannot be fetched; tokens are estimated from characters where there is text"
        )
    tokenizer = load_tokenizer(model.folder, added_tokens)
    return "ok", f"{len(tokenizer):,} tokens", tokenizer


@dataclass(frozen=True)
class AuxiliaryFacts:
    """An auxiliary model: the safety classifier or the judge.

    Attributes:
        download_bytes: Bytes to fetch.
        weights: Its number of weights (`auxiliary_models.count_weights`); None if unknown.
        question_tokens: Tokens of a question to a judge, without prompt and answers.
        served: Whether it is a server, which the job only asks.
    """

    download_bytes: int
    weights: int | None
    question_tokens: int = 0
    served: bool = False


def preview_safety_model(
    place: str,
    revision: str | None,
    labels: Sequence[str] | None,
    threshold: float,
    *,
    online: Online,
    folder: Path,
    storage: StorageOptions,
) -> Found[AuxiliaryFacts]:
    """Finds which of the classifier's labels count as unsafe; rows are not scored, since that takes the weights.

    Args:
        place: JOB_DATA__SAFETY_MODEL.
        revision: JOB_DATA__SAFETY_REVISION.
        labels: JOB_DATA__UNSAFE_LABELS.
        threshold: JOB_DATA__UNSAFE_THRESHOLD.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
    """
    with naming(SAFETY_SETTING):
        model_folder, weight_bytes, download = _auxiliary_model(
            place, revision, "safety", online=online, folder=folder, storage=storage
        )
        classifier_labels = Labels(model_folder, SAFETY_SETTING)
    unsafe = unsafe_labels(classifier_labels.names, labels, exclusive=classifier_labels.exclusive)
    what = f"{place}: unsafe is a probability of at least {threshold:g} for {', '.join(unsafe)}"
    facts = AuxiliaryFacts(download, count_weights(model_folder, weight_bytes, heads=False))
    return "ok", f"{what}; the job scores the rows, the plan does not", facts


def preview_judge(
    rules: str,
    judge: str,
    revision: str | None,
    *,
    online: Online,
    folder: Path,
    storage: StorageOptions,
) -> Found[AuxiliaryFacts]:
    """Reads the rules, and checks that the judge's model is there; a server is not contacted.

    Args:
        rules: JOB_EVAL__PRINCIPLES.
        judge: JOB_EVAL__JUDGE.
        revision: JOB_EVAL__JUDGE_REVISION.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
    """
    rules_read = read_principles(Path(rules))
    text = f"{len(rules_read)} rules; each pair of answers is judged twice by {judge}"
    rule_tokens = ceil(len(question(rules_read, "", "", "")) / CHARACTERS_PER_TOKEN)
    if is_server(judge):
        facts = AuxiliaryFacts(0, None, rule_tokens, served=True)
        return "ok", f"{text}, which the plan does not contact; its time is not forecast", facts
    with naming("JOB_EVAL__JUDGE"):
        model_folder, weight_bytes, download = _auxiliary_model(
            judge, revision, "judge", online=online, folder=folder, storage=storage
        )
    return "ok", text, AuxiliaryFacts(download, count_weights(model_folder, weight_bytes, heads=True), rule_tokens)


def _auxiliary_model(
    place: str, revision: str | None, name: str, *, online: Online, folder: Path, storage: StorageOptions
) -> tuple[Path, int | None, int]:
    """(folder of an auxiliary model's small files, bytes of its weights, None if unknown, bytes to fetch).

    Small files of a store are copied to the folder `name` below `folder`.

    Raises:
        DataError, SettingsError: There is nothing at `place`, or no weights in safetensors.
    """
    weight_bytes: int | None
    if is_remote(place):
        (folder / name).mkdir()
        model_folder, weights = _fetch_small_files(place, folder / name, storage)
        weight_bytes = download = bytes_to_fetch(place, storage)
    elif (local := local_model(place)) is not None:
        files = weight_files(local)
        model_folder, weights, weight_bytes, download = local, len(files), sum(file.stat().st_size for file in files), 0
    else:
        model_folder, weights, weight_bytes, _ = _look_up_on_hub(place, revision, online=online)
        download = weight_bytes or 0
    if not weights:
        raise DataError([Problem("JOB_MODEL__ID", f"{place} has no weights in safetensors")])
    return model_folder, weight_bytes, download


def _check_config(folder: Path, source: str) -> None:
    """Refuses a config.json that is none at all, by the name that the settings have for the model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError([Problem("JOB_MODEL__ID", f"{source} has no config.json that can be read: {error}")]) from error
    if not isinstance(config, dict):
        raise DataError([Problem("JOB_MODEL__ID", f"{source} has a config.json that is not a JSON object")])


def _look_up_on_hub(source: str, revision: str | None, *, online: Online) -> tuple[Path, int, int | None, str]:
    """(folder, number of weight files, bytes to fetch, where it was found, as a sentence)."""
    if online():
        folder, files = peek_model(source, revision)
        weights = sum(name.endswith(".safetensors") for name in files)
        return folder, weights, sum(files.values()), f"{source} can be fetched from the hub"
    cached = cached_model(source, revision)
    if cached is None or not (cached / "config.json").exists():
        raise NotChecked(f"{source} is no folder here and not in the cache, and {HUB_UNREACHABLE}")
    return cached, 1, None, f"{source} is in the cache; for its weights {HUB_UNREACHABLE}"


def _fetch_small_files(source: str, folder: Path, storage: StorageOptions) -> tuple[Path, int]:
    """Copies everything but the weights; returns the folder and the number of weight files."""
    store = open_store(source, storage)
    with named_by("JOB_MODEL__ID", ": "):
        files = listed_files(store, source)
    if not files:
        raise SettingsError([Problem("JOB_MODEL__ID", f"there is nothing at {source}; correct the URI")])
    target = folder / "model"
    target.mkdir()
    for name, info in files.items():
        if "/" not in name and not name.endswith(".safetensors") and info.bytes <= MAX_SMALL_BYTES:
            download_listed(store, info, target / name)
    return target, sum(name.endswith(".safetensors") for name in files)


def fetch_start(uri: str, folder: Path, storage: StorageOptions) -> None:
    """Copies the adapter of JOB_LORA__START from a store.

    Raises:
        SettingsError: There is nothing at the URI.
        DataError: There are other files than an adapter's.
        NotChecked: It is too large to be fetched for a plan.
        Unreachable, AccessDenied: As the store says.
    """
    store = open_store(uri, storage)
    names = (START_CONFIG, START_WEIGHTS, START_TOKENIZER)
    there = {name: info for name in names for info in store.list(name) if info.key == name}
    if not there and next(store.list(), None) is None:
        what = f"{uri}: there is no such object, and nothing below it; correct the URI"
        raise SettingsError([Problem("JOB_LORA__START", what)])
    if missing := [name for name in names[:2] if name not in there]:
        raise DataError([Problem("JOB_LORA__START", f"{uri} has no {' and no '.join(missing)}; correct the URI")])
    if (total := sum(info.bytes for info in there.values())) > MAX_START_BYTES:
        raise NotChecked(f"{uri} is there, and has {size(total, ' ')}, too much to fetch for a plan")
    for name, info in there.items():
        download_listed(store, info, folder / name)
