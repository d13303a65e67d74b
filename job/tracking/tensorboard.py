"""TensorBoard events of a run, from its metrics. Written with tensorboardX, which is a fifth of TensorBoard's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from job.records import StepMetrics, ValidationMetrics
from job.tracking.figures import step_figures, validation_figures


def write_events(folder: Path, history: Sequence[StepMetrics], validations: Sequence[ValidationMetrics] = ()) -> None:
    """Writes losses, learning rate, gradient norm, speed and memory by step, for `tensorboard --logdir`."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for metrics in history:
            for name, value in step_figures(metrics).items():
                writer.add_scalar(name, value, metrics.step)
        for validation in validations:
            for name, value in validation_figures(validation).items():
                writer.add_scalar(name, value, validation.step)
    for path in folder.iterdir():  # its name has the time and the host in it: every attempt would leave another file
        path.rename(folder / "events.out.tfevents.0")
