"""The command line, and the one place where an exception becomes an exit code, a log line and a failure file."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from job import __version__, log
from job.cli.arguments import COMMANDS, command_help
from job.common import garbage_collection
from job.common.out_of_memory import memory_errors, out_of_memory
from job.common.resources import usable_cpus
from job.distributed.ranks import VARIABLES, Place, find_machines, visible_gpu
from job.errors import (
    JobError,
    NoProgress,
    Preempted,
    Problem,
    SettingsError,
    Stalled,
    TrainingFailed,
    exit_codes,
)
from job.platforms.detect import Platform
from job.platforms.sagemaker import lasts
from job.settings.load import (
    Settings,
    current_place,
    current_platform,
    describe,
    environment,
    foreign_variables,
    json_schema,
    known_machine,
    known_place,
    load_settings,
    secrets,
)
from job.storage.azure_account import azure_variables

if TYPE_CHECKING:
    from job.distributed.launcher import Machine
    from job.runs.run_log import IdleLimit


_RETRY = {"no": "", "yes": " (retry)", "yes, free": " (retry)", "counts against the limit": " (a retry may help)"}


def _usage() -> str:
    """The text of `qlora-job --help`: the commands, and what they have in common."""
    listed = "\n".join(
        f"  {f'[{name}]' if name == 'run' else name:<13}{command.summary}"
        for name, command in COMMANDS.items()
        if name != "train"
    )
    codes = "\n".join(f"  {code:<3} {meaning}{_RETRY[retry]}" for code, (meaning, retry) in exit_codes().items())
    return f"""\
usage: qlora-job COMMAND [ARGUMENT ...] [--GROUP.NAME VALUE ...]

{listed}

`qlora-job COMMAND --help` lists the arguments of a command, and the settings that it reads, with their defaults.
A setting is given as --group.name VALUE, or as JOB_GROUP__NAME in the environment. Precedence: command line,
environment, files in the folder JOB_SECRETS_DIR, SageMaker's hyperparameters.json, the file JOB_CONFIG (--config),
SageMaker's channels, the preset (--preset), platform, default. `qlora-job config` shows each value with its source.

examples:
  qlora-job run --preset demo                                 # needs neither a GPU nor a network
  qlora-job plan --data.source rows.jsonl --model.id org/model
  qlora-job status s3://bucket/runs/my-first-run

exit codes:
  0   done, manifest published
{codes}
"""


USAGE = _usage()
FAILURE_CHARACTERS = 1024
TERMINATION_BYTES = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    platform = current_platform()
    for name, value in azure_variables(environment()).items():
        os.environ[name] = value  # for obstore
    # Before the settings are read: errors in them are log lines, too.
    asked = environment().get("JOB_LOG__FORMAT", "")
    log.configure(asked if asked in {"json", "console"} else "auto", "info", secrets())
    try:
        return _dispatch(argv)
    except Exception as error:  # noqa: BLE001 - this is the one handler
        return _report(_of_the_job(error), platform)


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in {"-h", "--help", "help"}:
        return _print(command_help(argv[1]) if argv[1:] and argv[1] in COMMANDS else USAGE)
    if argv and argv[0] == "--version":
        return _print(f"qlora-job {__version__}\n")
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = "".join(f"; the nearest is {name}" for name in get_close_matches(argv[0], COMMANDS, n=1))
        raise SettingsError([Problem(argv[0], f"is not a command{near}; commands are {', '.join(COMMANDS)}")])
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "run"
    if {"-h", "--help"} & set(argv):
        return _print(command_help(command))
    return _FUNCTIONS[command](argv)


def _print(text: str) -> int:
    """The exit code of a command that only prints: text that could not be written is no success."""
    return 0 if log.print_result(text) else JobError.exit_code


def _run(argv: list[str]) -> int:
    from job.distributed.early_end import telling_the_others
    from job.distributed.launcher import check_signals, recorded_signals
    from job.runs.fault_injection import parse

    with recorded_signals() as received:
        with telling_the_others(lambda: known_place(argv) or _several_machines(known_machine(argv)), received):
            settings = load_settings(argv)
            place = current_place()
            _configure_log(settings, place)
            _check_temporary_folder()
            faults = parse(settings.fault or "")
        check_signals(received)
    if place is None:  # else the launcher, or every process of torchrun, would log it again
        _note_foreign_variables()
    _configure_libraries(find_machines(current_platform()).interface)
    if settings.run.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else libraries would use a GPU if there is one
    if place is None and (code := _launch(settings, argv)) is not None:
        return code
    _hide_other_gpus(place)
    from job.common.resources import check_shared_memory
    from job.distributed.rendezvous import join
    from job.preemption.spot_notices import watch_notices
    from job.preemption.stop_flag import stop_on_signals
    from job.preemption.watchdog import watch

    platform = current_platform()
    first = place is None or place.local_rank == 0
    if place is not None and first:
        check_shared_memory(place.local_world_size)
    if platform.name == "sagemaker" and first and not lasts(settings.run.output, platform.inputs):
        log.get_logger().warning(
            "this run is not copied to S3: an interruption loses it; set JOB_RUN__OUTPUT=s3://... or CheckpointConfig",
            output=settings.run.output,
        )
    from job.runs.run_log import IdleLimit

    run, stall = settings.run, settings.train.stall_seconds
    idle = IdleLimit(run.max_idle_attempts)

    def on_stall(message: str) -> None:
        _report_to_platform(platform, Stalled(message), message)
        idle.record_stall(message)  # last: the store may be what hangs

    with (
        stop_on_signals(run.grace_seconds, partial(_report_late, idle, platform)) as stop,
        watch_notices(stop, run.spot_notices if first else "off"),
        watch(stall, on_stall) as report_progress,
        join(
            place,
            run.id,
            stop=stop,
            report_progress=report_progress,
            patience=stall,
            grace_seconds=run.grace_seconds,
            machine_checks=platform.machine_checks,
        ) as processes,
    ):
        from job.pipeline import run as run_job

        # In words before this process leaves the others, which end with the same exit code.
        with memory_errors(
            "the run was prepared or published", "lower JOB_TRAIN__MAX_LENGTH or JOB_EVAL__BATCH_TOKENS"
        ):
            run_job(settings, stop, report_progress, faults, delivery=platform.delivery, processes=processes, idle=idle)
    return 0


def _launch(settings: Settings, argv: list[str]) -> int | None:
    """Starts this machine's processes and returns their exit code; None if one process is enough, which is this one."""
    from job.distributed.early_end import telling_the_others
    from job.distributed.launcher import (
        Machine,
        check_signals,
        count_processes,
        launch,
        recorded_signals,
        worker_command,
    )

    run = settings.run
    with recorded_signals() as signals:
        telling = telling_the_others(lambda: _several_machines(settings), signals)
        with telling, current_platform().machine_checks():
            processes = count_processes(run.processes)
        _share_cpus(processes)
        if processes * run.nodes == 1:
            check_signals(signals)
            return None
        from job.pipeline import finished

        delivery = current_platform().delivery if run.node_rank == 0 else None
        if finished(settings, delivery) is not None:  # the other machines may be gone for good
            return 0
        # With one machine the rank is ignored: the pods of an Indexed Job may be independent runs.
        machine = Machine(processes, run.nodes, run.node_rank, run.rendezvous) if run.nodes > 1 else Machine(processes)
        command, grace = worker_command(argv), run.grace_seconds
        garbage_collection.enable()  # this process only waits from here on
        return launch(command, machine, signals, run=run.id, environ=environment(), grace_seconds=grace)


def _several_machines(settings: Settings | None) -> tuple[Machine, str | None] | None:
    """Which of several machines this is, and the run's id; None for a run of one machine, or if it is not known."""
    from job.distributed.launcher import Machine

    if settings is None or settings.run.nodes == 1:
        return None
    run = settings.run
    machine = Machine(1 if run.processes == "auto" else run.processes, run.nodes, run.node_rank, run.rendezvous)
    return machine, None if settings.sources["run.id"] == "generated" else run.id


def _share_cpus(processes: int) -> None:
    """Limits OpenMP's threads to the CPUs that these processes may use: it does not know of a container's quota."""
    cpus = usable_cpus()
    if processes > 1 or cpus < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // processes)))


def _note_foreign_variables() -> None:
    if found := foreign_variables():
        what = "variables of a CI server or batch system are ignored; a run is named with JOB_RUN__ID"
        log.get_logger().info(what, variables=found)


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


def _configure_libraries(interface: str | None) -> None:
    """Sets the variables that libraries read when they are imported, unless the user has set them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads would spin while they wait: beside other processes a CPU then needs four times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # cuBLAS reads it when CUDA starts; without it the same run gives other bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Warnings of torch's C++ code, such as about an address that does not answer, would be plain text among JSON lines.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # bitsandbytes has torch compile functions for devices that have no kernels in the library. The decorator alone
    # imports torch's compiler, 600 modules; nothing of the job is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # TRL and MLflow send telemetry when training starts, unless it is disabled.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # In a TrainJob transformers would report progress to Kubeflow from the training loop: after a resume with a wrong
    # remaining time, and 100 % when the run is preempted.
    os.environ.setdefault("DISABLE_KUBEFLOW_INTEGRATION", "TRUE")
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _hide_other_gpus(place: Place | None) -> None:
    """Makes the libraries see a single process with a single GPU: the job itself coordinates several of them."""
    environ = environment()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(environ, place.local_rank if place else 0)
    for name in VARIABLES:
        if name in environ:
            del os.environ[name]


def _config(argv: list[str]) -> int:
    if "--schema" in argv:
        if len(argv) > 1:
            raise SettingsError([Problem("--schema", "prints the schema of all settings; remove the other arguments")])
        return _print(json.dumps(json_schema(), indent=2) + "\n")
    rows = [
        (name, json.dumps(value), source) for name, value, source in describe(load_settings(argv, options=("schema",)))
    ]
    _note_foreign_variables()
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = (f"{name:<{widths[0]}}  {value:<{min(widths[1], 60)}}  {source}\n" for name, value, source in rows)
    return _print("".join(lines))


def _plan(argv: list[str]) -> int:
    _configure_libraries(None)
    _note_foreign_variables()
    with log.silence_stdout():
        from job.planning.plan_text import plan_command

    return plan_command(argv)


def _selftest(argv: list[str]) -> int:
    if argv:
        raise SettingsError([Problem("selftest", "takes no arguments and no settings; remove them")])
    from job.cli.selftest import selftest

    return max((_print(line + "\n") for line in selftest(environment())), default=0)


def _draw_report(argv: list[str]) -> int:
    from job.cli.runs import report_command

    return report_command(argv)


def _verify(argv: list[str]) -> int:
    from job.cli.runs import verify_command

    return verify_command(argv)


def _compare(argv: list[str]) -> int:
    from job.cli.runs import compare_command

    return compare_command(argv)


def _push(argv: list[str]) -> int:
    from job.cli.push import push_command

    return push_command(argv)


def _promote(argv: list[str]) -> int:
    from job.cli.promote import promote_command

    return promote_command(argv)


def _status(argv: list[str]) -> int:
    from job.cli.status import status_command

    return status_command(argv)


def _serve_check(argv: list[str]) -> int:
    from job.cli.serve_check import serve_check_command

    return serve_check_command(argv)


_FUNCTIONS = {
    "run": _run,
    "train": _run,
    "plan": _plan,
    "config": _config,
    "verify": _verify,
    "compare": _compare,
    "report": _draw_report,
    "push": _push,
    "promote": _promote,
    "serve-check": _serve_check,
    "status": _status,
    "selftest": _selftest,
}


def _of_the_job(error: Exception) -> Exception:
    """A file that may not be read, or a disk that fails, where no other code has made it an error of the job."""
    from job.common.disk import disk_errors, is_of_the_machine

    # Libraries in Rust, such as safetensors, raise their own classes, whose text ends with the error's number.
    if not isinstance(error, JobError) and (found := re.search(r"\(os error (\d+)\)$", str(error))):
        number = int(found[1])
        if is_of_the_machine(by_number := OSError(number, os.strerror(number))):
            error = by_number
    if not isinstance(error, JobError) and out_of_memory(error):
        what = "the memory of the GPU or of the machine ran out; use a machine with more memory, or lower "
        return TrainingFailed(f"{what}JOB_TRAIN__MAX_LENGTH or JOB_EVAL__BATCH_TOKENS ({error})")
    if is_of_the_machine(error):
        try:
            with disk_errors("a file cannot be read or written"):
                raise error
        except JobError as translated:
            return translated
    return error


def _report(error: Exception, platform: Platform) -> int:
    """Logs the error, writes it to where the platform looks for it, and returns the exit code."""
    code = error.exit_code if isinstance(error, JobError) else JobError.exit_code
    text = log.scrub(str(error) or type(error).__name__, secrets())
    logger = log.get_logger()
    if isinstance(error, JobError) and error.reported:
        # The error itself is in the log of another machine: without a warning this one would end without a word.
        place = current_place()
        first_elsewhere = place is not None and place.local_rank == 0 < place.rank
        say = logger.warning if first_elsewhere else logger.info
        say("this process ends because another process failed", exit_code=code, **_details(error))
    elif isinstance(error, JobError):
        logger.error(type(error).__name__, exit_code=code, meaning=error.meaning, **_details(error))
    else:
        logger.error("a bug: please report it with this traceback", exit_code=code, exc_info=error)
    _report_to_platform(platform, error, text)
    return code


def _report_late(idle: IdleLimit, platform: Platform, message: str) -> int:
    """Reports that this process ends because its time is over; returns the exit code, by the attempts before."""
    late = NoProgress(f"{message}; {idle.message}") if idle.reached else Preempted(message)
    return _report(late, platform)


def _report_to_platform(platform: Platform, error: Exception, text: str) -> None:
    """Writes the reason why the job ended to the files in which the platform looks for it.

    Where a retry may help, the machine may be at fault, so it is named.
    """
    kind = type(error) if isinstance(error, JobError) else JobError
    where = f"node {platform.node}: " if platform.node and kind.retry != "no" else ""
    message = f"{type(error).__name__} (exit code {kind.exit_code}): {where}{text}"
    _write_failure_file(platform.failure_file, message[:FAILURE_CHARACTERS])
    _write_failure_file(platform.termination_log, message.encode()[:TERMINATION_BYTES].decode(errors="ignore"))


def _details(error: JobError) -> dict[str, Any]:
    """The fields of the log line, beside the class of the error."""
    problems = getattr(error, "problems", None)
    if problems is None:
        return {"why": str(error)}
    found = {"problems": [str(problem) for problem in problems], "total": getattr(error, "total", len(problems))}
    advice = getattr(error, "advice", "")
    return {**found, "advice": advice} if advice else found


def _write_failure_file(path: Any, message: str) -> None:
    """Writes a file for the platform. If that fails, it only logs a warning, so as not to hide the error itself."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(message, encoding="utf-8")
    except OSError as error:
        log.get_logger().warning("the platform's failure file cannot be written", path=str(path), why=str(error))
