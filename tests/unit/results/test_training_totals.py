"""The totals of a training run over its steps."""

from __future__ import annotations

import pytest

from job.records import StepMetrics
from job.results.training_totals import training_totals


def step(number: int, loss: float, targets: int, **measured: float | None) -> StepMetrics:
    """The metrics of a step of four examples."""
    return StepMetrics(number, 0.5 * number, loss, 1e-4, 1.0, 4, targets, dict(measured))


def test_the_loss_is_that_of_the_last_epoch() -> None:
    """Weighted by target tokens over the last epoch's steps; all else covers all steps."""
    history = [step(n, float(n), 10 * n, seconds=0.5, memory_bytes=n) for n in range(1, 5)]
    found = training_totals(history, 2, 4)
    assert found == {
        "steps": 4,
        "examples": 16,
        "target_tokens": 100,
        "loss": (3 * 30 + 4 * 40) / 70,
        "seconds": 2.0,
        "tokens_per_second": 50.0,
        "peak_memory_bytes": 4,
        "global_batch_size": 4,
    }


@pytest.mark.parametrize("measured", [{}, {"seconds": None, "memory_bytes": None}])
def test_nothing_measured_is_no_speed(measured: dict[str, float | None]) -> None:
    """Without times there is no speed, and without target tokens no loss: no division by zero."""
    found = training_totals([step(1, 2.0, 0, **measured)], 1, 4)
    assert (found["loss"], found["tokens_per_second"], found["seconds"], found["peak_memory_bytes"]) == (
        None,
        None,
        0,
        0,
    )


def test_preferences_are_means_over_the_last_epochs_examples() -> None:
    """The loss and the rewards count by examples, not by tokens; a metric that some steps lack counts where it is."""
    rewards = [{"rewards/margins": 9.0}, {"rewards/margins": 1.0, "kl": 2.0}, {"rewards/margins": 2.0}]
    examples = [(n, found, size) for n, (found, size) in enumerate(zip(rewards, (4, 4, 2), strict=True), start=1)]
    history = [StepMetrics(n, 0.5 * n, float(n), 1e-4, 1.0, size, 10 * n, {}, found) for n, found, size in examples]
    found = training_totals(history, 2, 4)
    assert found["preference"] == {"rewards/margins": pytest.approx(8 / 6), "kl": 2.0}
    assert found["loss"] == pytest.approx((2 * 4 + 3 * 2) / 6)
