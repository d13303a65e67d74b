"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from job.cli.main import COMMANDS, USAGE
from job.errors import exit_codes
from job.evaluation.statistics import mcnemar, tango_interval, verdict
from job.settings.load import load_settings
from job.settings.schema import NAMES
from job.settings.sources import environment_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCKER = (ROOT / "infra/docker/README.md").read_text(encoding="utf-8")


def test_exit_codes_in_the_readme() -> None:
    """The README's table of exit codes is that of `errors.py`."""
    section = README.partition("## Exit codes")[2]
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.*?) ?\|$", section, re.MULTILINE)
    expected = [("0", "done, manifest published", "")]
    expected += [(str(code), meaning, retry) for code, (meaning, retry) in exit_codes().items()]
    assert rows == expected


def test_the_published_claim_in_the_readme() -> None:
    """The table of discordances is what our statistics say, and its middle is where the verdict turns."""
    asked = 2376
    before, after = 1896, 1929
    assert [k for k in range(asked) if f"{100 * k / asked:.2f}" in {"79.80", "81.19"}] == [before, after]
    found = re.findall(r"^\| (\d+) \| (\d+) \| (.+?) % \| (.+?) \| (.+?) \| (\w+) \|$", README, re.MULTILINE)
    pairs = [(int(better), int(worse)) for better, worse, *_ in found]
    expected = []
    for better, worse in pairs:
        assert better - worse == after - before
        assert worse <= asked - after
        p, (low, high) = mcnemar(better, worse), tango_interval(better, worse, asked)
        share, interval = f"{100 * (better + worse) / asked:.1f}", f"{100 * low:+.2f} to {100 * high:+.2f}"
        expected.append((str(better), str(worse), share, f"{p:.4g}", interval, verdict(p, (low, high))))
    assert found == expected
    last = max(better + worse for (better, worse), row in zip(pairs, found, strict=True) if row[-1] == "improved")
    assert f"Up to {last} changed answers, {100 * last / asked:.1f} % of the questions" in README
    assert (last + 2) in {better + worse for better, worse in pairs}  # the next one there can be is none


def test_settings_in_the_documents() -> None:
    """Every `JOB_` name in a README, and in what lies beside Docker's, is a setting."""
    known = {environment_name(name) for name in NAMES} | {"JOB_CONFIG", "JOB_SECRETS_DIR", "JOB_GROUP__NAME"}
    texts = [README, DOCKER, *(path.read_text(encoding="utf-8") for path in (ROOT / "infra/docker").glob("*.yaml"))]
    assert {name for text in texts for name in re.findall(r"JOB_[A-Z_]+[A-Z]", text)} <= known


def test_the_commands_for_docker() -> None:
    """Docker waits longer than the job's grace; the secrets by file that are named are those the entrypoint reads."""
    patience = re.findall(r"--stop-timeout (\d+)", README + DOCKER)
    assert patience
    assert all(int(seconds) > load_settings([], {}).run.grace_seconds for seconds in patience)
    block = (ROOT / "entrypoint.sh").read_text(encoding="utf-8").split("secrets=(")[1].split(")")[0]
    (told,) = re.findall(r"\*\*Secrets\*\*(.*?)\n- ", DOCKER, re.DOTALL)
    assert set(block.split()) <= set(re.findall(r"[A-Z_]{8,}", told.replace("_FILE", "")))


def test_the_image_s_words_are_in_the_documents() -> None:
    """The base that a build for old GPUs needs is pinned by digest like the default one."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for text in (dockerfile, DOCKER):
        assert re.search(
            r"BASE_IMAGE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04@sha256:[0-9a-f]{64}$", text, re.MULTILINE
        )


def test_commands_in_the_usage() -> None:
    """`--help` names every command, but for SageMaker's own word for `run`."""
    assert all(f" {command}" in USAGE or f"[{command}]" in USAGE for command in COMMANDS if command != "train")
