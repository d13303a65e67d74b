"""SkyPilot's and dstack's files: valid YAML, the job's own exit codes, and what dstack's commands do with them."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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
DSTACK_PATIENCE = 10
"""Seconds after its signal in which dstack's runner kills a task (`killDelay`, of 0.22)."""
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
        patience = DSTACK_PATIENCE if environ is by_name else re.findall(r"--stop-timeout (\d+)", SKYPILOT["run"])[0]
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


def test_skypilot_s_machines_can_write_to_the_bucket() -> None:
    """The container has the role of the machine, and only machines of the bucket's cloud have one for it."""
    scheme, _, _ = SKYPILOT["envs"]["JOB_RUN__OUTPUT"].partition("://")
    assert SKYPILOT["resources"]["infra"] == {"s3": "aws", "gs": "gcp", "az": "azure"}[scheme]
    assert "--network host" in SKYPILOT["run"]


def test_dstack_s_machine_has_what_a_pod_has() -> None:
    """By default dstack takes machines with less memory than a file of the reference recipe's model."""
    text = (FOLDER.parent / "kubernetes/base/job.yaml").read_text(encoding="utf-8")
    (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    requests = container["resources"]["requests"]
    assert DSTACK["resources"]["cpu"] == f"{requests['cpu']}.."
    assert DSTACK["resources"]["memory"] == f"{requests['memory'].removesuffix('Gi')}GB.."


def test_dstack_takes_only_gpus_that_the_image_serves() -> None:
    """To an image of one's own, dstack offers GPUs of every vendor and age."""
    gpu = DSTACK["resources"]["gpu"]
    assert (gpu["vendor"], gpu["compute_capability"]) == ("nvidia", 7.5)
    assert "compute capability 7.5" in (FOLDER.parent / "docker/README.md").read_text(encoding="utf-8")


@contextmanager
def dstack_commands(folder: Path, job: str) -> Iterator[subprocess.Popen[bytes]]:
    """The commands of dstack with a stand-in for the job, which counts its starts in `starts`; without the pauses.

    They are started as dstack's runner does: by an interactive shell at a terminal of its own, with / as HOME.
    """
    entrypoint, starts = folder / "entrypoint.sh", folder / "starts"
    entrypoint.write_text(f"#!/bin/sh\necho x >>{starts}\nstart=$(wc -l <{starts})\n{job}\n")
    entrypoint.chmod(0o755)
    (command,) = DSTACK["commands"]
    command = command.replace("/opt/job/entrypoint.sh", str(entrypoint)).replace("sleep 150", "sleep 0")
    words = ["setsid", "--ctty", f"/bin/{DSTACK['shell']}", "-i", "-c", command.strip()]
    terminal, end = os.openpty()
    try:
        yield subprocess.Popen(words, stdin=end, stdout=end, stderr=end, env={**os.environ, "HOME": "/"})
    finally:
        os.close(end)
        os.close(terminal)


@pytest.mark.parametrize("code", [0, *exit_codes()])
def test_dstack_restarts_the_codes_to_retry(tmp_path: Path, code: int) -> None:
    """They are restarted until the job ends otherwise; any other code is the task's own at once."""
    with dstack_commands(tmp_path, f"[ $start -lt 3 ] && exit {code}; exit 0") as process:
        ended = process.wait(timeout=60)
    starts = len((tmp_path / "starts").read_text().split())
    assert (ended, starts) == ((0, 3) if code in RETRIED else (code, 1))


def test_dstack_stops_the_job(tmp_path: Path) -> None:
    """The signal that stops the task reaches the job, whose exit code is the task's, and it is not started again."""
    ready = tmp_path / "ready"
    job = f"trap 'exit 75' TERM; touch {ready}; while true; do sleep 0.05; done"
    with dstack_commands(tmp_path, job) as process:
        wait_for(ready.exists)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 75
    assert len((tmp_path / "starts").read_text().split()) == 1


def test_dstack_s_job_has_a_home(tmp_path: Path) -> None:
    """HOME is not /, to which dstack sets it and which the image's user may not write."""
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text(encoding="utf-8")
    (home,) = re.findall(r"^ENV HOME=(\S+)", dockerfile, re.MULTILINE)
    with dstack_commands(tmp_path, f'printf %s "$HOME" >{tmp_path}/home') as process:
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "home").read_text() == home


def test_the_page_s_fleet_is_for_the_task() -> None:
    """A task of dstack runs on a fleet's machines: one of the same kind, of which there is none in the meantime."""
    (text,) = re.findall(r"  ```yaml\n(.*?)  ```", PAGE, re.DOTALL)
    fleet = yaml.safe_load(text)
    assert (fleet["type"], fleet["spot_policy"], fleet["nodes"]) == ("fleet", DSTACK["spot_policy"], "0..1")
