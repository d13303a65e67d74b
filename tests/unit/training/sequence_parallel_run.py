"""A training with divided rows in one of several processes, which `test_sequence_parallel` starts: see `Run`."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from job.errors import JobError, Preempted

ABOVE = 60
"""Tokens above which a row is divided in these tests; above 40 it is long."""


@dataclass(frozen=True)
class Run:
    """The work of one process, given as JSON in its arguments.

    Attributes:
        folder: Folder for checkpoints, and for the findings of process 0 in `found.json`.
        base: The base's folder.
        rank: Of this process.
        count: How many there are.
        port: The port at which they connect.
        placement: Of the base's weights.
        resume: The checkpoint's folder; empty for none.
        killed_after: The step after which this process kills itself; 0 for none.
        stopped_in: The step of this start in whose first divided row it is stopped.
        killed_in: The step of this start in whose first divided row it kills itself.
    """

    folder: str
    base: str
    rank: int
    count: int
    port: int
    placement: str = "gpu"
    resume: str = ""
    killed_after: int = 0
    stopped_in: int = 0
    killed_in: int = 0


def main(words: list[str]) -> int:
    """Trains; returns the exit code that the job has."""
    run = Run(**json.loads(words[0]))
    try:
        train(run)
    except JobError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def train(run: Run) -> None:
    """Trains in this process.

    Raises:
        JobError: It was stopped, or another process has ended.
    """
    from transformers import AutoTokenizer

    from job.distributed.ranks import Place
    from job.distributed.rendezvous import join
    from job.preemption.stop_flag import StopFlag
    from job.training import long_rows, micro_batch, step, trainer
    from job.training.config import Hooks
    from tests.unit.training.test_sequence_parallel import DIVIDED, EXAMPLES, RECIPE, VALIDATION, fused
    from tests.unit.training.training_runs import adapter_hash

    for module in (long_rows, micro_batch, step):
        module.LONG_ROW = 40
    stop, done, folder = StopFlag(), [], Path(run.folder)
    _disturb(run, stop, done)
    place = Place(run.rank, run.count, run.rank, run.count, "localhost", run.port)
    joining = {"stop": stop, "report_progress": lambda: None, "timeout_seconds": 60, "grace_seconds": 5}

    validations: list[float] = []

    def note(**more: Any) -> None:
        steps = [{**asdict(one), "measured": None} for one in done]
        if run.rank == 0:
            (folder / "found.json").write_text(json.dumps({"steps": steps, "validations": validations, **more}))

    def on_metrics(metrics: Any) -> None:
        done.append(metrics)
        note()
        if metrics.step == run.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with join(place, "run", **joining) as processes:
        model = fused(Path(run.base), placement=run.placement, group=processes)
        trained = trainer.train(
            model,
            AutoTokenizer.from_pretrained(run.base),
            EXAMPLES,
            recipe=replace(RECIPE, total_steps=3, save_every_steps=1, validate_every_steps=2),
            plan=DIVIDED if run.count > 1 else replace(DIVIDED, sequence_parallel=1, divided_above=None),
            hooks=Hooks(
                on_metrics,
                lambda *_: None,
                stop,
                lambda _: not stop(),
                on_validation=lambda one: validations.append(one.loss),
            ),
            folder=folder,
            resume=Path(run.resume) if run.resume else None,
            processes=processes,
            validation=VALIDATION,
        )
        note(adapter=adapter_hash(model), above=trained.plan.divided_above)
        if not trained.complete:
            raise Preempted("stopped")


def _disturb(run: Run, stop: Any, done: list[Any]) -> None:
    """Makes the process stop or kill itself in attention of a divided row."""
    from job.model.fused.long_attention import CpuKernel

    backward, at = CpuKernel.backward, run.stopped_in or run.killed_in

    def disturbed(self: CpuKernel, *tensors: Any) -> Any:
        if at and len(done) == at - 1 and self.layout.longest_query > ABOVE:
            if run.killed_in:
                os.kill(os.getpid(), signal.SIGKILL)
            stop.request("a test", 0.0)
        return backward(self, *tensors)

    CpuKernel.backward = disturbed  # type: ignore[method-assign]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
