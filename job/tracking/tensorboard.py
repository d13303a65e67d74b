"""TensorBoard events of a run, from its metrics. Written with tensorboardX, which is a fifth of TensorBoard's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from job.records import StepMetrics, ValidationMetrics


def write_events(folder: Path, history: Sequence[StepMetrics], validations: Sequence[ValidationMetrics] = ()) -> None:
    """Writes losses, learning rate, gradient norm, speed and memory by step, for `tensorboard --logdir`."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for metrics in history:
            writer.add_scalar("train/loss", metrics.loss, metrics.step)
            writer.add_scalar("train/learning_rate", metrics.learning_rate, metrics.step)
            if metrics.grad_norm is not None:
                writer.add_scalar("train/grad_norm", metrics.grad_norm, metrics.step)
            for name, number in metrics.preference.items():
                writer.add_scalar(f"train/{name}", number, metrics.step)
            for name, value in metrics.measured.items():
                if value is not None:
                    writer.add_scalar(f"measured/{name}", value, metrics.step)
        for validation in validations:
            for name, value in {"loss": validation.loss, **validation.preference}.items():
                writer.add_scalar(f"eval/{name}", value, validation.step)
    for path in folder.iterdir():  # its name has the time and the host in it: every attempt would leave another file
        path.rename(folder / "events.out.tfevents.0")
