"""`plan`: checks everything a run needs, without a GPU, and forecasts memory, time and cost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from job.common.export_formats import GGUF, MERGED
from job.common.formatting import size
from job.common.gpu_context import CONTEXT_BYTES
from job.common.optimizers import too_high
from job.common.resources import (
    OTHER_OUTPUT_BYTES,
    available_bytes,
    check_disk,
    checkpoint_bytes,
    disk_space,
    output_bytes,
)
from job.common.source_list import parse_sources
from job.data.hub_dataset import is_hub_id
from job.data.licences import find_licence
from job.distributed.launcher import count_processes
from job.errors import JobError, SettingsError, Unreachable, combine, environment_name
from job.planning import scaling, time_model
from job.planning.advice_to_fit import advice_to_fit, with_memory_limit
from job.planning.auxiliary_models import FP32_SHARE
from job.planning.forecast import Estimate, GpuForecast, disk_bytes, estimates, forecast_gpu
from job.planning.forecast_input import RunShape
from job.planning.forecast_time import (
    CORES,
    DOWNLOAD_RATE,
    GGUF_PER_SECOND,
    LLAMA_CPP_FLOPS,
    LOADING_RATE,
    MERGED_PER_SECOND,
    START_SECONDS,
)
from job.planning.gpu_prices import GPUS, PRICES
from job.planning.input_checks import EXPORTED, Preflight, check_run_inputs
from job.planning.plan_settings import place_of_run
from job.planning.preflight import Found, PreflightResult, run_check
from job.planning.run_shape import shape_of_run
from job.planning.shown_rows import ShownRow
from job.planning.workload import Workload
from job.settings.combinations import sharded_alone
from job.settings.load import Settings
from job.settings.training_stages import folder_of
from job.storage.hub import MAX_FILE_BYTES
from job.storage.location import is_remote
from job.training import memory_model

SHARED_MEMORY = PreflightResult("shared memory", "ok", "one process needs none; several need 1 GiB in /dev/shm")


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
    trains: bool = True
    """False for a run that exports a finished one."""
    advice: str = ""
    """What would help where no GPU fits; else empty."""

    @property
    def error(self) -> JobError | None:
        """The error to exit with, which lists all that is wrong; None if all that was checked is right."""
        wrong = [(check.name, check.error) for check in self.checks if check.error is not None]
        return combine(wrong) if wrong else None


def make_plan(settings: Settings, show: int = 0, unread: JobError | None = None) -> Plan:
    """Makes all checks, then forecasts from what they read, or from known sizes of public models and data.

    `unread` is why the settings of the run in JOB_EXPORT__RUN could not be read: then nothing is forecast.
    """
    cache = settings.storage.cache
    # The cache of a run is often on a disk that this machine lacks.
    parent = cache if cache is not None and os.access(cache, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="qlora-job-plan-", dir=parent) as folder:
        preflight = check_run_inputs(settings, Path(folder), show, unread)
    checks = [*preflight.checks, *_note_of_export(settings, preflight)]
    place = place_of_run(settings)
    if unread is not None:
        title = f"export of {settings.export.run}, to {place}"
        return Plan(title, tuple(checks), tuple(_measured(preflight)), (), None, (), trains=False)
    # As a run on this machine would count them; a plan for another machine names the number.
    processes = count_processes("auto") if settings.run.processes == "auto" else settings.run.processes
    placement_checks = [*_sharded_alone(settings, processes)]
    checks += [*placement_checks, *_learning_rates(settings)]
    run = shape_of_run(settings, preflight, checks, processes)
    limit = settings.train.gpu_memory_gb
    forecasts, advice = list[GpuForecast](), ""
    if run.setup is not None and not placement_checks:
        forecasts = [forecast_gpu(with_memory_limit(gpu, limit), run, run.setup) for gpu in GPUS]
        if not any(forecast.fits for forecast in forecasts):
            longest_at = preflight.data.longest_at if preflight.data is not None else ""
            advice = advice_to_fit(GPUS, run, run.setup, limit=limit, longest_at=longest_at)
    memory = [SHARED_MEMORY, *_main_memory(settings, run)]
    output = _output_bytes(settings, run)
    disks = [*_disks(settings, run, output)]
    checks += [_licence(settings, preflight), *disks, *memory, *_large_files(settings, run)]
    return Plan(
        title=f"{settings.model.id} on {settings.data.source}, to {place}"
        if run.trains
        else f"export of {settings.export.run}, {settings.model.id} on {settings.data.source}, to {place}",
        checks=tuple(checks),
        figures=(*_measured(preflight), *estimates(run), *_output_figure(run, output)),
        gpus=tuple(forecasts),
        largest_step=run.workload.largest_step if run.workload and run.trains else None,
        assumptions=_assumptions(settings, run.processes),
        shown=tuple(row for data in (preflight.first_data, preflight.data) if data for row in data.shown),
        trains=run.trains,
        advice=advice,
    )


def _note_of_export(settings: Settings, preflight: Preflight) -> Iterator[PreflightResult]:
    """The note on a run that exports a finished one."""
    if any(check.name == EXPORTED and check.state != "wrong" for check in preflight.checks):
        what = f"JOB_EXPORT__RUN: {settings.export.run} is taken over; nothing is trained"
        yield PreflightResult("training", "note", what)


def _learning_rates(settings: Settings) -> Iterator[PreflightResult]:
    """The note on learning rates that are likely mistakes; a run that exports a finished one has none."""
    train = settings.train
    rates = {"train.learning_rate": train.learning_rate}
    if not train.is_one_stage:
        rates = {"train.sft_learning_rate": train.sft_learning_rate, **rates}
    for name, rate in rates.items() if settings.export.run is None else ():
        if (why := too_high(rate)) is not None:
            yield PreflightResult("learning rate", "note", f"{environment_name(name)}: {why}")


def _measured(preflight: Preflight) -> list[Estimate]:
    """The estimates that were measured."""
    what = "a write, a read, a list, a delete, and conditional writes"
    return (
        [] if preflight.store_seconds is None else [Estimate("storage", preflight.store_seconds, "s", "measured", what)]
    )


def _licence(settings: Settings, preflight: Preflight) -> PreflightResult:
    """The licences of data and model by their cards, else by name; of what was not looked at, by cards in the cache."""
    data, model, sources = settings.data, settings.model, parse_sources(settings.data.source)
    licences = [
        preflight.data.licence if preflight.data is not None else None,
        *(
            find_licence(source.location, source.revision or data.revision, "dataset", ask_hub=False)
            for source in sources
        ),
    ]
    unknown = _unknown(*(source.location for source in sources), asked=preflight.data is not None)
    licence = (
        licences[0]
        or "; ".join(sorted({name for name in licences if name}))
        or f"{unknown}; check that you may train on it"
    )
    limits = ": no commercial use of the data, nor of models that are trained on it" if "-nc" in licence else ""
    hub_answers = preflight.model is not None  # a model that was looked at is here, or the hub answers
    base = find_licence(model.id, model.revision, "model", ask_hub=hub_answers) or _unknown(model.id, asked=hub_answers)
    return PreflightResult("licence", "note", f"{data.source}: {licence}{limits}; {model.id}: {base}")


def _unknown(*places: str, asked: bool) -> str:
    """Why no licence is known: of a hub id, the hub may not have been asked."""
    if asked or not any(map(is_hub_id, places)):
        return "unknown"
    return "unknown, since the hub was not asked and its cache here has no card"


def _sharded_alone(settings: Settings, processes: int) -> Iterator[PreflightResult]:
    """The problem of a base sharded over a single process, which `auto` may choose."""
    if (problem := sharded_alone(settings, processes * settings.run.nodes)) is not None:
        error = SettingsError([problem])
        yield PreflightResult("placement", "wrong", str(error), error)


def _disks(settings: Settings, run: RunShape, output: int | None) -> Iterator[PreflightResult]:
    """Whether this machine's disks have enough space; the machine with the GPU needs the same.

    `output` is as `_output_bytes` returns it. On one disk with the temporary files, both needs add up.
    """
    folder, results = Path(settings.storage.cache or tempfile.gettempdir()), Path(folder_of(settings)).expanduser()
    shared = output is not None and _on_one_disk(folder, results)
    need = disk_bytes(run) + (output if output is not None and shared else 0)
    part = f", {size(output or 0, ' ')} of them for results in {results}" if shared else ""

    def work() -> Found[None]:
        try:
            check_disk(folder, need)
        except Unreachable as error:
            raise Unreachable(f"{error}{', or by JOB_RUN__OUTPUT' if shared else ''}{part}") from None
        return "ok", f"about {size(need, ' ')} are needed{part}; {folder} has them on this machine", None

    def results_work() -> Found[None]:
        need, free = output or 0, disk_space(results).writable
        what = f"JOB_RUN__OUTPUT: about {size(need, ' ')} are needed for checkpoints, adapter, exports and report"
        if free >= need:
            return "ok", f"{what}; {results} has them on this machine", None
        fix = "free space there, or name a folder on a larger disk, or a bucket"
        if run.trains and settings.checkpoint.keep > 1:
            fix += "; JOB_CHECKPOINT__KEEP=1 keeps fewer checkpoints"
        return "note", f"{what}, and {results} has {size(free, ' ')} on this machine; {fix}", None

    yield run_check("disk", work, unreachable="note")[0]
    if output is not None and not shared:
        yield run_check("output disk", results_work, unreachable="note")[0]


def _on_one_disk(one: Path, other: Path) -> bool:
    """Whether both folders, which need not exist yet, share their space; False if that cannot be found out."""
    try:
        return disk_space(one).shares(disk_space(other))
    except Unreachable:
        return False


def _output_bytes(settings: Settings, run: RunShape) -> int | None:
    """Bytes that the run keeps in JOB_RUN__OUTPUT at most at once; None in a bucket, or for an unknown model.

    Of two training stages, the first one's checkpoints and adapter stay while the second one trains.
    """
    if is_remote(settings.run.output) or run.setup is None:
        return None
    adapter, keep = memory_model.FP32 * run.setup.adapter, settings.checkpoint.keep
    exports = run.format_bytes(MERGED) * (MERGED in settings.export.formats) + sum(map(run.format_bytes, run.derived))
    exports += adapter // 2 * run.adapter_copies
    kept_base = settings.model.keep_quantized == "store" and settings.model.quantization != "none"
    others, always = adapter + exports, OTHER_OUTPUT_BYTES + kept_base * memory_model.weight_bytes(run.setup)
    if not run.trains:
        return others + always
    checkpoint = checkpoint_bytes(run.setup.adapter, run.setup.optimizer)

    def saves(workload: Workload | None) -> int:
        """How many checkpoints a stage writes; with unknown rows, as many as can be there at once."""
        return keep + 1 if workload is None else ceil(workload.steps / settings.checkpoint.every_steps)

    need = always + output_bytes(checkpoint, keep=keep, saves=saves(run.workload), others=others)
    if run.first_stage is not None:
        need += min(keep, saves(run.first_stage.workload)) * checkpoint + adapter
    return need


def _output_figure(run: RunShape, output: int | None) -> Iterator[Estimate]:
    """The estimate of what is kept in a local folder of results."""
    if output is not None:
        note = "JOB_RUN__OUTPUT: checkpoints, adapter, exports, report; at most at once"
        basis = "assumed" if run.trains and run.workload_basis == "assumed" else run.setup_basis
        yield Estimate("disk, results", output, "bytes", basis, note)


def _main_memory(settings: Settings, run: RunShape) -> Iterator[PreflightResult]:
    """Whether this machine or its container has memory for a base kept there; a run's machine needs the same."""
    if settings.model.placement != "host" or run.setup is None:
        return
    need = run.processes_here * memory_model.packed_bytes(run.setup)
    free = int(memory_model.MAIN_MEMORY_SHARE * available_bytes())
    what = memory_model.copies_in_main_memory(run.setup, run.processes_here)
    fits = need <= free
    more = f"{size(free, ' ')} can safely be used here{'' if fits else ', where a run would be refused'}"
    yield PreflightResult("main memory", "ok" if fits else "note", f"{what}; {more}")


def _large_files(settings: Settings, run: RunShape) -> Iterator[PreflightResult]:
    """What is too large for one file of the hub: a GGUF file. All other formats are split into shards."""
    for name in run.derived if settings.export.hub else ():
        if name.startswith(GGUF) and (file_bytes := run.format_bytes(name)) > MAX_FILE_BYTES:
            what = f"{name} is one file of about {size(file_bytes, ' ')}, and the hub takes {size(MAX_FILE_BYTES, ' ')}"
            yield PreflightResult(
                "hub", "note", f"{what}; leave it out, use a smaller type, or push to JOB_EXPORT__OCI"
            )


_RESULTS = "tests/bench/results"
_GENERATED = "sample answers (JOB_EVAL__PROMPTS): the time in which they are generated is not in the hours"
_FP8 = f"speed with JOB_TRAIN__COMPUTE=fp8: {time_model.FP8_SPEEDUP:g} times that of bf16, measured on an H200"


def _assumptions(settings: Settings, processes: int) -> tuple[str, ...]:
    """The assumptions behind all figures of basis `assumed`, one sentence each."""
    price, context, trains = settings.cost.usd_per_hour, size(CONTEXT_BYTES, " "), settings.export.run is None
    exporting = (
        f"export: on one processor core {MERGED_PER_SECOND / 1e6:.0f} million weights a second for merged and "
        f"fp8, {GGUF_PER_SECOND / 1e6:.0f} for GGUF, which llama.cpp scores on {CORES} cores of "
        f"{LLAMA_CPP_FLOPS / 1e9:.0f} GFLOP/s"
    )
    auxiliary = (
        f"safety screen, judge: {time_model.UTILISATION:.0%} of the data sheet's operations a second, in fp32 "
        f"{FP32_SHARE:.0%} of these"
    )
    downloads = f"{DOWNLOAD_RATE / 1e6:.0f} MB/s"
    first = f"JOB_TRAIN__METHOD={settings.train.method}: hours and dollars of both stages, other figures of the last"
    return (
        *((first,) if trains and not settings.train.is_one_stage else ()),
        *((exporting,) if settings.export.formats else ()),
        *((auxiliary,) if trains and (settings.data.safety_model or settings.eval.judge) else ()),
        *_division(processes, settings.run.nodes, trains=trains),
        *((_FP8,) if trains and settings.train.compute == "fp8" else ()),
        _speed(trains=trains),
        *((_GENERATED,) if trains and settings.eval.prompts is not None else ()),
        f"start: {START_SECONDS:.0f} s, {LOADING_RATE / 1e6:.0f} MB/s of the base to load, {downloads} for downloads",
        f"memory: {context} for the driver, and {memory_model.MARGIN:.0%} for the error of the formula",
        f"price: {PRICES}" if price is None else f"price: {price:g} USD an hour, as set, for all GPUs of the run",
        f"no interruptions: each costs a start{' and the steps since the last checkpoint' if trains else ''}",
    )


def _speed(*, trains: bool) -> str:
    """The speeds of one GPU."""
    training = (
        (time_model.FUSED_UTILISATION, "with CUDA graphs"),
        (time_model.UNRECORDED_UTILISATION, "by fused layers without"),
        (time_model.LONG_ROW_UTILISATION["triton"], "on long rows by cuDNN and Triton"),
        (time_model.LONG_ROW_UTILISATION["flash"], "by flash attention"),
        (time_model.FINE_EXPERTS_UTILISATION, "with narrow experts"),
    )
    scoring = (
        (time_model.UTILISATION, "by PEFT's layers"),
        (time_model.SCORING_UTILISATION, "in an evaluation"),
    )
    shares = (*training, *scoring) if trains else scoring
    shares_in_words = ", ".join(f"{share:.0%} {condition}" for share, condition in shares)
    return f"speed: of the data sheet's operations a second {shares_in_words}; measured on H100 and H200 ({_RESULTS})"


def _division(processes: int, nodes: int, *, trains: bool) -> tuple[str, ...]:
    """What is assumed of several GPUs."""
    if processes == 1:
        shared = "examples of a step" if trains else "questions of an evaluation"
        return (f"one GPU; several GPUs share the {shared}, and each needs the same memory",)
    trained = " and ".join(
        f"{share:.0%} with {tokens:,} tokens of a step for each" for tokens, share in scaling.TRAINING_EFFICIENCY
    )
    trained = f"training reaches {trained}, " if trains else ""
    others = "more than two and several machines were not" if nodes > 1 else "more than two were not"
    scored = f"an evaluation {'' if trains else 'reaches '}{scaling.SCORING_EFFICIENCY:.0%}"
    undivided = ", export, safety screen and judge" if trains else " and export"
    measured = f"measured on two H200s of one machine ({scaling.MEASURED}), {others}"
    return (
        f"{processes} GPUs: memory of each; hours and USD of all together",
        f"several GPUs: of {processes} times one GPU's speed, {trained}{scored}; {measured}",
        f"several GPUs: start, downloads, loading{undivided} take as long as on one",
    )
