"""Shared by all tests: an offline, single-threaded process that leaves nothing in the checkout, and a tiny model."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from job import log
from job.preemption.stop_flag import SIGNALS

# A full garbage collection visits the millions of objects of imported libraries, for half a second each time.
gc.disable()

_CACHE = tempfile.TemporaryDirectory(prefix="qlora-job-tests-")

# Read when the libraries are imported, so they are set before any of them is. Threads: tests run in parallel.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _CACHE.name,
    "HYPOTHESIS_STORAGE_DIRECTORY": _CACHE.name,
    "OMP_NUM_THREADS": "1",
    # Torch looks up the name of each address that it connects to. If an answer is lost, the system waits for 5 s.
    "RES_OPTIONS": "timeout:1 attempts:1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
for _name in [name for name in os.environ if name.startswith("JOB_")]:
    del os.environ[_name]


# Under nohup or in the background of a script, HUP, INT and QUIT are ignored, also by the processes of the tests.
for _number in {*SIGNALS, signal.SIGQUIT}:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)


# A shared machine may pause an example for longer than hypothesis' deadline of 200 ms.
settings.register_profile("shared machine", deadline=None, max_examples=50)
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    """Starts the server that forks the job for all workers, before they start; it imports at the first request."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        from tests import warm

        warm.serve()


SLOW = tuple(
    f"tests/{name}"
    for name in (
        "integration",
        "kubernetes/test_job.py",
        "unit/training",
        "families",
        "unit/evaluation",
        "sagemaker/test_container.py",
        "unit/tracking",
    )
)
"""Paths of slow tests: if one of them began last, all other workers would wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow files first, because files are assigned to workers in this order."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))


def pytest_collection_finish() -> None:
    """Turns garbage collection on again, without the objects of the imported libraries."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Removes the caches of the Hugging Face libraries and of hypothesis."""
    _CACHE.cleanup()


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """Resets what a test sets by `log.configure`, as every command does, and the fields bound to log lines."""
    _as_if_never_configured()  # a fixture of a module or the session may have called a command
    levels = {name: logging.getLogger(name).level for name in log.QUIET}
    yield
    _as_if_never_configured()
    for name, level in levels.items():
        _set_level(name, level)


def _as_if_never_configured() -> None:
    log.clear_context()
    log._loggers_are_set_up = True
    # pytest adds and removes its own handlers around each phase of a test
    logging.root.handlers[:] = [one for one in logging.root.handlers if not isinstance(one, log._CurrentStderr)]
    logging.captureWarnings(capture=False)
    _set_level("job", logging.NOTSET)
    if "structlog" in sys.modules and sys.modules["structlog"].is_configured():
        sys.modules["structlog"].reset_defaults()


def _set_level(name: str, level: int) -> None:
    logger = logging.getLogger(name)
    if logger.level != level:  # otherwise the cache of every logger would be cleared needlessly
        logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _helper_processes_are_forked() -> Iterator[None]:
    """A process that renders chat templates starts in a second; forked, it has the same limits and starts at once."""
    from job.common import helper_process
    from tests import warm

    with pytest.MonkeyPatch.context() as patch:
        forking = SimpleNamespace(Popen=warm.start_helper_process, PIPE=subprocess.PIPE)
        patch.setattr(helper_process, "subprocess", forking)
        yield


@pytest.fixture(autouse=True, scope="session")
def _service_descriptions_are_read_once() -> Iterator[None]:
    """Caches botocore's descriptions: it parses megabytes of JSON for each of the tests' hundreds of clients."""
    from botocore.loaders import JSONFileLoader

    read = lru_cache(maxsize=None)(JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda _, path: read(path))
        yield


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Mistral of two layers and its byte-level tokenizer. Tests must not write into it."""
    from tests.helpers import make_base

    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> Any:
    """The tiny model's tokenizer, as the job loads it."""
    from job.model.tokenizer import load_tokenizer

    return load_tokenizer(base_folder)
