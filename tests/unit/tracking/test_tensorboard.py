"""TensorBoard's own reader finds the same events as if TensorBoard's own writer had written them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.records import StepMetrics, ValidationMetrics
from job.tracking.tensorboard import write_events

HISTORY = [
    StepMetrics(
        step=step,
        epoch=step / 2,
        loss=2.0 / step,
        learning_rate=1e-4 * step,
        grad_norm=None if step == 2 else 0.1 * step,
        examples=8,
        target_tokens=100,
        measured={"seconds": 0.5, "tokens_per_second": 200.0 + step, "memory_bytes": 80 * 10**9, "energy": None},
    )
    for step in (1, 2, 3)
]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each event, by its name."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_are_those_of_tensorboards_own_writer(tmp_path: Path) -> None:
    """The same names, steps and values, to the bit, of everything that is known."""
    from torch.utils.tensorboard import SummaryWriter

    write_events(tmp_path / "ours", HISTORY)
    with SummaryWriter(str(tmp_path / "theirs")) as writer:  # type: ignore[no-untyped-call]
        for step in HISTORY:
            figures = {"train/loss": step.loss, "train/learning_rate": step.learning_rate}
            figures |= {} if step.grad_norm is None else {"train/grad_norm": step.grad_norm}
            figures |= {f"measured/{name}": value for name, value in step.measured.items() if value is not None}
            for name, value in figures.items():
                writer.add_scalar(name, value, step.step)  # type: ignore[no-untyped-call]
    ours = read(tmp_path / "ours")
    assert ours == read(tmp_path / "theirs")
    assert set(ours) == {
        *("train/loss", "train/learning_rate", "train/grad_norm"),
        *("measured/seconds", "measured/tokens_per_second", "measured/memory_bytes"),
    }
    assert [step for step, _ in ours["train/grad_norm"]] == [1, 3]


def test_there_is_one_file_of_a_fixed_name(tmp_path: Path) -> None:
    """A second attempt replaces it instead of leaving another one beside it."""
    for _ in range(2):
        write_events(tmp_path, HISTORY)
        assert [path.name for path in tmp_path.iterdir()] == ["events.out.tfevents.0"]
    assert len(read(tmp_path)["train/loss"]) == 3


def test_validation_losses_are_events(tmp_path: Path) -> None:
    """By the name that TRL's own events have, the one before training included."""
    write_events(tmp_path, HISTORY, [ValidationMetrics(step, 0.0, 4.0 - step, 5, 50) for step in (0, 3)])
    assert read(tmp_path)["eval/loss"] == [(0, 4.0), (3, 1.0)]


def test_rewards_are_among_the_events(tmp_path: Path) -> None:
    """Metrics of preferences have TRL's names."""
    write_events(tmp_path, [replace(HISTORY[0], preference={"rewards/margins": 0.5})])
    assert read(tmp_path)["train/rewards/margins"] == [(1, 0.5)]
