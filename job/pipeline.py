"""The job, told once: pull, evaluate the base, train, evaluate the adapter, publish."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from job import log
from job.common import garbage_collection, host
from job.distributed.processes import ALONE, Processes
from job.errors import DataError, GateError, Problem, SettingsError
from job.model.base import choose_device
from job.model.quantized_cache.cache import publishing
from job.platforms.detect import Delivery
from job.preemption.stop_flag import Stop
from job.records import Artifact, Evaluated, Pulled, Trained
from job.results import manifest
from job.results.baseline import check_prompts
from job.results.delivery import deliver
from job.runs.attempt import Attempt, missing, open_attempt
from job.runs.fault_injection import Fault, arm, faulty
from job.runs.layout import RESULTS
from job.runs.run_log import compare_settings, keep_settings
from job.settings.load import Settings, environment, trackers
from job.stages.handoff import Sources
from job.stages.publish import publish
from job.stages.pull import pull
from job.storage.open import ObjectStore, open_store
from job.tracking import energy
from job.tracking.trackers import Tracking, tracking

if TYPE_CHECKING:
    from job.stages.handoff import Loaded
from job.settings.affects_result import decisive_settings, plain_values


def run(
    settings: Settings,
    stop: Stop,
    beat: Callable[[], None],
    faults: tuple[Fault, ...],
    *,
    delivery: Delivery | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Runs the job, or the rest of it if earlier attempts did a part; returns the published manifest.

    Where there are several processes, all of them run it; what only one may do is decided below.

    Raises:
        GateError: The results are published, and the quality gate is not met.
    """
    decisive = decisive_settings(settings)
    _agree_on(processes, decisive)
    if (done := processes.share("results of before", lambda: finished(settings, delivery))) is not None:
        return done
    store = _store(settings)
    armed = arm(faults if processes.leads else (), store)
    store = faulty(store, armed)
    cache, price = settings.storage.cache, settings.cost.usd_per_hour
    begun = open_attempt(
        store, decisive, cache=cache, usd_per_hour=price, stop=stop, beat=beat, faults=armed, processes=processes
    )
    with _tracked(settings, processes) as track, begun as attempt:
        results = _carry_out(attempt, settings, decisive, track)
        track.results(results)
    if processes.leads:
        manifest.print_lines(manifest.summary(results, f"{store.uri}/{RESULTS}"))
        if delivery:
            deliver(store, results, delivery)
    return _gated(results)


def _carry_out(attempt: Attempt, settings: Settings, decisive: Mapping[str, Any], track: Tracking) -> dict[str, Any]:
    """Pulls, loads, and does the rest; what an earlier attempt finished is not done again."""
    choose_device(settings.run.device)  # a missing GPU is found missing before the model is downloaded
    processes, storage = attempt.processes, settings.storage.model_dump(exclude={"cache"})
    if processes.leads:
        _withdraw(attempt)
    _watch(attempt, track)
    with attempt.timed("pull"):
        sources = pull(attempt, settings, storage)
    from job.stages.load import load  # heavy: what can be refused without it has been

    garbage_collection.enable()  # nearly all is imported
    loaded = load(settings, sources, processes)
    if processes.leads:
        keep_settings(attempt.store, decisive)  # not before: what cannot be loaded shall not bind the run
        _note_base(attempt, loaded)
    _same(attempt.stage("pull", Pulled, lambda: sources.record), sources.record)
    with publishing(sources.shelf if processes.leads else None, attempt.stop, attempt.beat):
        return _work(attempt, settings, sources, loaded)


def _note_base(attempt: Attempt, loaded: Loaded) -> None:
    """Notes which kept base the run begins with, or that there is none: once, before the record of the pull."""
    if attempt.known("pull", Pulled) is None:
        attempt.store.write("stages/base.json", json.dumps(asdict(loaded.kept_base)).encode())


def _work(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> dict[str, Any]:
    """The stages, one after the other, from the evaluation of the base to the manifest."""
    from job.stages.evaluate import evaluate_adapter, evaluate_base
    from job.stages.train import train_adapter

    processes = attempt.processes
    shared = open_store(settings.run.output, **settings.storage.model_dump(exclude={"cache"}))
    base = attempt.stage("evaluate-base", Evaluated, lambda: evaluate_base(attempt, settings, sources, loaded, shared))
    if sources.baseline is not None:
        check_prompts(sources.baseline, base.scores)
    trained = attempt.stage("train", Trained, lambda: train_adapter(attempt, settings, sources, loaded))
    adapter = attempt.stage(
        "evaluate-adapter", Evaluated, lambda: evaluate_adapter(attempt, settings, sources, loaded, trained)
    )
    with attempt.timed("publish"):
        gpus = [gpu for seen in processes.gather("gpus", host.hardware()["gpus"]) for gpu in seen]
        found = partial(publish, model=loaded.record, base=base, trained=trained, adapter=adapter, gpus=gpus)
        return processes.share("results", lambda: found(attempt, settings, sources))


def finished(settings: Settings, delivery: Delivery | None) -> dict[str, Any] | None:
    """The manifest of this run, if it is complete already; then it is delivered, which may have been cut short.

    Raises:
        SettingsError: It is, with other settings.
        GateError: It is, and the quality gate is not met.
    """
    store = _store(settings)
    done, gone = _published(store)
    if done is None or gone:
        return None
    compare_settings(store, decisive_settings(settings))
    log.get_logger().info("this run is complete already", results=f"{store.uri}/{RESULTS}")
    if delivery:
        deliver(store, done, delivery)
    return _gated(done)


def _published(store: ObjectStore) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, if there is one, and what it lists although it is not there."""
    found = store.read(RESULTS)
    results: dict[str, Any] | None = None if found is None else json.loads(found.data)
    return results, missing(store, [Artifact(**entry) for entry in results["artifacts"]]) if results else []


def _withdraw(attempt: Attempt) -> None:
    """Removes a manifest that says more than is there: of a run that was copied away while it ended."""
    if gone := _published(attempt.store)[1]:
        log.get_logger().warning("the manifest is there, but not all that it lists: the run goes on", gone=gone)
        attempt.store.delete(RESULTS)


def _tracked(settings: Settings, processes: Processes) -> AbstractContextManager[Tracking]:
    """The trackers that are asked for; the first process tells them for all."""
    asked = trackers(settings) if processes.leads else {}
    return tracking(asked, settings.run.id, plain_values(settings), environment())


def _watch(attempt: Attempt, track: Tracking) -> None:
    """Has the steps told to the trackers, and the energy of all processes' GPUs metered by process 0."""
    track.start()
    gpus = [name for seen in attempt.processes.gather("names of the GPUs", energy.visible_gpus()) for name in seen]
    if attempt.processes.leads:
        attempt.on_metrics, attempt.joules = track.step, energy.open_meter(gpus)


def _same(known: Pulled, found: Pulled) -> None:
    """A run is one experiment: what it is made of may not change between two attempts."""
    changed = [key for key, value in asdict(known).items() if asdict(found)[key] != value]
    if changed:
        raise DataError([Problem(name, "has changed since the first attempt of this run") for name in changed])


def _agree_on(processes: Processes, decisive: Mapping[str, Any]) -> None:
    """The machines of a run are started one by one: they have to be told the same."""
    first, mine = (json.loads(json.dumps(given)) for given in (processes.share("settings", lambda: decisive), decisive))
    if different := [name for name in mine if mine[name] != first.get(name)]:
        rank = processes.place.rank
        what = "is {!r} in process {} and {!r} in process 0; give all machines the same"
        raise SettingsError([Problem(name, what.format(mine[name], rank, first.get(name))) for name in different])


def _store(settings: Settings) -> ObjectStore:
    """The run's own store."""
    options = settings.storage.model_dump(exclude={"cache"})
    return open_store(f"{settings.run.output.rstrip('/')}/{settings.run.id}", **options)


def _gated(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results, unless they do not pass the gate."""
    if results["gate"]["passed"] is False:
        raise GateError("; ".join(results["gate"]["reasons"]))
    return dict(results)
