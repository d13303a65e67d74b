"""The stages of a run and the paths below its folder are defined in one module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import job
from job.runs import layout
from job.runs.layout import BUILT_ON, Stage

JOB = Path(job.__file__).parent
OTHERS = sorted({*JOB.rglob("*.py")} - {Path(layout.__file__)})
WORDS = {"train", "pull", "publish", "export"}  # also used for other things
NAMES = {layout.RESULTS, layout.SETTINGS, layout.LEASE, layout.COMMITTED, *Stage} - WORDS
FOLDERS = ("artifacts/", "attempts/", "checkpoints/", "faults/", "stages/")


def literals(path: Path) -> set[str]:
    """The strings of a module that are no documentation; of an f-string, its parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts
    }


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(JOB).as_posix())
def test_nobody_else_spells_a_path(path: Path) -> None:
    """A path below a run's folder, or a stage that is named like one, is written in `layout` alone."""
    found = {text for text in literals(path) if text in NAMES or text.startswith(FOLDERS)}
    assert not found


def test_keys_are_those_of_earlier_versions() -> None:
    """A run that an earlier version began is found: these paths never change."""
    assert layout.stage_key(Stage.EVALUATE_BASE) == "stages/evaluate-base.json"
    assert layout.attempt_key(7) == "attempts/0007.json"
    assert layout.marker_key(40) == "checkpoints/step-00000040/COMMITTED.json"
    assert layout.checkpoint_folder(40, 3) == "checkpoints/step-00000040/0003/"
    assert layout.answers_key("arc_easy", "base") == "artifacts/evaluation/arc_easy.base.jsonl"
    assert layout.fault_key("kill@step=2") == "faults/kill@step=2"
    assert (layout.RESULTS, layout.SETTINGS, layout.LEASE) == ("results.json", "settings.json", "lease.json")


@pytest.mark.parametrize("number", [1, 9999, 123456789])
def test_attempts_are_found_by_their_keys(number: int) -> None:
    """The number of an attempt can be read off its key, and off no other one."""
    assert layout.attempt_number(layout.attempt_key(number)) == number
    assert layout.attempt_number(f"{layout.attempt_key(number)}.part") is None


@pytest.mark.parametrize("step", [0, 40, 99_999_999, 100_000_000])
def test_checkpoints_are_found_by_their_keys(step: int) -> None:
    """Step and name can be read off a checkpoint's keys; a step has one spelling only."""
    assert layout.checkpoint_part(layout.marker_key(step)) == (step, "COMMITTED.json")
    assert layout.checkpoint_part(f"{layout.checkpoint_folder(step, 2)}a") == (step, "0002/a")
    assert layout.checkpoint_part("checkpoints/step-40/COMMITTED.json") is None
    assert layout.checkpoint_part(f"artifacts/{layout.marker_key(step)}") is None


def test_what_builds_on_a_stage_comes_after_it() -> None:
    """A stage is done again only after the one that it builds on."""
    order = list(Stage)
    pairs = [(Stage(before), after) for before, later in BUILT_ON.items() for after in later]
    assert all(order.index(before) < order.index(after) for before, after in pairs)
