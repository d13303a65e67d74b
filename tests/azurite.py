"""Azurite, Azure's own emulator of Blob Storage, as a process of node (`npm install azurite`).

It is searched for in AZURITE (the folder of the npm package); if this is not set, where npm installs packages.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import cache
from pathlib import Path
from urllib import request

import pytest

from tests.forked import free_port
from tests.s3_server import BUCKET

ACCOUNT = "devstoreaccount1"
# Azurite's published key.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
MISSING = "needs Azurite: make store-test installs it, or AZURITE=<folder>/node_modules/azurite"
PROGRAM = "dist/src/blob/main.js"


@cache
def _program() -> str | None:
    """The file that node runs; None if Azurite or node is not installed.

    Raises:
        FileNotFoundError: AZURITE is set, but Azurite or node is missing: skipped tests would not be noticed.
    """
    node = shutil.which("node")
    if folder := os.environ.get("AZURITE"):
        program = Path(folder, PROGRAM)
        if not program.is_file() or node is None:
            raise FileNotFoundError(f"AZURITE={folder}: needs {PROGRAM} in this folder, and node on PATH")
        return str(program)
    folders = ["node_modules/azurite", *(f"{root}/lib/node_modules/azurite" for root in ("/usr", "/usr/local"))]
    if (npm := shutil.which("npm")) is not None:
        folders.append(f"{Path(npm).resolve().parents[2]}/azurite")  # npm itself lies in lib/node_modules
    files = [Path(folder, PROGRAM) for folder in folders]
    return next((str(file) for file in files if file.is_file()), None) if node else None


def settings(url: str) -> dict[str, str]:
    """The variables with which obstore finds a server with Azure's API, and its account."""
    return {
        "AZURE_STORAGE_ENDPOINT": url,
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
    }


@contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """Runs Azurite with one empty container, `BUCKET`, and lets obstore find it; yields its address.

    The test is skipped where Azurite is not installed.
    """
    if (program := _program()) is None:
        pytest.skip(MISSING)
    port = free_port()
    words = ["node", program, "--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck"]
    with (folder / "azurite.log").open("wb") as log:
        process = subprocess.Popen([*words, "--blobPort", str(port)], cwd=folder, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}/{ACCOUNT}"
        _create_container(url, time.monotonic() + 60)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings(url).items():
                patch.setenv(name, value)
            yield url
    finally:
        process.kill()  # its data is in memory: nothing is lost, and a server that hangs ends, too
        process.wait()


def _create_container(url: str, deadline: float) -> None:
    """Creates `BUCKET` as soon as the server answers; obstore has no request for it."""
    date = formatdate(usegmt=True)
    lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", "x-ms-version:2021-08-06", f"/{ACCOUNT}/{ACCOUNT}/{BUCKET}"]
    text = "\n".join([*lines, "restype:container"])
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    create = request.Request(f"{url}/{BUCKET}?restype=container", method="PUT", headers=headers)
    while time.monotonic() < deadline:
        with suppress(OSError), request.urlopen(create, timeout=10):
            return
        time.sleep(0.1)
    raise TimeoutError("Azurite does not answer")
