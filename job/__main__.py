"""`python -m job` and `qlora-job`: the entrypoint of the image."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from job.common import garbage_collection


def run() -> NoReturn:
    """Runs the command line, and ends the process at once.

    Taking the libraries apart would take a second, and a thread in the midst of a download, which nobody needs any
    more, would be waited for. Whatever has to be in order at the end, `main` has put in order when it returns.
    """
    garbage_collection.disable()
    from job.cli.main import main

    code = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed when the process began
        try:
            stream.flush()
        except BrokenPipeError:  # nobody reads it any more
            pass
        except OSError:  # what was asked for is lost, as on a full disk
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    run()
