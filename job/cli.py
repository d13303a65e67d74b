"""The command line, and the one place where an exception becomes an exit code, a log line and a failure file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from job import __version__, log
from job.errors import JobError, Problem, SettingsError
from job.platforms import Platform
from job.settings import current_platform, describe, environment, json_schema, load_settings, secrets

USAGE = """\
usage: qlora-job [run] [--GROUP.NAME VALUE ...]      the job (default)
       qlora-job config [--GROUP.NAME VALUE ...]     the effective settings and where each came from
       qlora-job config --schema                     JSON Schema of all settings
       qlora-job report RESULTS [--output FILE]      the HTML report again, of a finished run (path or s3://)
       qlora-job selftest                            kill and resume here, and compare bit by bit

Settings come from the command line, JOB_GROUP__NAME in the environment, SageMaker's hyperparameters.json, the file
in JOB_CONFIG, the preset (--preset), and the defaults, in this order. `qlora-job config` lists them all.
Try it without a GPU or a network: qlora-job run --preset demo

exit codes: 0 done; 1 a bug; 2 settings; 3 gate not met; 65 data; 69 storage or hub unreachable (retry);
            75 preempted (retry); 76 replaced by another attempt; 77 access denied
"""

FAILURE_CHARACTERS = 1024
TERMINATION_BYTES = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    platform = current_platform()
    # Until the settings say otherwise: what is wrong with them is a line of the log too.
    log.configure("auto", "info", secrets())
    try:
        return _dispatch(words)
    except Exception as error:  # noqa: BLE001 - this is the one handler
        return _report(error, platform)


def _dispatch(words: list[str]) -> int:
    if words and words[0] in {"-h", "--help", "help"}:
        sys.stdout.write(USAGE)
        return 0
    if words and words[0] == "--version":
        sys.stdout.write(f"qlora-job {__version__}\n")
        return 0
    command = words.pop(0) if words and words[0] in COMMANDS else "run"
    return COMMANDS[command](words)


def _run(words: list[str]) -> int:
    settings = load_settings(words)
    log.configure(settings.log.format, settings.log.level, secrets(), run=settings.run.id)
    if settings.run.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for libraries that would use a GPU because it is there
    # cuBLAS reads it when CUDA starts; without it the same run gives other bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from job.faults import parse
    from job.notices import watch_notices
    from job.preemption import stop_on_signals
    from job.watchdog import watch

    if environment().get("WORLD_SIZE", "1") != "1":
        raise SettingsError([Problem("WORLD_SIZE", "the job runs in one process so far; start it without torchrun")])
    faults = parse(settings.fault or "")
    platform = current_platform()
    with (
        stop_on_signals(settings.run.grace_seconds) as stop,
        watch_notices(stop, settings.run.spot_notices),
        watch(settings.train.stall_seconds, lambda message: _leave_everywhere(platform, message)) as beat,
    ):
        from job.pipeline import run

        run(settings, stop, beat, faults)
    return 0


def _config(words: list[str]) -> int:
    if "--schema" in words:
        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
        return 0
    rows = [(name, json.dumps(value), source) for name, value, source in describe(load_settings(words))]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, source in rows:
        sys.stdout.write(f"{name:<{widths[0]}}  {value:<{min(widths[1], 60)}}  {source}\n")
    return 0


def _selftest(_words: list[str]) -> int:
    from job.selftest import selftest

    for line in selftest(environment()):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


def _draw_report(words: list[str]) -> int:
    from job.redraw import report_command

    return report_command(words)


COMMANDS = {"run": _run, "train": _run, "config": _config, "report": _draw_report, "selftest": _selftest}
"""`train` is what SageMaker calls a training image with."""


def _report(error: Exception, platform: Platform) -> int:
    """Says what went wrong, where the platform looks for it, and returns the exit code."""
    code = error.exit_code if isinstance(error, JobError) else JobError.exit_code
    text = log.scrub(str(error) or type(error).__name__, secrets())
    logger = log.get_logger()
    if isinstance(error, JobError):
        logger.error(type(error).__name__, exit_code=code, meaning=error.meaning, **_details(error))
    else:
        logger.error("a bug: please report it with this traceback", exit_code=code, exc_info=error)
    message = f"{type(error).__name__} (exit code {code}): {text}"
    _leave_everywhere(platform, message)
    return code


def _leave_everywhere(platform: Platform, message: str) -> None:
    """Writes last words to wherever the platform looks for them."""
    _leave(platform.failure_file, message[:FAILURE_CHARACTERS])
    _leave(platform.termination_log, message.encode()[:TERMINATION_BYTES].decode(errors="ignore"))


def _details(error: JobError) -> dict[str, Any]:
    """What the log line says beside the kind of error."""
    problems = getattr(error, "problems", None)
    if problems is None:
        return {"why": str(error)}
    return {"problems": [str(problem) for problem in problems], "total": getattr(error, "total", len(problems))}


def _leave(path: Any, message: str) -> None:
    """Writes the platform's failure file; a platform that does not take it must not hide the error itself."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(message, encoding="utf-8")
    except OSError as error:
        log.get_logger().warning("the platform's failure file cannot be written", path=str(path), why=str(error))
