"""What the log says about a recipe before training starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from job.stages.train import _note_learning_rate
from tests.unit.training.recipes import RECIPE


@pytest.mark.parametrize(
    ("rate", "first_stage", "setting"),
    [
        (2e-4, False, None),
        (0.1, True, None),
        (1e9, False, "JOB_TRAIN__LEARNING_RATE"),
        (0.2, True, "JOB_TRAIN__SFT_LEARNING_RATE"),
    ],
)
def test_a_learning_rate_that_is_likely_a_typo(rate: float, first_stage: bool, setting: str | None) -> None:  # noqa: FBT001
    """It is a warning that names the setting of the stage; training goes on."""
    with capture_logs() as lines:
        _note_learning_rate(replace(RECIPE, learning_rate=rate), first_stage=first_stage)
    assert [line["setting"] for line in lines if line["log_level"] == "warning"] == ([setting] if setting else [])
