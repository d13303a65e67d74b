"""SkyPilot's and dstack's files: valid YAML, the job's own exit codes, and what dstack's commands do with them."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import exit_codes
from job.settings.load import load_settings
from tests.waiting import wait_for

FOLDER = Path(__file__).parents[2] / "infra/orchestrators"
SKYPILOT: dict[str, Any] = yaml.safe_load((FOLDER / "skypilot.yaml").read_text(encoding="utf-8"))
DSTACK: dict[str, Any] = yaml.safe_load((FOLDER / "qlora-job.dstack.yml").read_text(encoding="utf-8"))
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RETRIED = {code for code, (_, retry) in exit_codes().items() if retry.startswith("yes")}
LIMITED = {code for code, (_, retry) in exit_codes().items() if retry == "counts against the limit"}


def test_skypilot_restarts_the_codes_to_retry() -> None:
    """Those without a limit; no other code is restarted, since its limit counts all of them."""
    assert set(SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"]) == RETRIED
    assert SKYPILOT["resources"]["job_recovery"].keys() == {"recover_on_exit_codes"}


def test_the_page_names_the_codes() -> None:
    """The codes that are restarted, and those with a limit, which end the job; and that the files were not run."""
    (row,) = re.findall(r"^\| exit codes ([\d, ]+) \|", PAGE, re.MULTILINE)
    assert set(map(int, row.split(","))) == RETRIED
    (told,) = re.findall(r"\*\*Other codes\.\*\* ([\d, and]+) deserve", PAGE)
    assert set(map(int, re.findall(r"\d+", told))) == LIMITED
    assert "not run on either platform" in PAGE


def test_the_settings_are_the_jobs() -> None:
    """Every variable JOB_... in the files is a setting; Docker waits longer than the job's grace period."""
    by_name = dict(entry.split("=", 1) for entry in DSTACK["env"])
    for environ in (SKYPILOT["envs"], by_name):
        given = {name: value for name, value in environ.items() if name.startswith("JOB_")}
        settings = load_settings([], given)
        assert settings.run.id == "my-first-run"
    (patience,) = re.findall(r"--stop-timeout (\d+)", SKYPILOT["run"])
    assert int(patience) > settings.run.grace_seconds


def test_skypilot_passes_every_setting_to_the_container(tmp_path: Path) -> None:
    """Variables that a user adds to `envs` reach the job, as the page says; so does the hub's token."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    docker.chmod(0o755)
    environ = {**SKYPILOT["envs"], **SKYPILOT["secrets"], "JOB_TRAIN__EPOCHS": "3", "JOB_DATA__SOURCE": "a b.jsonl"}
    environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", "-c", SKYPILOT["run"]]
    words = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()
    passed = {name for option, name in itertools.pairwise(words) if option == "--env" and "=" not in name}
    assert passed == {name for name in environ if name.startswith("JOB_")} | {"HF_TOKEN"}
    assert words[-1] == SKYPILOT["envs"]["IMAGE"]


def dstack_commands(folder: Path, job: str) -> subprocess.Popen[str]:
    """The commands of dstack with a stand-in for the job, which counts its starts in `starts`; without the pauses."""
    entrypoint, starts = folder / "entrypoint.sh", folder / "starts"
    entrypoint.write_text(f"#!/bin/sh\necho x >>{starts}\nstart=$(wc -l <{starts})\n{job}\n")
    entrypoint.chmod(0o755)
    (command,) = DSTACK["commands"]
    command = command.replace("/opt/job/entrypoint.sh", str(entrypoint)).replace("sleep 150", "sleep 0")
    return subprocess.Popen([DSTACK["shell"], "-c", command], text=True)


@pytest.mark.parametrize("code", [0, *exit_codes()])
def test_dstack_restarts_the_codes_to_retry(tmp_path: Path, code: int) -> None:
    """They are restarted until the job ends otherwise; any other code is the task's own at once."""
    ended = dstack_commands(tmp_path, f"[ $start -lt 3 ] && exit {code}; exit 0").wait(timeout=60)
    starts = len((tmp_path / "starts").read_text().split())
    assert (ended, starts) == ((0, 3) if code in RETRIED else (code, 1))


def test_dstack_stops_the_job(tmp_path: Path) -> None:
    """The signal that stops the task reaches the job, whose exit code is the task's, and it is not started again."""
    ready = tmp_path / "ready"
    process = dstack_commands(tmp_path, f"trap 'exit 75' TERM; touch {ready}; while true; do sleep 0.05; done")
    wait_for(ready.exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert len((tmp_path / "starts").read_text().split()) == 1
