"""Launching ahead: a step before the previous step's metrics, and the optimizer's step right after the all-reduce."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from job.checkpoints import optimizer_state
from job.common.optimizers import OPTIMIZERS
from job.data import batch_plan
from job.errors import TrainingFailed, Unreachable
from job.model.lora import trainable
from job.training.config import Hooks, StepAbandoned
from job.training.launch_ahead import (
    LaunchedSum,
    can_launch_behind_sum,
    counts_of,
    is_bitsandbytes,
    restore_counts,
    without_bitsandbytes_sync,
)
from job.training.padded_gradient import PaddedGradient
from job.training.trainer import train
from tests.helpers import make_model
from tests.unit.common.test_optimizers import make
from tests.unit.training.recipes import PLAN
from tests.unit.training.test_trainer import Beside, Launched
from tests.unit.training.training_runs import (
    EXAMPLES,
    LONGER,
    RECIPE,
    RESUMED,
    THROUGHOUT,
    adapter_hash,
    fused_model,
    run,
)


@pytest.fixture
def all_rows_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives process 0 all examples."""
    monkeypatch.setattr(batch_plan, "assign", lambda lengths, processes: [list(range(len(lengths))), []][:processes])


class Left(Beside):
    """The other process ends during the third step."""

    def agree(self, *, repeat: bool) -> bool:
        """Finds out where the processes meet."""
        if len(self.asked) == 2:
            raise Unreachable("process 1: the hub is silent")
        return super().agree(repeat=repeat)


class LeftInSum(Beside):
    """Its neighbour ends during the third step too, which is found out when the sum is waited for."""

    def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
        """The sum of the third step never comes."""
        self.all_reduce(tensor)
        return super().check if len(self.sizes) < 3 else self.fail

    def fail(self) -> None:
        """Raises the error of the other process."""
        raise Unreachable("process 1: the hub is silent")


@pytest.mark.usefixtures("all_rows_here")
@pytest.mark.parametrize("other", [Left, LeftInSum])
def test_the_end_of_another_process_leaves_the_step_before(
    base_folder: Path, tokenizer: Any, tmp_path: Path, other: type[Beside]
) -> None:
    """What was done is saved, and the error is the other's; resumed, the run ends with the bits of a whole one."""
    whole, model = make_model(base_folder), make_model(base_folder)
    recipe = replace(RESUMED, save_every_steps=1000)
    run(whole, tokenizer, LONGER, recipe, tmp_path / "whole")
    saved: list[Path] = []
    hooks = Hooks(lambda _: None, lambda path, _: saved.append(path), lambda: False)
    with pytest.raises(Unreachable, match="process 1: the hub is silent"):
        train(
            model, tokenizer, LONGER, recipe=recipe, plan=PLAN, hooks=hooks, folder=tmp_path / "left", processes=other()
        )
    assert [path.name for path in saved] == ["step-00000002"]
    again = make_model(base_folder)
    run(again, tokenizer, LONGER, recipe, tmp_path / "again", resume=saved[0])
    assert adapter_hash(again) == adapter_hash(whole)


@pytest.mark.usefixtures("all_rows_here")
@pytest.mark.parametrize("come", [False, True])
def test_a_launched_optimizer_step_that_never_begins(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, come: bool
) -> None:
    """From the second step on it is launched before the sum is there; what the host counted in a lost one is undone.

    If the sum has come after all, parameters may be those of the next step while they are saved: then they are not.
    """
    seen: list[str] = []
    model = make_model(base_folder)
    before: dict[str, torch.Tensor] = {}

    class Waiting(LeftInSum):
        def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
            end = super().start_all_reduce(tensor)

            def wait() -> None:
                seen.append("sum")
                end()

            return wait

        def fail(self) -> None:
            for name, parameter in trainable(model).items():
                parameter.data.copy_(before[name])  # on a GPU they would not have been changed
            super().fail()

    def launched(*_: Any) -> None:
        seen.append("optimizer")
        before.update({name: parameter.detach().clone() for name, parameter in trainable(model).items()})

    monkeypatch.setattr("job.training.launch_ahead.can_launch_behind_sum", lambda *_, **__: True)
    monkeypatch.setattr("job.training.launch_ahead.LaunchedSum.is_complete", lambda _: come)
    recipe = replace(RESUMED, save_every_steps=1000, optimizer="adamw_8bit")
    saved: list[Path] = []
    hooks = Hooks(lambda _: None, lambda path, _: saved.append(path), lambda: False)
    handle = register_optimizer_step_pre_hook(launched)
    try:
        with pytest.raises(Unreachable, match="process 1: the hub is silent"):
            train(model, tokenizer, LONGER, recipe=recipe, plan=PLAN, hooks=hooks, folder=tmp_path, processes=Waiting())
    finally:
        handle.remove()
    assert seen == ["sum", "optimizer", "optimizer", "sum", "optimizer", "sum"]
    assert [path.name for path in saved] == [path.name for path in tmp_path.glob("step-*")]
    assert [path.name for path in saved] == ([] if come else ["step-00000002"])
    for state in saved:
        whole, again = make_model(base_folder), make_model(base_folder)
        run(whole, tokenizer, LONGER, recipe, tmp_path / "whole")
        run(again, tokenizer, LONGER, recipe, tmp_path / "again", resume=state)
        assert adapter_hash(again) == adapter_hash(whole)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was launched, where recorded plans launch; tests note there what else has happened."""
    seen: list[str] = []

    class Noted(Launched):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            seen.append("launched")
            return super().__call__(*inputs)

    monkeypatch.setattr("job.training.padded_gradient.CudaGraphs", Noted)
    return seen


def noting(seen: list[str], **more: Any) -> Hooks:
    """Hooks that note there the metrics and checkpoints of steps."""
    more = {"stop": lambda: False} | more
    return Hooks(
        lambda metrics: seen.append(f"step {metrics.step}"), lambda _, step: seen.append(f"saved {step}"), **more
    )


def test_metrics_are_reported_while_the_next_step_is_computed(
    base_folder: Path, tokenizer: Any, tmp_path: Path, launches: list[str]
) -> None:
    """Where steps are launched at once. They are the same, and all are there before a checkpoint and at the end."""
    recipe = replace(RECIPE, total_steps=5, save_every_steps=3)
    histories, events = [], []
    for recorded in (False, True):
        launches.clear()
        model = fused_model(base_folder)
        how: dict[str, Any] = {"recipe": recipe, "plan": replace(THROUGHOUT, recorded=recorded)}
        began = time.monotonic()
        trained = train(model, tokenizer, EXAMPLES, **how, hooks=noting(launches), folder=tmp_path)
        seconds = [float(step.measured["seconds"] or 0) for step in trained.history]
        assert min(seconds) > 0
        assert sum(seconds) <= time.monotonic() - began
        histories.append([replace(step, measured={}) for step in trained.history])
        events.append(list(launches))
    assert histories[0] == histories[1]
    assert events[0] == ["step 1", "step 2", "step 3", "saved 3", "step 4", "step 5", "saved 5"]
    assert events[1] == [
        *("launched", "launched", "step 1", "launched", "step 2", "step 3", "saved 3"),
        *("launched", "launched", "step 4", "step 5", "saved 5"),
    ]


def test_a_step_launched_ahead_is_abandoned_where_it_does_not_fit(
    base_folder: Path, tokenizer: Any, tmp_path: Path, launches: list[str]
) -> None:
    """The flag is set while the host waits for the step before: the deadline has to be met without the next one."""
    hooks = noting(launches, stop=lambda: "step 2" in launches, has_time=lambda share: share == 0)
    recipe, plan = replace(RECIPE, total_steps=5), replace(THROUGHOUT, recorded=True)
    stopped = train(
        fused_model(base_folder), tokenizer, EXAMPLES, recipe=recipe, plan=plan, hooks=hooks, folder=tmp_path
    )
    assert launches == ["launched", "launched", "step 1", "launched", "step 2", "saved 2"]
    assert not stopped.complete


@pytest.mark.parametrize("abandons", [False, True])
def test_a_loss_that_is_not_finite_is_noticed_before_the_next_checkpoint(
    base_folder: Path,
    tokenizer: Any,
    tmp_path: Path,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    abandons: bool,
) -> None:
    """Although it is read a step later; also where that step is abandoned, after which a checkpoint would be saved."""
    recipe, plan = replace(RECIPE, total_steps=5, save_every_steps=3), replace(THROUGHOUT, recorded=True)
    gradient = PaddedGradient.__call__

    def broken(self: PaddedGradient, *given: Any, **how: Any) -> torch.Tensor:
        loss = gradient(self, *given, **how)
        if abandons and len(launches) == 4:
            raise StepAbandoned
        return loss * torch.nan if len(launches) == 2 else loss

    monkeypatch.setattr(PaddedGradient, "__call__", broken)
    how: dict[str, Any] = {"recipe": recipe, "plan": plan, "hooks": noting(launches)}
    with pytest.raises(TrainingFailed, match="loss of step 2 is nan"):
        train(fused_model(base_folder), tokenizer, EXAMPLES, **how, folder=tmp_path)
    assert launches == ["launched", "launched", "step 1", "launched", "step 2"]


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices])
def test_what_the_host_counts_in_a_step_is_undone(name: str) -> None:
    """The state after it is that before: nothing of it is counted where `counts_of` does not look."""
    optimizer, _ = make(name)
    counts = counts_of(optimizer)
    before = copy.deepcopy(optimizer_state.split(optimizer.state_dict()))
    optimizer.step()
    assert str(optimizer_state.split(optimizer.state_dict())) != str(before)
    restore_counts(optimizer, counts)
    after = optimizer_state.split(optimizer.state_dict())
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(tensor, after[0][place]) for place, tensor in before[0].items())


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices])
def test_no_optimizer_waits_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where bitsandbytes is imported later than `without_bitsandbytes_sync` begins; the paged one must wait."""
    waits: list[object] = []
    module = "bitsandbytes.optim.optimizer"
    monkeypatch.setattr(f"{module}.sync_gpu", waits.append)
    make(name)
    assert bool(waits) == is_bitsandbytes(OPTIMIZERS[name])
    waits.clear()
    with without_bitsandbytes_sync(OPTIMIZERS[name]):
        make(name)
    assert not waits
    assert sys.modules[module].sync_gpu == waits.append
    if is_bitsandbytes(OPTIMIZERS[name]):
        with without_bitsandbytes_sync(replace(OPTIMIZERS[name], paged=True)):
            assert sys.modules[module].sync_gpu == waits.append
        whole = sys.modules[module]
        monkeypatch.setattr("bitsandbytes.optim.optimizer", whole)  # the attribute, which the import below replaces
        monkeypatch.delitem(sys.modules, module)
        with without_bitsandbytes_sync(OPTIMIZERS[name]):
            assert sys.modules[module].sync_gpu.__name__ == "<lambda>"


def test_what_cannot_be_launched_behind_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose launch waits for the GPU would keep the host from noticing that another process has ended."""
    can = {name for name, spec in OPTIMIZERS.items() if can_launch_behind_sum(spec, on_gpu=True, reads_gpu=False)}
    assert can == set(OPTIMIZERS) - {"paged_adamw_8bit"}
    assert not any(can_launch_behind_sum(spec, on_gpu=False, reads_gpu=False) for spec in OPTIMIZERS.values())
    assert not any(can_launch_behind_sum(spec, on_gpu=True, reads_gpu=True) for spec in OPTIMIZERS.values())
    monkeypatch.delattr("bitsandbytes.optim.optimizer.sync_gpu")
    can = {name for name, spec in OPTIMIZERS.items() if can_launch_behind_sum(spec, on_gpu=True, reads_gpu=False)}
    assert can == {"adamw_torch", "adamw_torch_fused", "muon"}


def test_a_lost_sum_is_left_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: an event is recorded behind the sum; when the sum is lost, what is launched next is on a new stream."""
    seen: list[str] = []
    come = False

    class Stream:
        def record_event(self) -> Any:
            seen.append("event")
            return SimpleNamespace(query=lambda: come)

    class Lost(Beside):
        def start_all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
            seen.append("sum")
            return self.lost

        def lost(self) -> None:
            raise Unreachable("process 1: the hub is silent")

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: seen.append("new stream"))
    launched = LaunchedSum(Lost(), torch.device("cuda"))
    launched.finish()
    assert not launched.is_complete()
    launched.start(cast("torch.Tensor", SimpleNamespace(is_cuda=True)))
    with pytest.raises(StepAbandoned) as raised:
        launched.finish()
    assert isinstance(raised.value.__cause__, Unreachable)
    assert seen == ["sum", "event", "new stream"]
    assert not launched.is_complete()
    come = True
    assert launched.is_complete()
