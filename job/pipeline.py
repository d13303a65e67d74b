"""The job from start to end: pull, load, evaluate the base, train, evaluate the adapter, export, publish.

`run` calls the stages of `job/stages` in this order; `job/stages/handoff.py` defines what one stage passes to the next.
A stage that an earlier attempt finished is not repeated: `Attempt.stage` reads its record from the store. What comes
before the first stage and after the last one is in `job/start_and_end.py`.

Where a run resumes within a stage:

- pull: rows and the quantized base at the commits and keys of the first attempt (`stages.pull_rows`, `pull_model`);
- evaluations: sequences that were scored (`evaluation.score_cache`);
- training: the newest valid checkpoint (`_restore` in `stages.train`, `checkpoints.checkpoint_store`), then the state
  in it (`checkpoints.trainer_state`);
- export: candidates are made again, and files that are in the store are not uploaded again (`stages.export`).

Stages are imported when they begin: their libraries take seconds to import, and wrong settings are refused before that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from job import log
from job.common import garbage_collection, host
from job.common.export_formats import needs_merge
from job.common.out_of_memory import memory_errors
from job.model.quantized_cache.cache import publishing
from job.model.quantized_cache.layout import CachedBase
from job.platforms.detect import Delivery
from job.records import Evaluated, Exported, Packing, Pulled, ScoringPrecision, Trained
from job.results.baseline import check_prompts, warn_of_other_dtype
from job.results.completed import require_gate
from job.runs.attempt import Attempt
from job.runs.layout import BASE, PACKING, Stage
from job.runs.run_settings import write_settings
from job.runs.stage_records import require_same_inputs
from job.settings.load import Settings
from job.settings.training_stages import settings_renamed_in_errors, split_stages
from job.stages.handoff import Loaded, Sources
from job.stages.publish import StageResults, publish
from job.stages.pull import pull
from job.stages.pull_audit import publish_findings
from job.start_and_end import ProcessContext, check_before_lease, deliver_and_push, deliver_if_complete, next_attempt


def run(settings: Settings, context: ProcessContext, delivery: Delivery | None = None) -> dict[str, Any]:
    """Runs the job, or the rest of it if earlier attempts did a part; returns the published manifest.

    With several processes, each of them calls this function. Process 0 shares its results with the others, and only
    process 0 writes to the store.

    Args:
        settings: Those of the job. With several training stages, as in `JOB_TRAIN__METHOD=sft,dpo`, each is a run.
        context: What this process was started with.
        delivery: The folders from which the platform collects results; None where it collects none.

    Raises:
        GateError: The results are published, and the quality gate is not met.
        SettingsError, DataError: The settings, or the data or model that they name, are invalid; nothing is published.
        Unreachable, AccessDenied: The store or the hub cannot be used; the next attempt continues from here.
        Preempted: The job was asked to stop.
        NoProgress: The job was asked to stop, and too many attempts in a row, this one included, made no progress.
        Replaced: Another attempt owns the run.
    """
    training_stages = split_stages(settings)
    if settings.export.run is not None:
        training_stages = training_stages[-1:]  # a first one is part of what the last one takes over
    if len(training_stages) > 1:
        done = deliver_if_complete(settings, delivery, context.processes, context.check_stop)
        if done is not None:
            return done  # the first one is not looked at: its folder may be gone
    for number, stage_settings in enumerate(training_stages, start=1):
        log.bind(run=stage_settings.run.id)
        later = training_stages[number:]
        results = _run_training_stage(stage_settings, context, None if later else delivery, later)
    return results


def _run_training_stage(
    settings: Settings, context: ProcessContext, delivery: Delivery | None, later: Sequence[Settings] = ()
) -> dict[str, Any]:
    """One run from start to end: all stages of `job/stages`, each of which gets what those before it returned.

    `later` are the settings of the training stages that follow.
    """
    processes = context.processes
    done = deliver_if_complete(settings, delivery, processes, context.check_stop)
    if done is not None:
        return done
    processes.broadcast("inputs", lambda: check_before_lease(settings, later, processes.place.world_size))
    with next_attempt(settings, context, last=not later) as attempt:
        with attempt.timed(Stage.PULL):
            sources = pull(attempt, settings, later)
        with settings_renamed_in_errors(settings.part_of):
            loaded = _load(attempt, settings, sources)
        with (
            settings_renamed_in_errors(settings.part_of),
            # Meanwhile a thread uploads the quantized base to its cache, where there is one.
            publishing(sources.cache_entry if processes.leads else None, context.stop, context.report_progress),
        ):
            base = _evaluate_base(attempt, settings, sources, loaded)
            trained = _train(attempt, settings, sources, loaded)
            adapter = _evaluate_adapter(attempt, settings, sources, loaded, base=base, trained=trained)
            exported = _export(attempt, settings, sources, loaded, base=base, trained=trained)
            results = _publish(
                attempt, settings, sources, loaded, base=base, trained=trained, adapter=adapter, exported=exported
            )
        attempt.on_results(results)
    # The others wait: a process that is left alone is ended after the grace period.
    processes.broadcast(
        "handed over", lambda: deliver_and_push(settings, attempt.store, results, delivery, context.check_stop)
    )
    return require_gate(results)


@memory_errors("loading the model", "set JOB_MODEL__QUANTIZATION=nf4")
def _load(attempt: Attempt, settings: Settings, sources: Sources) -> Loaded:
    """Loads the model, then records the settings and the hashes of all inputs, which later attempts must match.

    They are recorded after loading: if the model cannot be loaded, the user can still change the settings of the run.

    Raises:
        DataError: Data, model or questions differ from those of the first attempt.
    """
    from job.stages.first_values import put_first_values
    from job.stages.load import check_experts, load
    from job.stages.output_disk import check_output_disk

    garbage_collection.enable()  # it was off for faster imports, and nearly all are done
    attempt.identify(sources.record)
    attempt.loading = True
    attempt.note("running")  # nothing is noted while loading: if the kernel kills it for its memory, this is the record
    trained = settings.export.run is not None or attempt.processes.broadcast(
        "whether the adapter is trained", lambda: attempt.is_done(Stage.TRAIN, Trained)
    )
    loaded = load(
        settings,
        sources,
        attempt.processes,
        trains=not trained,
        decided=attempt.recorded(PACKING, Packing),
        begin=partial(put_first_values, attempt, settings.lora.init, sources),
    )
    attempt.loading = False
    check_experts(attempt.recorded(BASE, CachedBase), loaded.kept_base)
    exports = None
    if needs_merge(settings.export.formats) and sources.original is not None:
        from job.stages.export_check import check_export

        exports = check_export(attempt, settings.export, settings.gate.on, sources.original, loaded)
    attempt.processes.broadcast(
        "disk of the results",
        lambda: check_output_disk(
            attempt,
            loaded,
            settings.train,
            settings.checkpoint,
            settings.export.formats,
            rows=len(sources.examples),
            trains=not trained,
            exports=exports,
        ),
    )
    if attempt.processes.leads:
        _record_inputs(attempt, sources, loaded)
    pulled = attempt.stage(Stage.PULL, Pulled, lambda: sources.record)
    require_same_inputs(pulled, sources.record, exports_run=settings.export.run is not None)
    return loaded


def _record_inputs(attempt: Attempt, sources: Sources, loaded: Loaded) -> None:
    """Records what the run begins with, before the record of the pull says that it has begun."""
    write_settings(attempt.store, attempt.settings)
    publish_findings(attempt, sources)
    attempt.settled = True
    for name, record in ((PACKING, loaded.packing), (BASE, loaded.kept_base)):
        if attempt.recorded(name, type(record)) is None:  # once, and again if the record is damaged
            attempt.write_record(name, json.dumps(asdict(record)))


@memory_errors("evaluating the base model", "lower JOB_EVAL__BATCH_TOKENS")
def _evaluate_base(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Evaluated:
    from job.stages.full_precision import evaluate_bases, objection_to_base

    base = attempt.stage(
        Stage.EVALUATE_BASE,
        Evaluated,
        lambda: evaluate_bases(attempt, settings, sources, loaded),
        lambda recorded: objection_to_base(attempt, settings, sources, loaded, recorded),
    )
    if sources.baseline is not None:
        check_prompts(sources.baseline, base.scores)
        warn_of_other_dtype(sources.baseline, base.precision.dtype if base.precision else loaded.record.dtype)
    return base


@memory_errors("training", "lower JOB_TRAIN__MAX_LENGTH or JOB_LORA__RANK")
def _train(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Trained:
    from job.stages.train import train_adapter

    return attempt.stage(Stage.TRAIN, Trained, lambda: train_adapter(attempt, settings, sources, loaded))


@memory_errors("evaluating the adapter", "lower JOB_EVAL__BATCH_TOKENS")
def _evaluate_adapter(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, *, base: Evaluated, trained: Trained
) -> Evaluated:
    from job.stages.evaluate import evaluate_adapter, other_answers_judged, other_generation

    return attempt.stage(
        Stage.EVALUATE_ADAPTER,
        Evaluated,
        lambda: evaluate_adapter(attempt, settings, sources, loaded, base=base, trained=trained),
        lambda recorded: (
            other_generation(recorded, base.generation)
            or other_answers_judged(recorded, base)
            or _scored_otherwise(recorded.precision, base)
        ),
    )


@memory_errors("exporting", "lower JOB_EVAL__BATCH_TOKENS, or use a machine that holds the unquantized model")
def _export(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, *, base: Evaluated, trained: Trained
) -> Exported:
    if not settings.export.formats:
        return Exported([], [])
    from job.stages.export import export

    return attempt.stage(
        Stage.EXPORT,
        Exported,
        lambda: export(attempt, settings, sources, loaded, trained, precision=base.precision),
        lambda recorded: _scored_otherwise(recorded.precision, base),
    )


def _scored_otherwise(precision: ScoringPrecision | None, base: Evaluated) -> str:
    """Why scores in this precision cannot be compared with those of the base, in words; empty if they can."""
    return "" if precision == base.precision else "it was scored in another precision than the base"


def _publish(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    loaded: Loaded,
    *,
    base: Evaluated,
    trained: Trained,
    adapter: Evaluated,
    exported: Exported,
) -> dict[str, Any]:
    with attempt.timed(Stage.PUBLISH):
        gpus = [gpu for seen in attempt.processes.gather("gpus", host.hardware()["gpus"]) for gpu in seen]
        return attempt.processes.broadcast(
            "results",
            lambda: publish(
                attempt,
                settings,
                sources,
                StageResults(base=base, trained=trained, adapter=adapter, exported=exported),
                model=loaded.record,
                gpus=gpus,
            ),
        )
