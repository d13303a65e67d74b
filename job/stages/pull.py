"""The first stage: downloads and checks model, data and questions, before the model is loaded.

On each machine the first process does this; the others read its results from the local disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import log
from job.audit.audit import Audited, read_findings
from job.audit.overlap import index_questions
from job.audit.rows import set_up
from job.audit.safety import Screen
from job.common import host
from job.common.findings import UNSAFE
from job.common.hashing import code_hashes, hash_file
from job.common.methods import SFT
from job.common.resources import check_disk, required_bytes, usable_cpus
from job.common.source_list import Source, locate_sources, parse_sources
from job.common.threads import in_thread
from job.common.validation import adapter_of
from job.data.hub_dataset import check_hub_dataset
from job.data.licences import find_licence
from job.data.prompts import find_prompts, prompts_sha256, read_prompts, validation_prompts
from job.data.text_tokenizer import broken_tokenizer
from job.data.token_cache import Tokens, load_tokens, open_tokens
from job.data.training_and_validation import ValidationSource, what_to_validate_on
from job.errors import DataError, JobError, Preempted, Problem, SettingsError, named_by
from job.evaluation.policy import Policy, read_policy
from job.evaluation.question_lengths import check_lengths
from job.evaluation.task_names import MULTIPLE_CHOICE
from job.evaluation.tasks import Tasks, check_choices, check_gate, load_tasks
from job.model.adapter_options import MANY_STEPS, make_options
from job.model.base import choose_device, choose_dtype, inspect, load_tokenizer
from job.model.files import fingerprint
from job.model.quantized_cache.cache import find
from job.model.quantized_cache.layout import CachedBase, CacheEntry, entry_at, entry_for
from job.model.start_adapter import FoundStart, check_start, find_start, hash_start
from job.model.tokenizer_files import rows_with, tokenizer_files
from job.records import Artifact, DatasetRecord, Evaluated, FirstValues, GroupSpec, PromptRow, PromptsRecord, Pulled
from job.results.baseline import check_questions, read_baseline
from job.runs.attempt import Attempt
from job.runs.layout import ADAPTER, BASE, FINDINGS, FIRST_VALUES, Stage
from job.runs.stage_records import identity
from job.settings.field_types import is_server
from job.settings.load import Settings
from job.settings.training_stages import naming_its_settings, start_of
from job.stages.handoff import Sources
from job.stages.inputs import check_inputs
from job.stages.preload import import_libraries
from job.stages.principles import FoundJudge, check_judge, find_judge, judge_sha256
from job.stages.safety import SafetyModel, find_safety_model, screen_rows
from job.storage.hub import MAX_SMALL_BYTES, download_model, import_client
from job.storage.location import is_remote
from job.storage.open import ObjectStore, StorageOptions, fetch, open_store, size

CODE = (
    "job.model.base",
    "job.model.files",
    "job.model.placed_weights",
    "job.model.quantized_cache.cache",
    "job.model.quantized_cache.layout",
)
"""Modules whose code decides the bits of a quantized base."""
_SETTING_OF = {
    "data": "JOB_DATA__SOURCE",
    "validation": "JOB_DATA__VALIDATION",
    "questions": "JOB_EVAL__DATA",
    "prompts": "JOB_EVAL__PROMPTS",
    "safety": "JOB_DATA__SAFETY_MODEL",
    "judge": "JOB_EVAL__JUDGE",
}
"""Folder for what is fetched -> the setting that names it."""
_LATER = "later/"
"""Stands before the folder of what a later stage reads."""
_POLL_SECONDS = 0.5
_CLEANUP_SECONDS = 3.0


@dataclass(frozen=True)
class _Model:
    """The model's files, and what they are."""

    folder: Path
    revision: str | None
    sha256: str
    cache_entry: CacheEntry | None
    quantized: bool
    original: Path | None = None


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
    during the download. The first attempt reads those of `later` stages too, so that what is wrong with them is known
    before training.

    Raises:
        DataError, SettingsError: The data, the questions, the model or the settings cannot be used.
        Unreachable, AccessDenied: The hub or a store cannot be used.
        Preempted: The job was asked to stop.
    """
    processes, settings = attempt.processes, _at_commit_of_before(attempt, settings)
    date = processes.share("date of the run", lambda: settings.data.date or _date(attempt))
    sources = _pull_for_machine(attempt, settings, storage, date, later)
    if settings.eval.principles is None:
        return sources
    # Only process 0 has the judge, but all compare and name the run by the same record.
    record = processes.share("judge", lambda: [sources.record.judge_sha256, sources.record.judge_revision])
    return replace(sources, record=replace(sources.record, judge_sha256=record[0], judge_revision=record[1]))


def _pull_for_machine(
    attempt: Attempt, settings: Settings, storage: StorageOptions, date: str, later: Sequence[Settings]
) -> Sources:
    """What this process uses: pulled by itself, or by the first process of its machine."""
    processes = attempt.processes
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
    check_disk(attempt.work, required_bytes(size(place, storage) for place in _places(attempt, settings, later)))
    import_client()  # here: two threads that import the same at once may get half of a module
    early: Future[tuple[Path, bool]] = Future()
    checked: Future[None] = Future()

    def before_weights(folder: Path, missing: bool) -> None:  # noqa: FBT001 - hub.download_model calls it so
        early.set_result((folder, missing))
        if missing:
            checked.result()

    # Downloading and hashing release the GIL, so that importing and reading rows run at the same time.
    coming = in_thread(lambda: _find_model(attempt, settings, storage, before_weights), "model")
    try:
        import_libraries()
        tasks = _load_tasks(attempt, settings, storage, policy)
        if baseline is not None:
            check_questions(baseline, tasks.only(MULTIPLE_CHOICE).questions(settings.eval.limit), gate.metric)
        start, safety = _find_start(attempt, settings, storage), _find_safety_model(attempt, settings, storage)
        fetched = _fetch_rows(attempt, settings, storage)
        folder, missing = _early_files(attempt, early, coming)
        tokenizer = load_tokenizer(folder, settings.model.add_tokens)
        vocabulary = rows_with(_vocabulary(folder), tokenizer, settings.model.add_tokens)
        if missing:
            _check_model(folder, settings)
            _check_hub(settings)
        _check_lengths(settings, tasks, tokenizer, vocabulary)
        checked.set_result(None)

        def alive(*, progress: bool = True) -> None:
            attempt.alive(progress=progress)
            if coming.done():
                coming.result()  # an error of the weights ends the reading of rows

        how: dict[str, Any] = {"date": date, "vocabulary": vocabulary, "alive": alive}
        auditing = {**how, **_auditing(attempt, settings, storage, tasks, safety)}
        known = {**auditing, "audited": _known_audit(attempt), **_known_scores(attempt)}
        tokens = _read_rows(attempt, settings, *fetched, tokenizer, **known)
        prompts = _read_prompts(attempt, settings, storage, tokens, tokenizer, fetched=fetched, how=how, auditing=known)
        # In a later attempt that was done; and its classifier's scores would be looked up once more.
        for stage in later if attempt.recorded(Stage.PULL, Pulled) is None else ():
            _read_rows(attempt, stage, *_fetch_rows(attempt, stage, storage, _LATER), tokenizer, **auditing)
        model: _Model = _wait(attempt, coming)
    except JobError as error:
        checked.cancel()
        if isinstance(error, Preempted):
            wait([coming], _CLEANUP_SECONDS)  # the thread removes a quantized base that it has copied in part
        raise
    attempt.alive()
    dataset, licence = _with_licences(attempt, settings, tokens.record, model.revision)
    log.get_logger().info("data is ready", rows=dataset.rows, skipped=dataset.skipped, tokens=dataset.tokens)
    judge = _find_judge(attempt, settings, storage)
    record = Pulled(
        dataset,
        model.sha256,
        model.revision,
        tasks.fingerprints(),
        None if start is None else hash_start(start.folder),
        _prompts_record(settings, prompts),
        licence,
        _groups(attempt, tasks),
        None if safety is None else safety.record.sha256,
        _judge_sha256(attempt, judge),
        None if judge is None else judge.record.revision,
        None if start is None else start.commit,
    )
    sources = Sources(
        record,
        model.folder,
        model.quantized,
        tokenizer,
        tokens.examples,
        tokens.validation or (),
        None if start is None else start.folder,
        tasks,
        baseline,
        policy,
        model.cache_entry,
        model.original,
        prompts,
        tokens.findings,
        safety,
        judge,
    )
    return sources, tokens.folder


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
    """The record of the data with the run's audit and its sources' licences; and the model's licence at a revision.

    Licences are looked up by the first attempt; later ones take its record, so that they need no card.
    """
    earlier, dataset = attempt.recorded(Stage.PULL, Pulled), _with_audit_of_before(attempt, dataset)
    if earlier is not None:
        known = earlier.dataset  # what an earlier version did not record, the manifest must not have either
        return replace(dataset, licences=known.licences, longest_at=known.longest_at), earlier.model_licence
    found = {
        one.place: find_licence(one.place, one.revision or settings.data.revision, "dataset")
        for one in parse_sources(settings.data.source)
    }
    model_licence = find_licence(settings.model.id, revision, "model")
    return replace(dataset, licences={place: name for place, name in found.items() if name}), model_licence


def _auditing(
    attempt: Attempt, settings: Settings, storage: StorageOptions, tasks: Tasks, safety: SafetyModel | None
) -> dict[str, Any]:
    """The arguments of `load_rows` that say what the audit looks for, and what scores the rows' texts."""
    questions = index_questions(tasks.prompts(settings.eval.limit))
    if safety is None:
        return {"audit": set_up(questions, settings.data.on_finding)}
    shared = open_store(settings.run.output, storage)
    screen = screen_rows(attempt, safety, settings.run, shared)
    return {"audit": set_up(questions, settings.data.on_finding, safety.record), "screen": screen}


def _groups(attempt: Attempt, tasks: Tasks) -> dict[str, GroupSpec] | None:
    """The groups that have an aggregate; None if an earlier version, which did not record them, began the run."""
    earlier = attempt.recorded(Stage.PULL, Pulled)
    return None if earlier is not None and earlier.groups is None else dict(tasks.groups) or None


def _known_scores(attempt: Attempt) -> dict[str, Screen]:
    """As `_auditing` has it, a `screen` by what an earlier attempt published; empty if there is nothing.

    On another GPU the classifier may score a row on the other side of the threshold: the run keeps the rows that it
    began with.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    record = None if earlier is None else earlier.dataset.audit
    if record is None or record.safety is None:
        return {}
    try:
        findings = read_findings(attempt.fetch(Artifact(FINDINGS, record.bytes, record.sha256)))
    except DataError:
        return {}  # which `_known_audit` logs
    scores = {one.row: one.score or 0.0 for one in findings if one.kind == UNSAFE}
    return {"screen": lambda texts: [scores.get(row, 0.0) for row in range(len(texts))]}


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


def _with_audit_of_before(attempt: Attempt, dataset: DatasetRecord) -> DatasetRecord:
    """The record of the data with the audit of the first attempt, if the same rows are left out on this machine.

    Where rows are left out, every attempt looks for them again, and it may do that with other tools than the first: a
    package may be missing here. The run's audit stays what the first attempt found.

    Raises:
        SettingsError: Other rows are left out, and what looks for them is another.
    """
    earlier = attempt.recorded(Stage.PULL, Pulled)
    before, now = None if earlier is None else earlier.dataset.audit, dataset.audit
    if earlier is None or before is None or now is None or before == now:
        return dataset
    other = [
        f"rows with a finding of the kind {kind} were looked for by {check.checked_by or 'nothing'} "
        f"when this run began, and by {now.checks[kind].checked_by or 'nothing'} here"
        for kind, check in before.checks.items()
        if kind in now.checks and check.action == "skip" and check.checked_by != now.checks[kind].checked_by
    ]
    if identity(replace(earlier, dataset=dataset)) == identity(earlier):
        if other:
            log.get_logger().warning("the audit's tools are others, which leave out the same rows", tools=other)
        return replace(dataset, audit=before)
    if not other:
        return dataset  # the data has changed, which is told for all of the record
    what = f"{'; '.join(other)}: other rows would be trained on"
    advice = "install what the run began with, or start a new run"
    raise SettingsError([Problem("JOB_DATA__ON_FINDING", what)], advice=advice)


def publish_findings(attempt: Attempt, sources: Sources) -> None:
    """Publishes what the audit found, before the record of the pull that lists it; once, and again if it is gone.

    Raises:
        DataError: It is gone, and the audit on this machine, with other tools, found something else.
    """
    record = sources.record.dataset.audit
    if record is None or sources.findings is None:
        return
    if attempt.damaged([Artifact(FINDINGS, record.bytes, record.sha256)]):
        if hash_file(sources.findings) != record.sha256:
            what = "is gone, and the audit's tools on this machine find something else than the first attempt's"
            raise DataError([Problem(f"{attempt.store.uri}/{FINDINGS}", f"{what}; install those, or start a new run")])
        attempt.publish(sources.findings, FINDINGS)


def _places(attempt: Attempt, settings: Settings, later: Sequence[Settings]) -> set[str]:
    """Where the inputs are."""
    texts = (settings.data.source, *(stage.data.source for stage in later))
    data = {source.place for text in texts for source in parse_sources(text)}
    validation = _what_to_validate_on(settings)
    own = {validation.name} if isinstance(validation, ValidationSource) else set()
    prompts = {settings.eval.prompts} if isinstance(settings.eval.prompts, str) else set()
    safety = {settings.data.safety_model} if settings.data.safety_model is not None else set()
    judges = {settings.eval.judge} if settings.eval.judge is not None and attempt.processes.leads else set()
    judge = {place for place in judges if not is_server(place)}
    return {settings.model.id, *data, *own, *prompts, *safety, *judge, *settings.eval.data.values()}


def _find_start(attempt: Attempt, settings: Settings, storage: StorageOptions) -> FoundStart | None:
    """The adapter that training starts from, checked as far as the base's weights are not needed."""
    lora, start = settings.lora, start_of(settings, ADAPTER.rstrip("/"))
    if start is None:
        return None
    attempt.alive()
    earlier = attempt.recorded(Stage.PULL, Pulled)
    known = None if earlier is None else earlier.start_revision
    found = find_start(start, attempt.work / "start", storage, known)
    check_start(found.folder, rank=lora.rank, alpha=lora.alpha, options=lora.model_dump(mode="json"))
    return found


def _find_safety_model(attempt: Attempt, settings: Settings, storage: StorageOptions) -> SafetyModel | None:
    """The classifier of JOB_DATA__SAFETY_MODEL; None without one."""
    place = settings.data.safety_model
    if place is None:
        return None
    source, data = _fetch(attempt, place, "safety", storage), settings.data
    earlier = attempt.recorded(Stage.PULL, Pulled)
    audit = None if earlier is None else earlier.dataset.audit
    if audit is not None and audit.safety is not None:
        # the hub may have a newer commit since the first attempt, a branch or tag too
        data = data.model_copy(update={"safety_revision": audit.safety.revision or data.safety_revision})
    found: SafetyModel = _wait(attempt, in_thread(lambda: find_safety_model(data, source, place), "safety model"))
    if earlier is not None and earlier.safety_sha256 != found.record.sha256:  # before it scores anything
        what = "what it names has changed since the first attempt of this run; put it back, or start a new run"
        raise DataError([Problem("JOB_DATA__SAFETY_MODEL", what)])
    return found


def _find_judge(attempt: Attempt, settings: Settings, storage: StorageOptions) -> FoundJudge | None:
    """Who judges by JOB_EVAL__PRINCIPLES, in process 0, which asks; None without."""
    place = settings.eval.judge
    if place is None or settings.eval.principles is None or not attempt.processes.leads:
        return None
    earlier = attempt.recorded(Stage.PULL, Pulled)
    revision = (None if earlier is None else earlier.judge_revision) or settings.eval.judge_revision
    source = place if is_server(place) else _fetch(attempt, place, "judge", storage)
    found: FoundJudge = _wait(attempt, in_thread(lambda: find_judge(settings.eval, source, revision), "judge"))
    if attempt.recorded(Stage.EVALUATE_ADAPTER, Evaluated) is None:
        check_judge(settings.eval, found, attempt.alive)
    return found


def _judge_sha256(attempt: Attempt, judge: FoundJudge | None) -> str | None:
    """None, too, if an earlier version, which did not record it, began the run."""
    earlier = attempt.recorded(Stage.PULL, Pulled)
    if judge is None or (earlier is not None and earlier.judge_sha256 is None):
        return None
    return judge_sha256(judge.record)


def _fetch(attempt: Attempt, place: str, kind: str, storage: StorageOptions) -> str:
    attempt.alive()
    with named_by(_SETTING_OF[kind.removeprefix(_LATER).partition("/")[0]], ": "):
        return fetch(place, attempt.work / kind, storage)


def _load_tasks(attempt: Attempt, settings: Settings, storage: StorageOptions, policy: Policy | None) -> Tasks:
    given, gate = settings.eval.data, settings.gate
    files = {task: Path(_fetch(attempt, place, f"questions/{task}", storage)) for task, place in given.items()}
    tasks = load_tasks(settings.eval.tasks, files, given, settings.eval.num_fewshot)
    check_choices(tasks, settings.need_choices)
    check_gate(tasks, gate.metric, policy, gate.policy, gate.only_choices)
    return tasks


def _wait(attempt: Attempt, *futures: Future[Any]) -> Any:
    """The result of the first future that is done; a request to stop ends the wait, even during a long download."""
    while not (done := wait(futures, _POLL_SECONDS, FIRST_COMPLETED).done):
        attempt.alive(progress=False)
    return next(future for future in futures if future in done).result()


def _early_files(attempt: Attempt, early: Future[tuple[Path, bool]], coming: Future[_Model]) -> tuple[Path, bool]:
    """The folder with configuration and tokenizer, and whether the weights are still to be downloaded."""
    _wait(attempt, early, coming)
    return early.result() if early.done() else (coming.result().folder, False)


def _check_model(folder: Path, settings: Settings) -> None:
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


def _what_to_validate_on(settings: Settings) -> float | ValidationSource | None:
    data = settings.data
    return what_to_validate_on(
        data.validation,
        source=data.source,
        source_revision=data.revision,
        validation_revision=data.validation_revision,
        validation_split=data.validation_split,
    )


def _check_hub(settings: Settings) -> None:
    """Asks the hub whether the data sets that it has are there, before weights are downloaded."""
    with naming_its_settings(settings):
        for source in parse_sources(settings.data.source):
            check_hub_dataset(source.place, source.revision or settings.data.revision)
    validation = _what_to_validate_on(settings)
    if isinstance(validation, ValidationSource) and not is_remote(validation.name):
        check_hub_dataset(validation.name, validation.revision)


def _fetch_rows(
    attempt: Attempt, settings: Settings, storage: StorageOptions, below: str = ""
) -> tuple[str | Sequence[Source], float | ValidationSource | None]:
    """What to train on, and what to validate on, copied from stores to folders that begin with `below`.

    A later attempt has the revisions that the first one found; not for a later stage, which has a `below`.
    """
    with naming_its_settings(settings):
        source = locate_sources(
            settings.data.source, lambda place, kind: _fetch(attempt, place, f"{below}{kind}", storage)
        )
        validation = _what_to_validate_on(settings)
        if isinstance(validation, ValidationSource):
            place = _fetch(attempt, validation.place, f"{below}validation", storage)
            validation = replace(validation, place=place)
    earlier = None if below else attempt.recorded(Stage.PULL, Pulled)
    if earlier is None:
        return source, validation
    # the branches may have moved since the first attempt
    if not isinstance(source, str):
        commits = {one.source: one.revision for one in earlier.dataset.sources}
        source = tuple(replace(one, revision=commits.get(one.name) or one.revision) for one in source)
    known = earlier.dataset.validation
    if isinstance(validation, ValidationSource) and known is not None:
        validation = replace(validation, revision=known.revision or validation.revision)
    return source, validation


def _at_commit_of_before(attempt: Attempt, settings: Settings) -> Settings:
    """Settings with the commit at which the first attempt read a single source; its branch may have moved since."""
    earlier = attempt.recorded(Stage.PULL, Pulled)
    if earlier is None or earlier.dataset.revision is None:
        return settings
    data = settings.data.model_copy(update={"revision": earlier.dataset.revision})
    return settings.model_copy(update={"data": data})


def _read_rows(
    attempt: Attempt,
    settings: Settings,
    source: str | Sequence[Source],
    validation: float | ValidationSource | None,
    tokenizer: Any,
    **how: Any,
) -> Tokens:
    """The tokens for training and for validation; `how` goes to `load_examples`."""
    data, cache = settings.data, settings.storage.cache
    with naming_its_settings(settings):
        return load_tokens(
            source,
            validation,
            root=attempt.work if cache is None else Path(cache),
            keep=cache is not None,
            processes=usable_cpus(),
            name=data.source,
            revision=data.revision,
            split=data.split,
            limit=data.limit,
            schema=None if data.format == "auto" else data.format,
            on_bad_row=data.on_bad_row,
            loss_on=settings.train.rows_loss_on,
            max_length=settings.train.max_length,
            tokenizer=tokenizer,
            method=settings.train.last_method,
            template_arguments=data.chat_template_arguments,
            field_names=data.fields,
            on_long_row=data.on_long_row,
            row_weights=data.row_weights,
            seed=settings.run.seed if data.seed is None else data.seed,
            **how,
        )


def _read_prompts(
    attempt: Attempt,
    settings: Settings,
    storage: StorageOptions,
    tokens: Tokens,
    tokenizer: Any,
    *,
    fetched: tuple[str | Sequence[Source], float | ValidationSource | None],
    how: Mapping[str, Any],
    auditing: Mapping[str, Any],
) -> list[PromptRow]:
    """The prompts of JOB_EVAL__PROMPTS; none where it is empty. `fetched` and `tokens` are of the training data.

    `how` goes to `read_prompts`, `auditing` to `load_tokens` where audited training data is read once more.

    Raises:
        DataError: They cannot be read, or there are none.
    """
    place = settings.eval.prompts
    if place is None:
        return []
    if isinstance(place, int):
        # Rows that are read again are the same only if the audit leaves out the same ones.
        left_out = tokens.record.audit is not None and tokens.record.audit.left_out
        again = auditing if left_out else how
        return _prompts_of_rows(attempt, settings, fetched, tokens, tokenizer, **again)
    return read_prompts(
        find_prompts(_fetch(attempt, place, "prompts", storage)),
        place,
        tokenizer=tokenizer,
        schema=tokens.record.format,
        most_tokens=_longest_prompt(settings),
        template_arguments=settings.data.chat_template_arguments,
        **how,
    )


def _prompts_of_rows(
    attempt: Attempt,
    settings: Settings,
    fetched: tuple[str | Sequence[Source], float | ValidationSource | None],
    tokens: Tokens,
    tokenizer: Any,
    **how: Any,
) -> list[PromptRow]:
    """The prompts of the first JOB_EVAL__PROMPTS validation rows; `fetched` and `tokens` are of all rows.

    Raises:
        DataError: The rows have no prompts.
    """
    asked, held = int(settings.eval.prompts or 0), tokens.validation or ()
    if settings.train.rows_loss_on == "all" and settings.train.last_method == SFT:
        # Where all tokens are targets, they do not say where the prompt ends: the same rows, read for that.
        train = settings.train.model_copy(update={"loss_on": "completion"})
        again = _read_rows(attempt, settings.model_copy(update={"train": train}), *fetched, tokenizer, **how)
        if [again.record.rows, len(again.validation or ())] != [tokens.record.rows, len(held)]:
            what = "some rows cannot be split into prompt and completion; give a file of prompts instead of a number"
            raise DataError([Problem("JOB_EVAL__PROMPTS", what)])
        held = again.validation or ()
    most = _longest_prompt(settings)
    found = list(validation_prompts(held, asked, tokenizer, most))
    if not found:
        what = f"no validation row of the schema {tokens.record.format} has a prompt of at most {most:,} tokens"
        raise DataError([Problem("JOB_EVAL__PROMPTS", f"{what}; give a file of prompts instead of a number")])
    if len(found) < asked:
        log.get_logger().warning("there are fewer prompts than JOB_EVAL__PROMPTS", prompts=len(found), asked=asked)
    return found


def _longest_prompt(settings: Settings) -> int:
    """In tokens, so that an answer has room behind it."""
    return settings.train.max_length - settings.eval.prompts_max_new_tokens


def _prompts_record(settings: Settings, prompts: Sequence[PromptRow]) -> PromptsRecord | None:
    if not prompts:
        return None
    asked = settings.eval.prompts
    return PromptsRecord(
        source=asked if isinstance(asked, str) else "validation rows",
        count=len(prompts),
        max_new_tokens=settings.eval.prompts_max_new_tokens,
        sha256=prompts_sha256([(prompt.text, prompt.reference) for prompt in prompts]),
    )


def _vocabulary(folder: Path) -> int | None:
    """Rows of the model's embedding according to its configuration; None if it does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        return int(text["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _find_model(
    attempt: Attempt, settings: Settings, storage: StorageOptions, before_weights: Callable[[Path, bool], None]
) -> _Model:
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
            return _Model(folder, earlier.model_revision, earlier.model_sha256, noted, quantized=True, original=None)
    source = settings.model.id
    if is_remote(source):
        if (small := _fetch_small_files(source, attempt.work / "model-small", storage)) is not None:
            before_weights(small, True)  # noqa: FBT003 - as hub.download_model calls it
        with named_by("JOB_MODEL__ID", ": "):
            source = fetch(source, attempt.work / "model", storage)
        folder, revision = download_model(source, None)
    else:
        # the hub may have a newer commit since the first attempt, a branch or tag too
        wanted = (None if earlier is None else earlier.model_revision) or settings.model.revision
        folder, revision = download_model(source, wanted, before_weights)
    tokenizer_files(folder)  # fails now rather than when the adapter is published
    sha256 = fingerprint(folder)
    locations = _cache_locations(attempt, settings, storage)
    entry = None if locations is None else entry_for(_facts(settings, sha256), *locations)
    # Not in a later attempt: this entry may not be the one that the run began with.
    here = None if entry is None or earlier else find(replace(entry, store=None), attempt.alive_in_thread)
    return _Model(here or folder, revision, sha256, entry, quantized=here is not None, original=folder)


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
