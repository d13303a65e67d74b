"""Installing Azurite and fake-gcs-server: a registry that cannot be reached neither fails CI nor delays it long."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests import store_servers
from tests.azurite import PROGRAM, _program

RUN = ["sh", "-c", 'echo "$AZURITE,$FAKE_GCS_SERVER" >answer; exit 7']
"""A command that says what it was given, and has an exit code of its own."""


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of npm, which cannot reach its registry; pip has none, and a folder without packages."""
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin/npm"
    npm.write_text("#!/bin/sh\necho the registry does not answer >&2\nexit 1\n")
    npm.chmod(0o755)
    (tmp_path / "bin/node").write_text('#!/bin/sh\n[ -f "$1" ]\n')
    (tmp_path / "bin/node").chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "bin"))
    for variable, _ in store_servers.PROGRAMS.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return npm


def test_a_registry_that_cannot_be_reached_is_said(npm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command runs without the programs, and its exit code counts; where they are required, it does not run."""
    assert store_servers.main(RUN) == 7
    assert Path("answer").read_text() == ",\n"
    shown = capfd.readouterr().out
    assert "Azurite cannot be installed, so its tests will be skipped: npm ended with 1:" in shown
    assert "the registry does not answer" in shown
    assert "fake-gcs-server cannot be installed, so its tests will be skipped: " in shown
    Path("answer").unlink()
    assert store_servers.main(["--required", *RUN]) == 1
    assert not Path("answer").exists()
    assert "Azurite cannot be installed: npm ended with 1:" in capfd.readouterr().out


def test_a_registry_that_does_not_answer_takes_no_longer_than_the_limit(npm: Path, tmp_path: Path) -> None:
    """An installer is killed with what it started."""
    npm.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >{tmp_path}/started\nwait\n")
    began = time.monotonic()
    _, missing = store_servers.install(tmp_path, 3)
    assert missing["Azurite"] == "npm takes too long"
    assert time.monotonic() - began < 60
    started = Path(f"/proc/{(tmp_path / 'started').read_text().strip()}/stat")
    assert not started.exists() or started.read_text().split()[2] == "Z"


def test_what_is_there_is_not_installed(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gets the variables as they are."""
    npm.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    monkeypatch.setenv("AZURITE", "here")
    monkeypatch.setenv("FAKE_GCS_SERVER", "there")
    assert store_servers.main(["--required", *RUN]) == 7
    assert Path("answer").read_text() == "here,there\n"
    assert not (tmp_path / "called").exists()


def test_what_npm_installed_is_found(npm: Path, tmp_path: Path) -> None:
    """The variable leads to the folder of the package; no lock file is asked for, and no code of packages runs."""
    package = tmp_path / "node_modules/azurite"
    npm.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called\nmkdir -p {package}\n')
    found, missing = store_servers.install(tmp_path, 60)
    assert found == {}
    assert missing["Azurite"].startswith("node ended with 1:"), "it is there, but does not start"
    (package / PROGRAM).parent.mkdir(parents=True)
    (package / PROGRAM).touch()
    found, missing = store_servers.install(tmp_path, 60)
    assert found == {"AZURITE": str(package)}
    assert list(missing) == ["fake-gcs-server"]
    called = (tmp_path / "called").read_text().split()
    assert {"--no-save", "--no-package-lock", "--ignore-scripts", store_servers.AZURITE} <= set(called)


def test_fake_gcs_server_that_does_not_start_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests are skipped then, and do not fail: a folder may be mounted with noexec."""
    program = tmp_path / "fake-gcs/wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    monkeypatch.setattr(store_servers, "pip", lambda _package, _folder, _deadline: None)
    with pytest.raises(store_servers.Failed, match="Permission denied"):
        store_servers.fake_gcs(tmp_path, time.monotonic() + 60)
    program.chmod(0o755)
    assert store_servers.fake_gcs(tmp_path, time.monotonic() + 60) == {"FAKE_GCS_SERVER": str(program)}


def test_azurite_that_is_named_must_be_there(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that were asked for are not skipped."""
    monkeypatch.setenv("AZURITE", str(tmp_path))
    _program.cache_clear()
    with pytest.raises(FileNotFoundError, match="AZURITE="):
        _program()
    (tmp_path / PROGRAM).parent.mkdir(parents=True)
    (tmp_path / PROGRAM).touch()
    assert _program() == str(tmp_path / PROGRAM)
    _program.cache_clear()
