"""What all tests share: an offline, single-threaded process that leaves nothing in the checkout, and a tiny model."""

from __future__ import annotations

import gc
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from job import log

# A full collection goes over the millions of objects of imported libraries, for half a second each time.
gc.disable()

_CACHE = tempfile.TemporaryDirectory(prefix="qlora-job-tests-")

# Read when the libraries are imported, so they are set before any of them is. Threads: tests run in parallel.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _CACHE.name,
    "HYPOTHESIS_STORAGE_DIRECTORY": _CACHE.name,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
for _name in [name for name in os.environ if name.startswith("JOB_")]:
    del os.environ[_name]


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
def _fresh_log_context() -> Iterator[None]:
    """What a test binds to its log lines (run, attempt) is not on another one's."""
    yield
    log.clear_context()


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
