"""The locks are complete, hashed and consistent, and name no package index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKS = ("requirements.lock", "requirements-cuda.lock", "requirements-dev.lock")


def pins(lock: str) -> list[Requirement]:
    """The requirements of a lock, without their hashes."""
    lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
    return [Requirement(line.removesuffix(" \\")) for line in lines if re.match("[a-z]", line)]


def wanted(names: list[str]) -> list[Requirement]:
    """The requirements of pyproject.toml, with its own extras in their place."""
    found = [Requirement(name) for name in names]
    own = [extra for need in found if need.name == PROJECT["name"] for extra in need.extras]
    return [need for need in found if need.name != PROJECT["name"]] + [
        need for extra in own for need in wanted(EXTRAS[extra])
    ]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes(lock: str) -> None:
    """A package is one version and the hashes of its files; no address is in the file."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert "://" not in text
    blocks = re.split(r"\n(?=[a-z])", text)[1:]
    assert len(blocks) == len(pins(lock)) > 0
    for block in blocks:
        first, *rest = block.strip().splitlines()
        assert re.match(r"[a-z0-9.-]+==\S+( ;.+)? \\$", first), first
        assert rest, first
        assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in rest), first


def test_the_locks_agree() -> None:
    """No requirement stands in two locks, and no package has two versions where one Python would take both."""
    known: dict[str, list[Requirement]] = {}
    for pin in (pin for lock in LOCKS for pin in pins(lock)):
        known.setdefault(pin.name, []).append(pin)
    for name, versions in known.items():
        assert len({str(pin) for pin in versions}) == len(versions), name
        for python in ("3.11", "3.12", "3.13"):
            here = {"python_version": python, "python_full_version": f"{python}.1"}
            taken = [pin for pin in versions if pin.marker is None or pin.marker.evaluate(here)]
            assert len({str(pin.specifier) for pin in taken}) <= 1, (name, python)


def test_torch_and_cuda_have_a_lock_of_their_own() -> None:
    """What a build of torch brings with it is in its lock, and in no other."""
    own = {pin.name for pin in pins("requirements-cuda.lock")}
    assert {"torch", "triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= own
    assert all(re.match(r"torch$|triton$|nvidia-|cuda-", name) for name in own)
    assert "nvidia-ml-py" not in own


@pytest.mark.parametrize(
    ("names", "locks"),
    [
        (PROJECT["dependencies"], LOCKS[:2]),
        *((needs, LOCKS[:2]) for extra, needs in EXTRAS.items() if extra != "dev"),
        (EXTRAS["dev"], LOCKS),
    ],
)
def test_the_ranges_are_met(names: list[str], locks: tuple[str, ...]) -> None:
    """What pyproject.toml asks for is in the lock it belongs to, at a version it allows."""
    locked = {canonicalize_name(pin.name): str(pin.specifier)[2:] for lock in locks for pin in pins(lock)}
    for need in wanted(names):
        assert need.specifier.contains(locked[canonicalize_name(need.name)]), str(need)


def test_the_job_s_lock_has_no_tools() -> None:
    """What only checks and tests need is not in the image."""
    assert not {pin.name for pin in pins("requirements.lock")} & {"pytest", "moto", "mypy", "ruff", "hypothesis"}
