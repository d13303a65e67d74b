"""The first stage: downloads and checks model, data and questions, before the model is loaded.

On each machine the first process does this; the others read its results from the local disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.audit.audit import Audited
from job.audit.overlap import index_questions
from job.audit.rows import set_up
from job.common.resources import check_disk, required_bytes
from job.common.source_list import parse_sources
from job.common.threads import in_thread
from job.data.licences import find_licence
from job.data.text_tokenizer import broken_tokenizer
from job.data.token_cache import open_tokens
from job.data.training_and_validation import ValidationSource
from job.errors import DataError, JobError, Preempted
from job.evaluation.policy import Policy, read_policy
from job.evaluation.question_lengths import check_lengths
from job.evaluation.task_names import MULTIPLE_CHOICE
from job.evaluation.tasks import Tasks, check_choices, check_gate, load_tasks
from job.model.base import load_tokenizer
from job.model.start_adapter import check_start, find_start, hash_start
from job.model.tokenizer_files import rows_with
from job.records import Artifact, DatasetRecord, Pulled
from job.results.baseline import check_questions, read_baseline
from job.runs.attempt import Attempt, missing
from job.runs.layout import ADAPTER, FINDINGS, Stage
from job.settings.load import Settings
from job.settings.training_stages import start_of
from job.stages.handoff import Sources
from job.stages.inputs import check_inputs
from job.stages.preload import import_libraries
from job.stages.pull_data import (
    LATER,
    check_hub,
    fetch_input,
    fetch_rows,
    prompts_record,
    read_asked_prompts,
    read_rows,
    validation_of,
)
from job.stages.pull_model import FoundModel, check_model, embedding_rows, find_model
from job.storage.hub import import_client
from job.storage.open import StorageOptions, size

_POLL_SECONDS = 0.5
_CLEANUP_SECONDS = 3.0


@dataclass(frozen=True)
class _Shared:
    """What the first process of a machine writes for the others: paths, and the record of the pull."""

    record: Pulled
    folder: str
    quantized: bool
    tokens: str
    start: str | None


def pull(attempt: Attempt, settings: Settings, storage: StorageOptions, later: Sequence[Settings] = ()) -> Sources:
    """Fetches and checks all inputs, in the first process of each machine; `storage` has the options of the stores.

    Everything that can be checked without the model's weights is checked before they are downloaded. Rows are read
    during the download; those of `later` stages too, so that what is wrong with them is known before training.

    Raises:
        DataError, SettingsError: The data, the questions, the model or the settings cannot be used.
        Unreachable, AccessDenied: The hub or a store cannot be used.
        Preempted: The job was asked to stop.
    """
    processes = attempt.processes
    date = processes.share("date of the run", lambda: settings.data.date or _date(attempt))
    if processes.place.local_world_size == 1:
        return _pull(attempt, settings, storage, date, later)[0]
    if processes.place.local_rank:
        import_libraries()  # while the first process downloads
    elif processes.place.rank:  # another machine, whose files process 0 has not seen
        check_inputs(settings, later, begun=True)
    sources = _pull(attempt, settings, storage, date, later) if processes.place.local_rank == 0 else None
    shared = processes.share_on_machine("sources", lambda: _write_shared(*sources) if sources else None)
    if sources:
        return sources[0]
    return _read_shared(TypeAdapter(_Shared).validate_json(shared or ""), settings.model.add_tokens)


def _date(attempt: Attempt) -> str:
    """The day on which the run began. Chat templates that insert the current date get this one, in every attempt.

    It is the earliest start in the run log, which is written as soon as the first attempt starts.
    """
    return min([attempt.started, *(record.started for record in attempt.earlier)])[: len("2026-01-31")]


def _write_shared(sources: Sources, tokens: Path) -> str:
    start = None if sources.start is None else str(sources.start.absolute())
    shared = _Shared(sources.record, str(sources.folder.absolute()), sources.quantized, str(tokens.absolute()), start)
    return TypeAdapter(_Shared).dump_json(shared).decode()


def _read_shared(shared: _Shared, added_tokens: Sequence[str] | None) -> Sources:
    folder = Path(shared.folder)
    tokens = open_tokens(Path(shared.tokens))
    return Sources(
        shared.record,
        folder,
        shared.quantized,
        load_tokenizer(folder, added_tokens),
        tokens.examples,
        tokens.validation or (),
        None if shared.start is None else Path(shared.start),
        tasks=None,
        baseline=None,
        policy=None,
        cache_entry=None,
    )


def _pull(
    attempt: Attempt, settings: Settings, storage: StorageOptions, date: str, later: Sequence[Settings]
) -> tuple[Sources, Path]:
    """What is pulled, and the folder of its tokens."""
    gate = settings.gate
    baseline = None if gate.baseline is None else read_baseline(gate.baseline, storage)
    policy = None if gate.policy is None else read_policy(gate.policy)
    check_disk(attempt.work, required_bytes(size(place, storage) for place in _places(settings, later)))
    import_client()  # here: two threads that import the same at once may get half of a module
    early: Future[tuple[Path, bool]] = Future()
    checked: Future[None] = Future()

    def before_weights(folder: Path, missing: bool) -> None:  # noqa: FBT001 - hub.download_model calls it so
        early.set_result((folder, missing))
        if missing:
            checked.result()

    # Downloading and hashing release the GIL, so that importing and reading rows run at the same time.
    coming = in_thread(lambda: find_model(attempt, settings, storage, before_weights), "model")
    try:
        import_libraries()
        tasks = _load_tasks(attempt, settings, storage, policy)
        if baseline is not None:
            check_questions(baseline, tasks.only(MULTIPLE_CHOICE).questions(settings.eval.limit), gate.metric)
        start = _find_start(attempt, settings, storage)
        fetched = fetch_rows(attempt, settings, storage)
        folder, missing = _early_files(attempt, early, coming)
        tokenizer = load_tokenizer(folder, settings.model.add_tokens)
        vocabulary = rows_with(embedding_rows(folder), tokenizer, settings.model.add_tokens)
        if missing:
            check_model(folder, settings)
            check_hub(settings)
        with broken_tokenizer():
            check_lengths(
                tasks,
                tokenizer,
                limit=settings.eval.limit,
                max_length=settings.train.max_length,
                cut=settings.eval.long_questions == "cut",
                vocabulary=vocabulary,
            )
        checked.set_result(None)

        def alive(*, progress: bool = True) -> None:
            attempt.alive(progress=progress)
            if coming.done():
                coming.result()  # an error of the weights ends the reading of rows

        how: dict[str, Any] = {"date": date, "vocabulary": vocabulary, "alive": alive}
        audit = set_up(index_questions(tasks.prompts(settings.eval.limit)), settings.data.on_finding)
        tokens = read_rows(attempt, settings, *fetched, tokenizer, audit=audit, audited=_known_audit(attempt), **how)
        prompts = read_asked_prompts(attempt, settings, storage, tokens, tokenizer, fetched=fetched, **how)
        for stage in later:
            read_rows(attempt, stage, *fetch_rows(attempt, stage, storage, LATER), tokenizer, audit=audit, **how)
        model: FoundModel = _wait(attempt, coming)
    except JobError as error:
        checked.cancel()
        if isinstance(error, Preempted):
            wait([coming], _CLEANUP_SECONDS)  # the thread removes a quantized base that it has copied in part
        raise
    attempt.alive()
    dataset, model_licence = _with_licences(attempt, settings, tokens.record, model.revision)
    log.get_logger().info("data is ready", rows=dataset.rows, skipped=dataset.skipped, tokens=dataset.tokens)
    start_sha256 = None if start is None else hash_start(start)
    record = Pulled(
        dataset,
        model.sha256,
        model.revision,
        tasks.fingerprints(),
        start_sha256,
        prompts_record(settings, prompts),
        model_licence,
    )
    sources = Sources(
        record,
        model.folder,
        model.quantized,
        tokenizer,
        tokens.examples,
        tokens.validation or (),
        start,
        tasks,
        baseline,
        policy,
        model.cache_entry,
        model.original,
        prompts,
        tokens.findings,
    )
    return sources, tokens.folder


def _with_licences(
    attempt: Attempt, settings: Settings, dataset: DatasetRecord, revision: str | None
) -> tuple[DatasetRecord, str | None]:
    """The record of the data with the licences of its sources, and the licence of the model at a revision.

    Looked up by the first attempt; later ones take its record, so that they need no card.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    if earlier is not None:
        return replace(dataset, licences=earlier.dataset.licences), earlier.model_licence
    found = {
        one.place: find_licence(one.place, one.revision or settings.data.revision, "dataset")
        for one in parse_sources(settings.data.source)
    }
    model_licence = find_licence(settings.model.id, revision, "model")
    return replace(dataset, licences={place: name for place, name in found.items() if name}), model_licence


def _known_audit(attempt: Attempt) -> Audited | None:
    """The result of the audit that an earlier attempt published; None if there is none, or rows were left out.

    Which examples these are is found out again, with the same result.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    record = None if earlier is None else earlier.dataset.audit
    if record is None or record.left_out:
        return None
    try:
        findings = attempt.fetch(Artifact(FINDINGS, record.bytes, record.sha256)).read_bytes()
    except DataError as error:
        log.get_logger().warning("the audit of the rows is made again", why=str(error))
        return None
    log.get_logger().info("the audit of the rows is known from an earlier attempt")
    return Audited(record, findings, ())


def publish_findings(attempt: Attempt, sources: Sources) -> None:
    """Publishes what the audit found, before the record of the pull that lists it; once, and again if it is gone."""
    record = sources.record.dataset.audit
    if record is None or sources.findings is None:
        return
    if missing(attempt.store, [Artifact(FINDINGS, record.bytes, record.sha256)]):
        attempt.publish(sources.findings, FINDINGS)


def _places(settings: Settings, later: Sequence[Settings]) -> set[str]:
    """Where the inputs are."""
    texts = (settings.data.source, *(stage.data.source for stage in later))
    data = {source.place for text in texts for source in parse_sources(text)}
    validation = validation_of(settings)
    own = {validation.name} if isinstance(validation, ValidationSource) else set()
    prompts = {settings.eval.prompts} if isinstance(settings.eval.prompts, str) else set()
    return {settings.model.id, *data, *own, *prompts, *settings.eval.data.values()}


def _find_start(attempt: Attempt, settings: Settings, storage: StorageOptions) -> Path | None:
    """The folder of the adapter that training starts from, checked as far as the base's weights are not needed."""
    lora, start = settings.lora, start_of(settings, ADAPTER.rstrip("/"))
    if start is None:
        return None
    attempt.alive()
    folder = find_start(start, attempt.work / "start", storage)
    check_start(folder, rank=lora.rank, alpha=lora.alpha, options=lora.model_dump(mode="json"))
    return folder


def _load_tasks(attempt: Attempt, settings: Settings, storage: StorageOptions, policy: Policy | None) -> Tasks:
    given, gate = settings.eval.data, settings.gate
    files = {task: Path(fetch_input(attempt, place, f"questions/{task}", storage)) for task, place in given.items()}
    tasks = load_tasks(settings.eval.tasks, files, given, settings.eval.num_fewshot)
    check_choices(tasks, settings.need_choices)
    check_gate(tasks, gate.metric, policy, gate.policy, gate.only_choices)
    return tasks


def _wait(attempt: Attempt, *futures: Future[Any]) -> Any:
    """The result of the first future that is done; a request to stop ends the wait, even during a long download."""
    while not (done := wait(futures, _POLL_SECONDS, FIRST_COMPLETED).done):
        attempt.alive(progress=False)
    return next(future for future in futures if future in done).result()


def _early_files(attempt: Attempt, early: Future[tuple[Path, bool]], coming: Future[FoundModel]) -> tuple[Path, bool]:
    """The folder with configuration and tokenizer, and whether the weights are still to be downloaded."""
    _wait(attempt, early, coming)
    return early.result() if early.done() else (coming.result().folder, False)
