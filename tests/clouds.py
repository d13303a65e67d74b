"""Imitations of the clouds' stores, by kind: moto for S3, `tests/gcs_server.py` for Google, Azurite for Azure.

`python -m tests.clouds KIND` runs one until its stdin ends, and prints the variables with its address.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from job.storage.open import StorageOptions
from tests.azurite import azurite
from tests.azurite import settings as azure_settings
from tests.gcs_server import TOKEN, gcs_server
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server

T = TypeVar("T")
SCHEMES = {"s3": "s3", "gcs": "gs", "azure": "az"}
ADDRESS = {"s3": "JOB_STORAGE__ENDPOINT_URL", "gcs": "GOOGLE_BASE_URL", "azure": "AZURE_STORAGE_ENDPOINT"}
"""Kind -> the variable with the address of its server."""


def place(kind: str) -> str:
    """The URI of the bucket in each imitation."""
    return f"{SCHEMES[kind]}://{BUCKET}"


def options(kind: str, environ: dict[str, str]) -> StorageOptions:
    """Options to open a store in a process with the variables: S3's client does not read the address from one."""
    return StorageOptions(endpoint_url=environ[ADDRESS[kind]] if kind == "s3" else None)


@contextmanager
def imitation(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """Runs one with an empty bucket, for use by this process; yields the variables for other processes.

    Those of S3 and Google are threads of this process. The test is skipped where Azurite is not installed.
    """
    if kind == "s3":
        with credentials(), moto_server() as url:
            yield {**CREDENTIALS, ADDRESS[kind]: url}
    elif kind == "gcs":
        with gcs_server():
            yield {ADDRESS[kind]: os.environ[ADDRESS[kind]], "GOOGLE_BEARER_TOKEN": TOKEN}
    else:
        with azurite(folder) as url:
            yield azure_settings(url)


@contextmanager
def process(kind: str) -> Iterator[dict[str, str]]:
    """Runs an imitation in a separate process, for callers that fork and so must not have threads."""
    words = [sys.executable, "-m", "tests.clouds", kind]
    server = subprocess.Popen(
        words, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line:
            raise AssertionError(f"no imitation of {kind}; for Azure set AZURITE")
        environ: dict[str, str] = json.loads(line)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            yield environ
    finally:
        server.stdin.close()
        server.wait(30)
        server.stdout.close()


def in_fork(work: Callable[[], T]) -> T:
    """The result of `work`, which uses a store, from a fork: obstore's threads would not survive later forks.

    Raises:
        AssertionError: It raised an error, which is on stderr.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with os.fdopen(writing, "wb") as file:
                pickle.dump(work(), file)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - whatever it is, it has to be seen
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    if os.waitpid(child, 0)[1]:
        raise AssertionError("the store could not be asked")
    found: T = pickle.loads(data)
    return found


def main() -> None:
    """Serves until stdin ends."""
    with tempfile.TemporaryDirectory() as folder, imitation(sys.argv[1], Path(folder)) as environ:
        print(json.dumps(environ), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
