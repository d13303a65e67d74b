"""Errors of the disk, anywhere in the job, are never reported as a bug."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors import SafetensorError

from job.cli import config
from job.cli import main as cli
from job.errors import DataError
from job.model.files import read_json, readable


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, 77) for number in (errno.EACCES, errno.EPERM, errno.EROFS)),
        *((number, 69) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE)),
        *((number, 2) for number in (errno.ENAMETOOLONG, errno.ELOOP)),
        (errno.ENOENT, 1),
    ],
)
def test_a_disk_that_refuses_is_no_bug(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An error of the disk that nobody has translated has the table's code and names the file; no file is a bug."""

    def fail(_words: list[str]) -> int:
        with readable(Path("/model")) if code != 1 else nullcontext():
            raise OSError(number, os.strerror(number), "/model/weights")

    monkeypatch.setattr(config, "config_command", fail)
    assert cli.main(["config"]) == code
    said = capfd.readouterr().err
    assert "/model/weights" in said
    assert ("a bug" in said) == (code == 1)


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 69), (errno.EACCES, 77), (errno.ENOENT, 1)])
def test_a_full_disk_under_safetensors_is_no_bug(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Safetensors has an exception of its own for what the disk says while it writes checkpoints and models."""

    def fail(_words: list[str]) -> int:
        what = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        raise SafetensorError(what)

    monkeypatch.setattr(config, "config_command", fail)
    assert cli.main(["config"]) == code
    said = capfd.readouterr().err
    assert os.strerror(number) in said
    assert ("a bug" in said) == (code == 1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        RuntimeError("unable to start watchdog thread"),
        BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),  # of fork
    ],
)
def test_a_machine_that_starts_no_more_threads_is_no_bug(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a container with a limit, for example: the message names the limits, and another try would end alike."""

    def fail(_words: list[str]) -> int:
        raise error

    monkeypatch.setattr(config, "config_command", fail)
    assert cli.main(["config"]) == 70
    said = capfd.readouterr().err
    assert "pids.max" in said
    assert "a bug" not in said


def test_a_path_that_is_too_long_is_no_bug(capfd: pytest.CaptureFixture[str]) -> None:
    """Of a model, where the first look at the path fails."""
    assert cli.main(["plan", "--preset", "demo", "--run.id", "x", "--model.id", "/tmp/" + "m" * 300]) == 2
    assert "File name too long" in "".join(capfd.readouterr())


def test_a_file_that_is_no_json_stays_wrong_data(tmp_path: Path) -> None:
    """Only the disk's own errors pass: a broken file is wrong data."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError):
        read_json(tmp_path / "config.json", 100)
