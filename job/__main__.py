"""`python -m job` and `qlora-job`: the entrypoint of the image."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from job.common import garbage_collection


def run() -> NoReturn:
    """Runs the command line, and ends the process without Python's own shutdown.

    The shutdown would take a second to free the libraries' modules, and would wait for threads that are still
    downloading. `main` has flushed and closed everything that matters when it returns.
    """
    garbage_collection.disable()
    _open_closed_streams()
    _undo_inherited_signals()
    from job.cli.main import main

    code = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed when the process began
        try:
            stream.flush()
        except BrokenPipeError:  # the reader of the pipe has closed it
            pass
        except OSError:  # the output is lost, for example on a full disk: not a success
            code = code or 1
    os._exit(code)


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

    Else the request to stop would not arrive, and the exit codes of this process's own children would be lost: Python
    takes them for 0.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


if __name__ == "__main__":
    run()
