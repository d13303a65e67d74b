"""What a run does before its first stage and after its last one; `job/pipeline.py` calls these functions in this order.

1. `deliver_if_complete`: if an earlier attempt completed the run, it is delivered again, and nothing else is done.
2. `check_before_lease`: wrong paths, names and push targets are refused before the run takes its lease, so that they
   leave nothing behind.
3. `next_attempt`: takes the lease, begins the next attempt and reports about it, and refuses a machine without the GPU
   that the settings need; the attempt's end is recorded on leaving.
4. `deliver_and_push`: delivers the published results to the platform, pushes them, and prints the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from job import log
from job.common.lora_readers import why_not_served
from job.distributed.processes import ALONE, Processes, require_one_kind
from job.errors import DataError, JobError
from job.model.device import choose_device
from job.platforms.detect import Delivery
from job.preemption.stop_flag import StopFlag
from job.push.push import check_targets, push_run, targets
from job.records import FP8
from job.results.completed import read_complete, require_gate, withdraw_incomplete
from job.results.delivery import deliver
from job.results.exported_run import read_exported, refuse_without, take_over
from job.results.summary import summary
from job.runs.attempt import Attempt
from job.runs.fault_injection import Fault, arm, faulty
from job.runs.layout import RESULTS, Stage, stage_key
from job.runs.open_attempt import TakeOver, open_attempt
from job.runs.run_log import IdleLimit
from job.runs.run_settings import agree_on_settings, compare_settings
from job.settings.affects_result import common_settings, decisive_settings, default_settings
from job.settings.load import Settings, current_platform, environment, exporters, plain_values, trackers
from job.settings.training_stages import folder_of, given_settings_renamed_in_errors
from job.stages.inputs import check_inputs
from job.storage.open import ObjectStore, open_store, storage_options
from job.storage.permissions import check_permissions
from job.tracking import energy
from job.tracking.live_metrics import live_metrics
from job.tracking.trackers import tracking
from job.tracking.webhook import SILENT, notifying
from job.training.fp8_check import require_fp8


@dataclass(frozen=True)
class ProcessContext:
    """What the command `run` has set up in this process before the job begins in it.

    Attributes:
        stop: The flag that asks the job to end.
        report_progress: Tells the watchdog that there is progress.
        idle: Decides, from the attempts before, with which error a stopped attempt ends.
        faults: Faults to inject.
        processes: All processes of the run; this is one of them.
    """

    stop: StopFlag
    report_progress: Callable[[], None]
    idle: IdleLimit
    faults: tuple[Fault, ...] = ()
    processes: Processes = ALONE

    def check_stop(self) -> None:
        """Reports progress; raises Preempted if the job has to end. Called between the files of a push.

        What has been pushed by then is not pushed again by the next attempt.
        """
        self.report_progress()
        self.stop.check()


def deliver_if_complete(
    settings: Settings,
    delivery: Delivery | None,
    processes: Processes = ALONE,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """The manifest of this run if an earlier attempt completed it, else None; in all processes.

    Process 0 delivers and pushes the results of a complete run again, since the earlier attempt may have been killed
    while it did so.

    Args:
        settings: Those of the run, which are the same in all processes.
        delivery: The folders from which the platform collects results; None where it collects none.
        processes: Those that call this function.
        check_stop: Called between files; may raise what ends the job.

    Raises:
        SettingsError: The settings of this process are not those of process 0. Or the run is complete, but was made
            with other settings, or exports another run; or it is not complete, and another user began it, or it has
            begun to export a run and would train now.
        GateError: The run is complete, and the quality gate is not met.
        JobError: It cannot be pushed.
    """
    agree_on_settings(processes, common_settings(plain_values(settings)))
    with given_settings_renamed_in_errors(settings):
        return processes.broadcast("results of before", lambda: _deliver_if_complete(settings, delivery, check_stop))


def _deliver_if_complete(
    settings: Settings, delivery: Delivery | None, check_stop: Callable[[], None]
) -> dict[str, Any] | None:
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
    deliver_and_push(settings, store, results, delivery, check_stop)
    return require_gate(results)


def check_before_lease(settings: Settings, later: Sequence[Settings], processes: int) -> None:
    """Refuses wrong paths and names, and push targets that do not allow the push.

    Args:
        settings: Those of this training stage.
        later: Those of the training stages after it.
        processes: How many the run has on all machines.

    Raises:
        DataError, SettingsError: With everything that is wrong with the inputs.
        AccessDenied, SettingsError, Unreachable: A target does not allow the push, or is away. Only before the inputs
            are recorded: a run that has begun goes on, and is pushed at its end.
    """
    begun = _store(settings).read(stage_key(Stage.PULL)) is not None
    try:
        check_inputs(settings, later, has_record=begun, processes=processes)
    except DataError as error:
        if settings.export.run is None:
            raise
        advice = "models and data have to be where the run in JOB_EXPORT__RUN had them: other paths are refused"
        raise DataError(list(error.problems), error.total, advice) from None
    push_targets = targets(settings.export)
    if push_targets and (reasons := why_not_served(plain_values(settings))):
        log.get_logger().warning("vLLM cannot serve this adapter unchanged", reasons=reasons)
    try:
        check_targets(push_targets)
    except JobError as error:
        if not begun:
            raise
        # A target that is away for a while is no reason to let a machine that trains wait.
        log.get_logger().warning(
            "the run could not be pushed now; it goes on, and is pushed at its end", why=str(error)
        )


@contextmanager
def next_attempt(settings: Settings, context: ProcessContext, *, last: bool) -> Iterator[Attempt]:
    """Takes the run's lease and begins its next attempt; refuses a machine that cannot do the work.

    Process 0 reports for all: to trackers, live metrics and the webhook, and measures the energy of all GPUs.

    Args:
        settings: Those of this training stage.
        context: What this process was started with.
        last: Whether no other training stage follows.

    Raises:
        NoProgress, Replaced, SettingsError: As `open_attempt`, which also records how the body ended.
        SettingsError, UnfitMachine: The machine has not the GPU that the settings need.
        Preempted: The job was asked to stop.
    """
    processes, store = context.processes, _store(settings)
    faults = arm(context.faults if processes.leads else (), store)
    opening = open_attempt(
        faulty(store, faults),
        decisive_settings(plain_values(settings)),
        defaults=default_settings(),
        cache=settings.storage.cache,
        usd_per_hour=settings.cost.usd_per_hour,
        stop=context.stop,
        report_progress=context.report_progress,
        faults=faults,
        processes=processes,
        idle=context.idle,
        stall_seconds=settings.train.stall_seconds,
        take_over=_take_over(settings) if processes.leads else None,
    )
    webhook = settings.notify.webhook if processes.leads else None
    with (
        notifying(None if webhook is None else webhook.get_secret_value(), settings.run.id) as notifier,
        live_metrics(exporters(settings) if processes.leads else {}, settings.run.id) as live,
        tracking(
            trackers(settings) if processes.leads else {}, settings.run.id, plain_values(settings), environment()
        ) as tracker,
        ExitStack() as stack,
    ):
        with given_settings_renamed_in_errors(settings):
            attempt = stack.enter_context(opening)
        live.figures = attempt.figures
        silent = attempt.earlier[-1] if attempt.earlier and attempt.earlier[-1].outcome in SILENT else None
        notifier.started({"attempt": attempt.number, "store": store.uri}, silent)
        if settings.run.nodes > 1:
            attempt.pause_after_idle()
        _check_machine(settings, processes)
        if processes.leads:
            withdraw_incomplete(attempt.store, str(attempt.work))
        tracker.start()
        gpus = [name for seen in processes.gather("names of the GPUs", energy.visible_gpus()) for name in seen]
        if processes.leads:
            attempt.on_metrics, attempt.on_validation = tracker.step, tracker.validation
            attempt.joules = energy.open_meter(gpus)

        def on_results(results: Mapping[str, Any]) -> None:
            tracker.results(results)
            live.complete = last
            notifier.gate_passed = results["gate"]["passed"]

        attempt.on_results = on_results
        yield attempt


def _check_machine(settings: Settings, processes: Processes) -> None:
    """Refuses a machine without the GPU that the settings need, before the model is downloaded."""
    with current_platform().machine_checks():
        device = choose_device(settings.run.device)
    require_one_kind(processes, device.type)
    if settings.train.compute == FP8:
        require_fp8(device)


def deliver_and_push(
    settings: Settings,
    store: ObjectStore,
    results: dict[str, Any],
    delivery: Delivery | None,
    check_stop: Callable[[], None],
) -> None:
    """Delivers a complete run to the platform and its targets, and prints its summary, the last that a user sees.

    A run whose gate is not met goes to no target: from there, models are served.

    Args:
        settings: Those of the run.
        store: Its store.
        results: Its manifest.
        delivery: The folders from which the platform collects results; None where it collects none.
        check_stop: Called between files; may raise what ends the job.

    Raises:
        DataError: A file in the store is not what the manifest says.
        JobError: A target does not accept the push.
    """
    push_targets = targets(settings.export)
    try:
        if delivery:
            deliver(store, results, delivery)
        if push_targets and results["gate"]["passed"] is False:
            log.get_logger().warning(
                "the run is not pushed: its quality gate is not met", places=[target.place for target in push_targets]
            )
        else:
            push_run(store, results, push_targets, cache=settings.storage.cache, check_stop=check_stop)
    finally:
        # the results are published, whether or not this can be printed
        log.print_result("\n".join(summary(results, f"{store.uri}/{RESULTS}")) + "\n")


def _take_over(settings: Settings) -> TakeOver | None:
    """How this run takes over the one in JOB_EXPORT__RUN; None without one."""
    if settings.export.run is None:
        return None
    decisive, storage = decisive_settings(plain_values(settings)), storage_options(settings.storage)
    exported = read_exported(settings.export.run, storage)
    return take_over(exported, folder_of(settings), decisive, default_settings(), storage)


def _store(settings: Settings) -> ObjectStore:
    """The run's own store."""
    return open_store(folder_of(settings), storage_options(settings.storage))
