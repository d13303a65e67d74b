"""A few cases of `make hostile`, as part of every test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import hostile


@pytest.mark.long
def test_hostile_models_and_templates_are_refused(tmp_path: Path) -> None:
    """One of each kind: in words, in time, and without running their code."""
    names = ["config: a list", "weights: pickled only", "tokenizer: broken", "template: imports os by a name"]
    outcomes = list(hostile.explore(tmp_path, hostile.prepare(tmp_path), names, seconds=120))
    assert [outcome.broken for outcome in outcomes] == [None] * 4
