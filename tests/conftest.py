"""What all tests share: an offline, single-threaded process that leaves nothing in the checkout, and a tiny model."""

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

# A full collection goes over the millions of objects of imported libraries, for half a second each time.
gc.disable()

_CACHE = tempfile.TemporaryDirectory(prefix="qlora-job-tests-")

# Read when the libraries are imported, so they are set before any of them is. Threads: tests run in parallel.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _CACHE.name,
    "HYPOTHESIS_STORAGE_DIRECTORY": _CACHE.name,
    "OMP_NUM_THREADS": "1",
    # Torch looks up the name of each address that it connects to. Where an answer is lost, the system waits for 5 s.
    "RES_OPTIONS": "timeout:1 attempts:1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
for _name in [name for name in os.environ if name.startswith("JOB_")]:
    del os.environ[_name]


# Who starts the tests by nohup or in the background of a script has HUP, INT and QUIT ignored, in what they start too.
for _number in {*SIGNALS, signal.SIGQUIT}:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)


# A shared machine may pause any example for longer than hypothesis' deadline of 200 ms.
settings.register_profile("shared machine", deadline=None, max_examples=50)
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    """Starts what forks the job for all workers, before there are any; it imports nothing until it is asked."""
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
"""Paths of tests that take long: a worker that began with one of them at the end would let the others wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow files first, which are dealt to the workers in this order."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))


def pytest_collection_finish() -> None:
    """From here on garbage is collected, but what was imported for the tests is not looked at again."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Removes the caches of the Hugging Face libraries and of hypothesis."""
    _CACHE.cleanup()


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """What a test sets up by `log.configure`, as every command does, and binds to its lines is not another test's."""
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
    if logger.level != level:  # else the cache of every logger would be cleared for nothing
        logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _helper_processes_are_forked() -> Iterator[None]:
    """A process that renders chat templates starts in a second; forked, it has the same bounds and starts at once."""
    from job.common import helper_process
    from tests import warm

    with pytest.MonkeyPatch.context() as patch:
        forking = SimpleNamespace(Popen=warm.start_helper_process, PIPE=subprocess.PIPE)
        patch.setattr(helper_process, "subprocess", forking)
        yield


@pytest.fixture(autouse=True, scope="session")
def _service_descriptions_are_read_once() -> Iterator[None]:
    """Botocore parses megabytes of JSON for every client of a new session; tests make hundreds of them."""
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
