"""Credentials as files (HF_TOKEN_FILE and others): they become the variables, or are refused without being shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from job.cli.library_variables import take_secret_files
from job.errors import SettingsError
from job.settings.load import load_reading, load_settings, secrets
from job.settings.secret_files import NAMES

ROOT = Path(__file__).parents[3]
SECRET = "a-secret-that-no-message-may-hold"


def test_the_names_are_those_of_the_image() -> None:
    """A variable that the entrypoint reads from a file is read without the image, too."""
    block = (ROOT / "entrypoint.sh").read_text(encoding="utf-8").split("secrets=(")[1].split(")")[0]
    assert set(block.split()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_file_becomes_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: str) -> None:
    """Libraries and child processes find it without its line break; the path is unset, and the log hides the secret."""
    (tmp_path / "secret").write_bytes((SECRET + ending).encode())
    monkeypatch.setenv(name, "")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    take_secret_files()
    assert os.environ[name] == SECRET
    assert f"{name}_FILE" not in os.environ
    assert SECRET in secrets()
    load_settings([], os.environ | {"JOB_PRESET": "demo"})


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Each file that is refused, together with what is wrong with settings; no message has a secret."""
    (tmp_path / "empty").touch()
    (tmp_path / "lines").write_text(f"{SECRET}\n{SECRET}\n")
    (tmp_path / "escape").write_text(f"{SECRET}\x1b[0m")
    (tmp_path / "bytes").write_bytes(SECRET.encode() + b"\xff")
    environ = {
        "JOB_TRAIN__EPOCHS": "x",
        "HF_TOKEN": SECRET,
        "HF_TOKEN_FILE": str(tmp_path / "empty"),
        "WANDB_API_KEY_FILE": str(tmp_path / "empty"),
        "AWS_SECRET_ACCESS_KEY_FILE": str(tmp_path / "missing"),
        "AWS_SESSION_TOKEN_FILE": str(tmp_path),
        "OCI_PASSWORD_FILE": SECRET,
        "MLFLOW_TRACKING_TOKEN_FILE": str(tmp_path / "lines"),
        "MLFLOW_TRACKING_PASSWORD_FILE": str(tmp_path / "escape"),
        "AZURE_CLIENT_SECRET_FILE": str(tmp_path / "bytes"),
        "AZURE_STORAGE_SAS_TOKEN_FILE": f"{SECRET}\0",
    }
    with pytest.raises(SettingsError) as error:
        load_settings([], environ)
    expected = {
        "JOB_TRAIN__EPOCHS (environment)": "",
        "HF_TOKEN_FILE (environment)": "is given, and HF_TOKEN as well; keep one of them",
        "WANDB_API_KEY_FILE (environment)": f"{tmp_path}/empty is empty; put the secret into it",
        "AWS_SECRET_ACCESS_KEY_FILE (environment)": (
            f"user {os.getuid()} cannot read {tmp_path}/missing (No such file or directory); correct the path"
        ),
        "AWS_SESSION_TOKEN_FILE (environment)": f"{tmp_path} is not a regular file",
        "OCI_PASSWORD_FILE (environment)": f"user {os.getuid()} cannot read the file (No such file or directory)",
        "MLFLOW_TRACKING_TOKEN_FILE (environment)": "has several lines or control characters",
        "MLFLOW_TRACKING_PASSWORD_FILE (environment)": "has several lines or control characters",
        "AZURE_CLIENT_SECRET_FILE (environment)": "is not text",
        "AZURE_STORAGE_SAS_TOKEN_FILE (environment)": "cannot read the file (not a path)",
    }
    found = {problem.where: problem.what for problem in error.value.problems}
    assert found.keys() == expected.keys()
    for where, what in expected.items():
        assert what in found[where]
    assert SECRET not in str(error.value)
    with pytest.raises(SettingsError) as error:
        load_reading([], environ)
    assert {problem.where for problem in error.value.problems} == expected.keys() - {"JOB_TRAIN__EPOCHS (environment)"}


def test_files_of_libraries_are_their_own() -> None:
    """Variables that end in _FILE and belong to a library are neither read nor refused; an empty one is not set."""
    names = ("AWS_WEB_IDENTITY_TOKEN", "AWS_SHARED_CREDENTIALS", "AZURE_FEDERATED_TOKEN", "SSL_CERT")
    load_settings([], {"JOB_PRESET": "demo", "HF_TOKEN_FILE": "", **{f"{name}_FILE": "/x" for name in names}})


@pytest.mark.parametrize("command", ["config", "run", "status runs/one"])
def test_every_command_refuses_a_file_that_is_not_there(tmp_path: Path, command: str) -> None:
    """`python -m job` ends with exit code 2 and the variable's name, whatever else is set."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "JOB_PRESET": "demo"}
    done = subprocess.run(
        [sys.executable, "-m", "job", *command.split()],
        env=environ | {"HF_TOKEN_FILE": "/nonexistent"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"HF_TOKEN_FILE.*cannot read /nonexistent", done.stderr)
