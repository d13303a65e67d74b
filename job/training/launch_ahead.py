"""What the host launches on a GPU before the work launched earlier is done, so that the GPU never waits for the host.

A GPU computes what the host has launched on a CUDA stream, in that order. The host waits for the GPU only when it reads
a number. Nothing here changes what is computed; on a CPU every call returns when its work is done.

With one GPU, the order of events in step 5 is this. The host waits for the GPU only in 3 (with fp16 also in the
optimizer's step, whose loss scaling reads a number).

1. The host launches the gradient of step 5 while the GPU computes step 4.
2. It lays out the first sequence of step 6 (`MicroBatchGradient.lay_out`).
3. It waits for the loss and the gradient's norm of step 4, which is then done, and reports them
   (`DeferredMetrics.report`). If the job has to stop now, and step 5 does not fit before the deadline, step 5 is
   abandoned (`StepAbandoned`).
4. It launches clipping, the optimizer's step, and copies of the loss and the norm of step 5 to the host
   (`DeferredMetrics.defer`), which it reads in the next step.

This order requires that launching a step takes a few milliseconds only (`StepGradient.launched_at_once`: CUDA graphs).
Otherwise, and before a validation, a checkpoint, or the end of training, a step's metrics are read when the step ends,
before anything of the next one is launched.

With several GPUs, two things happen between 3 and 4:

- The processes agree, on their CPUs, that none of them ran out of memory. If one has ended, step 5 is abandoned.
- The host launches the all-reduce of the gradients (`LaunchedSum.start`). What it launches later waits for this sum, on
  the GPU.

After launching the optimizer's step, the host waits for the sum (`LaunchedSum.finish`), and checks meanwhile whether
another process has ended. If launching the optimizer's step would itself wait for the GPU (`can_launch_behind_sum`),
the host waits for the sum first. It also does so in the first step of an attempt, in which the optimizer creates its
state (`OptimizerBehindSum`).

If a process is lost after the sum was launched, the sum never ends. So clipping and the optimizer's step, which were
launched after it, never begin: parameters and optimizer states are those of step 4. The host's own counters of the
optimizer's step are restored (`restore_counts`). Step 5 is abandoned, and step 4 is saved from another CUDA stream,
because everything launched on this one waits for the sum (`use_new_stream`). However, a process that ends with an error
may have launched its part of the sum before. Then the sum may still complete, and the optimizer's step begin while
step 4 is being saved. So the trainer checks afterwards, and deletes a checkpoint that may mix the two steps
(`OptimizerBehindSum.may_have_begun`).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from job.common.device_copies import to_host
from job.common.optimizers import OptimizerSpec
from job.distributed.processes import Processes
from job.errors import JobError
from job.training.config import StepAbandoned


class LaunchedSum:
    """Sums a tensor over all processes; the host launches the sum in `start`, and waits for it in `finish`.

    Args:
        processes: The processes that each contribute a tensor.
        device: The device of the tensors.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self._processes, self._device = processes, device
        self._wait: Callable[[], None] = lambda: None
        self._behind: Any = None
        """The CUDA event recorded right after the last sum; None on a CPU."""

    def start(self, tensor: torch.Tensor) -> None:
        """Launches the sum, which replaces the tensor in place. Work launched later on the GPU waits for it.

        Raises:
            JobError: Another process has ended.
        """
        self._wait = self._processes.start_all_reduce(tensor)
        self._behind = torch.cuda.current_stream().record_event() if tensor.is_cuda else None

    def finish(self) -> None:
        """Waits until the last sum is complete; returns at once if none was started.

        Raises:
            StepAbandoned: Another process has ended.
        """
        try:
            self._wait()
        except JobError as error:
            use_new_stream(self._device)
            raise StepAbandoned from error

    def is_complete(self) -> bool:
        """Whether the last sum is complete although `finish` failed: then work launched after it may have begun.

        Another process may publish that it ends while its GPU still completes what that process launched.
        """
        return self._behind is not None and bool(self._behind.query())


def use_new_stream(device: torch.device) -> None:
    """Makes later work, such as the copies for a checkpoint, independent of what was launched so far.

    What was launched so far is the gradient of an abandoned step, or waits for a sum that never completes. Nothing else
    can be pending: the metrics of the step before were read, so that step is done.
    """
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


class OptimizerBehindSum:
    """Lets the host launch the optimizer's step before it waits for the sum over the processes, if that is possible.

    Args:
        gradient_sum: The sum of a step's gradient.
        spec: The optimizer's entry in `OPTIMIZERS`.
        on_gpu: Whether the adapter is on a GPU.
        reads_gpu: Whether fp16's loss scaling or AdaLoRA reads numbers from the GPU in the step.
    """

    def __init__(self, gradient_sum: LaunchedSum, spec: OptimizerSpec, *, on_gpu: bool, reads_gpu: bool) -> None:
        self._sum, self._spec, self._on_gpu, self._reads_gpu = gradient_sum, spec, on_gpu, reads_gpu
        self._launches_behind = False
        """Whether the next step is launched before the sum is complete.

        False for the first step of an attempt, which creates the optimizer's state: copying that waits for the GPU.
        """
        self._counts: list[dict[str, Any]] = []
        self.may_have_begun: Callable[[], bool] = lambda: False
        """Whether the optimizer's step of an abandoned step may have begun."""

    def before_step(self, optimizer: Any) -> None:
        """To be called before `optimizer.step()`. Waits for the sum unless that step can be launched without waiting.

        Raises:
            StepAbandoned: Another process has ended.
        """
        if self._launches_behind:
            self._counts = counts_of(optimizer)
        else:
            self._sum.finish()

    def after_step(self, optimizer: Any) -> None:
        """To be called after `optimizer.step()`. Waits for the sum if `before_step` did not.

        Raises:
            StepAbandoned: Another process has ended, and the optimizer's step, which was launched, is never computed.
        """
        if self._launches_behind:
            try:
                self._sum.finish()
            except StepAbandoned:
                restore_counts(optimizer, self._counts)
                self.may_have_begun = self._sum.is_complete
                raise
        self._launches_behind = can_launch_behind_sum(self._spec, on_gpu=self._on_gpu, reads_gpu=self._reads_gpu)


def can_launch_behind_sum(optimizer: OptimizerSpec, *, on_gpu: bool, reads_gpu: bool) -> bool:
    """Whether launching the optimizer's step does not wait for the GPU; arguments as for `OptimizerBehindSum`.

    If it waits, the host could not notice that another process has ended, and that the sum will never complete.
    """
    return (
        on_gpu and not reads_gpu and not optimizer.paged and (not is_bitsandbytes(optimizer) or _WAIT in vars(_bnb()))
    )


def counts_of(optimizer: Any) -> list[dict[str, Any]]:
    """A copy of each parameter's optimizer state that is not on the GPU, such as the number of steps."""
    return [
        {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
            if not (isinstance(value, torch.Tensor) and value.is_cuda)
        }
        for state in optimizer.state.values()
    ]


def restore_counts(optimizer: Any, counts: Sequence[Mapping[str, Any]]) -> None:
    """Restores what `counts_of` returned before a step that was launched and is never computed."""
    for state, before in zip(optimizer.state.values(), counts, strict=True):
        state.update(before)


_WAIT = "sync_gpu"
"""The function that bitsandbytes' optimizers call to wait for the GPU."""


def is_bitsandbytes(optimizer: OptimizerSpec) -> bool:
    """Whether it is one of bitsandbytes' 8-bit optimizers."""
    return "qmap1" in optimizer.state


def _bnb() -> Any:
    """The module of bitsandbytes' optimizers, which Trainer imports only when it creates one."""
    return importlib.import_module("bitsandbytes.optim.optimizer")


@contextmanager
def without_bitsandbytes_sync(optimizer: OptimizerSpec) -> Iterator[None]:
    """Context manager in which bitsandbytes does not wait for the GPU after each parameter that it updates.

    Only a paged state needs that, since the host must not access it while the GPU does.
    """
    module = _bnb() if is_bitsandbytes(optimizer) else None
    wait = getattr(module, _WAIT, None)
    if wait is None or optimizer.paged:
        yield
        return
    setattr(module, _WAIT, lambda _parameter: None)
    try:
        yield
    finally:
        setattr(module, _WAIT, wait)


class DeferredMetrics:
    """Reports a step's loss and gradient norm when the next step is launched, and measures the seconds of a step.

    Reading them when the step ends would wait for the GPU, which would then have nothing to do until the host has
    launched the next step.

    Args:
        log: Called with `loss`, `grad_norm` and `learning_rate` of a step; raises if the loss is not finite.
    """

    def __init__(self, log: Callable[[dict[str, float]], None]) -> None:
        self._log = log
        self._report: Callable[[], None] | None = None
        """Waits for the metrics of the last step and reports them; None if they are reported."""
        self._clock = time.monotonic()

    def step_begins(self) -> None:
        """Starts the clock of a step; if the step before is not reported yet, its report starts the clock instead."""
        if self._report is None:
            self._clock = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of the step that is being reported."""
        return time.monotonic() - self._clock

    def defer(self, loss: torch.Tensor, norm: Any, learning_rate: float) -> None:
        """Launches the copies of a step's loss, () float32, and of its gradient's norm, a () tensor or a number.

        The loss is cloned first, because Trainer adds the next step's loss to the same tensor.
        """
        read = to_host(loss.detach().clone(), torch.as_tensor(norm, device=loss.device))
        self._report = partial(self._log_copies, read, learning_rate)

    def report(self) -> None:
        """Reports the metrics of the last step, if that was deferred.

        Raises:
            TrainingFailed: Its loss is not finite.
        """
        report, self._report = self._report, None
        if report is not None:
            report()
            self._clock = time.monotonic()

    def _log_copies(self, read: Callable[[], tuple[torch.Tensor, ...]], learning_rate: float) -> None:
        """Waits for the copies of loss and norm, () each, and logs them."""
        loss, norm = (float(value) for value in read())
        self._log({"loss": loss, "grad_norm": norm, "learning_rate": learning_rate})
