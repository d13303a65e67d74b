"""How an error becomes an exit code, a line of the log, and the file in which the platform looks for the reason."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log
from job.common.out_of_memory import give_back_reserve, out_of_memory, print_one_line, ran_out
from job.errors import JobError, NoProgress, Preempted, TrainingFailed
from job.platforms.detect import Platform
from job.settings.load import current_place, secrets
from job.settings.training_stages import SUFFIX

if TYPE_CHECKING:
    from job.runs.run_log import IdleLimit

FAILURE_CHARACTERS = 1024
TERMINATION_BYTES = 4096
_NO_THREAD = ("can't start new thread", "unable to start watchdog thread")
"""What Python says where the system starts no more threads, and what faulthandler says."""
_AT_WORK = ("the command was at work", "lower JOB_TRAIN__MAX_LENGTH or JOB_EVAL__BATCH_TOKENS")
"""What is said of memory that runs out where nothing closer is known, and what to lower."""


def translated(error: Exception) -> Exception:
    """A file that may not be read, or a disk that fails, where no other code has made it an error of the job."""
    give_back_reserve()
    from job.common.disk import disk_errors, is_of_the_machine

    # Libraries in Rust, such as safetensors, raise their own classes, whose text ends with the error's number.
    if not isinstance(error, JobError) and (found := re.search(r"\(os error (\d+)\)$", str(error))):
        number = int(found[1])
        if is_of_the_machine(by_number := OSError(number, os.strerror(number))):
            error = by_number
    if isinstance(error, BlockingIOError) or (isinstance(error, RuntimeError) and str(error) in _NO_THREAD):
        what = "the system starts no more threads or processes: memory is used up, or the limit of their number"
        return TrainingFailed(f"{what} (ulimit -u, ulimit -v, pids.max of the container); raise it ({error})")
    if not isinstance(error, JobError) and out_of_memory(error):
        return ran_out(*_AT_WORK, error)
    if is_of_the_machine(error):
        try:
            with disk_errors("a file cannot be read or written"):
                raise error
        except JobError as translated:
            return translated
    return error


def report(error: Exception, platform: Platform) -> int:
    """Logs the error, writes it to where the platform looks for it, and returns the exit code."""
    code = error.exit_code if isinstance(error, JobError) else JobError.exit_code
    text = log.scrub(str(error) or type(error).__name__, secrets())
    try:
        _log(error, code)
    except Exception as failed:  # the log's libraries are imported for the first line, for which memory may be missing
        if not out_of_memory(failed):
            raise
        if not isinstance(error, JobError):
            error = ran_out(*_AT_WORK, failed)
            code, text = error.exit_code, str(error)
        print_one_line(type(error).__name__, text, code)
    report_to_platform(platform, error, text)
    return code


def _log(error: Exception, code: int) -> None:
    """Writes the error to the log."""
    logger = log.get_logger()
    if isinstance(error, JobError) and error.reported:
        # The error itself is in the log of another machine: without a warning this one would end without a word.
        place = current_place()
        first_elsewhere = place is not None and place.local_rank == 0 < place.rank
        say = logger.warning if first_elsewhere else logger.info
        say("this process ends because another process failed", exit_code=code, **_details(error))
    elif isinstance(error, JobError):
        # A run on spot machines is preempted as a matter of course: no alert on errors should go off.
        say = logger.warning if isinstance(error, Preempted) else logger.error
        say(type(error).__name__, exit_code=code, meaning=error.meaning, **_details(error), **_resume_with(error))
    else:
        logger.error("a bug: please report it with this traceback", exit_code=code, exc_info=error)


def report_late(idle: IdleLimit, platform: Platform, message: str) -> int:
    """Reports that this process ends because its time is over; returns the exit code, by the attempts before."""
    late = NoProgress(f"{message}; {idle.message}") if idle.reached else Preempted(message)
    return report(late, platform)


def report_to_platform(platform: Platform, error: Exception, text: str) -> None:
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


def _resume_with(error: JobError) -> dict[str, str]:
    """What resumes the run: its id may have been generated, and a terminal shows it in the first line only."""
    run = log.context()
    begun = error.retry != "no" and "attempt" in run and "run" in run
    # The id of a first training stage resumes nothing: it is made of the whole run's, which may be too long for it.
    begun = begun and not run["run"].endswith(SUFFIX)
    return {"resume_with": f"JOB_RUN__ID={run['run']}"} if begun else {}


def _write_failure_file(path: Path | None, message: str) -> None:
    """Writes a file for the platform. If that fails, it only logs a warning, so as not to hide the error itself."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(message, encoding="utf-8")
    except OSError as error:
        log.get_logger().warning("the platform's failure file cannot be written", path=str(path), why=str(error))
