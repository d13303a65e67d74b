"""`plan`: checks everything a run needs, without a GPU, and forecasts memory, time and cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from job.audit.overlap import index_questions
from job.audit.rows import set_up
from job.common.export_formats import GGUF, adapter_copies, derived, needs_merge
from job.common.formatting import size
from job.common.lora_readers import why_not_served
from job.common.methods import METHODS
from job.common.resources import check_disk, checkpoint_bytes, required_bytes
from job.common.source_list import parse_sources
from job.data.batch_plan import steps_per_epoch
from job.data.examples import lengths_of, target_counts_of
from job.data.licences import LICENCES, find_licence
from job.data.prompts import find_prompts, read_prompts
from job.data.training_and_validation import what_to_validate_on
from job.errors import JobError, Problem, SettingsError, combine, named_by
from job.evaluation.policy import CHOICES, read_policy
from job.evaluation.tasks import Tasks, check_gate
from job.model.adapter_options import MANY_STEPS, PLAIN, AdapterOptions, make_options
from job.model.start_adapter import check_start, local_start
from job.model.tokenizer_files import rows_with
from job.planning import forecast
from job.planning import known_models_and_data as known
from job.planning.forecast import Basis, Estimate, ForwardWork, GpuForecast, RunShape, estimates, forecast_gpu
from job.planning.gpu_prices import GPUS, PRICES, Gpu
from job.planning.preflight import (
    AdapterFacts,
    DataFacts,
    Found,
    ModelFacts,
    NotChecked,
    PreflightResult,
    find_tokenizer,
    local_round_trip,
    preview_adapter,
    preview_data,
    preview_model,
    preview_questions,
    preview_safety_model,
    report_audit,
    round_trip,
    run_check,
)
from job.planning.shown_rows import ShownRow
from job.planning.workload import Workload, count, scale
from job.push.push import targets
from job.records import Example
from job.results.baseline import read_baseline
from job.results.signing import key_id, load_private_key, public_key
from job.settings.affects_result import plain_values
from job.settings.load import Settings
from job.settings.schema import Sign
from job.settings.training_stages import naming_its_settings, split_stages
from job.storage.hub import MAX_FILE, is_reachable
from job.storage.location import join
from job.storage.open import StorageOptions, fetch, is_remote, open_store, storage_options
from job.training import memory_model
from job.training.config import total_steps
from job.training.early_stopping import due_steps
from job.training.memory_model import Setup

CALIBRATION_BATCH, CALIBRATION_LENGTH = 8, 2048
"""Sequences of a step of auto-round, and their length in tokens at most; `job.export` has them, which needs torch."""
SMALL_GPU_TOKENS = 4096
"""Token budget for which memory is forecast if none is set: what the job uses on GPUs of 11 to 40 GiB."""

QUICK = {"timeout_seconds": 10.0, "retries": 2}
"""Upper limits on the storage settings, so that an address that does not answer fails within seconds."""
SHARED_MEMORY = PreflightResult("shared memory", "ok", "one process needs none; several want 1 GiB in /dev/shm")


@dataclass(frozen=True)
class Plan:
    """Checks, estimates, and the forecast for each GPU."""

    title: str
    checks: tuple[PreflightResult, ...]
    figures: tuple[Estimate, ...]
    gpus: tuple[GpuForecast, ...]
    largest_step: int | None
    assumptions: tuple[str, ...]
    shown: tuple[ShownRow, ...] = ()

    @property
    def error(self) -> JobError | None:
        """The error to exit with, which lists all that is wrong; None if all that was checked is right."""
        wrong = [(found.name, found.error) for found in self.checks if found.error is not None]
        return combine(wrong) if wrong else None


@dataclass(frozen=True)
class _Preflight:
    """The results of the checks, and what each of them read: None if it failed or was not made."""

    checks: list[PreflightResult]
    store_seconds: float | None
    model: ModelFacts | None
    adapter: AdapterFacts | None
    tokenizer: Any | None
    data: DataFacts | None
    first_data: DataFacts | None
    questions: known.TaskTokens | None


def make_plan(settings: Settings, show: int = 0) -> Plan:
    """Makes all checks, then forecasts from what they read, or from known sizes of public models and data."""
    with tempfile.TemporaryDirectory(prefix="qlora-job-plan-") as folder:
        seen = _look(settings, Path(folder), show)
    checks = [*seen.checks]
    run = _run(settings, seen, checks)
    gpus = [_with_memory_limit(gpu, settings.train.gpu_memory_gb) for gpu in GPUS]
    checks += [_licence(settings, seen), _disk(settings, run), SHARED_MEMORY, *_large_files(settings, run)]
    return Plan(
        title=f"{settings.model.id} on {settings.data.source}, to {settings.run.output.rstrip('/')}/{settings.run.id}",
        checks=tuple(checks),
        figures=(*_measured(seen), *estimates(run)),
        gpus=() if run.setup is None else tuple(forecast_gpu(gpu, run, run.setup) for gpu in gpus),
        largest_step=run.workload.largest_step if run.workload else None,
        assumptions=_assumptions(settings),
        shown=tuple(row for data in (seen.first_data, seen.data) if data for row in data.shown),
    )


def _with_memory_limit(gpu: Gpu, gigabytes: float | None) -> Gpu:
    """The GPU, with no more memory than JOB_TRAIN__GPU_MEMORY_GB."""
    return gpu if gigabytes is None else replace(gpu, memory_bytes=min(gpu.memory_bytes, int(gigabytes * 1e9)))


def _look(settings: Settings, folder: Path, show: int) -> _Preflight:
    """Makes all checks; one that fails does not stop the others."""
    s, storage = settings, storage_options(settings.storage)
    storage = replace(storage, **{name: min(getattr(storage, name), most) for name, most in QUICK.items()})
    where: dict[str, Any] = {"online": cache(is_reachable), "folder": folder, "storage": storage}
    stored, seconds = run_check("storage", lambda: _try_storage(s.run.output, s.run.id, storage), unreachable="wrong")
    modelled, model = run_check(
        "model", lambda: preview_model(s.model.id, s.model.revision, s.train.max_length, **where)
    )
    adapted, adapter = run_check(
        "adapter",
        lambda: preview_adapter(
            model,
            s.lora.target_modules,
            quantization=s.model.quantization,
            max_length=s.train.max_length,
            rank=s.lora.rank,
            options=_adapter_options(s),
        ),
    )
    tokenized, tokenizer = run_check("tokenizer", lambda: find_tokenizer(model, s.model.add_tokens))
    rows_too: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocabulary": rows_with(
            model.architecture.vocabulary if model and model.architecture else None, tokenizer, s.model.add_tokens
        ),
        **where,
    }
    loaded: list[Tasks] = []
    asked, questions = run_check(
        "questions",
        lambda: preview_questions(
            s.eval.tasks,
            s.eval.data,
            s.eval.num_fewshot,
            needed_by=s.need_choices,
            tokenizer=tokenizer,
            limit=s.eval.limit,
            max_length=s.train.max_length,
            cut=s.eval.long_questions == "cut",
            on_tasks=loaded.append,
            **where,
        ),
    )
    scored = index_questions(loaded[0].prompts(s.eval.limit)) if loaded else None
    rows_too["audit"] = set_up(scored, s.data.on_finding)
    read, data = run_check("data", lambda: _preview_rows(s, show=show, **rows_too))
    first, first_data = [], None
    if not s.train.is_one_stage:
        rows_too["folder"] = folder / "first"
        earlier, _ = split_stages(s)
        check, first_data = run_check("first stage", lambda: _preview_rows(earlier, show=show, **rows_too))
        first.append(check)
    audited = [
        run_check(name, partial(report_audit, one.audit, one.long_rows))[0]
        for name, one in (("audit", data), ("audit of the first stage", first_data))
        if one is not None and one.audit is not None
    ]
    others = _check_other_inputs(s, storage, loaded[0] if loaded else None)
    if s.data.safety_model is not None:
        asked_for = (s.data.safety_model, s.data.safety_revision, s.data.unsafe_labels, s.data.unsafe_threshold)
        audited.append(run_check("safety model", partial(preview_safety_model, *asked_for, **where))[0])
    checks = [stored, modelled, adapted, tokenized, read, *first, *audited, asked, *others]
    if s.eval.prompts is not None:
        checks.append(run_check("prompts", lambda: _preview_prompts(s, data, tokenizer, folder, storage))[0])
    return _Preflight(checks, seconds, model, adapter, tokenizer, data, first_data, questions)


def _preview_rows(s: Settings, **how: Any) -> Found[DataFacts]:
    """The rows of a stage of training; `how` goes to `preview_data`."""
    with naming_its_settings(s):
        return preview_data(
            s.data.source,
            max_length=s.train.max_length,
            revision=s.data.revision,
            validation=what_to_validate_on(
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
            **how,
        )


def _preview_prompts(
    s: Settings, data: DataFacts | None, tokenizer: Any, folder: Path, storage: StorageOptions
) -> Found[None]:
    """Reads the prompts of a file as the job will. Of a number of validation rows the job says if there are fewer."""
    asked, most = s.eval.prompts, s.train.max_length - s.eval.prompts_max_new_tokens
    if isinstance(asked, int):
        held = "rows" if data is None else f"{len(data.validation):,} rows"
        return "ok", f"{asked:,} of the {held} for validation", None
    with named_by("JOB_EVAL__PROMPTS", ": "):
        path = find_prompts(fetch(asked or "", folder / "prompts", storage))
    if tokenizer is None or data is None:
        raise NotChecked(f"{asked}: what a prompt is depends on the model and the data, which could not be read")
    how: dict[str, Any] = {"date": s.data.date, "template_arguments": s.data.chat_template_arguments}
    found = read_prompts(path, asked or "", tokenizer=tokenizer, schema=data.schema, most_tokens=most, **how)
    longest = max(len(prompt.ids) for prompt in found)
    return "ok", f"{len(found):,} in {asked}, the longest of {longest:,} tokens", None


def _check_other_inputs(settings: Settings, storage: StorageOptions, tasks: Tasks | None) -> Iterator[PreflightResult]:
    """Checks of the inputs that only some runs have."""
    start, baseline = settings.lora.start, settings.gate.baseline

    def check_start_adapter() -> Found[None]:
        folder = None if is_remote(start or "") else local_start(start or "")
        if folder is None:
            raise NotChecked(f"{start}: an adapter is not fetched for a plan")
        lora = settings.lora
        check_start(folder, rank=lora.rank, alpha=lora.alpha, options=lora.model_dump(mode="json"))
        return "ok", f"training goes on from {start}", None

    def check_baseline() -> Found[None]:
        return "ok", f"the gate compares with run {read_baseline(baseline or '', storage).run}", None

    if (chosen := targets(settings.export)) and (reasons := why_not_served(plain_values(settings))):
        yield PreflightResult(
            "serving", "note", f"vLLM does not serve this adapter as it was trained: {'; '.join(reasons)}"
        )
    if settings.sign.key is not None:
        yield run_check("signature", lambda: _check_key(settings.sign))[0]
    for target in chosen:
        yield run_check(target.kind, lambda target=target: ("ok", target.check(), None))[0]  # type: ignore[misc]
    if start is not None:
        yield run_check("start", check_start_adapter)[0]
    if baseline is not None:
        yield run_check("baseline", check_baseline)[0]
    if settings.gate.policy is not None or settings.gate.metric not in CHOICES:
        yield run_check("gate", lambda: _check_gate(settings, tasks))[0]


def _check_key(sign: Sign) -> Found[None]:
    """Whether the key signs, and by which hash signatures will name it."""
    password = None if sign.password is None else sign.password.get_secret_value()
    pem = public_key(load_private_key(sign.key or "", password))
    return "ok", f"{sign.key} signs what is published; its public key has the SHA-256 {key_id(pem)[:12]}", None


def _check_gate(settings: Settings, tasks: Tasks | None) -> Found[None]:
    """Whether the gate names what the run compares."""
    gate = settings.gate
    policy = None if gate.policy is None else read_policy(gate.policy)
    if tasks is None:
        raise NotChecked("what the gate may judge depends on the tasks, which could not be read")
    check_gate(tasks, gate.metric, policy, gate.policy, gate.only_choices)
    if policy is None:
        return "ok", f"the gate judges {gate.metric}", None
    return "ok", f"the gate judges {len(policy.tasks)} tasks or groups by {gate.policy}", None


def _try_storage(output: str, run: str, storage: StorageOptions) -> Found[float]:
    """A round trip in the run's own store; for a local output in a folder beside the run, which is removed again."""
    place = join(output, run)
    return round_trip(open_store(place, storage), place) if is_remote(place) else local_round_trip(Path(output), place)


def _measured(seen: _Preflight) -> list[Estimate]:
    """The estimates that were measured."""
    what = "a write, a read, a list, a delete, and conditional writes"
    return [] if seen.store_seconds is None else [Estimate("storage", seen.store_seconds, "s", "measured", what)]


def _run(settings: Settings, seen: _Preflight, checks: list[PreflightResult]) -> RunShape:
    """What is known about the run: from the checks, or from the tables of known sizes if they read nothing."""
    setup, model_basis = _setup(settings, seen, checks)
    workload, data_basis = _workload(settings, seen.data)
    questions, questions_basis = _questions(settings, seen)
    download = seen.model.download_bytes if seen.model else None
    if download is None:
        download = 2 * setup.architecture.parameters if setup else 0  # weights are published in half precision
    run = RunShape(
        setup=setup,
        setup_basis=model_basis,
        workload=workload,
        workload_basis=data_basis,
        validation=_validation(settings, seen.data, workload),
        merges=_merges(settings),
        derived=tuple(derived(settings.export.formats)),
        adapter_copies=len(adapter_copies(settings.export.formats)),
        quantizing_tokens=_quantizing_tokens(settings, workload),
        reference=_reference(settings, seen.data),
        questions=questions,
        questions_basis=questions_basis,
        budget=settings.train.micro_batch_tokens or SMALL_GPU_TOKENS,
        scoring_budget=settings.eval.batch_tokens,
        download_bytes=download + (seen.data.download_bytes if seen.data else 0),
        usd_per_hour=settings.cost.usd_per_hour,
        fused=settings.model.dtype in {"auto", "bf16"}
        and settings.lora.dropout == 0
        and _adapter_options(settings).not_fused is None,
        budget_by_gpu=settings.train.micro_batch_tokens is None,
        keep_base=None if settings.model.keep_dequantized == "auto" else settings.model.keep_dequantized,
        full_precision=settings.eval.full_precision == "auto" and settings.model.quantization != "none",
        keep_activations=None if (again := settings.train.gradient_checkpointing) == "auto" else not again,
    )
    if settings.train.is_one_stage:
        return run
    first, _ = split_stages(settings)
    workload, data_basis = _workload(first, seen.first_data)
    earlier = replace(
        run,
        workload=workload,
        workload_basis=data_basis,
        validation=_validation(first, seen.first_data, workload),
        reference=None,
        download_bytes=0,
        merges=0,
        adapter_copies=0,
        derived=(),
        quantizing_tokens=0,
    )
    more = seen.first_data.download_bytes if seen.first_data else 0
    return replace(run, first_stage=earlier, download_bytes=run.download_bytes + more)


def _setup(settings: Settings, seen: _Preflight, checks: list[PreflightResult]) -> tuple[Setup | None, Basis]:
    """Model, adapter and optimizer; None if the model is unknown, or lacks a layer that LoRA should adapt."""
    basis: Basis = "computed" if seen.model is not None else "assumed"
    architecture = seen.model.architecture if seen.model else known.ARCHITECTURES.get(settings.model.id)
    if architecture is None:
        return None, basis
    named, options = settings.lora.target_modules, _adapter_options(settings)
    targets = architecture.groups[named] if isinstance(named, str) else named
    rank = settings.lora.rank if options.adalora is None else options.adalora.init_r
    missing = [name for name in targets if name not in architecture.linear]
    if missing:
        if seen.model is None:  # else the check named "adapter" has inspected the layers themselves
            what = f"the model has no linear {', '.join(missing)}; it has {', '.join(sorted(architecture.linear))}"
            error = SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
            checks.append(PreflightResult("adapter", "wrong", str(error), error))
        return None, basis
    return Setup(
        architecture=architecture,
        rank=2 * rank if options.decomposed else rank,
        targets=targets,
        quantization=settings.model.quantization,
        double_quantization=settings.model.double_quantization,
        value_bytes=memory_model.FP32 if settings.model.dtype == "fp32" else forecast.HALF_PRECISION,
        optimizer=settings.train.optimizer,
        recompute=settings.train.gradient_checkpointing is not False,
        counted=seen.adapter.parameters if seen.adapter and options != PLAIN else None,
        dora=options.use_dora,
        bytes_beside=options.bytes_beside,
        merged_rows=2 * architecture.vocabulary if options.added_tokens else 0,
    ), basis


def _adapter_options(settings: Settings) -> AdapterOptions:
    """As a run has them, but for the number of steps: before the rows are counted nothing is known of it."""
    return make_options(dict(settings.lora), settings.train.max_steps or MANY_STEPS, settings.model.add_tokens)


def _workload(settings: Settings, data: DataFacts | None) -> tuple[Workload | None, Basis]:
    """Counted from the rows; else scaled from a known sample of the data set; else None."""
    train = settings.train

    def steps(rows: int) -> int:
        return total_steps(rows, train.global_batch_size, train.epochs, train.max_steps)

    if data is not None:
        lengths, targets = lengths_of(data.examples), target_counts_of(data.examples)
        seed = settings.run.seed if settings.data.seed is None else settings.data.seed
        batches = {"seed": seed, "global_batch_size": train.global_batch_size}
        counted = count(lengths, targets, steps=steps(len(lengths)), **batches)
        return counted, "assumed" if data.estimated else "computed"
    samples = known.DATASET_TOKENS.get(settings.data.source)
    if samples is None:
        return None, "assumed"
    rows = min(settings.data.limit or samples[-1].rows, samples[-1].rows)
    sample = min(samples, key=lambda sample: abs(sample.rows - rows))
    return scale(
        rows,
        sample.tokens / sample.rows,
        sample.squares / sample.rows,
        min(sample.longest, train.max_length),
        global_batch_size=train.global_batch_size,
        steps=steps(rows),
    ), "assumed"


def _validation(settings: Settings, data: DataFacts | None, workload: Workload | None) -> ForwardWork | None:
    """The validations of a run that does not stop early; None where there are none, or their rows are not known."""
    if data is None or workload is None or not data.validation:
        return None
    every = settings.train.validate_every_steps or steps_per_epoch(workload.rows, settings.train.global_batch_size)
    return _forward(data.validation, len(due_steps(every, workload.steps)))


def _reference(settings: Settings, data: DataFacts | None) -> ForwardWork | None:
    """The log-probabilities of the reference; None where the method has none, or the rows are not known."""
    if data is None or not METHODS[settings.train.last_method].reference:
        return None
    return _forward(data.examples, 1)


def _forward(examples: Sequence[Example], count: int) -> ForwardWork:
    return ForwardWork(
        count=count,
        rows=len(examples),
        tokens=sum(lengths_of(examples)),
        target_tokens=sum(target_counts_of(examples)),
        longest=max(lengths_of(examples)),
    )


def _merges(settings: Settings) -> int:
    """How many candidates of a merge are made, as far as that is known before the base's weights are."""
    both = settings.export.merge_onto == "best" and settings.model.quantization != "none"
    return (1 + both) * needs_merge(settings.export.formats)


def _quantizing_tokens(settings: Settings, workload: Workload | None) -> int:
    """Tokens of all steps of auto-round; at most, where the rows are unknown."""
    at_once = CALIBRATION_BATCH * CALIBRATION_LENGTH
    if workload is not None:
        rows = min(settings.export.calibration_rows, workload.rows)
        epochs = workload.steps * settings.train.global_batch_size / workload.rows
        at_once = min(at_once, int(rows * workload.tokens / max(1, workload.rows * epochs)))
    return settings.export.quantization_steps * at_once


def _questions(settings: Settings, seen: _Preflight) -> tuple[known.TaskTokens | None, Basis]:
    """Counted from the questions; else from known tasks; else None."""
    if seen.questions is not None:
        return seen.questions, "computed" if seen.tokenizer is not None else "assumed"
    tables = [known.TASK_TOKENS.get(task) for task in settings.eval.tasks]
    limited = [table.first(settings.eval.limit) for table in tables if table is not None]
    if len(limited) < len(tables):
        return None, "assumed"
    return known.TaskTokens(*(sum(parts) for parts in zip(*map(astuple, limited), strict=True))), "assumed"


def _licence(settings: Settings, seen: _Preflight) -> PreflightResult:
    """The licences of data and model by their cards, else by name; the hub is asked for the model's if it answered."""
    data = settings.data
    found = [
        seen.data.licence if seen.data is not None else None,
        *(
            find_licence(one.place, one.revision or data.revision, "dataset")
            if Path(one.place).exists()
            else LICENCES.get(one.place)
            for one in parse_sources(data.source)
        ),
    ]
    licence = found[0] or "; ".join(sorted({one for one in found if one})) or "unknown; check that you may train on it"
    limits = ": no commercial use of the data, nor of what is trained on it" if "-nc" in licence else ""
    # A model that was looked at is here, or the hub answers.
    base = find_licence(settings.model.id, settings.model.revision, "model") if seen.model is not None else None
    return PreflightResult(
        "licence", "note", f"{data.source}: {licence}{limits}; {settings.model.id}: {base or 'unknown'}"
    )


def _disk(settings: Settings, run: RunShape) -> PreflightResult:
    """Whether this machine's disk has enough space; the machine with the GPU needs as much."""
    folder = Path(settings.storage.cache or tempfile.gettempdir())
    checkpoint = checkpoint_bytes(run.setup.adapter, run.setup.optimizer) if run.setup else 0
    need = required_bytes([run.download_bytes, run.export_bytes], checkpoint)

    def work() -> Found[None]:
        check_disk(folder, need)
        return "ok", f"about {size(need, ' ')} are needed; {folder} has them on this machine", None

    return run_check("disk", work, unreachable="note")[0]


def _large_files(settings: Settings, run: RunShape) -> Iterator[PreflightResult]:
    """What is too large for one file of the hub: a GGUF file. All other formats are split into shards."""
    for name in run.derived if settings.export.hub else ():
        if name.startswith(GGUF) and (found := run.format_bytes(name)) > MAX_FILE:
            what = f"{name} is one file of about {size(found, ' ')}, and the hub takes {size(MAX_FILE, ' ')}"
            yield PreflightResult(
                "hub", "note", f"{what}; leave it out, take a smaller type, or push to JOB_EXPORT__OCI"
            )


def _assumptions(settings: Settings) -> tuple[str, ...]:
    """The assumptions behind all figures of basis `assumed`, one sentence each."""
    price, context = settings.cost.usd_per_hour, size(memory_model.CONTEXT_BYTES, " ")
    fused, peft = (f"{used:.0%}" for used in (memory_model.FUSED_UTILISATION, memory_model.UTILISATION))
    half = f"speed: {fused} of the data sheet's operations a second in bf16, {peft} before Ampere or with dropout"
    exporting = (
        f"export: on one processor core {forecast.MERGED_PER_SECOND / 1e6:.0f} million weights a second for merged and "
        f"fp8, {forecast.GGUF_PER_SECOND / 1e6:.0f} for GGUF, which llama.cpp scores on {forecast.CORES} cores of "
        f"{forecast.LLAMA_CPP_FLOPS / 1e9:.0f} GFLOP/s"
    )
    first = f"JOB_TRAIN__METHOD={settings.train.method}: hours and dollars of both stages, other figures of the last"
    return (
        *(() if settings.train.is_one_stage else (first,)),
        *((exporting,) if settings.export.formats else ()),
        "one GPU; several GPUs share the examples of a step, and each needs the same memory",
        f"{half}, as measured on H100 and H200; slower GPUs tend to do better",
        f"start: {forecast.START_SECONDS:.0f} s, and {forecast.DOWNLOAD_RATE / 1e6:.0f} MB/s for downloads",
        f"memory: {context} for the driver, and {memory_model.MARGIN:.0%} for the error of the formula",
        f"price: {PRICES}" if price is None else f"price: {price:g} USD an hour, as set, on every GPU",
        "no interruptions: each costs a start and the steps since the last checkpoint",
    )
