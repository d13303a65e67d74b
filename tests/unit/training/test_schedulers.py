"""Learning-rate schedules: transformers' own, by the settings' names."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from job.common.schedulers import SCHEDULERS, make_schedule
from job.training.config import total_steps


def rates(name: str, total: int, peak: float = 1.0, **settings: Any) -> list[float]:
    """The learning rate of each step, as Trainer gets it from transformers."""
    given = {"warmup_steps": 0, "warmup_ratio": None, "min_lr_ratio": 0.0, "decay_ratio": 0.0} | settings
    schedule, spec = make_schedule(total, **given), SCHEDULERS[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(
        spec.transformers_name(schedule), optimizer, schedule.warmup_steps, total, spec.options(schedule)
    )
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_ends_at_its_minimum() -> None:
    """With a minimum the cosine falls from the peak to that share of it; without one, to zero as before."""
    expected = [0.1 + 0.9 * 0.5 * (1 + cos(pi * step / 10)) for step in range(10)]
    assert rates("cosine", 10, min_lr_ratio=0.1) == pytest.approx(expected)
    assert rates("cosine", 10) == pytest.approx([0.5 * (1 + cos(pi * step / 10)) for step in range(10)])


def test_warmup_stable_decay_has_three_parts() -> None:
    """It rises, stays, and falls along a cosine in the last share of the steps, to the minimum."""
    found = rates("warmup_stable_decay", 20, warmup_ratio=0.2, decay_ratio=0.25, min_lr_ratio=0.1)
    assert found[:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    assert found[4:16] == pytest.approx([1.0] * 12)
    assert found[16:] == pytest.approx([0.1 + 0.9 * 0.5 * (1 + cos(pi * step / 5)) for step in range(1, 5)])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_share_of_the_steps_warms_up(name: str) -> None:
    """A ratio is the number of steps that it comes to, rounded up, whatever the number of steps is set to."""
    found = rates(name, 21, warmup_steps=2, warmup_ratio=0.1)
    assert found == rates(name, 21, warmup_steps=3)
    assert found[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_rate_of_zero_stays_zero(name: str) -> None:
    """The control experiment is possible with every schedule."""
    assert set(rates(name, 5, peak=0.0, decay_ratio=0.5)) == {0.0}


def test_decay_leaves_room_for_the_warmup() -> None:
    """A run of few steps warms up first, and decays in what is left."""
    schedule = make_schedule(6, warmup_steps=5, warmup_ratio=None, min_lr_ratio=0.0, decay_ratio=0.9)
    assert (schedule.warmup_steps, schedule.decay_steps) == (5, 1)


def test_a_fraction_of_an_epoch_is_a_fraction_of_its_steps() -> None:
    """Half of 47 steps is 24, and whole numbers are what they were."""
    assert total_steps(1500, 32, 0.5, None) == 24
    assert total_steps(1500, 32, 2, None) == total_steps(1500, 32, 2.0, None) == 94
    assert total_steps(1500, 32, 1.5, 60) == 60
