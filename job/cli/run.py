"""The command `run`: settings, the processes of this machine, signals, then `job.pipeline.run` in each process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial

from job import log
from job.cli.config import note_foreign_variables, settings_of_run
from job.cli.error_report import report_late, report_to_platform
from job.cli.library_variables import configure_libraries, hide_all_gpus, hide_other_gpus, share_cpus
from job.common import garbage_collection
from job.common.out_of_memory import memory_errors
from job.distributed.early_end import announcing_early_end
from job.distributed.launcher import Machine, check_signals, count_processes, launch, recorded_signals, worker_command
from job.distributed.ranks import Place, find_machines
from job.errors import Problem, SettingsError, Stalled
from job.platforms.sagemaker_copied_folder import outlives_machine
from job.runs.fault_injection import Fault, parse
from job.settings.load import (
    Settings,
    current_place,
    current_platform,
    environment,
    known_machine,
    known_place,
    load_settings,
    secrets,
)


def run_command(argv: Sequence[str]) -> int:
    """`run`: reads the settings, starts this machine's processes, or is one of them and runs the job.

    A signal is recorded until the settings are read and the processes counted, and is then acted upon; the launcher
    passes it on to its processes; a process that runs the job stops by `job/preemption/stop_flag.py`.

    Raises:
        JobError: As the job or its launcher ends.
    """
    with recorded_signals() as received:
        with announcing_early_end(lambda: known_place(argv) or _several_machines(known_machine(argv)), received):
            settings = load_settings(argv, of_run=settings_of_run)
            place = current_place()
            _configure_log(settings, place)
            _check_temporary_folder()
            faults = parse(settings.fault or "")
        check_signals(received)
    if place is None:  # else the launcher, or every process of torchrun, would log it again
        note_foreign_variables()
    configure_libraries(find_machines(current_platform()).interface)
    if settings.run.device == "cpu":
        hide_all_gpus()
    if place is None and (code := _launch(settings, argv)) is not None:
        return code
    hide_other_gpus(place)
    _run_here(settings, place, faults)
    return 0


def _run_here(settings: Settings, place: Place | None, faults: tuple[Fault, ...]) -> None:
    """Runs the job in this process, which is the only one or one of several (`place`)."""
    # Imported only now: before, they would delay the recording of signals.
    from job.common.resources import check_shared_memory
    from job.distributed.rendezvous import join
    from job.preemption.spot_notices import watch_notices
    from job.preemption.stop_flag import stop_on_signals
    from job.preemption.watchdog import watch
    from job.runs.run_log import IdleLimit

    platform = current_platform()
    first = place is None or place.local_rank == 0
    if place is not None and first:
        check_shared_memory(place.local_world_size)
    if platform.name == "sagemaker" and first and not outlives_machine(settings.run.output, platform.inputs):
        log.get_logger().warning(
            "this run is not copied to S3: an interruption loses it; set JOB_RUN__OUTPUT=s3://... or CheckpointConfig",
            output=settings.run.output,
        )
    run, stall = settings.run, settings.train.stall_seconds
    idle = IdleLimit(run.max_idle_attempts)

    def on_stall(message: str) -> None:
        report_to_platform(platform, Stalled(message), message)
        idle.record_stall(message)  # last: the store may be what hangs

    with (
        stop_on_signals(run.grace_seconds, partial(report_late, idle, platform), says_end=first) as stop,
        watch_notices(stop, run.spot_notices if first else "off"),
        watch(stall, on_stall) as report_progress,
        join(
            place,
            run.id,
            stop=stop,
            report_progress=report_progress,
            timeout_seconds=stall,
            grace_seconds=run.grace_seconds,
            machine_checks=platform.machine_checks,
        ) as processes,
    ):
        from job.pipeline import run as run_job
        from job.start_and_end import ProcessContext

        # In words before this process leaves the others, which end with the same exit code.
        with memory_errors(
            "the run was prepared or published", "lower JOB_TRAIN__MAX_LENGTH or JOB_EVAL__BATCH_TOKENS"
        ):
            run_job(settings, ProcessContext(stop, report_progress, idle, faults, processes), platform.delivery)


def _launch(settings: Settings, argv: Sequence[str]) -> int | None:
    """Starts this machine's processes and returns their exit code; None if one process is enough, which is this one."""
    run = settings.run
    with recorded_signals() as signals:
        telling = announcing_early_end(lambda: _several_machines(settings), signals)
        with telling, current_platform().machine_checks():
            processes = count_processes(run.processes)
        share_cpus(processes)
        if processes * run.nodes == 1:
            check_signals(signals)
            return None
        from job.start_and_end import deliver_if_complete

        delivery = current_platform().delivery if run.node_rank == 0 else None
        if deliver_if_complete(settings, delivery) is not None:  # the other machines may be gone for good
            return 0
        # With one machine the rank is ignored: the pods of an Indexed Job may be independent runs.
        machine = Machine(processes, run.nodes, run.node_rank, run.rendezvous) if run.nodes > 1 else Machine(processes)
        command, grace = worker_command(argv), run.grace_seconds
        garbage_collection.enable()  # this process only waits from here on
        return launch(command, machine, signals, run=run.id, environ=environment(), grace_seconds=grace)


def _several_machines(settings: Settings | None) -> tuple[Machine, str | None] | None:
    """Which of several machines this is, and the run's id; None for a run of one machine, or if it is not known."""
    if settings is None or settings.run.nodes == 1:
        return None
    run = settings.run
    machine = Machine(1 if run.processes == "auto" else run.processes, run.nodes, run.node_rank, run.rendezvous)
    return machine, None if settings.sources["run.id"] == "generated" else run.id


def _configure_log(settings: Settings, place: Place | None) -> None:
    """With several processes, each logs its rank, and all but the first log only warnings and errors."""
    several = place is not None and place.world_size > 1
    context = {"process": place.rank} if place is not None and several else {}
    quiet = bool(context.get("process")) and settings.log.level == "info"
    level = "warning" if quiet else settings.log.level
    log.configure(settings.log.format, level, secrets(), run=settings.run.id, **context)


def _check_temporary_folder() -> None:
    """Raises SettingsError if no folder takes temporary files, which libraries and the job write."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        fix = "mount one at /tmp (docker run --tmpfs /tmp:exec, or an emptyDir), or name another folder"
        raise SettingsError(
            [Problem("TMPDIR (environment)", f"no writable folder for temporary files; {fix}")]
        ) from None
