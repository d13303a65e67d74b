"""The job from start to end: pull, load, evaluate the base, train, evaluate the adapter, export, publish.

`run` calls the stages of `job/stages` in this order; `job/stages/handoff.py` defines what one stage passes to the next.
A stage that an earlier attempt finished is not repeated: `Attempt.stage` reads its record from the store.

Where a run resumes within a stage:

- pull: rows and the quantized base at the commits and keys of the first attempt (`stages.pull_rows`, `pull_model`);
- evaluations: sequences that were scored (`evaluation.score_cache`);
- training: the newest valid checkpoint (`_restore` in `stages.train`, `checkpoints.manager`), then the state in it
  (`checkpoints.trainer_state`);
- export: candidates are made again, and files that are in the store are not uploaded again (`stages.export`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from job import log
from job.common import garbage_collection, host
from job.common.export_formats import needs_merge
from job.common.lora_readers import why_not_served
from job.common.out_of_memory import memory_errors
from job.distributed.processes import ALONE, Processes, require_one_kind
from job.errors import DataError, JobError, Problem
from job.model.device import choose_device
from job.model.quantized_cache.cache import publishing
from job.platforms.detect import Delivery
from job.preemption.stop_flag import Stop
from job.push.push import Target, check_targets, push_run, targets
from job.records import FP8, Evaluated, Exported, ModelRecord, Packing, Pulled, ScoringPrecision, Trained
from job.results.baseline import check_prompts, warn_of_other_dtype
from job.results.completed import read_complete, require_gate, withdraw_incomplete
from job.results.delivery import deliver
from job.results.exported_run import read_exported, refuse_without, take_over
from job.results.summary import summary
from job.runs.attempt import Attempt
from job.runs.fault_injection import Fault, arm, faulty
from job.runs.layout import BASE, PACKING, RESULTS, Stage, stage_key
from job.runs.open_attempt import TakeOver, open_attempt
from job.runs.run_log import IdleLimit, read_exported_run
from job.runs.run_settings import agree_on_settings, compare_settings, keep_settings
from job.runs.stage_records import identity
from job.settings.affects_result import common_settings, decisive_settings, default_settings
from job.settings.load import Settings, current_platform, environment, exporters, plain_values, trackers
from job.settings.training_stages import folder_of, split_stages
from job.stages.handoff import Sources
from job.stages.inputs import check_inputs
from job.stages.publish import publish
from job.stages.pull import pull
from job.stages.pull_audit import publish_findings
from job.storage.open import ObjectStore, open_store, storage_options
from job.storage.permissions import check_permissions
from job.tracking import energy
from job.tracking.live_metrics import live_metrics
from job.tracking.trackers import tracking
from job.tracking.webhook import SILENT, notifying
from job.training.fp8_check import require_fp8

if TYPE_CHECKING:
    from job.stages.handoff import Loaded

_SETTING_OF = {
    "dataset": "JOB_DATA__SOURCE",
    "model_sha256": "JOB_MODEL__ID",
    "model_revision": "JOB_MODEL__REVISION",
    "questions": "JOB_EVAL__TASKS",
    "start_sha256": "JOB_LORA__START",
    "prompts": "JOB_EVAL__PROMPTS",
    "groups": "JOB_EVAL__TASKS",
    "safety_sha256": "JOB_DATA__SAFETY_MODEL",
    "judge_sha256": "JOB_EVAL__PRINCIPLES",
}
"""Field of `Pulled` -> the setting that names what it is about."""
_SCORED_OTHERWISE = "it was scored in another precision than the base"


def run(
    settings: Settings,
    stop: Stop,
    report_progress: Callable[[], None],
    faults: tuple[Fault, ...],
    *,
    delivery: Delivery | None = None,
    processes: Processes = ALONE,
    idle: IdleLimit | None = None,
) -> dict[str, Any]:
    """Runs the job, or the rest of it if earlier attempts did a part; returns the published manifest.

    With several processes, each of them calls this function. Process 0 shares its results with the others, and only
    process 0 writes to the store.

    Raises:
        GateError: The results are published, and the quality gate is not met.
        SettingsError, DataError: The settings, or the data or model that they name, are invalid; nothing is published.
        Unreachable, AccessDenied: The store or the hub cannot be used; the next attempt continues from here.
        Preempted: The job was asked to stop.
        NoProgress: The job was asked to stop, and too many attempts in a row, this one included, made no progress.
        Replaced: Another attempt owns the run.
    """
    stages = split_stages(settings)
    if settings.export.run is not None:
        stages = stages[-1:]  # a first stage is part of what the last one takes over
    check_stop = partial(_check_stop, stop, report_progress)
    if len(stages) > 1 and (done := _finished(processes, settings, delivery, check_stop)) is not None:
        return done  # the first stage is not looked at: its folder may be gone
    for number, stage in enumerate(stages, start=1):
        log.bind(run=stage.run.id)
        last = number == len(stages)
        results = _run_stage(
            stage,
            stop,
            report_progress,
            faults,
            delivery=delivery if last else None,
            processes=processes,
            idle=idle,
            later=stages[number:],
        )
    return results


def _run_stage(
    settings: Settings,
    stop: Stop,
    report_progress: Callable[[], None],
    faults: tuple[Fault, ...],
    *,
    delivery: Delivery | None,
    processes: Processes,
    idle: IdleLimit | None,
    later: Sequence[Settings] = (),
) -> dict[str, Any]:
    """One run from start to end; `later` are those that follow, as in `JOB_TRAIN__METHOD=sft,dpo`."""
    check_stop = partial(_check_stop, stop, report_progress)
    if (done := _finished(processes, settings, delivery, check_stop)) is not None:
        return done
    processes.share("inputs", lambda: _check_inputs(settings, later, processes.place.world_size))
    with _attempt(settings, stop, report_progress, faults, processes, idle=idle, last=not later) as (
        attempt,
        report_results,
    ):
        with attempt.timed(Stage.PULL):
            sources = pull(attempt, settings, storage_options(settings.storage), later)
        loaded = _load(attempt, settings, sources)
        with publishing(sources.cache_entry if processes.leads else None, stop, report_progress):
            base = _evaluate_base(attempt, settings, sources, loaded)
            trained = _train(attempt, settings, sources, loaded)
            adapter = _evaluate_adapter(attempt, settings, sources, loaded, base=base, trained=trained)
            exported = _export(attempt, settings, sources, loaded, trained, precision=base.precision)
            results = _publish(
                attempt,
                settings,
                sources,
                model=loaded.record,
                base=base,
                trained=trained,
                adapter=adapter,
                exported=exported,
            )
        report_results(results)
    chosen, cache = () if later else targets(settings.export), settings.storage.cache
    # The others wait: a process that is left alone is ended after the grace period.
    processes.share(
        "handed over", lambda: _hand_over(attempt.store, results, delivery, chosen, check_stop, cache=cache)
    )
    return require_gate(results)


def _check_stop(stop: Stop, report_progress: Callable[[], None]) -> None:
    """Called between files that are pushed: what has been pushed is taken up by the next attempt."""
    report_progress()
    stop.check()


def _finished(
    processes: Processes, settings: Settings, delivery: Delivery | None, check_stop: Callable[[], None]
) -> dict[str, Any] | None:
    """`finished`, asked by process 0 for all, which have the same settings."""
    agree_on_settings(processes, common_settings(plain_values(settings)))
    found: dict[str, Any] | None = processes.share(
        "results of before", lambda: finished(settings, delivery, check_stop)
    )
    return found


def _check_inputs(settings: Settings, later: Sequence[Settings], processes: int) -> None:
    """Refuses wrong paths and names before the run takes its lease, so that nothing is left behind."""
    begun = _store(settings).read(stage_key(Stage.PULL)) is not None
    try:
        check_inputs(settings, later, has_record=begun, processes=processes)
    except DataError as error:
        if settings.export.run is None:
            raise
        advice = "models and data have to be where the run in JOB_EXPORT__RUN had them: other paths are refused"
        raise DataError(list(error.problems), error.total, advice) from None
    chosen = () if later else targets(settings.export)
    if chosen and (reasons := why_not_served(plain_values(settings))):
        log.get_logger().warning("vLLM cannot serve this adapter unchanged", reasons=reasons)
    try:
        check_targets(chosen)
    except JobError as error:
        if not begun:
            raise
        # A target that is away for a while is no reason to let a machine that trains wait.
        log.get_logger().warning(
            "the run could not be pushed now; it goes on, and is pushed at its end", why=str(error)
        )


def finished(
    settings: Settings, delivery: Delivery | None, check_stop: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """The manifest of this run if an earlier attempt completed it, else None.

    The results of a complete run are delivered and pushed again, since the earlier attempt may have been killed while
    it did so.

    Raises:
        SettingsError: The run is complete, but was made with other settings, or exports another run; or it is not
            complete, and another user began it, or it has begun to export a run and would train now.
        GateError: The run is complete, and the quality gate is not met.
        JobError: It cannot be pushed.
    """
    store = _store(settings)
    if (results := read_complete(store, settings.storage.cache)) is None:
        check_permissions(settings.run.output, folder_of(settings))
        if settings.export.run is None:
            refuse_without(store)
        return None
    compare_settings(store, decisive_settings(plain_values(settings)), default_settings())
    if settings.export.run is not None:
        _take_over(settings)  # refuses another run than the one that is exported here
    log.get_logger().info("this run is complete already", results=f"{store.uri}/{RESULTS}")
    _hand_over(store, results, delivery, targets(settings.export), check_stop, cache=settings.storage.cache)
    return require_gate(results)


def _hand_over(
    store: ObjectStore,
    results: dict[str, Any],
    delivery: Delivery | None,
    push_targets: Sequence[Target],
    check_stop: Callable[[], None],
    *,
    cache: str | None,
) -> None:
    """Delivers a complete run to the platform and its targets, and prints its summary, the last that a user sees.

    A run whose gate is not met goes to no target: from there, models are served.
    """
    try:
        if delivery:
            deliver(store, results, delivery)
        if push_targets and results["gate"]["passed"] is False:
            log.get_logger().warning(
                "the run is not pushed: its quality gate is not met", places=[target.place for target in push_targets]
            )
        else:
            push_run(store, results, push_targets, cache=cache, check_stop=check_stop)
    finally:
        # the results are published, whether or not this can be printed
        log.print_result("\n".join(summary(results, f"{store.uri}/{RESULTS}")) + "\n")


@contextmanager
def _attempt(
    settings: Settings,
    stop: Stop,
    report_progress: Callable[[], None],
    faults: tuple[Fault, ...],
    processes: Processes,
    *,
    idle: IdleLimit | None,
    last: bool,
) -> Iterator[tuple[Attempt, Callable[[Mapping[str, Any]], None]]]:
    """Opens the run's next attempt, with injected faults, trackers, metrics and an energy meter for all GPUs.

    `last`: no other run follows, as in `JOB_TRAIN__METHOD=sft,dpo`.

    Yields:
        The attempt, and the function to call with its results, for the trackers and the webhook.
    """
    store = _store(settings)
    armed = arm(faults if processes.leads else (), store)
    opening = open_attempt(
        faulty(store, armed),
        decisive_settings(plain_values(settings)),
        defaults=default_settings(),
        cache=settings.storage.cache,
        usd_per_hour=settings.cost.usd_per_hour,
        stop=stop,
        report_progress=report_progress,
        faults=armed,
        processes=processes,
        idle=idle or IdleLimit(settings.run.max_idle_attempts),
        stall_seconds=settings.train.stall_seconds,
        take_over=_take_over(settings) if processes.leads else None,
    )
    tracker_options = trackers(settings) if processes.leads else {}  # process 0 reports for all
    watched = exporters(settings) if processes.leads else {}
    webhook = settings.notify.webhook if processes.leads else None
    with (
        notifying(None if webhook is None else webhook.get_secret_value(), settings.run.id) as notifier,
        live_metrics(watched, settings.run.id) as live,
        tracking(tracker_options, settings.run.id, plain_values(settings), environment()) as track,
        opening as attempt,
    ):
        live.figures = attempt.figures
        silent = attempt.earlier[-1] if attempt.earlier and attempt.earlier[-1].outcome in SILENT else None
        notifier.started({"attempt": attempt.number, "store": store.uri}, silent)
        if settings.run.nodes > 1:
            attempt.pause_after_idle()
        with current_platform().machine_checks():
            device = choose_device(settings.run.device)  # fails on a missing GPU before the model is downloaded
        require_one_kind(processes, device.type)
        if settings.train.compute == FP8:
            require_fp8(device)
        if processes.leads:
            withdraw_incomplete(attempt.store, str(attempt.work))
        track.start()
        gpus = [name for seen in processes.gather("names of the GPUs", energy.visible_gpus()) for name in seen]
        if processes.leads:
            attempt.on_metrics, attempt.on_validation = track.step, track.validation
            attempt.joules = energy.open_meter(gpus)

        def report_results(results: Mapping[str, Any]) -> None:
            track.results(results)
            live.complete = last
            notifier.gate_passed = results["gate"]["passed"]

        yield attempt, report_results


def _take_over(settings: Settings) -> TakeOver | None:
    """How this run takes over the one in JOB_EXPORT__RUN; None without one."""
    if settings.export.run is None:
        return None
    decisive, storage = decisive_settings(plain_values(settings)), storage_options(settings.storage)
    exported = read_exported(settings.export.run, storage)
    return take_over(exported, folder_of(settings), decisive, default_settings(), storage)


@memory_errors("loading the model", "set JOB_MODEL__QUANTIZATION=nf4")
def _load(attempt: Attempt, settings: Settings, sources: Sources) -> Loaded:
    """Loads the model, then records the settings and the hashes of all inputs, which later attempts must match.

    They are recorded after loading: if the model cannot be loaded, the user can still change the settings of the run.

    Raises:
        DataError: Data, model or questions differ from those of the first attempt.
    """
    from job.stages.first_values import put_first_values
    from job.stages.load import check_experts, load  # slow import: after all checks that do not need it

    garbage_collection.enable()  # it was off for faster imports, and nearly all are done
    attempt.identify(sources.record)
    attempt.loading = True
    attempt.note("running")  # nothing is noted while loading: if the kernel kills it for its memory, this is the record
    begin = partial(put_first_values, attempt, settings.lora.init, sources)
    trained = settings.export.run is not None or attempt.processes.share(
        "whether the adapter is trained", lambda: attempt.is_done(Stage.TRAIN, Trained)
    )
    loaded = load(settings, sources, attempt.processes, attempt.recorded(PACKING, Packing), begin, trains=not trained)
    attempt.loading = False
    check_experts(attempt.recorded(BASE, type(loaded.kept_base)), loaded.kept_base)
    if needs_merge(settings.export.formats) and sources.original is not None:
        from job.stages.export_check import check_export

        check_export(attempt, settings.export, settings.gate.on, sources.original, loaded)
    if attempt.processes.leads:
        keep_settings(attempt.store, attempt.settings)
        publish_findings(attempt, sources)
        attempt.settled = True
        # once, before the record of the pull; and again if they are damaged
        for name, record in ((PACKING, loaded.packing), (BASE, loaded.kept_base)):
            if attempt.recorded(name, type(record)) is None:
                attempt.keep(name, json.dumps(asdict(record)))
    known, found = map(identity, (attempt.stage(Stage.PULL, Pulled, lambda: sources.record), sources.record))
    if changed := [name for name, value in known.items() if found.get(name) != value]:
        if settings.export.run is None:
            what = "its content has changed since the first attempt of this run; restore it, or start a new run with "
            what += "another JOB_RUN__ID"
        else:
            what = "its content is not that of the run in JOB_EXPORT__RUN; restore it, or train again without that"
        raise DataError([Problem(_SETTING_OF[name], what) for name in changed])
    return loaded


@memory_errors("evaluating the base model", "lower JOB_EVAL__BATCH_TOKENS")
def _evaluate_base(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Evaluated:
    from job.stages.evaluate import generation_rules, other_generation
    from job.stages.full_precision import evaluate_bases
    from job.stages.scoring_precision import other_precision

    shared = open_store(settings.run.output, storage_options(settings.storage))

    def objection(base: Evaluated) -> str:
        adapter = attempt.recorded(Stage.EVALUATE_ADAPTER, Evaluated)
        wanted = generation_rules(settings, sources, loaded.model) if adapter is None else adapter.generation
        if why := other_generation(base, wanted):
            return why
        exported = not settings.export.formats or attempt.recorded(Stage.EXPORT, Exported) is not None
        return "" if adapter is not None and exported else other_precision(base, settings.eval, loaded)

    base = attempt.stage(
        Stage.EVALUATE_BASE, Evaluated, lambda: evaluate_bases(attempt, settings, sources, loaded, shared), objection
    )
    if sources.baseline is not None:
        check_prompts(sources.baseline, base.scores)
        warn_of_other_dtype(sources.baseline, base.precision.dtype if base.precision else loaded.record.dtype)
    return base


@memory_errors("training", "lower JOB_TRAIN__MAX_LENGTH or JOB_LORA__RANK")
def _train(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Trained:
    from job.stages.train import train_adapter

    def train() -> Trained | None:
        if settings.export.run is not None or read_exported_run(attempt.store) is not None:
            what = "its adapter was taken over, and is missing or damaged here; remove the folder "
            what += f"{attempt.store.uri}, and export again"
            raise DataError([Problem("JOB_EXPORT__RUN", what)])
        return train_adapter(attempt, settings, sources, loaded)

    return attempt.stage(Stage.TRAIN, Trained, train)


@memory_errors("evaluating the adapter", "lower JOB_EVAL__BATCH_TOKENS")
def _evaluate_adapter(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, *, base: Evaluated, trained: Trained
) -> Evaluated:
    from job.stages.evaluate import evaluate_adapter, other_answers_judged, other_generation

    return attempt.stage(
        Stage.EVALUATE_ADAPTER,
        Evaluated,
        lambda: evaluate_adapter(attempt, settings, sources, loaded, base=base, trained=trained),
        lambda adapter: (
            other_generation(adapter, base.generation)
            or other_answers_judged(adapter, base)
            or (_SCORED_OTHERWISE if adapter.precision != base.precision else "")
        ),
    )


@memory_errors("exporting", "lower JOB_EVAL__BATCH_TOKENS, or use a machine that holds the unquantized model")
def _export(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    loaded: Loaded,
    trained: Trained,
    *,
    precision: ScoringPrecision | None,
) -> Exported:
    from job.stages.export import export

    if not settings.export.formats:
        return Exported([], [])
    return attempt.stage(
        Stage.EXPORT,
        Exported,
        lambda: export(attempt, settings, sources, loaded, trained, precision=precision),
        lambda exported: _SCORED_OTHERWISE if exported.precision != precision else "",
    )


def _publish(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    *,
    model: ModelRecord,
    base: Evaluated,
    trained: Trained,
    adapter: Evaluated,
    exported: Exported,
) -> dict[str, Any]:
    with attempt.timed(Stage.PUBLISH):
        gpus = [gpu for seen in attempt.processes.gather("gpus", host.hardware()["gpus"]) for gpu in seen]
        found = partial(publish, model=model, base=base, trained=trained, adapter=adapter, exported=exported, gpus=gpus)
        return attempt.processes.share("results", lambda: found(attempt, settings, sources))


def _store(settings: Settings) -> ObjectStore:
    """The run's own store."""
    return open_store(folder_of(settings), storage_options(settings.storage))
