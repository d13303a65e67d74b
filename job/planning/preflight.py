"""The checks of `plan`, made before a GPU is paid for: storage, model, tokenizer, data and questions.

To add one: write a function that returns `Found` (or raises NotChecked, or the JobError that the job would end with),
and call it by `run_check` in `input_checks.check_run_inputs`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import uuid4

from job.audit.safety import SETTING as SAFETY_SETTING
from job.audit.safety import unsafe_labels
from job.common import formatting
from job.common.findings import statistics
from job.common.resources import usable_cpus
from job.common.source_list import locate_sources, parse_sources
from job.data.examples import lengths_of
from job.data.hub_dataset import is_hub_id
from job.data.preferences import EncodedAnswers
from job.data.sources import check_source, require_revision
from job.data.tokenization import Encoded
from job.data.training_and_validation import ValidationSource, load_rows
from job.errors import DataError, JobError, Problem, SettingsError, Unreachable, named_by, naming
from job.evaluation.principles import question, read_principles
from job.evaluation.question_lengths import check_lengths, count_questions
from job.evaluation.task_files import is_task_file
from job.evaluation.task_names import check_tasks
from job.evaluation.tasks import Tasks, check_choices, load_tasks
from job.model.adapter_options import PLAIN, AdapterOptions, described
from job.model.architecture import Architecture, read_config
from job.model.base import inspect, load_tokenizer
from job.model.families import fused_family, why_not_recorded
from job.model.files import weight_files
from job.model.lora import count_parameters
from job.model.target_modules import linear_weights, resolve_targets
from job.model.text_classifier import Labels
from job.planning.auxiliary_models import count_weights
from job.planning.character_tokenizer import CharacterTokenizer
from job.planning.known_models_and_data import CHARACTERS_PER_TOKEN, TaskTokens
from job.planning.shown_rows import ShownRow, show_row
from job.records import AuditRecord, Example
from job.settings.field_types import is_server
from job.storage.base import disk_errors
from job.storage.hub import cached_model, local_model, peek_dataset, peek_model
from job.storage.local import LocalStore
from job.storage.open import ObjectStore, StorageOptions, fetch, is_remote, open_store, size

MAX_BYTES = 256 << 20
"""Larger data sets are not downloaded for a plan."""
MOSTLY = 0.5
"""If less than this share of the weights would be quantized, the plan says so; in most models it is more."""
MAX_SMALL_BYTES = 64 << 20
HUB_UNREACHABLE = "the hub cannot be reached from here"
Online = Callable[[], bool]
"""Whether the hub can be reached; called only if something has to be fetched from it."""
FILE_BYTES = (8 << 20) + 1
"""Size of the file that `plan` uploads to a store: enough for a multipart upload, as checkpoints have."""
_PLACES = 2
_ACTIONS = {"record": "", "skip": ", left out", "error": ""}
NO_LIMIT = 1 << 31
"""Maximum length of an example while tokens are only estimated: none."""
State = Literal["ok", "note", "not checked", "wrong"]
T = TypeVar("T")


class NotChecked(Exception):
    """A check could not be made, so nothing is known about its subject."""


@dataclass(frozen=True)
class PreflightResult:
    """The result of one check; `error` is the error the job would end with, if any."""

    name: str
    state: State
    what: str
    error: JobError | None = None


Found = tuple[State, str, T]
"""What a check returns: its state, a sentence about it, and what it read."""


def run_check(
    name: str, work: Callable[[], Found[T]], *, unreachable: State = "not checked"
) -> tuple[PreflightResult, T | None]:
    """Makes one check and catches its errors, so that the other checks are made too.

    Args:
        name: What is checked, as it is printed.
        work: Makes the check.
        unreachable: State for a service that does not answer. By default that is no error, because this machine's
            network may differ from the job's.
    """
    try:
        state, what, found = work()
    except NotChecked as reason:
        return PreflightResult(name, "not checked", str(reason)), None
    except Unreachable as error:
        return PreflightResult(name, unreachable, str(error), error if unreachable == "wrong" else None), None
    except JobError as error:
        return PreflightResult(name, "wrong", str(error), error), None
    return PreflightResult(name, state, what), found


def round_trip(store: ObjectStore, name: str) -> Found[float]:
    """Tests a store with the requests that the job will make, on objects of its own; returns the seconds it took.

    A small object is written and read, files of 0 and of `FILE_BYTES` bytes are uploaded and downloaded, all are listed
    and deleted, and conditional writes are tried.

    Args:
        store: The store.
        name: The store's name in the result's sentence.

    Raises:
        AccessDenied: A kind of request is not allowed.
        Unreachable: The store does not answer, or returns something else than was written.
    """
    key, content = f".plan-{uuid4().hex}", uuid4().bytes
    files = {f"{key}-{size}": size for size in (0, FILE_BYTES)}
    began = time.monotonic()
    try:
        store.write(key, content)
        stored = store.read(key)
        whole = [_file_round_trip(store, one, size) for one, size in files.items()]
        listed = [info.key for info in store.list(key)]
    finally:
        for one in (key, *files):
            store.delete(one)
    right = stored is not None and stored.data == content and all(whole) and listed == sorted([key, *files])
    if not right or store.read(key) is not None:
        raise Unreachable(f"{name}: objects that were written could not be read, listed and deleted unchanged")
    conditional = store.conditional_writes()
    seconds = time.monotonic() - began
    what = f"{name}: wrote, read, listed and deleted"
    if conditional:
        return "ok", f"{what}; conditional writes are honoured", seconds
    return (
        "note",
        f"{what}; no conditional writes, so two attempts that start at the same time may both run for a while",
        seconds,
    )


def _file_round_trip(store: ObjectStore, key: str, size: int) -> bool:
    """Whether an uploaded file of random bytes is downloaded unchanged."""
    with tempfile.TemporaryDirectory(prefix="qlora-job-") as folder, disk_errors(f"cannot write to {folder}"):
        there, back = Path(folder, "there"), Path(folder, "back")
        there.write_bytes(os.urandom(size))
        store.upload(there, key)
        try:
            store.download(key, back, max_bytes=size)
        except FileNotFoundError:
            return False
        return there.read_bytes() == back.read_bytes()


def local_round_trip(output: Path, name: str) -> Found[float]:
    """`round_trip` in a temporary folder below a local output; it and the parents it created are removed again."""
    root = output / f".plan-{uuid4().hex}"
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        return round_trip(LocalStore(root), name)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        with suppress(OSError):
            for folder in made[1:]:
                folder.rmdir()  # fails unless it is empty: another process may use it by now


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights: the folder of its small files, its architecture, and the bytes to download.

    `download_bytes` is None if the sizes of its files are unknown.
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
    """Fetches a model's configuration and tokenizer, and checks that it has weights in safetensors.

    Args:
        source: Hub id, URI or path.
        revision: For a hub id.
        max_length: Longest example in tokens; it has to fit the model's window.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
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
        raise DataError([Problem("JOB_MODEL__ID", f"{source} has no weights in safetensors")])
    try:
        architecture = read_config(_config(place, source))
    except ValueError as error:
        return "note", f"{where}; no figures: {error}", ModelFacts(place, None, download)
    if architecture.window is not None and architecture.window < max_length:
        what = f"{max_length} is more than the model's window of {architecture.window} tokens; lower it"
        raise SettingsError([Problem("JOB_TRAIN__MAX_LENGTH", what)])
    return "ok", where, ModelFacts(place, architecture, download)


@dataclass(frozen=True)
class AdapterFacts:
    """Names of the layers that get an adapter, as they were found, and the number of its parameters."""

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
) -> Found[AdapterFacts]:
    """Builds the model without weights, as a run does first, to find what LoRA adapts and what would be quantized.

    Args:
        model: As `preview_model` found it.
        targets: `JOB_LORA__TARGET_MODULES`; None for those that are found.
        rank: `JOB_LORA__RANK`.
        options: What else the adapter is to be.
        quantization: `nf4` or `none`.
        max_length: Longest example in tokens.
    """
    if model is None:
        raise NotChecked("the model's files cannot be had")
    config, empty = inspect(model.folder, max_length=max_length, targets=targets, rank=rank, options=options)
    found = tuple(sorted(resolve_targets(empty, targets)))
    names = ", ".join(found)
    linear, all_ = (sum(p.numel() for p in part) for part in (linear_weights(empty), empty.parameters()))
    facts = AdapterFacts(found, count_parameters(empty, rank=rank, target_modules=found, options=options))
    what = f"LoRA on {names}"
    if options != PLAIN:
        said = ", ".join(f"{name}={value}" for name, value in described(options).items() if name != "adalora")
        what = f"{what}; {said}; {facts.parameters:,} parameters"
    if options.not_fused:
        what = f"{what}; on a GPU at less than half the speed, by PEFT's own layers: {options.not_fused}"
    elif fused_family(known := config.to_dict()) is None:
        what = f"{what}; on a GPU only these layers are fused, not the whole decoder of {config.model_type}"
    elif why := why_not_recorded(known):
        what = f"{what}; on a GPU all of {config.model_type}'s decoder is fused, without CUDA graphs: {why}"
    if quantization == "none" or linear >= MOSTLY * all_:
        return "ok", what, facts
    stays = "the rest, such as embeddings, stays in 16 bit"
    return "note", f"{what}; {linear:,} of {all_:,} weights can be held as {quantization}, {stays}", facts


def _config(place: Path, source: str) -> dict[str, Any]:
    """The model's config.json."""
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError([Problem("JOB_MODEL__ID", f"{source} has no config.json that can be read: {error}")]) from error
    if not isinstance(config, dict):
        raise DataError([Problem("JOB_MODEL__ID", f"{source} has a config.json that holds no object")])
    return config


def _of_the_hub(source: str, revision: str | None, *, online: Online) -> tuple[Path, int, int | None, str]:
    """(folder, number of weight files, bytes to fetch, where it was found, as a sentence)."""
    if online():
        place, files = peek_model(source, revision)
        weights = sum(name.endswith(".safetensors") for name in files)
        return place, weights, sum(files.values()), f"{source} can be fetched from the hub"
    cached = cached_model(source, revision)
    if cached is None or not (cached / "config.json").exists():
        raise NotChecked(f"{source} is not in the cache, and {HUB_UNREACHABLE}")
    return cached, 1, None, f"{source} is in the cache; for its weights {HUB_UNREACHABLE}"


def _fetch_small_files(source: str, folder: Path, storage: StorageOptions) -> tuple[Path, int]:
    """Copies everything but the weights; returns the folder and the number of weight files."""
    store = open_store(source, storage)
    found = list(store.list())
    if not found:
        raise SettingsError([Problem("JOB_MODEL__ID", f"there is nothing at {source}; correct the URI")])
    target = folder / "model"
    target.mkdir()
    for info in found:
        if "/" not in info.key and not info.key.endswith(".safetensors") and info.bytes <= MAX_SMALL_BYTES:
            store.download(info.key, target / info.key)
    return target, sum(info.key.endswith(".safetensors") for info in found)


@dataclass(frozen=True)
class DataFacts:
    """The examples as they would be trained on. `estimated`: token counts are estimated from characters.

    `validation` are the rows that would be validated on.
    """

    examples: Sequence[Example]
    estimated: bool
    download_bytes: int
    licence: str | None
    validation: Sequence[Example] = ()
    shown: Sequence[ShownRow] = ()
    schema: str = ""
    audit: AuditRecord | None = None
    long_rows: Mapping[str, int] = field(default_factory=dict)


def preview_data(
    source: str,
    *,
    tokenizer: Any | None,
    max_length: int,
    online: Online,
    folder: Path,
    storage: StorageOptions,
    revision: str | None,
    show: int = 0,
    validation: float | ValidationSource | None = None,
    **reading: Any,
) -> Found[DataFacts]:
    """Reads and checks the rows as the job will; without a tokenizer, token counts are estimated.

    Args:
        source: JOB_DATA__SOURCE.
        tokenizer: The model's; None if it could not be read.
        max_length: Longest example allowed, in tokens.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
        revision: For a hub id.
        show: How many rows to show, the first ones; none without a tokenizer.
        validation: What to validate on.
        reading: Further arguments of `load_rows`.
    """
    split = reading["split"]
    found = [
        _of_the_data(one.place, one.revision or revision, storage, split=split, online=online)
        for one in parse_sources(source)
    ]
    download = sum(size for size, _ in found)
    licence = "; ".join(sorted({licence for _, licence in found if licence})) or None
    if download > MAX_BYTES:
        raise NotChecked(f"{source} has {formatting.size(download, ' ')}, too much to fetch for a plan")
    shown: list[ShownRow] = []

    def keep(item: Encoded | EncodedAnswers) -> None:
        if tokenizer is not None and len(shown) < show:
            shown.append(show_row(item, tokenizer))

    if isinstance(validation, ValidationSource):
        where = (validation.name, validation.revision, storage, "JOB_DATA__VALIDATION")
        more, _ = _of_the_data(*where, split=validation.split, online=online)
        if more > MAX_BYTES:
            raise NotChecked(f"{validation.name} has {formatting.size(more, ' ')}, too much to fetch for a plan")
        download += more
        with named_by("JOB_DATA__VALIDATION", ": "):
            validation = replace(validation, place=fetch(validation.place, folder / "validation", storage))
    with named_by("JOB_DATA__SOURCE", ": "):
        place = locate_sources(source, lambda place, kind: fetch(place, folder / kind, storage))
    examples, held_out, record = load_rows(
        place,
        validation,
        revision=revision,
        max_length=NO_LIMIT if tokenizer is None else max_length,
        tokenizer=tokenizer or CharacterTokenizer(CHARACTERS_PER_TOKEN),
        name=source,
        on_example=keep,
        processes=usable_cpus(),
        **reading,
    )
    what = f"{record.rows:,} rows in the schema {record.format}"
    if record.validation is not None:
        what += f", {record.validation.rows:,} for validation"
    if record.skipped:
        what += f"; skipped {', '.join(f'{count} {kind}' for kind, count in record.skipped.items())}"
    facts = DataFacts(
        examples,
        tokenizer is None,
        download,
        licence,
        held_out or (),
        shown,
        record.format,
        # Estimated lengths are no statistics.
        record.audit if tokenizer is not None or record.audit is None else replace(record.audit, lengths={}),
        record.long_rows,
    )
    if tokenizer is not None:
        return "ok", what, facts
    long = sum(length > max_length for length in lengths_of(examples))
    return "note", f"{what}; tokens are estimated{f', so {long} rows may be too long' if long else ''}", facts


def report_audit(record: AuditRecord, long_rows: Mapping[str, int]) -> Found[None]:
    """What the audit found in the rows, by kind, what it could not check, and what kind of text they are."""
    found = [
        f"{check.rows:,} {kind} ({', '.join(check.places[:_PLACES])}{', ...' * (check.rows > _PLACES)})"
        f"{_ACTIONS[check.action]}"
        for kind, check in record.checks.items()
        if check.rows
    ]
    missing = [f"{kind} not checked: {check.not_checked}" for kind, check in record.checks.items() if check.not_checked]
    if record.too_short:
        missing.append(f"{record.too_short:,} questions of one or two words were not looked for")
    what = "; ".join([*(found or ["nothing found"]), *missing])
    text = " ".join([f"{record.rows:,} rows: {what}.", *statistics(asdict(record), long_rows)])
    return "note" if found or missing else "ok", text, None


@dataclass(frozen=True)
class AuxiliaryFacts:
    """An auxiliary model: the bytes to fetch, and its `auxiliary_models.count_weights`.

    `question_tokens` are those of a question to a judge without prompt and answers.
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
    """Says which labels of the classifier count as unsafe; rows are scored by the job, which has the weights.

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
        found, held, download = _auxiliary_model(
            place, revision, "safety", online=online, folder=folder, storage=storage
        )
        known = Labels(found, SAFETY_SETTING)
    chosen = unsafe_labels(known.names, labels, exclusive=known.exclusive)
    what = f"{place}: unsafe is a probability of at least {threshold:g} for {', '.join(chosen)}"
    facts = AuxiliaryFacts(download, count_weights(found, held, heads=False))
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
    """Reads the rules, and looks whether the judge is there; nothing is asked of a server.

    Args:
        rules: JOB_EVAL__PRINCIPLES.
        judge: JOB_EVAL__JUDGE.
        revision: JOB_EVAL__JUDGE_REVISION.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
    """
    found = read_principles(Path(rules))
    what = f"{len(found)} rules; each pair of answers is judged twice by {judge}"
    asked = ceil(len(question(found, "", "", "")) / CHARACTERS_PER_TOKEN)
    if is_server(judge):
        facts = AuxiliaryFacts(0, None, asked, served=True)
        return "ok", f"{what}, which the plan does not ask; how long that takes is the server's matter", facts
    with naming("JOB_EVAL__JUDGE"):
        place, held, download = _auxiliary_model(
            judge, revision, "judge", online=online, folder=folder, storage=storage
        )
    return "ok", what, AuxiliaryFacts(download, count_weights(place, held, heads=True), asked)


def _auxiliary_model(
    place: str, revision: str | None, name: str, *, online: Online, folder: Path, storage: StorageOptions
) -> tuple[Path, int | None, int]:
    """The small files of an auxiliary model, its weights' bytes, and the bytes to fetch.

    The small files are copied from a store to the folder `name`. The weights' bytes are None if they are unknown.

    Raises:
        DataError, SettingsError: There is nothing at its place, or no weights in safetensors.
    """
    held: int | None
    if is_remote(place):
        (folder / name).mkdir()
        found, weights = _fetch_small_files(place, folder / name, storage)
        held = download = size(place, storage)
    elif (local := local_model(place)) is not None:
        files = weight_files(local)
        found, weights, held, download = local, len(files), sum(file.stat().st_size for file in files), 0
    else:
        found, weights, held, _ = _of_the_hub(place, revision, online=online)
        download = held or 0
    if not weights:
        raise DataError([Problem("JOB_MODEL__ID", f"{place} has no weights in safetensors")])
    return found, held, download


def _of_the_data(
    source: str,
    revision: str | None,
    storage: StorageOptions,
    setting: str = "JOB_DATA__SOURCE",
    *,
    split: str,
    online: Online,
) -> tuple[int, str | None]:
    """(bytes to download, 0 for a local file; the licence on the hub's card, if there is one)."""
    if is_remote(source):
        return size(source, storage), None
    check_source(source, revision, split, setting)
    if not is_hub_id(source):
        return 0, None
    if not online():
        raise NotChecked(f"{source}: {HUB_UNREACHABLE}")
    return peek_dataset(source, require_revision(revision))


def preview_questions(
    names: Sequence[str],
    data: Mapping[str, str],
    num_fewshot: int | None = None,
    *,
    needed_by: Sequence[str] = (),
    tokenizer: Any | None,
    limit: int | None,
    online: Online,
    folder: Path,
    storage: StorageOptions,
    max_length: int = NO_LIMIT,
    cut: bool = False,
    on_tasks: Callable[[Tasks], None] | None = None,
) -> Found[TaskTokens]:
    """Loads the tasks as the job will, if all their questions can be fetched.

    Args:
        names: Tasks.
        data: The user's own files of questions, by task.
        needed_by: Settings that need a multiple-choice task.
        num_fewshot: Examples in every prompt; None for as many as each task says.
        tokenizer: The model's; None if it could not be read.
        limit: Number of questions of each task; None for all.
        online: Whether the hub can be reached.
        folder: Folder for copies from a store.
        storage: How to reach stores.
        max_length: The most tokens of a question with one of its choices.
        cut: Whether the beginning of longer ones is cut off.
        on_tasks: Called with the tasks, as soon as they are loaded.
    """
    check_tasks(names, data)
    if (missing := [name for name in names if name not in data and not is_task_file(name)]) and not online():
        raise NotChecked(f"{', '.join(missing)}: {HUB_UNREACHABLE}")
    with named_by("JOB_EVAL__DATA", ": "):
        files = {task: Path(fetch(uri, folder / "questions" / task, storage)) for task, uri in data.items()}
    tasks = load_tasks(names, files, data, num_fewshot)
    check_choices(tasks, needed_by)
    if on_tasks is not None:
        on_tasks(tasks)
    if tokenizer is not None:
        check_lengths(tasks, tokenizer, limit=limit, max_length=max_length, cut=cut, vocabulary=None)
    facts = TaskTokens(*count_questions(tasks, tokenizer or CharacterTokenizer(CHARACTERS_PER_TOKEN), limit))
    return "ok", f"{facts.count:,} questions in {', '.join(names)}", facts


def find_tokenizer(model: ModelFacts | None, added_tokens: Sequence[str] | None = None) -> Found[Any]:
    """The tokenizer beside the model, with new tokens."""
    if model is None:
        raise NotChecked("the model's files cannot be had; tokens are estimated from characters where there is text")
    tokenizer = load_tokenizer(model.folder, added_tokens)
    return "ok", f"{len(tokenizer):,} tokens", tokenizer
