"""`python -m job` and `qlora-job`: the entrypoint of the image."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from job.common import garbage_collection


def run() -> NoReturn:
    """Runs the command line, and ends the process without Python's own shutdown.

    The shutdown would take a second to free the libraries' modules, and would wait for threads that are still
    downloading. `main` has flushed and closed everything that matters when it returns.
    """
    garbage_collection.disable()
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


if __name__ == "__main__":
    run()
