"""The first stage: downloads and checks model, data and questions, before the model is loaded.

On each machine the first process does this; the others read its results from the local disk. The steps are in
`pull_model`, `pull_rows`, `pull_audit`, `pull_prompts` and `pull_other_models`, each of which gets only the settings
that it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import log
from job.common.bad_row_reasons import by_reason
from job.common.resources import check_disk, required_bytes
from job.common.source_list import parse_sources
from job.common.validation import adapter_of
from job.data.licences import find_licence
from job.data.sources import copies_named_as_given
from job.data.text_tokenizer import broken_tokenizer
from job.data.token_cache import Tokens, open_tokens
from job.data.training_and_validation import ValidationSource
from job.errors import check_all
from job.evaluation.policy import Policy, read_policy
from job.evaluation.question_lengths import check_lengths
from job.evaluation.task_names import MULTIPLE_CHOICE
from job.evaluation.tasks import Tasks, check_choices, check_gate, load_tasks
from job.model.start_adapter import FoundStart, hash_start
from job.model.tokenizer import load_tokenizer
from job.model.tokenizer_files import rows_with
from job.records import DatasetRecord, GroupSpec, PromptRow, Pulled
from job.results.baseline import Baseline, check_questions, read_baseline
from job.runs.attempt import Attempt
from job.runs.layout import ADAPTER, Stage
from job.settings.field_types import is_server
from job.settings.load import Settings
from job.settings.training_stages import start_of
from job.stages.fetch_input import LATER, fetch_input
from job.stages.handoff import Sources
from job.stages.inputs import check_inputs
from job.stages.preload import import_libraries
from job.stages.pull_audit import audit_arguments, known_audit, known_scores, with_audit_of_before
from job.stages.pull_checks import CheckedSettings, check_files_of_exports, check_model, check_rows, check_start_on
from job.stages.pull_in_background import BackgroundBase, base_in_background
from job.stages.pull_model import BaseSettings, vocabulary_of
from job.stages.pull_other_models import pull_judge, pull_safety_model, pull_start_adapter, recorded_judge_sha256
from job.stages.pull_prompts import find_prompt_rows, prompts_record
from job.stages.pull_rows import FetchedRows, RowSettings, check_hub, fetch_rows, read_rows, validation_of
from job.stages.safety import SafetyModel
from job.storage.open import StorageOptions, bytes_to_fetch, storage_options


@dataclass(frozen=True)
class _Shared:
    """What the first process of a machine passes to the others: the record of the pull, and paths of folders.

    Attributes:
        record: The record of the pull.
        folder: Path of the base's files.
        quantized: Whether these are a quantized base of the cache.
        tokens: Path of the tokenized rows.
        start: Path of the adapter that training starts from; None without one.
    """

    record: Pulled
    folder: str
    quantized: bool
    tokens: str
    start: str | None


def pull(attempt: Attempt, settings: Settings, later: Sequence[Settings] = ()) -> Sources:
    """Fetches and checks all inputs, in the first process of each machine.

    Everything that can be checked without the model's weights is checked before they are downloaded. Rows are read
    during the download. The first attempt also reads the rows and prompts of `later` training stages, so that errors in
    them are found before training.

    Args:
        attempt: The inputs are put into its work folder.
        settings: The settings of this training stage.
        later: The settings of the training stages after this one.

    Raises:
        DataError, SettingsError: The data, the questions, the model or the settings cannot be used.
        Unreachable, AccessDenied: The hub or a store cannot be used.
        Preempted: The job was asked to stop.
    """
    processes, storage = attempt.processes, storage_options(settings.storage)
    settings = _at_commit_of_before(attempt, settings)
    date = processes.broadcast("date of the run", lambda: settings.data.date or _date(attempt))
    sources = _pull_for_machine(attempt, settings, storage, date, later)
    if settings.eval.principles is None:
        return sources
    # Only process 0 has the judge, but all processes need the same record: the run's fingerprint is made of it.
    record = processes.broadcast("judge", lambda: [sources.record.judge_sha256, sources.record.judge_revision])
    return replace(sources, record=replace(sources.record, judge_sha256=record[0], judge_revision=record[1]))


def _pull_for_machine(
    attempt: Attempt, settings: Settings, storage: StorageOptions, date: str, later: Sequence[Settings]
) -> Sources:
    """The inputs as this process uses them: pulled by it or by the first process of its machine."""
    processes = attempt.processes
    if processes.place.local_world_size == 1:
        return _pull(attempt, settings, storage, date, later)[0]
    if processes.place.local_rank:
        import_libraries()  # while the first process downloads
    elif processes.place.rank:  # another machine, whose files process 0 has not seen
        check_inputs(settings, later, has_record=True)
    sources = _pull(attempt, settings, storage, date, later) if processes.place.local_rank == 0 else None
    shared = processes.broadcast_on_machine("sources", lambda: _write_shared(*sources) if sources else None)
    if sources:
        return sources[0]
    return _read_shared(adapter_of(_Shared).validate_json(shared or ""), settings.model.add_tokens)


def _date(attempt: Attempt) -> str:
    """The day on which the run began. Chat templates that insert the current date get this one, in every attempt.

    It is the earliest start in the run log, which is written as soon as the first attempt starts.
    """
    return min([attempt.started, *(record.started for record in attempt.earlier)])[: len("2026-01-31")]


def _write_shared(sources: Sources, tokens: Path) -> str:
    start = None if sources.start is None else str(sources.start.absolute())
    shared = _Shared(sources.record, str(sources.folder.absolute()), sources.quantized, str(tokens.absolute()), start)
    return adapter_of(_Shared).dump_json(shared).decode()


def _read_shared(shared: _Shared, added_tokens: Sequence[str] | None) -> Sources:
    folder = Path(shared.folder)
    tokens = open_tokens(Path(shared.tokens))
    return Sources(
        record=shared.record,
        folder=folder,
        quantized=shared.quantized,
        tokenizer=load_tokenizer(folder, added_tokens),
        examples=tokens.examples,
        validation=tokens.validation or (),
        start=None if shared.start is None else Path(shared.start),
    )


@dataclass(frozen=True)
class _Checked:
    """The inputs that are available before the base's weights are downloaded.

    Attributes:
        tasks: The tasks with their questions.
        start: The adapter that training starts from; None for a new one.
        safety: The classifier of JOB_DATA__SAFETY_MODEL; None without one.
        rows: What to train on, and what to validate on, as `fetch_rows` returns them.
        folder: Folder with the base's configuration and tokenizer.
        tokenizer: The base's tokenizer.
        vocabulary: Number of rows of the base's embedding; None if it is not known.
    """

    tasks: Tasks
    start: FoundStart | None
    safety: SafetyModel | None
    rows: FetchedRows
    folder: Path
    tokenizer: Any
    vocabulary: int | None


def _pull(
    attempt: Attempt, settings: Settings, storage: StorageOptions, date: str, later: Sequence[Settings]
) -> tuple[Sources, Path]:
    """(the inputs, the folder of the tokenized rows)."""
    # The last training stage has the gate; the first one checks its inputs, before hours of training.
    gate = (later or [settings])[-1].gate
    baseline = None if gate.baseline is None else read_baseline(gate.baseline, storage)
    policy = None if gate.policy is None else read_policy(gate.policy)
    check_disk(
        attempt.work,
        required_bytes(bytes_to_fetch(location, storage) for location in _input_locations(attempt, settings, later)),
    )
    with base_in_background(attempt, _base_settings(settings), storage) as base:
        import_libraries()
        tasks = _checked_tasks(
            attempt,
            lambda: _load_tasks(attempt, settings, storage, policy=policy, baseline=baseline, later=later),
            lambda: check_model(attempt, base.small_files()[0], checked_settings(settings, later)),
            base.early.done,
        )
        checked = _check_before_weights(attempt, settings, storage, base, tasks)
        base.download_weights()
        tokens, prompts = _read_all_rows(
            attempt, settings, storage, checked, date=date, later=later, check_stop=base.check_stop
        )
        files = base.files()
    if later and _is_unchecked(attempt):
        check_files_of_exports(attempt, files.original, later[-1].export)
    attempt.check_stop()
    dataset, licence = _with_licences(attempt, settings, tokens.record, files.revision)
    log.get_logger().info("data is ready", rows=dataset.rows, skipped=by_reason(dataset.skipped), tokens=dataset.tokens)
    judge, start, safety = pull_judge(attempt, settings.eval, storage), checked.start, checked.safety
    record = Pulled(
        dataset=dataset,
        model_sha256=files.sha256,
        model_revision=files.revision,
        questions=tasks.fingerprints(),
        start_sha256=None if start is None else hash_start(start.folder),
        prompts=prompts_record(settings.eval, prompts),
        model_licence=licence,
        groups=_groups(attempt, tasks),
        safety_sha256=None if safety is None else safety.record.sha256,
        judge_sha256=recorded_judge_sha256(attempt, judge),
        judge_revision=None if judge is None else judge.record.revision,
        start_revision=None if start is None else start.commit,
    )
    sources = Sources(
        record=record,
        folder=files.folder,
        quantized=files.quantized,
        cache_entry=files.cache_entry,
        original=files.original,
        tokenizer=checked.tokenizer,
        examples=tokens.examples,
        validation=tokens.validation or (),
        findings=tokens.findings,
        start=None if start is None else start.folder,
        tasks=tasks,
        baseline=None if later else baseline,
        policy=None if later else policy,
        prompts=prompts,
        safety=safety,
        judge=judge,
    )
    return sources, tokens.folder


def _check_before_weights(
    attempt: Attempt, settings: Settings, storage: StorageOptions, base: BackgroundBase, tasks: Tasks
) -> _Checked:
    """Fetches and checks what depends on the base's tokenizer, but not on its weights."""
    location, added = start_of(settings, ADAPTER.rstrip("/")), settings.model.add_tokens
    start = pull_start_adapter(attempt, location, settings.lora, storage, added)
    safety = pull_safety_model(attempt, settings.data, storage)
    rows = _row_settings(settings)
    fetched = fetch_rows(attempt, rows, storage)
    folder, missing = base.small_files()
    tokenizer = load_tokenizer(folder, added)
    vocabulary = rows_with(vocabulary_of(folder), tokenizer, added)
    if missing:
        check_hub(rows)
    _check_lengths(settings, tasks, tokenizer, vocabulary)
    if start is not None and settings.train.is_one_stage and _is_unchecked(attempt):
        check_start_on(folder, start.folder, checked_settings(settings, ()))
    return _Checked(tasks, start, safety, rows=fetched, folder=folder, tokenizer=tokenizer, vocabulary=vocabulary)


def _read_all_rows(
    attempt: Attempt,
    settings: Settings,
    storage: StorageOptions,
    checked: _Checked,
    *,
    date: str,
    later: Sequence[Settings],
    check_stop: Callable[..., None],
) -> tuple[Tokens, list[PromptRow]]:
    """The rows of this training stage as tokens, and the prompts; those of later stages are read to check them."""
    rows, tokenizer = _row_settings(settings), checked.tokenizer
    options: dict[str, Any] = {"date": date, "vocabulary": checked.vocabulary, "check_stop": check_stop}
    auditing = {**options, **_auditing(attempt, settings, storage, checked.tasks, checked.safety)}
    as_published = {**auditing, "audited": known_audit(attempt), **known_scores(attempt)}
    tokens = read_rows(attempt, rows, *checked.rows, tokenizer, **as_published)
    check_rows(attempt, checked.folder, checked_settings(settings, later), tokens)
    prompts = find_prompt_rows(
        attempt,
        settings.eval,
        rows,
        storage,
        tokens=tokens,
        tokenizer=tokenizer,
        fetched=checked.rows,
        reading=options,
        auditing=as_published,
    )
    # In the first attempt only: later ones need not check these rows, nor score them again.
    for stage in later if attempt.recorded(Stage.PULL, Pulled) is None else ():
        later_rows = _row_settings(stage)
        fetched = fetch_rows(attempt, later_rows, storage, LATER)
        find_prompt_rows(
            attempt,
            stage.eval,
            later_rows,
            storage,
            tokens=read_rows(attempt, later_rows, *fetched, tokenizer, **auditing),
            tokenizer=tokenizer,
            fetched=fetched,
            reading=options,
            auditing=auditing,
        )
    return tokens, prompts


def _base_settings(settings: Settings) -> BaseSettings:
    run = settings.run
    return BaseSettings(settings.model, settings.lora.init, run.device, run.output, settings.storage.cache)


def checked_settings(settings: Settings, later: Sequence[Settings]) -> CheckedSettings:
    """What `pull_checks` checks of the settings of this training stage, and of those after it."""
    last = (later or [settings])[-1]
    return CheckedSettings(
        model=settings.model,
        lora=settings.lora,
        train=settings.train,
        device=settings.run.device,
        seed=_row_settings(settings).seed,
        export=last.export,
        gate_format=last.gate.on,
    )


def _row_settings(settings: Settings) -> RowSettings:
    """The settings that decide about one training stage's rows."""
    data = settings.data
    seed = settings.run.seed if data.seed is None else data.seed
    return RowSettings(data, settings.train, seed, settings.storage.cache, settings.part_of)


def _auditing(
    attempt: Attempt, settings: Settings, storage: StorageOptions, tasks: Tasks, safety: SafetyModel | None
) -> dict[str, Any]:
    prompts = tasks.prompts(settings.eval.limit)
    return audit_arguments(attempt, settings.data, settings.run, storage, prompts=prompts, safety=safety)


def _check_lengths(settings: Settings, tasks: Tasks, tokenizer: Any, vocabulary: int | None) -> None:
    with broken_tokenizer():
        check_lengths(
            tasks,
            tokenizer,
            limit=settings.eval.limit,
            max_length=settings.train.max_length,
            cut=settings.eval.long_questions == "cut",
            vocabulary=vocabulary,
        )


def _with_licences(
    attempt: Attempt, settings: Settings, dataset: DatasetRecord, revision: str | None
) -> tuple[DatasetRecord, str | None]:
    """(the record of the data with the run's audit and its sources' licences; the model's licence at `revision`).

    The first attempt looks the licences up on the hub; later ones take them from its record.
    """
    earlier, dataset = attempt.recorded(Stage.PULL, Pulled), with_audit_of_before(attempt, dataset)
    if earlier is not None:
        recorded = earlier.dataset  # what an earlier version did not record, the manifest must not have either
        return replace(dataset, licences=recorded.licences, longest_at=recorded.longest_at), earlier.model_licence
    licences = {
        source.location: find_licence(source.location, source.revision or settings.data.revision, "dataset")
        for source in parse_sources(settings.data.source)
    }
    model_licence = find_licence(settings.model.id, revision, "model")
    return replace(dataset, licences={location: name for location, name in licences.items() if name}), model_licence


def _groups(attempt: Attempt, tasks: Tasks) -> dict[str, GroupSpec] | None:
    """The groups that have an aggregate; None if an earlier version, which did not record them, began the run."""
    earlier = attempt.recorded(Stage.PULL, Pulled)
    return None if earlier is not None and earlier.groups is None else dict(tasks.groups) or None


def _input_locations(attempt: Attempt, settings: Settings, later: Sequence[Settings]) -> set[str]:
    """Paths, URIs and hub ids of all inputs whose size counts for the disk check."""
    texts = (settings.data.source, *(stage.data.source for stage in later))
    data = {source.location for text in texts for source in parse_sources(text)}
    validation = validation_of(settings.data)
    validation_location = {validation.name} if isinstance(validation, ValidationSource) else set()
    prompts = {settings.eval.prompts} if isinstance(settings.eval.prompts, str) else set()
    safety = {settings.data.safety_model} if settings.data.safety_model is not None else set()
    judges = {settings.eval.judge} if settings.eval.judge is not None and attempt.processes.leads else set()
    judge = {location for location in judges if not is_server(location)}
    return {settings.model.id, *data, *validation_location, *prompts, *safety, *judge, *settings.eval.data.values()}


def _checked_tasks(
    attempt: Attempt, load: Callable[[], Tasks], check_model: Callable[[], None], model_is_found: Callable[[], bool]
) -> Tasks:
    """The tasks. What is wrong with them, and what the model excludes of the settings, is raised together.

    Wrong tasks are raised at once if the model's configuration is still being downloaded. Later attempts do not check
    the model: they have the same settings and the same model.
    """
    loaded: list[Tasks] = []

    def model() -> None:
        if loaded or model_is_found():
            check_model()

    checks: list[tuple[str, Callable[[], object]]] = [("questions", lambda: loaded.append(load()))]
    if _is_unchecked(attempt):
        checks.append(("model", model))
    check_all(checks)
    return loaded[0]


def _is_unchecked(attempt: Attempt) -> bool:
    """Whether no attempt before this one has checked the settings with the model."""
    return attempt.begins_export or attempt.recorded(Stage.PULL, Pulled) is None


def _load_tasks(
    attempt: Attempt,
    settings: Settings,
    storage: StorageOptions,
    *,
    policy: Policy | None,
    baseline: Baseline | None,
    later: Sequence[Settings] = (),
) -> Tasks:
    last = (later or [settings])[-1]
    locations, gate = settings.eval.data, last.gate
    files = {
        task: Path(fetch_input(attempt, location, f"questions/{task}", storage)) for task, location in locations.items()
    }
    with copies_named_as_given({str(path): locations[task] for task, path in files.items()}):
        tasks = load_tasks(settings.eval.tasks, files, locations, settings.eval.num_fewshot)
    check_choices(tasks, last.need_choices)
    check_gate(tasks, gate.metric, policy, gate.policy, gate.only_choices)
    if baseline is not None:
        check_questions(baseline, tasks.only(MULTIPLE_CHOICE).questions(settings.eval.limit), gate.metric)
    return tasks


def _at_commit_of_before(attempt: Attempt, settings: Settings) -> Settings:
    """Settings with the commit at which the first attempt read a single source; its branch may have moved since."""
    earlier = attempt.recorded(Stage.PULL, Pulled)
    if earlier is None or earlier.dataset.revision is None:
        return settings
    data = settings.data.model_copy(update={"revision": earlier.dataset.revision})
    return settings.model_copy(update={"data": data})
