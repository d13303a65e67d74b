"""The checks that `plan` makes of a run's inputs, each with its settings; one that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from job.audit.overlap import index_questions
from job.audit.rows import set_up
from job.common.export_formats import EXTRA, GGUF, needs_merge, not_installed, split_name
from job.common.source_list import parse_sources
from job.data.evaluation_prompts import find_prompts, read_prompts
from job.data.examples import lengths_of
from job.data.training_and_validation import validation_source_of
from job.errors import DataError, JobError, Problem, named_by, naming, raise_problems
from job.evaluation.tasks import Tasks
from job.model.adapter_options import make_options, too_few_steps
from job.model.tokenizer_files import rows_with
from job.planning import known_models_and_data as known
from job.planning.other_input_checks import check_other_inputs
from job.planning.plan_settings import adapter_options, place_of_run, quick_storage
from job.planning.preflight import After, Found, NotChecked, PreflightResult, after_answers, run_check
from job.planning.preflight_data import DataFacts, preview_data, preview_questions, report_audit
from job.planning.preflight_export import check_exported_run
from job.planning.preflight_models import (
    AdapterFacts,
    AuxiliaryFacts,
    ModelFacts,
    files_without_weights,
    find_tokenizer,
    preview_adapter,
    preview_judge,
    preview_model,
    preview_safety_model,
)
from job.planning.preflight_store import local_round_trip, round_trip
from job.settings.load import Settings
from job.settings.training_stages import settings_renamed_in_errors, split_stages
from job.storage.first_answer import answers_once
from job.storage.hub import is_reachable, local_model
from job.storage.location import join
from job.storage.open import StorageOptions, fetch, is_remote, open_store
from job.training.config import total_steps
from job.training.model_checks import model_problems

EXPORTED = "exported run"
"""The name of the check of JOB_EXPORT__RUN."""


@dataclass(frozen=True)
class Preflight:
    """The results of the checks, and what each of them read: None if it failed or was not made."""

    checks: list[PreflightResult]
    store_seconds: float | None
    model: ModelFacts | None
    adapter: AdapterFacts | None
    tokenizer: Any | None
    data: DataFacts | None
    first_data: DataFacts | None
    questions: known.TaskTokens | None
    safety: AuxiliaryFacts | None = None
    judge: AuxiliaryFacts | None = None
    prompts: tuple[int, ...] = ()
    """Tokens of each prompt of JOB_EVAL__PROMPTS, at most."""


def check_run_inputs(settings: Settings, folder: Path, show: int, unread: JobError | None = None) -> Preflight:
    """Makes all checks; one that fails does not stop the others.

    `unread` is why the settings of the run in JOB_EXPORT__RUN could not be read: then only what does not depend on them
    is checked.
    """
    s, storage = settings, quick_storage(settings)
    access: dict[str, Any] = {"online": cache(is_reachable), "folder": folder, "storage": storage}
    after = partial(after_answers, answers_once(storage))
    storage_check, seconds = run_check(
        "storage", after([s.run.output], lambda: _try_storage(s, storage, folder)), unreachable="wrong"
    )
    first_checks = [storage_check]
    if s.export.run is not None:
        first_checks.append(
            run_check(EXPORTED, after([s.export.run], lambda: check_exported_run(s, storage, unread)))[0]
        )
    if unread is not None:
        checks = [*first_checks, *check_other_inputs(s, storage, None, after=after)]
        return Preflight(checks, seconds, None, None, None, None, None, None)
    model_check, model = run_check(
        "model", after([s.model.id], lambda: preview_model(s.model.id, s.model.revision, **access))
    )
    adapter_check, adapter = run_check("adapter", lambda: _preview_adapter(s, model))
    tokenizer_check, tokenizer = run_check("tokenizer", lambda: find_tokenizer(model, s.model.add_tokens))
    loaded_tasks: list[Tasks] = []
    question_check, questions = run_check(
        "questions",
        after((s.eval.data or {}).values(), lambda: _preview_questions(s, tokenizer, loaded_tasks.append, access)),
    )
    tasks = loaded_tasks[0] if loaded_tasks else None
    rows = _check_rows(s, model, tokenizer, tasks, show=show, access=access, after=after)
    other_checks = [*rows.steps, *check_other_inputs(s, storage, tasks, model, after=after)]
    safety_checks, safety = _check_safety_model(s, access, after)
    prompt_checks, prompts = _check_prompts(s, rows.data, tokenizer, access, after)
    judge_checks, judge = _check_principles(s, access, after)
    return Preflight(
        checks=[
            *(*first_checks, model_check, adapter_check, tokenizer_check),
            *_check_gguf(s, model, folder),
            *(*rows.read, *rows.audited, *safety_checks, question_check),
            *(*other_checks, *prompt_checks, *judge_checks),
        ],
        store_seconds=seconds,
        model=model,
        adapter=adapter,
        tokenizer=tokenizer,
        data=rows.data,
        first_data=rows.first_data,
        questions=questions,
        safety=safety,
        judge=judge,
        prompts=prompts,
    )


@dataclass(frozen=True)
class _RowChecks:
    """The checks of the rows to train on: of a first training stage too, if there is one."""

    read: list[PreflightResult]
    audited: list[PreflightResult]
    steps: list[PreflightResult]
    data: DataFacts | None
    first_data: DataFacts | None


def _check_rows(
    s: Settings,
    model: ModelFacts | None,
    tokenizer: Any,
    tasks: Tasks | None,
    *,
    show: int,
    access: Mapping[str, Any],
    after: After,
) -> _RowChecks:
    """Reads the rows of each training stage and reports their audit, and whether AdaLoRA has enough steps."""
    architecture = model.architecture if model else None
    options: dict[str, Any] = {
        **access,
        "tokenizer": tokenizer,
        "vocabulary": rows_with(architecture.vocabulary if architecture else None, tokenizer, s.model.add_tokens),
        "audit": set_up(index_questions(tasks.prompts(s.eval.limit)) if tasks else None, s.data.on_finding),
        "show": show,
    }
    check, data = run_check("data", after(_row_places(s), lambda: _preview_rows(s, **options)))
    row_checks, steps, first_data = [check], list[PreflightResult](), None
    if s.lora.kind == "adalora" and data is not None and not data.estimated:
        steps = [run_check("steps", partial(_check_steps, s, len(data.examples)))[0]]
    if not s.train.is_one_stage and s.export.run is None:
        options["folder"] = access["folder"] / "first"
        earlier, _ = split_stages(s)
        check, first_data = run_check(
            "first stage", after(_row_places(earlier), lambda: _preview_rows(earlier, **options))
        )
        row_checks.append(check)
    audited = [
        run_check(name, partial(report_audit, facts.audit, facts.long_rows))[0]
        for name, facts in (("audit", data), ("audit of the first stage", first_data))
        if facts is not None and facts.audit is not None
    ]
    return _RowChecks(row_checks, audited, steps, data, first_data)


def _row_places(s: Settings) -> list[str]:
    """Where the rows of a training stage come from, as far as the settings name places."""
    return [*(source.location for source in parse_sources(s.data.source)), str(s.data.validation)]


def _check_safety_model(
    s: Settings, access: Mapping[str, Any], after: After
) -> tuple[list[PreflightResult], AuxiliaryFacts | None]:
    """(the check of JOB_DATA__SAFETY_MODEL, what it read); no check without one."""
    if s.data.safety_model is None:
        return [], None
    model_settings = (s.data.safety_model, s.data.safety_revision, s.data.unsafe_labels, s.data.unsafe_threshold)
    look = after([s.data.safety_model], partial(preview_safety_model, *model_settings, **access))
    check, facts = run_check("safety model", look)
    return [check], facts


def _check_prompts(
    s: Settings, data: DataFacts | None, tokenizer: Any, access: Mapping[str, Any], after: After
) -> tuple[list[PreflightResult], tuple[int, ...]]:
    """(the check of JOB_EVAL__PROMPTS, the tokens of each prompt); no check without one."""
    if s.eval.prompts is None:
        return [], ()
    look = after(
        [str(s.eval.prompts)], lambda: _preview_prompts(s, data, tokenizer, access["folder"], access["storage"])
    )
    check, lengths = run_check("prompts", look)
    return [check], lengths or ()


def _check_principles(
    s: Settings, access: Mapping[str, Any], after: After
) -> tuple[list[PreflightResult], AuxiliaryFacts | None]:
    """(the check of JOB_EVAL__PRINCIPLES and its judge, what it read); no check without one."""
    if s.eval.principles is None or s.eval.judge is None:
        return [], None
    judge_settings = (s.eval.principles, s.eval.judge, s.eval.judge_revision)
    look = after([s.eval.judge], partial(preview_judge, *judge_settings, **access))
    check, facts = run_check("principles", look)
    return [check], facts


def _preview_adapter(s: Settings, model: ModelFacts | None) -> Found[AdapterFacts]:
    """The adapter that the settings name, on this model."""
    return preview_adapter(
        model,
        s.lora.target_modules,
        quantization=s.model.quantization,
        max_length=s.train.max_length,
        rank=s.lora.rank,
        options=adapter_options(s),
        problems=partial(_problems_of_model, s),
    )


def _preview_questions(
    s: Settings, tokenizer: Any, on_tasks: Callable[[Tasks], None], access: Mapping[str, Any]
) -> Found[known.TaskTokens]:
    """The questions of all tasks; `on_tasks` is called with the tasks, as soon as they are loaded."""
    return preview_questions(
        s.eval.tasks,
        s.eval.data,
        s.eval.num_fewshot,
        needed_by=s.need_choices,
        tokenizer=tokenizer,
        limit=s.eval.limit,
        max_length=s.train.max_length,
        cut=s.eval.long_questions == "cut",
        on_tasks=on_tasks,
        **access,
    )


def _problems_of_model(s: Settings, config: Any, empty: Any) -> Iterator[Problem]:
    """What of the settings the model excludes by its configuration, as the job finds before it fetches the weights."""
    yield from model_problems(
        config,
        empty,
        targets=s.lora.target_modules,
        rank=s.lora.rank,
        options=adapter_options(s),
        compute=s.train.compute,
        placement=s.model.placement,
        optimizer=s.train.optimizer,
    )
    if needs_merge(s.export.formats):
        from job.export.model_checks import export_problems

        export_settings: dict[str, Any] = {
            "formats": s.export.formats,
            "onto": s.export.merge_onto,
            "gate_format": s.gate.on,
        }
        yield from export_problems(config, empty, **export_settings, nf4=s.model.quantization == "nf4", device=None)


def _check_gguf(s: Settings, model: ModelFacts | None, folder: Path) -> Iterator[PreflightResult]:
    """Whether llama.cpp takes the model by its small files; no check without a GGUF format."""
    names = [name for name in s.export.formats if split_name(name)[0] == GGUF]
    if not names:
        return

    def check() -> Found[None]:
        from job.export.model_checks import file_problems

        if model is None:
            raise NotChecked("the model's files cannot be fetched")
        if lacking := not_installed(names):
            fix = f"run pip install '{EXTRA}' in the repository"
            raise NotChecked(f"needs {', '.join(lacking)}, which is not installed here: {fix}")
        original = None if is_remote(s.model.id) else local_model(s.model.id)
        original = original or files_without_weights(model.folder, folder / "without weights")
        raise_problems(file_problems(names, original, lambda **_: None))
        return "ok", "llama.cpp takes the model's family and tokenizer", None

    yield run_check(GGUF, check)[0]


def _check_steps(s: Settings, rows: int) -> Found[None]:
    """Whether AdaLoRA has steps to take ranks away in."""
    steps = total_steps(rows, s.train.global_batch_size, s.train.epochs, s.train.max_steps)
    raise_problems(too_few_steps(make_options(dict(s.lora), steps, s.model.add_tokens)))
    return (
        "ok",
        f"{steps:,} steps; the first {s.lora.tinit:,} and last {s.lora.tfinal:,} take no ranks away",
        None,
    )


def _preview_rows(s: Settings, **options: Any) -> Found[DataFacts]:
    """The rows of a stage of training; `options` goes to `preview_data`."""
    with settings_renamed_in_errors(s.part_of):
        return preview_data(
            s.data.source,
            max_length=s.train.max_length,
            revision=s.data.revision,
            validation=validation_source_of(
                s.data.validation,
                source=s.data.source,
                source_revision=s.data.revision,
                validation_revision=s.data.validation_revision,
                validation_split=s.data.validation_split,
            ),
            split=s.data.split,
            limit=s.data.limit,
            schema=None if s.data.format == "auto" else s.data.format,
            on_bad_row=s.data.on_bad_row,
            loss_on=s.train.rows_loss_on,
            method=s.train.last_method,
            seed=s.run.seed if s.data.seed is None else s.data.seed,
            date=s.data.date,
            template_arguments=s.data.chat_template_arguments,
            field_names=s.data.fields,
            on_long_row=s.data.on_long_row,
            row_weights=s.data.row_weights,
            **options,
        )


def _preview_prompts(
    s: Settings, data: DataFacts | None, tokenizer: Any, folder: Path, storage: StorageOptions
) -> Found[tuple[int, ...]]:
    """The tokens of each prompt. A file is read as the job will; of a number of validation rows all tokens count."""
    source, most = s.eval.prompts, s.train.max_length - s.eval.prompts_max_new_tokens
    if isinstance(source, int):
        if data is None:
            raise NotChecked(f"{source:,} of the rows for validation: the data could not be read")
        if data.schema == "text":
            what = "is a number of validation rows, and rows of the schema text have no prompts; give a file of prompts"
            raise DataError([Problem("JOB_EVAL__PROMPTS", what)])
        available, lengths = len(data.validation), tuple(lengths_of(data.validation)[:source])
        if available < source:
            return "note", f"{source:,} of the rows for validation, of which there are only {available:,}", lengths
        return "ok", f"{source:,} of the {available:,} rows for validation", lengths
    with named_by("JOB_EVAL__PROMPTS", ": "):
        copy = fetch(source or "", folder / "prompts", storage)
        with naming(source or "", copy):
            path = find_prompts(copy)
    if tokenizer is None or data is None:
        raise NotChecked(f"{source}: the prompts depend on the model and the data, which could not be read")
    reading: dict[str, Any] = {"date": s.data.date, "template_arguments": s.data.chat_template_arguments}
    prompts = read_prompts(path, source or "", tokenizer=tokenizer, schema=data.schema, most_tokens=most, **reading)
    lengths = tuple(len(prompt.ids) for prompt in prompts)
    return "ok", f"{len(prompts):,} in {source}, the longest of {max(lengths):,} tokens", lengths


def _try_storage(s: Settings, storage: StorageOptions, folder: Path) -> Found[float]:
    """A round trip in the run's own store; for a local output in a folder next to the run, which is removed again.

    The files that are written and read are made in `folder`.
    """
    place = join(s.run.output, s.run.id)
    if is_remote(place):
        return round_trip(open_store(place, storage), place_of_run(s), folder)
    return local_round_trip(Path(s.run.output), place_of_run(s), folder)
