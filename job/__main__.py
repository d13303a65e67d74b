"""`python -m job` and `qlora-job`: the entrypoint of the image."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn


def run() -> NoReturn:
    """Runs the command line, and ends the process without Python's own shutdown.

    The shutdown would take a second to free the libraries' modules, and would wait for threads that are still
    downloading. `main` has flushed and closed everything that matters when it returns.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # not where the parent process ignores it
        signal.signal(signal.SIGTERM, _stopped_early)
    sys.unraisablehook = _unraisable
    try:
        code = _run()
    except KeyboardInterrupt:  # raised by Python, unless a run has its own handlers or the parent process ignores it
        _interrupted()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed when the process began
        try:
            stream.flush()
        except BrokenPipeError:  # the reader of the pipe has closed it
            pass
        except OSError:  # the output is lost, for example on a full disk: not a success
            code = code or 1
    os._exit(code)


def _run() -> int:
    from job.common import garbage_collection, interrupt

    interrupt.record_interrupt()
    garbage_collection.disable()
    _open_closed_streams()
    _undo_inherited_signals()
    from job.cli.main import main

    return main()


def _unraisable(what: Any) -> None:
    """Python's hook for exceptions that have nowhere to go, such as those in a callback of an import's lock.

    They are printed and forgotten; an interrupt would be, too.
    """
    if issubclass(what.exc_type, KeyboardInterrupt):
        _interrupted()
    sys.__unraisablehook__(what)


def _interrupted() -> NoReturn:
    """Ends a process that was interrupted (Ctrl-C) before, or between, the handlers of a run: as `_stopped_early`.

    Any other command ends as the signal ends other programs: a shell shows code 130, and ends a loop around it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = next(iter(sys.argv[1:]), "run")
    if command in {"run", "train", "export"} or command.startswith("-"):
        _stopped_early(signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(130)  # process 1 of a container, which the signal does not end


def _stopped_early(number: int, *_: object) -> NoReturn:
    """Ends a process that is stopped before, or between, the handlers of a run: as preempted, so that it is retried.

    Process 1 of a container would ignore the signal, and be killed after the grace period.
    """
    with suppress(OSError):
        name = signal.Signals(number).name.encode()
        os.write(2, b'{"event": "stopped by %s", "level": "error", "exit_code": 75}\n' % name)
    os._exit(75)


def _open_closed_streams() -> None:
    """Opens each standard stream that was closed when the process began: where nothing is kept, or comes from.

    Else the next file that is opened, such as a checkpoint's, would take its number, and what libraries and other
    processes print would be written there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - the lowest number that is free
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - stays open: it is a standard stream
            setattr(sys, name, stream)


def _undo_inherited_signals() -> None:
    """Undoes what the parent process set for itself: blocked signals, and CHLD ignored.

    The entrypoint blocks TERM, which is pending if it came since then.

    Else the request to stop would not arrive, and the exit codes of this process's own children would be lost: Python
    takes them for 0.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


if __name__ == "__main__":
    run()
