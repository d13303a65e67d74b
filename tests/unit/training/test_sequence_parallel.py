"""Rows that several processes compute together: the same gradient as in one process, repeatable bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import MistralConfig, MistralForCausalLM

from job.data.batch_plan import Steps
from job.distributed.processes import ALONE
from job.errors import TrainingFailed
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.fused.long_attention import CpuKernel
from job.model.fused.sequence_parallel import parts, share_heads
from job.model.lora import add_adapter, trainable
from job.model.placed_weights import OtherOutOfMemory, computing_together, taking_part
from job.records import Example
from job.training import long_rows, micro_batch, step
from job.training.config import Hooks
from job.training.flat_parameters import FlatParameters
from job.training.padded_gradient import PaddedGradient
from job.training.sequence_parallel import why_not_divided
from job.training.step import StepGradient
from job.training.trainer import train
from tests.forked import free_port
from tests.helpers import LINEAR, deepened, fill_adapter, load_plain, make_examples
from tests.unit.model.test_placed_weights import Threads
from tests.unit.training import recipes
from tests.unit.training.sequence_parallel_run import ABOVE, Run
from tests.unit.training.test_memory_model import REFERENCE
from tests.warm import Member, Processes

PLAN = replace(recipes.PLAN, forward="fused all, torch", tile_tokens=16)
DIVIDED = replace(PLAN, sequence_parallel=2, divided_above=ABOVE)
EXAMPLES = [
    *make_examples(6, longest=60, prompt=0.3),
    *(make_examples(1, shortest=length, longest=length, prompt=0.2)[0] for length in (57, 75, 91)),
]
"""Short rows; one that is long and computed by one process; two that are divided."""
HOOKS = Hooks(lambda _: None, lambda *_: None, lambda: False)
VALIDATION = make_examples(3, shortest=30, longest=90)
RECIPE = replace(recipes.RECIPE, total_steps=2, global_batch_size=9, micro_batch_tokens=64)


@pytest.fixture(autouse=True)
def _short_rows_are_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (long_rows, micro_batch, step):
        monkeypatch.setattr(module, "LONG_ROW", 40)
    return


def fused(folder: Path, dtype: torch.dtype = torch.float32, window: int | None = None, **how: Any) -> Any:
    """The base there with a filled adapter in NF4, by the fused layers."""
    base = load_plain(folder, quantization="nf4", dtype=dtype, **how)
    base.config.sliding_window = window
    options: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": LINEAR, "seed": 1}
    model = fill_adapter(add_adapter(base, **options))
    assert fuse_layers(model, keep_dequantized=False, kernels=TORCH) == "all"
    return model.train()


def a_step(
    model: Any,
    processes: Any = ALONE,
    plan: Any = PLAN,
    examples: Sequence[Example] = EXAMPLES,
    hooks: Hooks = HOOKS,
) -> tuple[StepGradient, FlatParameters]:
    """A step of all examples in one process of several."""
    parameters = FlatParameters(trainable(model).values(), 256)
    place = processes.place
    made = StepGradient(
        model,
        Steps(examples, RECIPE.seed, RECIPE.global_batch_size, RECIPE.total_steps, place.rank, place.world_size),
        parameters,
        recipe=RECIPE,
        plan=plan,
        hooks=hooks,
        processes=processes,
        packed_gradient=lambda *_: torch.zeros(()),
    )
    return made, parameters


def by_several(
    count: int, work: Callable[[Any, Threads], Any], load: Callable[[Threads], Any] = lambda _: None
) -> list[Any]:
    """What each of several processes returns, which gets what was loaded for it; here they are threads."""
    board, barrier = [None] * count, Barrier(count)
    groups = [Threads(rank, board, barrier) for rank in range(count)]
    loaded = [load(group) for group in groups]  # one after the other: loading is not made for threads

    def one(model: Any, group: Threads) -> Any:
        try:
            return work(model, group)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, loaded, groups))


def assert_close(gradient: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the norm."""
    assert expected.norm() > 0
    assert (gradient - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("processes", "window", "examples"),
    [(2, None, EXAMPLES), (2, 20, EXAMPLES), (4, None, EXAMPLES[-1:]), (2, None, EXAMPLES[-1:])],
    ids=["mixed", "window", "copied keys", "one row"],
)
def test_the_gradient_is_that_of_one_process(
    base_folder: Path, processes: int, window: int | None, examples: list[Example]
) -> None:
    """Loss and gradient of a step, whose rows have 91 tokens and fewer, four heads and two of keys; twice, same bits.

    In both processes they are the same; of four, two each have a copy of a head of keys and values.
    """
    weighted = [replace(one, weight=1 + number % 3 / 2) for number, one in enumerate(examples)]
    alone, parameters = a_step(fused(base_folder, window=window), examples=weighted)
    loss = alone(0)

    def work(model: Any, group: Threads) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made, own = a_step(model, group, DIVIDED, weighted)
        return [(made(0), own.gradient.clone()) for _ in range(2)]

    (first, again), *others = by_several(processes, work, lambda _: fused(base_folder, window=window))
    torch.testing.assert_close(first[0], loss)
    assert_close(first[1], parameters.gradient)
    for one in (again, *(turn for other in others for turn in other)):
        assert torch.equal(one[0], first[0])
        assert torch.equal(one[1], first[1])


def test_uneven_heads(base_folder: Path, tmp_path: Path) -> None:
    """Four heads of queries and of keys in three processes: one has two of each."""
    shutil.copytree(base_folder, folder := tmp_path / "base")
    torch.manual_seed(0)
    config = MistralConfig.from_pretrained(base_folder, num_key_value_heads=4)
    MistralForCausalLM(config).save_pretrained(folder)
    row = EXAMPLES[-1:]
    alone, parameters = a_step(fused(folder), examples=row)
    loss = alone(0)

    def work(model: Any, group: Threads) -> tuple[torch.Tensor, torch.Tensor]:
        made, own = a_step(model, group, DIVIDED, row)
        return made(0), own.gradient

    for found in by_several(3, work, lambda _: fused(folder)):
        torch.testing.assert_close(found[0], loss)
        assert_close(found[1], parameters.gradient)


@pytest.mark.parametrize("place", ["gpu", "sharded"])
def test_memory_that_runs_out_in_one_process(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In the midst of a row that both compute, in its backward pass: both repeat the step, to the same bits.

    Only the one gives something up; the other, which could not, neither ends the run nor halves the budget.
    Of sharded weights too, whose layers all processes gather, and where each has kept attention or not.
    """
    folder = deepened(base_folder, tmp_path / "base", 3)
    backward, failing = CpuKernel.backward, set[int]()

    def full(self: CpuKernel, *tensors: torch.Tensor) -> Any:
        if self.layout.longest_query > ABOVE and get_ident() in failing:
            failing.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, *tensors)

    def work(model: Any, group: Threads) -> tuple[Any, ...]:
        first = group.place.rank == 0
        if first and fails:
            failing.add(get_ident())
        # The other one has nothing to give up, not even its budget: a row has more than twice as many tokens.
        kept = {"may_offload": first, "kept_attention": first, "kept_activations": False, "recorded": False}
        made, parameters = a_step(model, group, replace(DIVIDED, divided_above=40, **kept))
        assert bool(made.plan.droppable) == first
        made.budget = 45
        return made(0), parameters.gradient.clone(), made.plan.offloaded, made.budget

    monkeypatch.setattr(CpuKernel, "backward", full)
    found = []
    for fails in (False, True):
        made = by_several(2, work, lambda group: fused(folder, placement=place, group=group))
        assert [one[2] for one in made] == [fails, False]
        assert [one[3] for one in made] == [45, 45]
        found += made
    assert not failing
    for one in found:
        assert torch.equal(one[0], found[0][0])
        assert torch.equal(one[1], found[0][1])


def test_the_watchdog_hears_of_each_layer(base_folder: Path) -> None:
    """Of a long row, in both passes and in a validation: rows of 300,000 tokens take minutes each."""
    heard = list[int]()
    hooks = Hooks(lambda _: None, lambda *_: None, lambda: False, on_progress=lambda: heard.append(1))
    model = fused(base_folder)
    made, _ = a_step(model, examples=EXAMPLES[-1:], hooks=hooks)
    made(0)
    layers = len(model.get_base_model().model.layers)
    assert len(heard) == 2 * layers
    with torch.no_grad():
        made.micro_batch.summed_loss(EXAMPLES[-1:])
    assert len(heard) == 3 * layers


@pytest.mark.parametrize("in_row", [False, True])
def test_short_rows_are_taken_apart_beside_a_long_one(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, *, in_row: bool
) -> None:
    """If memory runs out in a micro-batch of short rows, fewer at a time take less, however long another row is.

    If it runs out in a row that is alone, nothing helps.
    """
    examples = [*make_examples(4, shortest=18, longest=20), EXAMPLES[-1]]
    whole, parameters = a_step(fused(base_folder), examples=examples)
    whole(0)
    plan = replace(PLAN, may_offload=False, kept_activations=False)
    made, own = a_step(fused(base_folder), plan=plan, examples=examples)
    assert not made.plan.droppable
    made.budget = 45
    name, owner = ("gradient", long_rows.LongRows) if in_row else ("__call__", PaddedGradient)
    compute = getattr(owner, name)

    def full(*args: Any, **how: Any) -> Any:
        if made.budget > 22:
            run_out()
        return compute(*args, **how)

    monkeypatch.setattr(owner, name, full)
    if in_row:
        with pytest.raises(TrainingFailed, match="91 tokens"):
            made(0)
        return
    made(0)
    assert made.budget == 22
    assert_close(own.gradient, parameters.gradient)


def test_rows_that_do_not_fit_are_divided_after_all(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is left to give up: all long rows, in all processes; the metrics of the steps say from when on."""
    gradient = long_rows.LongRows.gradient

    def full(self: Any, examples: Any, weight: Any, plan: Any, team: Any) -> Any:
        if team is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient(self, examples, weight, plan, team)

    plan = replace(PLAN, sequence_parallel=2, divided_above=200, may_offload=False, kept_activations=False)
    alone, parameters = a_step(fused(base_folder))
    loss = alone(0)
    monkeypatch.setattr(long_rows.LongRows, "gradient", full)

    def work(model: Any, group: Threads) -> tuple[Any, ...]:
        made, own = a_step(model, group, plan)
        return made(0), own.gradient, made.divided_above, made.budget

    for found in by_several(2, work, lambda _: fused(base_folder)):
        torch.testing.assert_close(found[0], loss)
        assert_close(found[1], parameters.gradient)
        assert found[2:] == (40, RECIPE.micro_batch_tokens)


def run_out() -> None:
    """As a GPU does."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_resumed_run_divides_the_same_rows(base_folder: Path) -> None:
    """Those of its checkpoint, whatever this attempt would choose; where none can be divided now, it is said."""
    model = fused(base_folder)
    before = a_step(model, plan=replace(DIVIDED, divided_above=50))[0].computation_options()
    assert before.divided_above == 50
    for plan, expected, warned in ((DIVIDED, 50, False), (PLAN, None, True)):
        made, _ = a_step(model, plan=plan)
        with capture_logs() as lines:
            made.resume_as(before)
        assert made.divided_above == expected
        assert any("divided_above" in line for line in lines) == warned


@pytest.mark.parametrize(
    ("plan", "before", "expected"),
    [
        (DIVIDED, 5, 40),
        (replace(PLAN, tile_tokens=None), 50, None),
        (replace(DIVIDED, forward="fused layers"), 50, None),
    ],
    ids=["short rows", "not in tiles", "not padded"],
)
def test_only_long_rows_are_divided(base_folder: Path, plan: Any, before: int, expected: int | None) -> None:
    """Whatever a plan or a checkpoint says: of any other row each process would compute all, and count it again."""
    model = fused(base_folder)
    known = replace(a_step(model)[0].computation_options(), divided_above=before)
    made, _ = a_step(model, plan=replace(plan, divided_above=before))
    assert made.divided_above == expected
    made.resume_as(known)
    assert made.divided_above == expected


def test_shapes_that_no_row_needs_are_not_used(base_folder: Path) -> None:
    """A checkpoint that says so is not of these rows: padding to them might take all memory."""
    made, _ = a_step(fused(base_folder))
    own = made.computation_options()
    with capture_logs() as lines:
        made.resume_as(replace(own, padded=[(1 << 20, 8)]))
    assert made.computation_options() == own
    assert "which no row needs" in lines[0]["padded_shapes"]
    made.resume_as(replace(own, padded=[(256, 16)]))
    assert made.computation_options().padded == [(256, 16)]


def test_a_barrier_fails_for_all() -> None:
    """One of three runs out of memory between barriers: the others are told so at the next one, and none waits."""

    def work(_: Any, group: Threads) -> str:
        try:
            with computing_together(None, group) as barrier:
                barrier()
                if group.place.rank == 1:
                    run_out()
                barrier()
        except OtherOutOfMemory:
            return "another"
        except torch.OutOfMemoryError:
            return "this"
        return "none"

    assert by_several(3, work) == ["another", "this", "another"]


def test_all_leave_together(base_folder: Path) -> None:
    """Of sharded weights, one fails after its last exchange: the other does not leave the row before it knows."""

    def work(model: Any, group: Threads) -> str:
        try:
            with taking_part(model), computing_together(model, group) as barrier:
                barrier()
                if group.place.rank == 1:
                    run_out()
        except RuntimeError as error:
            return type(error).__name__
        return "none"

    found = by_several(2, work, lambda group: fused(base_folder, placement="sharded", group=group))
    assert found == ["OtherOutOfMemory", "OutOfMemoryError"]


def test_every_token_and_head_is_in_one_part() -> None:
    """Of tokens in any number; of heads as far as processes can share them, each with its keys and values."""
    for count, processes in ((91, 2), (7, 3), (64, 8)):
        whole = [number for part in parts(count, processes) for number in range(count)[part]]
        assert whole == list(range(count))
    for heads, kv_heads, processes in (
        (32, 8, 2),
        (32, 8, 3),
        (32, 8, 8),
        (32, 8, 16),
        (4, 2, 4),
        (28, 4, 3),
        (8, 1, 8),
    ):
        shared = share_heads(heads, kv_heads, processes)
        assert [head for part in shared.queries for head in range(heads)[part]] == list(range(heads))
        for queries, keys in zip(shared.queries, shared.keys, strict=True):
            needed = {head * kv_heads // heads for head in range(heads)[queries]}
            assert needed == set(range(kv_heads)[keys])
            own, kept = len(range(heads)[queries]), len(needed)
            assert own % kept == 0
            assert [head * kept // own for head in range(own)] == [
                head * kv_heads // heads - min(needed) for head in range(heads)[queries]
            ]


@pytest.mark.parametrize(
    ("processes", "possible"), [(2, True), (3, True), (8, True), (12, False), (16, True), (64, False)]
)
def test_heads_that_cannot_be_shared(processes: int, *, possible: bool) -> None:
    """32 heads, eight of keys and values: the plan and the attention agree on what can be."""
    why = why_not_divided(REFERENCE.architecture, processes)
    assert (why is None) == possible
    if why is not None:
        assert "at most 8, or a multiple of 8 that divides 32" in why
        with pytest.raises(ValueError, match="cannot share"):
            share_heads(32, 8, processes)
    why = why_not_divided(replace(REFERENCE.architecture, kv_heads=1), 3)
    assert str(why).endswith("use a number that divides 32")


PROGRAM = "import sys; from tests.unit.training.sequence_parallel_run import main; raise SystemExit(main(sys.argv[1:]))"


def trained(
    folder: Path, base: Path, count: int, resume: Path | str = "", place: str = "gpu", *, last: bool = True, **how: Any
) -> tuple[list[int], Any]:
    """Exit codes of a training by so many processes, and what process 0 has found.

    `how` disturbs one of them, the last or the first; see `Run`.
    """
    folder.mkdir(exist_ok=True)
    port, members = free_port(), []
    for rank in range(count):
        disturbed = how if rank == (count - 1 if last else 0) else {}
        run = Run(str(folder), str(base), rank, count, port, place, str(resume), **disturbed)
        log = folder / f"{rank}.log"
        log.write_bytes(b"")
        members.append(Member([json.dumps(asdict(run))], dict(os.environ), log, log, source=PROGRAM))
    codes = Processes(members).wait(120)
    found = folder / "found.json"
    if any(code not in {0, 1, 75, -9} for code in codes):
        print(*[log.read_text("utf-8")[-3000:] for log in folder.glob("*.log")], sep="\n")
    return codes, json.loads(found.read_text()) if found.exists() else None


def alone(model: Any, tokenizer: Any, folder: Path) -> tuple[list[float], list[float]]:
    """The losses of steps and validations of the same training in one process."""
    validations: list[float] = []
    steps: list[float] = []
    train(
        model,
        tokenizer,
        EXAMPLES,
        recipe=replace(RECIPE, total_steps=3, save_every_steps=10, validate_every_steps=2),
        plan=PLAN,
        hooks=Hooks(
            lambda one: steps.append(one.loss),
            lambda *_: None,
            lambda: False,
            on_validation=lambda one: validations.append(one.loss),
        ),
        folder=folder,
        validation=VALIDATION,
    )
    return steps, validations


def test_two_processes_of_which_one_is_stopped_in_a_row(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """By gloo. The other one, which waits for its tensors, ends with it; what was before is as in one process."""
    codes, found = trained(tmp_path / "two", base_folder, 2, stopped_in=2)
    assert codes == [75, 75]
    steps, validations = alone(fused(base_folder), tokenizer, tmp_path)
    assert [one["loss"] for one in found["steps"]] == pytest.approx(steps[:1], rel=1e-5)
    assert found["validations"] == pytest.approx(validations[:1], rel=1e-5)


@pytest.mark.long
def test_killed_and_resumed(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """After a step, and within a row: the bits of an undisturbed run; in one process, its losses."""
    codes, whole = trained(tmp_path / "whole", base_folder, 2)
    assert codes == [0, 0]
    steps, validations = alone(fused(base_folder), tokenizer, tmp_path)
    assert [one["loss"] for one in whole["steps"]] == pytest.approx(steps, rel=1e-4)
    assert whole["validations"] == pytest.approx(validations, rel=1e-4)
    assert len(validations) == 3
    folder, checkpoint = tmp_path / "killed", tmp_path / "killed" / "step-00000001"
    assert trained(folder, base_folder, 2, last=False, killed_after=2)[0] == [-9, 1]
    shutil.rmtree(folder / "step-00000002", ignore_errors=True)  # in the midst of it, or not even begun
    began = time.monotonic()
    assert trained(folder, base_folder, 2, checkpoint, killed_in=1)[0] == [1, -9]
    assert time.monotonic() - began < 60
    codes, resumed = trained(folder, base_folder, 2, checkpoint)
    assert codes == [0, 0]
    assert resumed["adapter"] == whole["adapter"]
    assert resumed["above"] == whole["above"] == ABOVE
    shutil.rmtree(folder / "step-00000002")
    shutil.rmtree(folder / "step-00000003")
    codes, by_one = trained(folder, base_folder, 1, checkpoint)
    assert codes == [0]
    assert [one["loss"] for one in by_one["steps"]] == pytest.approx(steps[1:], rel=1e-4)


@pytest.mark.long
def test_a_sharded_base_gives_the_same_bits(base_folder: Path, tmp_path: Path) -> None:
    """Steps with divided rows and others, and validations."""
    found = []
    for place in ("gpu", "sharded"):
        codes, one = trained(tmp_path / place, base_folder, 2, place=place)
        assert codes == [0, 0]
        found.append((one["adapter"], one["validations"], [step["loss"] for step in one["steps"]]))
    assert found[0] == found[1]
